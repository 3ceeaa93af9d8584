// Submit a run: a form made of the run spec's schema, checked as one types here and, once it fits the schema, by the server.
import { get, part, post } from "../api.js";
import { el, fill, say } from "../dom.js";
import { drafts, keepDraft } from "../form/drafts.js";
import { NOT_JSON } from "../form/fields.js";
import { schemaForm } from "../form/form.js";
import { defaultOf, difference } from "../form/schema.js";
import { problemsOf } from "../form/validate.js";
import { problemBox } from "../problems.js";
import { go } from "../router.js";
import { visible } from "../text.js";

const PAUSE = 500;

export async function submitPage(main, _, query, signal) {
  const { spec: root, knobs } = await get("schema", {}, signal);
  const base = defaultOf(root, root);
  const like = query.get("like") ?? "";
  const start = like ? { ...base, ...(await get(`runs/${part(like)}`, {}, signal)).spec } : base;
  const place = el("div");
  const verdict = el("div", { id: "verdict", "aria-live": "polite" });
  const json = el("textarea", { id: "spec-json", rows: 12, spellcheck: false });
  const unread = el("div", { id: "unread" });
  const button = el("button", { class: "first", type: "submit" }, "Submit");
  const begun = el("div");
  const over = el("button", { type: "button", onclick: () => {
    show(start);
    fill(begun);
    fill(unread);
    place.querySelector("input").focus();
    say("The form is as it was at first");
  } }, "Start over");
  const key = crypto.getRandomValues(new Uint32Array(4)).join("-"); // randomUUID is only there over HTTPS and on this machine
  let form;
  let timer;
  let asked = 0;
  let untouched = null;

  const body = () => difference(form.value(), base) ?? {};
  const changed = () => {
    const found = problemsOf(root, form.value());
    const left = form.problems(found);
    if (document.activeElement !== json) json.value = JSON.stringify(body(), null, 2);
    clearTimeout(timer);
    asked++;
    if (found.length) fill(verdict, problemBox({ title: found.length === 1 ? "One field is to be corrected" : `${found.length} fields are to be corrected`, message: "", errors: left }));
    else timer = setTimeout(ask, PAUSE);
    button.disabled = found.length > 0;
    if (untouched === null) return;
    over.hidden = JSON.stringify(body()) === untouched;
    keepDraft(like, over.hidden ? null : body(), NOT_JSON);
  };
  const ask = async () => {
    const mine = asked;
    try {
      const answer = await post("validate", body());
      if (mine !== asked || signal.aborted) return;
      fill(verdict, el("p", { class: "done" }, `It would be accepted: ${answer.prompts.toLocaleString("en")} prompts, the first of ${answer.first_prompt_tokens} tokens: `,
        el("code", {}, visible(answer.first_prompt, 120)), answer.rewards_checked ? "" : ". No reward server is there to check the verifiers."));
    } catch (error) {
      if (mine === asked && !signal.aborted) refused(error);
    }
  };
  const refused = (error) => {
    const errors = form.problems(error.errors ?? []);
    const shown = (error.errors ?? []).length - errors.length;
    fill(verdict, problemBox({ title: error.title, message: shown ? "See the fields that are marked." : error.message, errors }));
  };
  const show = (tree) => {
    form = schemaForm(root, tree, knobs, changed);
    fill(place, form.node);
    changed();
  };
  const paste = el("button", { type: "button", onclick: () => {
    try {
      const given = JSON.parse(json.value);
      if (!isTree(given) || Array.isArray(given)) throw new TypeError("A run spec is an object with fields.");
      show(merged(base, given));
      const lost = missing(given, form.value());
      fill(unread, lost.length ? problemBox({ title: "Not all of it is in the form", message: `A run spec has no such field, or not in this variant: ${lost.join(", ")}.` }) : null);
      say(lost.length ? "The form was filled, but not with all of it" : "The form was filled");
    } catch (error) {
      fill(unread, problemBox({ title: error instanceof SyntaxError ? "Not JSON" : "Not a run spec", message: error.message }));
    }
  } }, "Fill the form with this");
  const node = el("form", { novalidate: true, onsubmit: async (event) => {
    event.preventDefault();
    clearTimeout(timer);
    asked++;
    button.disabled = true;
    try {
      const run = await post("runs", body(), { "Idempotency-Key": `${key}-${asked}` });
      keepDraft(like, null);
      go(`#/runs/${part(run.run_id)}`);
    } catch (error) {
      button.disabled = false;
      refused(error);
      main.querySelector("[aria-invalid=true]")?.focus();
    }
  } },
    place,
    el("details", { class: "section" }, el("summary", {}, "As JSON ", el("span", { class: "soft small" }, "what differs from the defaults; paste a spec to fill the form")),
      el("div", { class: "inside" }, el("label", { htmlFor: "spec-json" }, "Spec"), json, paste, unread)),
    el("div", { class: "turn" }, verdict, el("div", { class: "row" }, button, over)));
  fill(main, el("h1", {}, "Submit a run"), like ? el("p", { class: "soft" }, `As ${visible(like)}; change what is to differ.`) : null, begun, node);
  const left = drafts();
  show(start);
  untouched = JSON.stringify(body());
  show(left.has(like) ? merged(base, left.get(like)) : start);
  const others = [...left.keys()].filter((other) => other !== like).reverse();
  fill(begun,
    left.has(like) ? el("p", { class: "note" }, "What you had filled in and not submitted is here again. Start over, beside Submit, drops it.") : null,
    others.length ? el("p", { class: "soft" }, "Begun and not submitted: ", others.map((other, i) => [i ? ", " : "", el("a", { href: `#/submit${other ? `?like=${part(other)}` : ""}` }, other ? `as ${visible(other)}` : "from the defaults")])) : null);
  signal.addEventListener("abort", () => clearTimeout(timer), { once: true });
}

/** Dotted names of what `given` has and `kept` has no place for. */
function missing(given, kept, prefix = "") {
  return Object.entries(given).flatMap(([name, value]) => {
    const path = `${prefix}${name}`;
    if (!Object.hasOwn(kept, name)) return [path];
    if (!isTree(kept[name])) return [];
    return isTree(value) ? missing(value, kept[name], `${path}.`) : [path];
  });
}

const isTree = (value) => typeof value === "object" && value !== null;

/** `given` over `base`, section by section. */
function merged(base, given) {
  if (typeof given !== "object" || given === null || Array.isArray(given)) return given;
  if (typeof base !== "object" || base === null || Array.isArray(base)) return given;
  const tree = { ...base };
  for (const [name, value] of Object.entries(given)) tree[name] = merged(base[name], value);
  return tree;
}
