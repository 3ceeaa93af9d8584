// The dials: knobs of a run that goes on, with what turning them does, and from which version it holds.
import { get, part, patch } from "../api.js";
import { described, el, fill, newId, say } from "../dom.js";
import { number } from "../format.js";
import { fieldAt } from "../form/schema.js";
import { problemsOf } from "../form/validate.js";
import { problemBox } from "../problems.js";
import { visible } from "../text.js";
import { consequence } from "./consequences.js";
import { on } from "./run_data.js";

const FIRST = ["staleness.max_lag", "staleness.min_lag", "clip.low", "clip.high", "entropy.target", "learning_rate", "updates_per_batch"];
const ENDED = new Set(["completed", "cancelled"]);

/** Sliders where a knob has a range that people turn it in: (value now) => [least, greatest, step]. */
const RANGES = {
  "staleness.max_lag": (now) => [0, Math.max(16, 2 * now), 1],
  "staleness.min_lag": (now) => [0, Math.max(8, 2 * now), 1],
  "clip.low": () => [0, 1, 0.01],
  "clip.high": (now) => [0, Math.max(1, 2 * now), 0.01],
  "entropy.target": (now) => [0, Math.max(2, 2 * now), 0.01],
  temperature: (now) => [0.1, Math.max(2, now), 0.05],
};

export async function dials(box, run, schema, data, signal) {
  const path = `runs/${part(run.run_id)}/knobs`;
  const form = el("form", { class: "dials", novalidate: true });
  const answer = el("div", { id: "knob-answer", "aria-live": "polite" });
  const plan = el("div", { id: "knob-plan" });
  const button = el("button", { class: "first", type: "submit", disabled: true }, "Turn");
  const undo = el("button", { type: "reset", disabled: true }, "Back");
  let known = await get(path, {}, signal);
  let rows = [];
  let inForce = null;
  let turnedLast = null;
  const version = () => data.state?.version ?? known.version;
  const ended = () => ENDED.has(data.state?.state ?? run.state);

  const show = () => {
    const names = Object.keys(known.knobs).sort((a, b) => rank(a) - rank(b));
    rows = names.map((name) => dial(name, known.knobs[name], fieldAt(schema, name, run.spec), run.spec, changed));
    const focused = form.contains(document.activeElement) ? document.activeElement.closest("[data-knob]")?.dataset.knob ?? turnedLast : null;
    fill(form, rows.map((row) => row.node), el("div", { class: "turn" }, answer, plan, el("div", { class: "row" }, button, undo)));
    rows.find((row) => row.name === focused)?.node.querySelector("input, select").focus({ preventScroll: true });
    changed();
  };
  const changed = () => {
    const turned = rows.filter((row) => row.turned());
    for (const row of rows) row.fault(row.turned() ? row.wrong() : "");
    const whole = turned.every((row) => !row.wrong());
    undo.disabled = turned.length === 0 || ended();
    button.disabled = undo.disabled || !whole;
    const from = version();
    fill(plan, turned.length && whole
      ? el("div", { class: "note" },
          el("p", {}, el("strong", {}, from === null ? "From the first version on" : `From version ${from + 1} on, at the earliest`), " (the boundary after the one at hand):"),
          el("ul", {}, turned.map((row) => el("li", { class: "small" }, consequence(row.name, row.before, row.value(), { batch: run.spec.batch_groups })))))
      : null);
  };
  const told = () => {
    if (!inForce) return;
    const reached = (version() ?? -1) >= inForce.version;
    fill(answer, el("p", { class: reached ? "done" : "note" },
      reached ? `In force since version ${inForce.version}: ` : `In force from version ${inForce.version} (now ${version() ?? "none"}): `, inForce.text));
  };
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    for (const row of rows) row.put(row.before);
    changed();
    refresh();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const turned = rows.filter((row) => row.turned());
    if (turned.length === 0 || turned.some((row) => row.wrong())) return;
    for (const row of rows) row.fault("");
    button.disabled = true;
    try {
      const done = await patch(path, Object.fromEntries(turned.map((row) => [row.name, row.value()])));
      inForce = { version: done.version, text: turned.map((row) => `${row.name} ${String(row.before)} \u2192 ${String(row.value())}`).join(", ") };
      known = { ...known, knobs: done.knobs };
      turnedLast = turned[0].name;
      show();
      told();
      say(`In force from version ${done.version}`);
    } catch (error) {
      for (const { field, problem } of error.errors ?? []) rows.find((row) => row.name === field)?.fault(problem);
      fill(answer, problemBox(error));
      button.disabled = false;
    }
  });
  on(data, ["state"], () => {
    told();
    if (ended()) changed();
  }, signal);
  const refresh = async () => { // somebody else, or a controller, may have turned a knob
    const turnedAt = data.events.findLast((event) => event.event.startsWith("knobs_"))?.id;
    if (turnedAt === known.seen || rows.some((row) => row.turned())) return;
    known = { ...(await get(path, {}, signal).catch(() => known)), seen: turnedAt };
    if (!rows.some((row) => row.turned())) showNewest();
  };
  on(data, ["events"], refresh, signal);
  const showNewest = () => {
    const latest = Object.assign({}, known.knobs, ...known.changes.map((change) => change.values));
    known = { ...known, knobs: latest };
    show();
  };
  showNewest();
  fill(box, el("h2", {}, "Dials"), ended() ? el("p", { class: "soft" }, "The run has ended: its knobs no longer turn.") : null, form);
}

