// A card with curves over versions: uPlot on a canvas, a legend of our own, marks where knobs were turned, and words for those who do not see it.
import uPlot from "../../vendor/uplot/uPlot.esm.js";
import { el, fill } from "../dom.js";
import { number, percent, ticks } from "../format.js";
import { colour } from "../theme.js";
import { downsampled } from "./downsample.js";
import { drawSoon, forgetDrawing } from "./queue.js";

const HEIGHT_REM = 14;
const LINES = 8;
const WHOLE = Array.from({ length: 7 }, (_, power) => [1, 2, 5].map((first) => first * 10 ** power)).flat();

export class Chart {
  /** `lines`: [{label, colour (1 to 8), dash, thin, points, stepped, bandTo}]; `format` of values; `x` names the axis; `bars` instead of lines. */
  constructor({ title, unit, lines, format = number, sync, x = "version", bars = false }) {
    Object.assign(this, { title, unit, lines, format, sync, x, bars });
    this.now = el("span", { class: "now" });
    this.plot = el("div", { class: "plot", role: "img", "aria-label": `${title}: not drawn yet` });
    this.values = lines.map(() => el("span", { class: "value" }));
    this.legend = el("ul", { class: "legend" });
    this.node = el("section", { class: "card chart", "aria-label": title }, el("h2", {}, el("span", {}, title, unit ? el("span", { class: "soft small" }, ` ${unit}`) : null), this.now), this.plot, this.legend);
    this.source = null;
    this.data = null;
    this.marks = [];
    /** [least, greatest] of a stretch that is shaded, in bars. */
    this.shade = null;
    this.visible = false;
    this.stale = false;
    this.sizes = new ResizeObserver(() => this.#resized());
    this.seen = new IntersectionObserver(([entry]) => {
      this.visible = entry.isIntersecting;
      if (this.visible && this.stale) drawSoon(this);
    }, { rootMargin: "200px" });
    this.repaint = () => { this.#forget(); this.legendOf = undefined; drawSoon(this); };
    this.sizes.observe(this.plot);
    this.seen.observe(this.node);
    window.addEventListener("theme", this.repaint);
  }

  close() {
    this.sizes.disconnect();
    this.seen.disconnect();
    window.removeEventListener("theme", this.repaint);
    forgetDrawing(this);
    this.#forget();
  }

  /** New data: `source()` gives `[xs, ...one column for each line]`, typed arrays, NaN for what is not there. It is asked when the chart is in view. */
  show(source, marks = []) {
    this.source = source;
    this.marks = marks;
    this.stale = true;
    if (this.visible) drawSoon(this);
  }

  draw() {
    if (!this.source || !this.plot.isConnected) return;
    this.stale = false;
    this.data = this.source();
    const present = this.lines.map((_, k) => this.data[k + 1].some((value) => !Number.isNaN(value)));
    const width = this.plot.clientWidth;
    if (!present.some(Boolean) || width < 40) return this.#empty(present.some(Boolean));
    this.#say(present);
    const shown = this.bars ? this.data : downsampled(this.data, Math.max(200, 2 * width));
    const columns = shown.map((column, k) => (k === 0 ? column : Array.from(column, (value) => (Number.isNaN(value) ? null : value))));
    if (this.uplot && this.drawn === present.join()) {
      this.#renew(columns);
      this.#at(this.uplot);
    } else this.#make(columns, present, width);
    return undefined;
  }

  /** New columns in the stretch that one looks at closer, if one does. */
  #renew(columns) {
    const { min, max } = this.uplot.scales.x;
    const [first, last] = [this.uplot.data[0][0], this.uplot.data[0].at(-1)];
    const closer = !this.bars && (min > first || max < last);
    this.uplot.batch(() => {
      this.uplot.setData(columns, !closer);
      if (closer) this.uplot.setScale("x", { min, max });
    });
  }

  #make(columns, present, width) {
    this.#forget();
    fill(this.plot);
    const rem = remNow();
    this.rem = rem;
    const font = `${Math.round(0.78 * rem)}px system-ui, sans-serif`;
    const [ink, grid, mark] = ["soft", "grid", "mark"].map(colour);
    const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, font, size: 2.2 * rem };
    const series = this.lines.map((line, k) => this.#series(line, k, present[k], ink));
    const bands = this.lines.flatMap((line, k) => (line.bandTo === undefined ? [] : [{ series: [k + 1, line.bandTo + 1], fill: colour("band") }]));
    this.uplot = new uPlot({
      width, height: Math.round(HEIGHT_REM * rem), series: [{}, ...series], bands, legend: { show: false },
      scales: { x: { time: false, range: this.bars ? (_, low, high) => [low - 0.6, high + 0.6] : undefined }, y: { range: this.#range } },
      axes: [
        { ...axis, space: 4 * rem, size: 1.7 * rem, incrs: WHOLE, label: this.x, labelFont: font, labelSize: 1.2 * rem, labelGap: 0 },
        { ...axis, size: 3.6 * rem, values: (_, at, __, ___, increment) => ticks(at, increment, { shares: this.format === percent }) },
      ],
      cursor: { sync: this.sync ? { key: this.sync } : undefined, drag: { x: true, y: false }, points: { size: 6 } },
      hooks: { drawClear: [(u) => shade(u, this.shade)], draw: [(u) => drawMarks(u, this.marks, mark)], setCursor: [(u) => this.#at(u)] },
    }, columns, this.plot);
    this.drawn = present.join();
    this.#at(this.uplot);
  }

  #series(line, k, shown, ink) {
    const stroke = line.colour ? colour(`line-${line.colour}`) : colour(`line-${(k % LINES) + 1}`);
    const paths = this.bars ? uPlot.paths.bars({ size: [0.8, 60] }) : line.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined;
    return {
      label: line.label, stroke: stroke || ink, width: line.thin ? 1 : 2, dash: line.dash ? [6, 4] : undefined, show: shown, spanGaps: true, paths,
      fill: this.bars ? `color-mix(in srgb, ${stroke} 45%, transparent)` : undefined,
      points: { show: Boolean(line.points) || (this.data[0].length < 3 && !this.bars), size: 6, fill: stroke },
    };
  }

  /** Room above and below; a share keeps 0 in view. */
  #range = (_, low, high) => {
    if (low === null || high === null) return [0, 1];
    const floor = this.bars || (low >= 0 && low < 0.5 * high) ? Math.min(0, low) : low;
    const room = 0.08 * (high - floor || Math.abs(high) || 1);
    return [floor === 0 ? 0 : floor - room, high + room];
  };

  #at(u) {
    const at = u.cursor.idx ?? null;
    const newest = this.bars ? "" : "newest";
    this.now.textContent = at === null ? newest : `${this.x} ${number(Math.round(u.data[0][at]))}`;
    for (const [k] of this.lines.entries()) {
      const column = u.data[k + 1];
      const value = at !== null ? column[at] : this.bars ? null : lastOf(this.data[k + 1]);
      this.values[k].textContent = value === null || value === undefined ? "" : this.format(value);
    }
  }

  #say(present) {
    const shown = this.lines.map((line, k) => ({ line, k })).filter(({ k }) => present[k]);
    const words = shown.map(({ line, k }) => `${line.label} ${this.format(lastOf(this.data[k + 1]))}`);
    const bars = this.bars ? Array.from(this.data[0], (x, i) => (this.data[1][i] > 0 ? `${this.x} ${x}: ${this.format(this.data[1][i])}` : "")).filter(Boolean) : null;
    this.plot.setAttribute("aria-label", `${this.title}${this.unit ? `, ${this.unit}` : ""}. ${bars ? bars.join(", ") : `Newest: ${words.join(", ")}`}`);
    if (this.legendOf === present.join()) return;
    this.legendOf = present.join();
    fill(this.legend, shown.map(({ line, k }) => {
      const swatch = el("span", { class: `swatch ${line.dash ? "dashed" : ""}` });
      swatch.style.color = `var(--line-${line.colour ?? (k % LINES) + 1})`;
      return el("li", {}, swatch, line.label, " ", this.values[k]);
    }));
  }

