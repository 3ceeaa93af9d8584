// Lags requested against achieved: the tokens of the newest versions by lag, beside the window that they were to keep.
import { percent } from "../format.js";
import { Chart } from "./chart.js";

export const NEWEST = 20;

export function lagHistogram() {
  return new Chart({
    title: "Lags requested and achieved", unit: `share of the tokens of the newest ${NEWEST} versions`, format: percent, bars: true, x: "lag",
    lines: [{ label: "achieved; the window requested is shaded", colour: 1 }],
  });
}

/** Show the newest of `steps` [{lags, window}]: the share of tokens of each lag, and the window of the last one. */
export function showLags(chart, steps) {
  const newest = steps.slice(-NEWEST);
  const window = newest.at(-1)?.window ?? [0, 0];
  const most = Math.max(window[1] + 1, ...newest.flatMap((step) => Object.keys(step.lags).map(Number)), 0) + 1;
  const xs = Float64Array.from({ length: most + 1 }, (_, lag) => lag);
  const achieved = new Float64Array(most + 1);
  let total = 0;
  for (const step of newest) {
    for (const [lag, tokens] of Object.entries(step.lags)) {
      achieved[lag] += tokens;
      total += tokens;
    }
  }
  chart.shade = window;
  chart.show(() => [xs, achieved.map((tokens) => (total ? tokens / total : NaN))]);
}
