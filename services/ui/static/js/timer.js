// Do something again and again while a page is shown, and not while its tab is hidden.
import { timeOfDay } from "./format.js";
import { notice } from "./notice.js";

/** A page whose newest look failed says so, and of when that is what it shows. */
export function every(milliseconds, action, signal) {
  let at = Date.now();
  let busy = false;
  const timer = setInterval(async () => {
    if (document.hidden || busy) return;
    busy = true;
    try {
      await action();
      at = Date.now();
      if (!signal.aborted) notice("");
    } catch (error) {
      if (!signal.aborted) notice(`${error.message} What is shown is of ${timeOfDay(at / 1000)}; it is tried again.`);
    }
    busy = false;
  }, milliseconds);
  signal.addEventListener("abort", () => { clearInterval(timer); notice(""); }, { once: true });
}

/** `action` at once, and then at most so often however often it is asked for; the last time is never left out. */
export function atMostEvery(milliseconds, action) {
  let timer = null;
  let again = false;
  const run = () => {
    again = false;
    action();
    timer = setTimeout(() => { timer = null; if (again) run(); }, milliseconds);
  };
  return () => {
    if (timer === null) run();
    else again = true;
  };
}