  #empty(measured) {
    this.#forget();
    this.legendOf = undefined;
    fill(this.legend);
    this.now.textContent = "";
    this.plot.setAttribute("aria-label", `${this.title}: nothing yet`);
    if (!measured) fill(this.plot, el("p", { class: "empty" }, "Nothing measured yet"));
  }

  #resized() {
    const width = this.plot.clientWidth;
    if (this.uplot && remNow() !== this.rem) this.repaint();
    else if (this.uplot && width > 40 && Math.abs(width - this.uplot.width) > 1) this.uplot.setSize({ width, height: this.uplot.height });
    else if (!this.uplot && this.visible) drawSoon(this);
  }

  #forget() {
    this.uplot?.destroy();
    this.uplot = undefined;
    this.drawn = undefined;
  }
}

const remNow = () => parseFloat(getComputedStyle(document.documentElement).fontSize);

function lastOf(column) {
  for (let i = column.length - 1; i >= 0; i--) if (column[i] !== null && !Number.isNaN(column[i])) return column[i];
  return NaN;
}

function shade(u, stretch) {
  if (!stretch) return;
  const { ctx, bbox } = u;
  const [from, to] = [stretch[0] - 0.5, stretch[1] + 0.5].map((x) => Math.min(bbox.left + bbox.width, Math.max(bbox.left, u.valToPos(x, "x", true))));
  ctx.save();
  ctx.fillStyle = colour("band");
  ctx.fillRect(from, bbox.top, to - from, bbox.height);
  ctx.restore();
}

function drawMarks(u, versions, stroke) {
  const { ctx, bbox } = u;
  ctx.save();
  ctx.strokeStyle = stroke;
  ctx.lineWidth = devicePixelRatio * 1.5;
  ctx.setLineDash([5 * devicePixelRatio, 4 * devicePixelRatio]);
  for (const version of versions) {
    const x = Math.round(u.valToPos(version, "x", true));
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

