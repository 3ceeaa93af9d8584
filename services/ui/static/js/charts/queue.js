// Charts are drawn a few a frame, so that many of them with thousands of points never hold the page up.

const BUDGET = 10; // milliseconds of a frame

const waiting = new Set();
let asked = false;

/** Have `chart.draw()` called soon, once for however many times it was asked. */
export function drawSoon(chart) {
  waiting.add(chart);
  ask();
}

export function forgetDrawing(chart) {
  waiting.delete(chart);
}

function ask() {
  if (asked || waiting.size === 0) return;
  asked = true;
  requestAnimationFrame(work);
}

function work() {
  const began = performance.now();
  asked = false;
  for (const chart of waiting) {
    waiting.delete(chart);
    chart.draw();
    if (performance.now() - began > BUDGET) break;
  }
  ask();
}
