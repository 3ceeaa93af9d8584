// What all processes of the fleet log.
import { el, fill } from "../dom.js";
import { logView } from "../logs/log_view.js";

export async function logsPage(main, _, query, signal) {
  const body = el("div");
  fill(main, el("h1", {}, "Logs"), body);
  await logView(body, { query, signal });
}
