// One run: how it goes, its dials, what it was trained on, what happened, what was given up, and what it was submitted with.
import { get, part, post } from "../api.js";
import { confirmed, el, fill, say } from "../dom.js";
import { clock, count, duration, number } from "../format.js";
import { logView } from "../logs/log_view.js";
import { problemBox } from "../problems.js";
import { runCharts } from "../run/charts.js";
import { dials } from "../run/dials.js";
import { eventLog } from "../run/events.js";
import { on, watch } from "../run/run_data.js";
import { samples } from "../run/samples.js";
import { visible } from "../text.js";
import { atMostEvery } from "../timer.js";
import { letters } from "./dead_letters.js";

const TABS = [["", "Charts"], ["samples", "Samples"], ["events", "Events"], ["logs", "Logs"], ["groups", "Groups"], ["spec", "Spec"]];
const COUNTED = 2_000; // milliseconds between counts of groups
const POSSIBLE = {
  queued: ["pause", "cancel"], starting: ["pause", "cancel"], running: ["pause", "cancel"], paused: ["resume", "cancel"], failed: ["resume", "cancel"],
  completed: [], cancelled: [],
};

export async function runPage(main, { run: runId, tab = "" }, query, signal) {
  const run = await get(`runs/${part(runId)}`, {}, signal);
  const data = watch(runId, signal);
  const body = el("div");
  const link = el("span", { class: "live", id: "connection" }, el("span", { class: "live-dot" }), el("span"));
  const answer = el("div");
  const state = el("span", { class: `state ${run.state}`, id: "state" }, run.state);
  const moves = el("div", { class: "row" });
  const stats = el("div", { class: "stat", id: "stats" });
  let standing = { state: run.state, version: run.version, reason: run.reason };

  const show = () => {
    standing = data.state ?? standing;
    state.className = `state ${standing.state}`;
    state.textContent = standing.state;
    fill(stats, statsOf(run, standing, data));
    link.className = `live ${data.connection}`;
    link.lastChild.textContent = { open: "live", away: "trying again", over: "has ended", connecting: "connecting" }[data.connection];
    const possible = POSSIBLE[standing.state].join();
    if (moves.dataset.possible === possible) return;
    moves.dataset.possible = possible;
    const focused = moves.contains(document.activeElement);
    fill(moves, POSSIBLE[standing.state].map((action) => el("button", { class: action === "cancel" ? "danger" : null, data: { action }, onclick: () => move(action) }, MOVES[action][0])),
      el("a", { class: "button", href: `#/submit?like=${part(runId)}` }, "Submit another like it"));
    if (focused) moves.firstElementChild.focus();
  };
  const move = async (action) => {
    if (action === "cancel" && !(await confirmed(`Cancel ${visible(runId)} for good? What it recorded, and its checkpoints, stay.`, "Cancel the run"))) return;
    try {
      const moved = await post(`runs/${part(runId)}/${action}`);
      data.state = { state: moved.state, version: moved.version, reason: moved.reason };
      fill(answer);
      show();
      say(MOVES[action][1]);
    } catch (error) {
      fill(answer, problemBox(error));
    }
  };
  fill(main,
    el("div", { class: "spread" }, el("h1", {}, visible(run.run_id)), el("div", { class: "row" }, state, link)),
    moves, answer, stats,
    el("nav", { class: "tabs", "aria-label": "Parts of the run" },
      TABS.map(([path, name]) => el("a", { href: `#/runs/${part(runId)}${path ? `/${path}` : ""}`, "aria-current": path === tab ? "page" : null }, name))),
    body);
  show();
  on(data, ["state", "steps", "connection"], atMostEvery(100, show), signal);
  on(data, ["failed"], () => fill(answer, problemBox(data.error)), signal);
  const parts = new Map(Object.entries({ "": charts, samples, events: eventLog, logs, groups, spec }));
  const shown = parts.get(tab);
  if (!shown) throw new Error(`A run has no part ${tab}.`);
  await shown(body, run, data, signal, query);
}

const MOVES = { pause: ["Pause", "It writes a checkpoint and leaves the fleet"], resume: ["Resume", "It is queued"], cancel: ["Cancel", "It is cancelled"] };

function statsOf(run, standing, data) {
  const one = (name, value) => el("div", {}, el("b", {}, value), el("span", {}, name));
  const seconds = data.columns.last("seconds");
  const left = run.versions - (standing.version ?? 0);
  return [
    one("version", `${number(standing.version)} of ${number(run.versions)}`),
    one("reward", number(data.columns.last("reward_mean"))),
    one("entropy, nats", number(data.columns.last("entropy_nats"))),
    one("mean lag", number(data.columns.last("lag_mean"), 2)),
    one("a version takes", duration(seconds)),
    standing.state === "running" && left > 0 ? one("left, about", duration(left * seconds)) : null,
    standing.reason ? el("div", {}, el("span", {}, "reason"), el("span", {}, visible(standing.reason, 300))) : null,
  ];
}

async function charts(body, run, data, signal) {
  const grid = el("div", { class: "charts" });
  const side = el("aside", { class: "side", "aria-label": "Dials" });
  const key = runCharts(grid, data, signal);
  fill(body, el("div", { class: "watch" }, el("div", {}, key, grid), side));
  const [schema, fleet] = await Promise.all([get("schema", {}, signal), get("fleet", {}, signal)]);
  data.rewardServers = Math.max(1, fleet.members.filter((member) => member.role === "reward").length);
  await dials(side, run, schema.spec, data, signal);
}

const logs = (body, run, data, signal, query) => logView(body, { run: run.run_id, query, signal });

async function groups(body, run, data, signal) {
  const counts = el("div");
  const list = el("div");
  const refresh = async () => {
    const kept = await get(`runs/${part(run.run_id)}/conservation`, {}, signal);
    const names = ["issued", "consumed", "skipped", "queued", "running", "generated", "scored", "taken", "replaying", "dead", "cancelled", "superseded", "unreadable"];
    fill(counts, el("div", { class: "card" },
      el("h2", {}, "Where the groups are"),
      el("p", { class: kept.holds ? "done" : "problem" }, kept.holds ? "All are accounted for: " : "Not all are accounted for: ", "issued = consumed + skipped + outstanding + replaying + dead + cancelled"),
      el("div", { class: "stat" }, names.map((name) => el("div", {}, el("b", {}, number(kept[name])), el("span", {}, name))))));
  };
  fill(body, counts, el("h2", {}, "Dead letters"), list);
  await refresh();
  await letters(list, { run: run.run_id }, signal, refresh);
  on(data, ["steps"], atMostEvery(COUNTED, () => refresh().catch(() => undefined)), signal); // the connection's state says when nothing comes
}

async function spec(body, run) {
  const checkpoints = (await get(`runs/${part(run.run_id)}/checkpoints`)).checkpoints;
  fill(body,
    el("div", { class: "columns" },
      el("div", { class: "card" }, el("h2", {}, "As it was submitted"), el("pre", { tabIndex: 0 }, visible(JSON.stringify(run.spec, null, 2), 200_000))),
      el("div", { class: "card" },
        el("h2", {}, "Life"),
        el("dl", { class: "facts" }, [["submitted", clock(run.created_at)], ["first version", clock(run.started_at)], ["ended", clock(run.ended_at)], ["trainer", visible(run.trainer ?? "\u2013")]]
          .flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
        el("h2", {}, count(checkpoints.length, "checkpoint")),
        el("ul", {}, checkpoints.map((one) => el("li", {}, el("code", {}, visible(one.path)), ` of version ${one.version}, ${clock(one.made_at)}`))))));
}
