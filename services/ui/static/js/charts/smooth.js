// The trailing mean of a curve over `width` versions that were measured; NaN where nothing was.

export function smoothed(column, width) {
  if (width <= 1) return column;
  const out = new Float64Array(column.length).fill(NaN);
  const kept = new Float64Array(width);
  let count = 0;
  let sum = 0;
  for (const [i, value] of column.entries()) {
    if (Number.isNaN(value)) continue;
    const at = count % width;
    if (count >= width) sum -= kept[at];
    kept[at] = value;
    sum += value;
    count++;
    out[i] = sum / Math.min(count, width);
  }
  return out;
}
