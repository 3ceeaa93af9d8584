// Numbers and times for people.

export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "\u2013";
  if (!Number.isFinite(value)) return value > 0 ? "\u221e" : "-\u221e";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 10 ** -Math.min(digits, 5) || size >= 1e7)) return Number(value.toPrecision(3)).toExponential();
  return value.toLocaleString("en", { maximumFractionDigits: digits });
}

export const percent = (share, digits = 1) => (share === null || share === undefined || Number.isNaN(share) ? "\u2013" : `${number(100 * share, digits)} %`);

/** Marks of an axis with as many digits as tell them apart: 0.0025 and 0.005 are no equal steps once they are rounded. */
export function ticks(values, increment, { shares = false } = {}) {
  const digits = Math.max(0, 1 - Math.floor(Math.log10(shares ? 100 * increment : increment)));
  return values.map((value) => (shares ? percent(value, digits) : number(value, digits)));
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined || !(seconds >= 0)) return "\u2013";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
}

/** A Unix time in seconds. */
export function clock(at) {
  if (!at) return "\u2013";
  return new Date(at * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" });
}

export const timeOfDay = (at) => new Date(at * 1000).toLocaleTimeString("en-GB");

export const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
