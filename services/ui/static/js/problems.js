// Errors as people read them.
import { el } from "./dom.js";
import { visible } from "./text.js";

export function problemBox(error) {
  const errors = (error.errors ?? []).map(({ field, problem }) => el("li", {}, el("code", {}, visible(field)), " ", visible(problem)));
  return el("div", { class: "problem", role: "alert" },
    el("strong", {}, visible(error.title ?? "Something went wrong")), " ", visible(error.message),
    errors.length ? el("ul", {}, errors) : null);
}
