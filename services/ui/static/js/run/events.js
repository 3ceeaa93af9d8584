// What happened to a run, newest first, as it happens.
import { el, fill } from "../dom.js";
import { clock, count } from "../format.js";
import { visible } from "../text.js";
import { on } from "./run_data.js";

const SEVERITIES = ["info", "warning", "error"];
const SHOWN = 500;

export function eventLog(body, run, data, signal) {
  const list = el("ul", { class: "log card", id: "events" });
  const least = el("select", { id: "least", onchange: () => show() }, SEVERITIES.map((name) => el("option", { value: name }, name === "info" ? "everything" : `${name} and above`)));
  const about = el("p", { class: "soft small" });
  const show = () => {
    const wanted = data.events.filter((event) => SEVERITIES.indexOf(event.severity) >= SEVERITIES.indexOf(least.value));
    about.textContent = count(wanted.length, "event") + (wanted.length > SHOWN ? `, the newest ${SHOWN} shown` : "");
    fill(list, wanted.slice(-SHOWN).reverse().map(row), wanted.length ? null : el("li", {}, "Nothing happened yet"));
  };
  fill(body, el("div", { class: "row" }, el("label", { htmlFor: "least" }, "Show"), least), about, list);
  on(data, ["events"], show, signal);
  show();
}

function row(event) {
  return el("li", {},
    el("span", { class: "soft" }, clock(event.at), event.version === null ? "" : ` v${event.version}`),
    el("span", { class: `state ${event.severity}` }, visible(event.event, 60)),
    el("span", {}, visible(event.text)));
}
