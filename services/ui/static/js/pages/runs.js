// All runs, newest first, as they stand.
import { get, part } from "../api.js";
import { el, fill, table } from "../dom.js";
import { clock, number } from "../format.js";
import { go } from "../router.js";
import { visible } from "../text.js";
import { every } from "../timer.js";

const REFRESH = 3_000;
const STATES = ["", "queued", "starting", "running", "paused", "completed", "failed", "cancelled"];

export async function runsPage(main, _, query, signal) {
  const chosen = new Set();
  const list = el("div");
  const state = el("select", { id: "state", onchange: () => refresh() }, STATES.map((name) => el("option", { value: name, selected: name === query.get("state") }, name || "any state")));
  const name = el("input", { id: "name", type: "search", placeholder: "any name", value: query.get("name") ?? "", onchange: () => refresh() });
  const compare = el("button", { disabled: true, onclick: () => go(`#/compare?runs=${[...chosen].map(part).join(",")}`) }, "Compare");
  const more = el("button", { hidden: true, onclick: () => older() }, "Older runs");
  let runs = [];
  let next = null;
  let paged = false;
  const filters = () => ({ state: state.value, name: name.value.trim(), limit: 50 });
  const refresh = async () => {
    const page = await get("runs", filters(), signal);
    runs = page.runs;
    next = page.next;
    paged = false;
    show();
  };
  const older = async () => {
    const page = await get("runs", { ...filters(), cursor: next }, signal);
    runs = [...runs, ...page.runs];
    next = page.next;
    paged = true;
    show();
  };
  const show = () => {
    if (list.contains(document.activeElement) && document.activeElement.matches("input")) return; // it would lose the focus
    more.hidden = next === null;
    fill(list, runs.length ? table("Runs", COLUMNS, runs.map((run) => row(run, chosen, picked))) : el("p", { class: "card empty" }, "No run yet. ", el("a", { href: "#/submit" }, "Submit one")));
  };
  const picked = () => {
    compare.disabled = chosen.size < 2;
    compare.textContent = chosen.size ? `Compare (${chosen.size})` : "Compare";
  };
  fill(main,
    el("div", { class: "spread" }, el("h1", {}, "Runs"), el("a", { class: "button first", href: "#/submit" }, "Submit a run")),
    el("div", { class: "row" }, el("label", { class: "visually-hidden", htmlFor: "state" }, "State"), state, el("label", { class: "visually-hidden", htmlFor: "name" }, "Name"), name, compare),
    el("p"), list, el("p", {}, more));
  await refresh();
  every(REFRESH, () => (paged ? undefined : refresh()), signal);
}

const COLUMNS = [["Compare", "quiet"], ["Run", "wide"], ["State", ""], ["Version", ""], ["Window", ""], ["Submitted", ""]];

function row(run, chosen, picked) {
  const tick = el("input", { type: "checkbox", "aria-label": `Compare ${visible(run.run_id)}`, checked: chosen.has(run.run_id), onchange: () => {
    if (tick.checked) chosen.add(run.run_id);
    else chosen.delete(run.run_id);
    tick.blur();
    picked();
  } });
  return [
    tick,
    [el("a", { href: `#/runs/${part(run.run_id)}` }, visible(run.run_id)), run.reason ? el("div", { class: "small soft" }, visible(run.reason, 200)) : null],
    el("span", { class: `state ${run.state}` }, run.state),
    progress(run),
    `${run.spec.staleness.min_lag} to ${run.spec.staleness.max_lag}`,
    clock(run.created_at),
  ];
}

export function progress(run) {
  const done = run.version ?? 0;
  return [el("progress", { max: run.versions, value: done, "aria-label": `${done} of ${run.versions} versions` }), el("div", { class: "small soft" }, `${number(done)} of ${number(run.versions)}`)];
}
