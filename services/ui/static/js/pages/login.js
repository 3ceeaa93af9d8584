// The token of the API, typed once for a tab.
import { get } from "../api.js";
import { el, fill } from "../dom.js";
import { problemBox } from "../problems.js";
import { logIn } from "../session.js";

export function loginPage(main, entered) {
  const answer = el("div");
  const input = el("input", { type: "password", id: "token", autocomplete: "off", required: true, spellcheck: false });
  const form = el("form", { class: "card", onsubmit: async (event) => {
    event.preventDefault();
    const typed = input.value.trim();
    if (!/^[\x21-\x7e]+$/.test(typed)) { // no header can carry anything else
      fill(answer, problemBox({ title: "Not a token", message: "It has spaces or characters that no token has: copy the whole line of the file, and nothing else." }));
      return;
    }
    logIn(typed);
    try {
      await get("runs", { limit: 1 });
      entered();
    } catch (error) {
      if (error.status !== 401) sessionStorage.clear();
      fill(document.querySelector("#login-answer") ?? answer, problemBox(error));
    }
  } },
    el("div", { class: "field" },
      el("label", { htmlFor: "token" }, "Token"),
      el("p", { class: "about", id: "token-about" }, "What the file that OFFBEAT_TOKEN_FILE names holds; of a local stack: .offbeat/token. It stays in this tab and is forgotten when the tab is closed."),
      input),
    el("p", {}, el("button", { class: "first", type: "submit" }, "Log in")));
  input.setAttribute("aria-describedby", "token-about");
  answer.id = "login-answer";
  document.title = "Log in \u00b7 Offbeat";
  fill(main, el("div", { class: "login" }, el("h1", {}, "Log in"), answer, form));
  input.focus();
}
