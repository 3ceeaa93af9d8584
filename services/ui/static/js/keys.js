// Shortcuts: one table, which is also the help.
import { el } from "./dom.js";
import { go } from "./router.js";

const WAIT = 900;
const OFF = "offbeat.keys-off"; // for those whose speech or switch types letters by accident

/** keys -> [what it does, action]; two keys are pressed one after the other. */
export function shortcuts(tools) {
  return {
    "g r": ["Runs", () => go("#/runs")],
    "g s": ["Studies", () => go("#/studies")],
    "g d": ["Dead letters", () => go("#/dead-letters")],
    "g f": ["Fleet", () => go("#/fleet")],
    "g l": ["Logs", () => go("#/logs")],
    n: ["Submit a run", () => go("#/submit")],
    "[": ["The tab before", () => tab(-1)],
    "]": ["The next tab", () => tab(1)],
    "/": ["To the first field of the page", () => document.querySelector("main input, main select, main textarea")?.focus()],
    t: ["System colours, light, dark", tools.theme],
    "?": ["This help", () => help(shortcuts(tools))],
  };
}

export function listen(table) {
  let before = "";
  let timer;
  document.addEventListener("keydown", (event) => {
    if (localStorage.getItem(OFF) || event.ctrlKey || event.metaKey || event.altKey || typing(event.target) || document.querySelector("dialog[open]")) return;
    const keys = before ? `${before} ${event.key}` : event.key;
    before = "";
    clearTimeout(timer);
    if (table[keys]) {
      event.preventDefault();
      table[keys][1]();
    } else if (Object.keys(table).some((known) => known.startsWith(`${event.key} `))) {
      before = event.key;
      timer = setTimeout(() => { before = ""; }, WAIT);
    }
  });
}

const typing = (target) => target instanceof HTMLElement && target.matches("input:not([type=checkbox]):not([type=range]), textarea, select");

function tab(step) {
  const tabs = [...document.querySelectorAll(".tabs a")];
  const at = tabs.findIndex((link) => link.getAttribute("aria-current") === "page");
  if (at >= 0) tabs[(at + step + tabs.length) % tabs.length].click();
}

export function help(table) {
  const rows = Object.entries(table).map(([keys, [text]]) =>
    el("div", { class: "spread" }, el("span", {}, text), el("span", { class: "row" }, keys.split(" ").map((key) => el("kbd", {}, key)))));
  const listens = el("input", { type: "checkbox", id: "keys-on", checked: !localStorage.getItem(OFF), onchange: () => {
    if (listens.checked) localStorage.removeItem(OFF);
    else localStorage.setItem(OFF, "1");
  } });
  const dialog = el("dialog", { "aria-labelledby": "help-title", onclose: () => dialog.remove() },
    el("h2", { id: "help-title" }, "Keys"), rows,
    el("p", { class: "row" }, listens, el("label", { htmlFor: "keys-on" }, "The page listens to these keys")),
    el("p", {}, el("button", { class: "first", autofocus: true, onclick: () => dialog.close() }, "Close")));
  document.body.append(dialog);
  dialog.showModal();
}
