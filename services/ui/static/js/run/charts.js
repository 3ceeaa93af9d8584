// The charts of a run as it goes on.
import { Chart } from "../charts/chart.js";
import { lagHistogram, showLags } from "../charts/lag_histogram.js";
import { PANELS } from "../charts/panels.js";
import { smoothed } from "../charts/smooth.js";
import { el, fill } from "../dom.js";
import { atMostEvery } from "../timer.js";
import { on } from "./run_data.js";

const SMOOTH = [["1", "each version"], ["10", "the mean of 10 versions"], ["50", "the mean of 50 versions"]];
const HELD_OUT_COLOURS = [2, 3, 4, 7, 5];
const REDRAW = 200; // milliseconds
const AFTER = 2; // the histogram stands behind the second panel

/** Charts of `data` (RunData) in `grid`, until the signal is aborted. */
export function runCharts(grid, data, signal) {
  const histogram = lagHistogram();
  let sets = "";
  let charts = [];
  const build = () => { // again when another set was evaluated: its panel has one more line
    sets = data.sets.join();
    charts = PANELS.map((panel, i) => {
      if (charts[i] && !panel.heldOut) return charts[i];
      charts[i]?.chart.close();
      const lines = linesOf(panel, data.sets);
      return { panel, lines, chart: new Chart({ ...panel, lines, sync: `run ${data.runId}` }) };
    });
    const nodes = charts.map(({ chart }) => chart.node);
    nodes.splice(AFTER, 0, histogram.node);
    fill(grid, nodes);
  };
  const draw = () => {
    if (signal.aborted) return;
    if (sets !== data.sets.join()) build();
    const { marks } = data;
    const width = Number(smooth.value);
    for (const { panel, lines, chart } of charts) chart.show(() => (panel.heldOut ? withEvaluations(data, lines, width) : columnsOf(data.columns, lines, width)), marks);
    showLags(histogram, data.newest);
    key.hidden = marks.length === 0;
  };
  const smooth = el("select", { id: "smooth", onchange: () => soon() }, SMOOTH.map(([width, words]) => el("option", { value: width }, words)));
  const key = el("p", { class: "marks-key", hidden: true }, "A knob was turned here");
  build();
  const soon = atMostEvery(REDRAW, draw);
  on(data, ["steps", "evaluations", "events"], soon, signal);
  soon();
  signal.addEventListener("abort", () => { for (const chart of [histogram, ...charts.map((one) => one.chart)]) chart.close(); }, { once: true });
  return el("div", { class: "row above" }, el("label", { htmlFor: "smooth" }, "Show"), smooth, key, el("span", { class: "soft small" }, "Drag over a chart to look closer; double-click to see all again."));
}

function linesOf(panel, sets) {
  if (!panel.heldOut) return panel.lines;
  return [...panel.lines, ...sets.map((name, i) => ({ label: `held out: ${name}`, set: name, key: panel.heldOut, colour: HELD_OUT_COLOURS[i % HELD_OUT_COLOURS.length], points: true }))];
}

function columnsOf(columns, lines, width) {
  return [columns.xs, ...lines.map((line) => smoothed(line.of ? line.of(...line.keys.map((key) => columns.get(key))) : columns.get(line.key), line.stepped ? 1 : width))];
}

/** Evaluations are made of versions that may have no step yet: the axis has both. */
function withEvaluations(data, lines, width) {
  const own = data.columns.xs;
  const extra = [...new Set(data.evaluations.map((one) => one.version))].filter((version) => own.length === 0 || version > own.at(-1) || version < own[0]);
  const xs = extra.length ? Float64Array.from([...own, ...extra]).sort() : own;
  const place = new Map(Array.from(xs, (version, i) => [version, i]));
  return [xs, ...lines.map((line) => {
    const column = new Float64Array(xs.length).fill(NaN);
    if (line.set) {
      for (const one of data.evaluations) if (one.name === line.set && place.has(one.version)) column[place.get(one.version)] = one.values[line.key] ?? NaN;
    } else {
      const known = smoothed(data.columns.get(line.key), width);
      for (const [i, version] of own.entries()) column[place.get(version)] = known[i];
    }
    return column;
  })];
}
