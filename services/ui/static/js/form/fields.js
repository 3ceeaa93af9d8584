// The inputs of single values. Each is {node, value(), problem(text)}; `changed` is called as one types.
import { described, el, newId } from "../dom.js";
import { visible } from "../text.js";

const SHOWN_NAME = (name) => name.replaceAll("_", " ");

/** The frame of a field: label, what it is, the input, what is wrong with it. */
function framed(path, name, field, input, knob, { tick = false } = {}) {
  const id = newId("field");
  input.id = id;
  input.dataset.path = path;
  const about = el("p", { class: "about", id: `${id}-about` }, described(field.description));
  const fault = el("p", { class: "fault", id: `${id}-fault` });
  input.setAttribute("aria-describedby", `${id}-about ${id}-fault`);
  const label = [el("label", { htmlFor: id }, SHOWN_NAME(name)), knob ? el("span", { class: "knob" }, "dial") : null];
  const node = el("div", { class: "field" }, tick ? el("div", { class: "tick" }, input, label) : label, about, tick ? null : input, fault);
  const problem = (text) => {
    fault.textContent = text ? visible(text) : "";
    input.setAttribute("aria-invalid", String(Boolean(text)));
  };
  return { node, problem };
}

/** One of several; with `empties` also none of them, which is null. */
export function choiceField(path, name, field, value, knob, changed, { empties = false } = {}) {
  const none = empties ? [el("option", { value: "", selected: value === null }, "not set")] : [];
  const input = el("select", { onchange: changed }, none, field.enum.map((choice) => el("option", { value: choice, selected: choice === value }, choice)));
  return { ...framed(path, name, field, input, knob), value: () => (empties && input.value === "" ? null : input.value) };
}

export function tickField(path, name, field, value, knob, changed) {
  const input = el("input", { type: "checkbox", checked: Boolean(value), onchange: changed });
  return { ...framed(path, name, field, input, knob, { tick: true }), value: () => input.checked };
}

/** A text or a number; left empty it is null where that is allowed, or not there at all. */
export function textField(path, name, field, value, knob, changed, { empty }) {
  const numeric = field.type === "number" || field.type === "integer";
  const input = el("input", {
    type: "text", inputMode: numeric ? "decimal" : null, value: value === null || value === undefined ? "" : String(value), autocomplete: "off",
    spellcheck: false, placeholder: empty === null ? "not set" : null, oninput: changed,
  });
  const read = () => {
    const text = numeric ? input.value.trim() : input.value;
    if (text === "") return numeric || empty === null ? empty : text;
    return numeric && !Number.isNaN(Number(text)) ? Number(text) : text;
  };
  return { ...framed(path, name, field, input, knob), value: read };
}

/** Anything, as JSON. */
export function jsonField(path, name, field, value, knob, changed) {
  const input = el("textarea", { rows: 2, spellcheck: false, value: JSON.stringify(value ?? null), oninput: changed });
  const parts = framed(path, name, field, input, knob);
  const read = () => {
    try {
      parts.problem("");
      return JSON.parse(input.value);
    } catch {
      return NOT_JSON;
    }
  };
  return { ...parts, value: read };
}

/** Stands for a text that is no JSON: no schema accepts it. */
export const NOT_JSON = "\u0000not JSON";
