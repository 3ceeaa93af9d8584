// The frame of the page: places, theme, keys, login; and which page belongs to which address.
import { ApiError } from "./api.js";
import { el, fill, say } from "./dom.js";
import { forgetDrafts } from "./form/drafts.js";
import { help, listen, shortcuts } from "./keys.js";
import { notice } from "./notice.js";
import { comparePage } from "./pages/compare.js";
import { deadLettersPage } from "./pages/dead_letters.js";
import { fleetPage } from "./pages/fleet.js";
import { loginPage } from "./pages/login.js";
import { logsPage } from "./pages/logs.js";
import { runPage } from "./pages/run.js";
import { runsPage } from "./pages/runs.js";
import { studiesPage } from "./pages/studies.js";
import { studyPage } from "./pages/study.js";
import { submitPage } from "./pages/submit.js";
import { leavePage, place, route } from "./router.js";
import { logOut, token } from "./session.js";
import { applyTheme, nextTheme, theme } from "./theme.js";

const PAGES = [
  ["", runsPage], ["runs", runsPage], ["runs/:run", runPage], ["runs/:run/:tab", runPage], ["compare", comparePage], ["submit", submitPage],
  ["studies", studiesPage], ["studies/:study", studyPage], ["dead-letters", deadLettersPage], ["fleet", fleetPage], ["logs", logsPage],
];
const PLACES = [["runs", "Runs"], ["studies", "Studies"], ["dead-letters", "Dead letters"], ["fleet", "Fleet"], ["logs", "Logs"], ["submit", "Submit"]];

const keys = shortcuts({ theme: turnTheme });

function turnTheme() {
  nextTheme();
  frame();
  document.getElementById("theme").focus();
  say(`Colours: ${theme()}`);
}

function frame() {
  const at = place().parts[0] ?? "runs";
  const links = PLACES.map(([path, name]) => el("a", { href: `#/${path}`, "aria-current": path === at ? "page" : null }, name));
  fill(document.getElementById("top"),
    el("a", { class: "brand", href: "#/runs" }, el("img", { src: "/static/icon.svg", alt: "" }), "Offbeat"),
    token() ? el("nav", { class: "places", "aria-label": "Places" }, links) : null,
    el("div", { class: "tools" },
      el("button", { class: "plain", id: "theme", onclick: turnTheme }, `Colours: ${theme()}`),
      el("button", { class: "plain", id: "help", "aria-label": "Keys", onclick: () => help(keys) }, "?"),
      token() ? el("button", { class: "plain", id: "log-out", onclick: () => { forgetDrafts(); logOut(); } }, "Log out") : null));
}

async function show() {
  frame();
  if (token()) await route(PAGES);
  else {
    leavePage();
    loginPage(document.getElementById("main"), show);
  }
  // last, or what is loaded above it would move it
  fill(document.getElementById("foot"), "Offbeat \u00b7 press ", el("kbd", {}, "?"), ` for keys \u00b7 times are those of ${Intl.DateTimeFormat().resolvedOptions().timeZone}`);
}

document.getElementById("skip").addEventListener("click", (event) => { // the fragment is the address of the page
  event.preventDefault();
  document.getElementById("main").focus();
});
window.addEventListener("hashchange", show);
window.addEventListener("logged-out", show);
window.addEventListener("storage", () => { applyTheme(); frame(); }); // another tab chose colours
window.addEventListener("unhandledrejection", (event) => { // what was asked for by a click and failed
  if (event.reason?.name === "AbortError") event.preventDefault();
  else if (event.reason instanceof ApiError) {
    event.preventDefault();
    notice(`${event.reason.title}: ${event.reason.message}`);
  }
});
listen(keys);
applyTheme();
show();
