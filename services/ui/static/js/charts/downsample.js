// Fewer points than pixels, without losing a spike: of each stretch of versions the least and the greatest value, in their order.

/** `[xs, ...ys]` with at most about `most` points. Typed arrays in and out; NaN where nothing was measured. */
export function downsampled([xs, ...ys], most) {
  const n = xs.length;
  if (n <= most) return [xs, ...ys];
  const buckets = Math.max(1, Math.floor(most / 2));
  const outXs = new Float64Array(2 * buckets);
  const outs = ys.map(() => new Float64Array(2 * buckets));
  for (let b = 0; b < buckets; b++) {
    const from = Math.floor((b * n) / buckets);
    const to = Math.floor(((b + 1) * n) / buckets);
    outXs[2 * b] = xs[from];
    outXs[2 * b + 1] = to - from > 1 ? xs[to - 1] : xs[from] + 0.5;
    for (const [k, column] of ys.entries()) extremes(column, from, to, outs[k], 2 * b);
  }
  return [outXs, ...outs];
}

function extremes(column, from, to, out, at) {
  let low = NaN;
  let high = NaN;
  let lowAt = from;
  let highAt = from;
  for (let i = from; i < to; i++) {
    const value = column[i];
    if (Number.isNaN(value)) continue;
    if (!(low <= value)) { low = value; lowAt = i; }
    if (!(high >= value)) { high = value; highAt = i; }
  }
  out[at] = lowAt <= highAt ? low : high;
  out[at + 1] = lowAt <= highAt ? high : low;
}
