// All runs, newest first, as they stand.
import { get, part } from "../api.js";
import { el, fill, refill, table } from "../dom.js";
import { clock, number } from "../format.js";
import { go } from "../router.js";
import { visible } from "../text.js";
import { every } from "../timer.js";

const REFRESH = 3_000;
const PAGE = 50;
const TYPING = 300;
const STATES = ["", "queued", "starting", "running", "paused", "completed", "failed", "cancelled"];

export async function runsPage(main, _, query, signal) {
  const chosen = new Set();
  const list = el("div");
  const state = el("select", { id: "state", onchange: () => filtered() }, STATES.map((name) => el("option", { value: name, selected: name === query.get("state") }, name || "any state")));
  const name = el("input", { id: "name", type: "search", placeholder: "any name", title: "A part of their name, or how their id begins", maxLength: 200, value: query.get("name") ?? "", oninput: () => { clearTimeout(typing); typing = setTimeout(filtered, TYPING); } });
  const compare = el("button", { disabled: true, onclick: () => go(`#/compare?runs=${[...chosen].map(part).join(",")}`) }, "Compare");
  const more = el("button", { hidden: true, onclick: () => further() }, "Older runs");
  let newest = { runs: [], next: null };
  let older = [];
  let next = null;
  let typing;
  const filters = () => ({ state: state.value, name: name.value.trim() });
  const refresh = async () => {
    const asked = JSON.stringify(filters());
    const page = await get("runs", { ...filters(), limit: PAGE }, signal);
    if (asked !== JSON.stringify(filters())) return;
    newest = page;
    if (!older.length) next = page.next;
    show();
  };
  const filtered = () => {
    const words = new URLSearchParams(Object.entries(filters()).filter(([, value]) => value));
    history.replaceState(history.state, "", `#/runs${words.size ? `?${words}` : ""}`); // so that one comes back to the same list
    older = [];
    return refresh();
  };
  const further = async () => {
    const page = await get("runs", { ...filters(), cursor: next, limit: PAGE }, signal);
    older = [...older, ...page.runs];
    next = page.next;
    show();
  };
  const show = () => {
    more.hidden = next === null;
    const there = new Set(newest.runs.map((run) => run.run_id));
    const runs = [...newest.runs, ...older.filter((run) => !there.has(run.run_id))];
    refill(list, runs.length ? table("Runs", COLUMNS, runs.map((run) => row(run, chosen, picked))) : none());
  };
  const none = () => el("p", { class: "card empty" }, Object.values(filters()).some(Boolean)
    ? ["No run fits: in this state, with this in its name. ", el("button", { onclick: () => { state.value = ""; name.value = ""; filtered(); } }, "Show all")]
    : ["No run yet. ", el("a", { href: "#/submit" }, "Submit one")]);
  const picked = () => {
    compare.disabled = chosen.size < 2;
    compare.textContent = chosen.size ? `Compare (${chosen.size})` : "Compare";
  };
  fill(main,
    el("div", { class: "spread" }, el("h1", {}, "Runs"), el("a", { class: "button first", href: "#/submit" }, "Submit a run")),
    el("div", { class: "row" }, el("label", { class: "visually-hidden", htmlFor: "state" }, "State"), state, el("label", { class: "visually-hidden", htmlFor: "name" }, "Name"), name, compare),
    el("p"), list, el("p", {}, more));
  signal.addEventListener("abort", () => clearTimeout(typing), { once: true });
  await refresh();
  every(REFRESH, refresh, signal);
}

const COLUMNS = [["Compare", "quiet"], ["Run", "wide"], ["State", ""], ["Version", ""], ["Window", ""], ["Submitted", ""]];

function row(run, chosen, picked) {
  const tick = el("input", { type: "checkbox", "aria-label": `Compare ${visible(run.run_id)}`, checked: chosen.has(run.run_id), onchange: () => {
    if (tick.checked) chosen.add(run.run_id);
    else chosen.delete(run.run_id);
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
