// Do something again and again while a page is shown, and not while its tab is hidden.

export function every(milliseconds, action, signal) {
  const timer = setInterval(async () => {
    if (document.hidden) return;
    try {
      await action();
    } catch (error) {
      if (error.name !== "AbortError") console.info("tried again later:", error.message);
    }
  }, milliseconds);
  signal.addEventListener("abort", () => clearInterval(timer), { once: true });
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
