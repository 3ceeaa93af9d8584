// Curves of several runs over one another: one chart for each measurement, one line for each run.
import { get, part } from "./api.js";
import { Chart } from "./charts/chart.js";
import { percent } from "./format.js";

const POINTS = 600;

export const MEASUREMENTS = {
  entropy_nats: ["Policy entropy", "nats a token"],
  reward_mean: ["Reward", "training"],
  lag_mean: ["Mean lag", "versions"],
  kl_behaviour_k3_nats: ["KL of sampler to policy", "nats a token, k3"],
  ess_share: ["Effective sample size", "share of tokens", percent],
  clip_region_share: ["Clipped tokens", "share", percent],
  completion_tokens_mean: ["Length of completions", "tokens"],
  seconds: ["Time of a version", "seconds"],
};

/** Steps of a run, averaged where there are many. */
export async function stepsOf(runId, signal) {
  return (await get(`runs/${part(runId)}/steps`, { points: POINTS, keys: Object.keys(MEASUREMENTS).join(",") }, signal)).steps;
}

/** Charts of `curves`: [{label, colour, dash, steps}]; the caller closes them. */
export function overlays(curves, sync, names = Object.keys(MEASUREMENTS)) {
  const versions = Float64Array.from(new Set(curves.flatMap(({ steps }) => steps.map((step) => step.version)))).sort();
  const place = new Map(Array.from(versions, (version, i) => [version, i]));
  return names.map((key) => {
    const [title, unit, format] = MEASUREMENTS[key];
    const chart = new Chart({ title, unit, format, sync, lines: curves.map(({ label, colour, dash, thin }) => ({ label, colour, dash, thin })) });
    const columns = () => curves.map(({ steps }) => {
      const column = new Float64Array(versions.length).fill(NaN);
      for (const step of steps) column[place.get(step.version)] = step.values[key] ?? NaN;
      return column;
    });
    chart.show(() => [versions, ...columns()]);
    return chart;
  });
}