const rank = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length); // the others stay in the order of their names

/** One knob: {node, name, before, value(), turned(), put(value), fault(text)}. */
function dial(name, before, field, spec, changed) {
  const id = newId("dial");
  const fault = el("p", { class: "fault", id: `${id}-fault` });
  const node = el("div", { class: "dial", data: { knob: name } });
  const input = control(name, before, field, spec, id);
  const range = RANGES[name]?.(before);
  const slider = range ? el("input", { type: "range", min: range[0], max: range[1], step: range[2], value: before, "aria-label": `${name}, slider` }) : null;
  const value = () => read(input, field);
  const turned = () => String(value()) !== String(before);
  const put = (to) => {
    if (input.type === "checkbox") input.checked = to;
    else input.value = String(to);
    if (slider) slider.value = String(to);
    node.classList.toggle("changed", turned());
  };
  const moved = () => { node.classList.toggle("changed", turned()); changed(); };
  input.addEventListener("input", () => { if (slider) slider.value = input.value; moved(); });
  slider?.addEventListener("input", () => { input.value = slider.value; moved(); });
  input.setAttribute("aria-describedby", `${id}-about ${id}-fault`);
  node.append(
    el("label", { htmlFor: id }, name),
    slider ? el("div", { class: "pair" }, slider, input) : input,
    el("p", { class: "what", id: `${id}-about` }, described(field?.description), ` Now ${typeof before === "number" ? number(before, 6) : String(before)}.`),
    fault);
  return {
    node, name, before, value, turned, put,
    /** What is wrong with the value, by its field's schema alone; an empty text where nothing is. */
    wrong: () => problemsOf(field, value())[0]?.problem ?? "",
    fault: (text) => { fault.textContent = visible(text); input.setAttribute("aria-invalid", String(Boolean(text))); },
  };
}

function control(name, before, field, spec, id) {
  if (typeof before === "boolean") return el("input", { type: "checkbox", id, checked: before });
  const choices = name === "updates_per_batch" ? divisors(spec.batch_groups) : field?.enum;
  if (choices) return el("select", { id }, choices.map((choice) => el("option", { value: String(choice), selected: String(choice) === String(before) }, String(choice))));
  return el("input", { type: "text", inputMode: "decimal", id, value: String(before), autocomplete: "off", spellcheck: false });
}

function read(input, field) {
  if (input.type === "checkbox") return input.checked;
  if (field?.enum) return input.value;
  const text = input.value.trim();
  const found = Number(text);
  return text === "" || Number.isNaN(found) ? text : found;
}

const divisors = (n) => Array.from({ length: Math.min(n, 512) }, (_, i) => i + 1).filter((d) => n % d === 0);
