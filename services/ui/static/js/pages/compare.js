// Runs over one another.
import { get, part } from "../api.js";
import { el, fill, table } from "../dom.js";
import { difference } from "../form/schema.js";
import { number } from "../format.js";
import { overlays, stepsOf } from "../overlay.js";
import { visible } from "../text.js";

const MOST = 8;

export async function comparePage(main, _, query, signal) {
  const ids = [...new Set((query.get("runs") ?? "").split(",").filter(Boolean))];
  if (ids.length < 2) {
    fill(main, el("h1", {}, "Compare runs"), el("p", {}, "Choose two or more in the ", el("a", { href: "#/runs" }, "list of runs"), "."));
    return;
  }
  const shown = ids.slice(0, MOST);
  const [runs, steps] = await Promise.all([
    Promise.all(shown.map((id) => get(`runs/${part(id)}`, {}, signal))), Promise.all(shown.map((id) => stepsOf(id, signal))),
  ]);
  const charts = overlays(runs.map((run, i) => ({ label: visible(run.run_id, 80), colour: (i % MOST) + 1, dash: i % 2 === 1, steps: steps[i] })), "compare");
  signal.addEventListener("abort", () => { for (const chart of charts) chart.close(); }, { once: true });
  fill(main,
    el("h1", {}, "Compare runs"),
    ids.length > MOST ? el("p", { class: "note" }, `The first ${MOST} of ${ids.length} are shown: more lines cannot be told apart.`) : null,
    table("Runs that are compared", [["Run", "wide"], ["State", ""], ["Version", "number"], ["Differs from the first in", "wide"]],
      runs.map((run) => [el("a", { href: `#/runs/${part(run.run_id)}` }, visible(run.run_id)), el("span", { class: `state ${run.state}` }, run.state), number(run.version), differing(run.spec, runs[0].spec)])),
    el("p"), el("div", { class: "charts" }, charts.map((chart) => chart.node)));
}

function differing(spec, first) {
  const { name: _name, labels: _labels, ...differs } = difference(spec, first) ?? {};
  const words = flat(differs).map(([name, value]) => `${name} = ${JSON.stringify(value)}`);
  return words.length ? visible(words.join(", "), 400) : "\u2013";
}

function flat(tree, prefix = "") {
  return Object.entries(tree).flatMap(([name, value]) =>
    typeof value === "object" && value !== null && !Array.isArray(value) ? flat(value, `${prefix}${name}.`) : [[`${prefix}${name}`, value]]);
}
