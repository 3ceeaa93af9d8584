// Pages by the address's fragment: `#/runs/ID?colour=lag`. A page gets a signal that is aborted when one leaves it.
import { el, fill, say } from "./dom.js";
import { notice } from "./notice.js";
import { problemBox } from "./problems.js";

let leave = new AbortController();
let current = "";
let entry = null; // of the browser's history, while its page is there
let entries = Date.now();
const scrolled = new Map(); // entry -> pixels

history.scrollRestoration = "manual"; // the browser's own comes before the page that one goes back to is there
addEventListener("scroll", () => { if (entry !== null) scrolled.set(entry, scrollY); }, { passive: true });

/** The number of the address's entry in the browser's history: a new one has none yet. */
function numbered() {
  if (!history.state?.entry) history.replaceState({ entry: ++entries }, "");
  return history.state.entry;
}

/** {path, parts, query} of the address. */
export function place() {
  const [path, search = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return { path, parts: path.split("/").filter(Boolean).map(decoded), query: new URLSearchParams(search) };
}

/** An address that somebody cut in the middle of a character is one of something unknown, not an error of its own. */
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/** End what the page that is shown does by itself. */
export function leavePage() {
  leave.abort();
  entry = null;
}

/** Show the page of the address. `pages`: [[pattern parts with `:name`, page]]; a page is `(main, parameters, query, signal) => void`. */
export async function route(pages) {
  leavePage();
  leave = new AbortController();
  const { signal } = leave;
  const here = numbered();
  const { path, parts, query } = place();
  const main = document.getElementById("main");
  const found = pages.map(([pattern, page]) => [matched(pattern, parts), page]).find(([parameters]) => parameters);
  notice("");
  fill(main, el("p", { class: "loading" }, "Loading"));
  try {
    if (!found) throw new Error(`There is no page ${path}.`);
    await found[1](main, found[0], query, signal);
  } catch (error) {
    if (!signal.aborted) {
      fill(main, el("h1", {}, "This cannot be shown"), problemBox(error),
        el("div", { class: "row" }, el("button", { onclick: () => route(pages) }, "Try again"), el("a", { class: "button", href: "#/runs" }, "All runs")));
    }
  }
  if (signal.aborted) return;
  const title = main.querySelector("h1")?.textContent ?? "Offbeat";
  document.title = `${title} \u00b7 Offbeat`;
  if (current && current !== path) { // not at the first page: the address bar has the focus then
    main.focus({ preventScroll: true });
    say(title);
  }
  if (scrolled.has(here) || (current && current !== path)) scrollTo(0, scrolled.get(here) ?? 0);
  current = path;
  entry = here;
}

function matched(pattern, parts) {
  const wanted = pattern.split("/").filter(Boolean);
  if (wanted.length !== parts.length) return null;
  const parameters = {};
  for (const [i, name] of wanted.entries()) {
    if (name.startsWith(":")) parameters[name.slice(1)] = parts[i];
    else if (name !== parts[i]) return null;
  }
  return parameters;
}

export function go(hash) {
  location.hash = hash;
}
