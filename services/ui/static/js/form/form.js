// A form made of a JSON schema: sections that open, variants to choose, lists that grow. Its value is the tree that the schema describes.
import { described, el, fill } from "../dom.js";
import { choiceField, jsonField, NOT_JSON, textField, tickField } from "./fields.js";
import { defaultOf, followed, isSection, nullable, sectionDefaults, variants } from "./schema.js";

/** {node, value(), problems([{field, problem}]) => those that no field shows}: the form of `root`, filled with `tree`; `changed` is called as one types. */
export function schemaForm(root, tree, knobs, changed) {
  const fields = new Map();
  const context = { root, knobs: new Set(knobs), changed, fields };
  const plain = [];
  const sections = [];
  const readers = {};
  for (const [name, given] of Object.entries(root.properties)) {
    const part = partOf(context, name, name, given, tree[name]);
    readers[name] = part.value;
    if (part.leaf) plain.push(part.node);
    else sections.push(folded(name, followed(root, given).description, part.node));
  }
  const node = el("div", {}, el("div", { class: "card" }, el("h2", {}, "The run"), el("div", { class: "columns" }, plain)), sections);
  return { node, value: () => gathered(readers), problems: (found) => told(context, node, found) };
}

const LEAVE_OUT = undefined;

function gathered(readers) {
  return Object.fromEntries(Object.entries(readers).map(([name, read]) => [name, read()]).filter(([, value]) => value !== LEAVE_OUT));
}

/** {node, value, leaf} of any field. */
function partOf(context, path, name, given, value) {
  const field = followed(context.root, given);
  const kinds = variants(context.root, field);
  if (kinds) return variantPart(context, path, kinds, value ?? defaultOf(context.root, given));
  const held = nullable(context.root, field);
  if (held && (isSection(held) || variants(context.root, held))) return optionalPart(context, path, held, value);
  if (isSection(field)) return sectionPart(context, path, field, value ?? defaultOf(context.root, given));
  if (field.type === "array" && isSection(followed(context.root, field.items))) return listPart(context, path, field, value ?? []);
  const leaf = leafField(context, path, name, held ?? field, value, Boolean(held));
  context.fields.set(path, leaf);
  return { node: leaf.node, value: leaf.value, leaf: true };
}

function leafField({ knobs, changed }, path, name, field, value, empties) {
  const knob = knobs.has(path);
  if (field.enum) return choiceField(path, name, field, value, knob, changed, { empties });
  if (field.type === "boolean") return tickField(path, name, field, value, knob, changed);
  if (["string", "number", "integer"].includes(field.type)) return textField(path, name, field, value, knob, changed, { empty: empties ? null : LEAVE_OUT });
  return jsonField(path, name, field, value, knob, changed);
}

function sectionPart(context, path, field, value) {
  const readers = {};
  const nodes = Object.entries(field.properties).filter(([, given]) => given.const === undefined).map(([name, given]) => {
    const part = partOf(context, `${path}.${name}`, name, given, value?.[name] === undefined ? defaultOf(context.root, given) : value[name]);
    readers[name] = part.value;
    return part.leaf ? part.node : el("fieldset", {}, el("legend", {}, name.replaceAll("_", " ")), part.node);
  });
  return { node: el("div", { class: "columns" }, nodes), value: () => gathered(readers) };
}

function variantPart(context, path, kinds, value) {
  const body = el("div");
  let chosen = value[kinds.tag];
  let part;
  const show = (given) => {
    const field = kinds.of(chosen);
    forget(context, path);
    part = sectionPart(context, path, field, given);
    fill(body, field.description ? el("p", { class: "soft small" }, described(field.description)) : null, part.node);
  };
  const select = choiceField(`${path}.${kinds.tag}`, kinds.tag, { enum: kinds.names, description: "" }, chosen, false, () => {
    chosen = select.value();
    show(sectionDefaults(context.root, kinds.of(chosen)));
    context.changed();
  });
  show(value);
  return { node: el("div", {}, select.node, body), value: () => ({ [kinds.tag]: chosen, ...part.value() }) };
}

function optionalPart(context, path, held, value) {
  const body = el("div");
  let part = null;
  const show = (given) => {
    forget(context, path);
    part = given === null || given === undefined ? null : partOf(context, path, path, held, given);
    fill(body, part?.node);
  };
  const tick = tickField(`${path}?`, "set", { description: held.description ?? "" }, value !== null && value !== undefined, false, () => {
    show(tick.value() ? defaultOf(context.root, held) : null);
    context.changed();
  });
  show(value);
  return { node: el("div", {}, tick.node, body), value: () => (part ? part.value() : null) };
}

function listPart(context, path, field, values) {
  const list = el("div");
  let items = values.map((value) => ({ value }));
  const item = followed(context.root, field.items);
  const show = () => {
    forget(context, path);
    for (const [i, one] of items.entries()) one.part = sectionPart(context, `${path}.${i}`, item, one.value);
    fill(list, items.map((one, i) => el("fieldset", {}, el("legend", {}, `${i + 1}.`), one.part.node,
      el("button", { type: "button", onclick: () => { keep(); items.splice(i, 1); show(); context.changed(); add.focus(); } }, "Remove"))));
  };
  const keep = () => { items = items.map((one) => ({ value: one.part.value() })); };
  show();
  const add = el("button", { type: "button", onclick: () => { keep(); items.push({ value: defaultOf(context.root, field.items) }); show(); context.changed(); } }, "Add");
  return { node: el("div", {}, list, add), value: () => items.map((one) => one.part.value()) };
}

function forget({ fields }, path) {
  for (const known of [...fields.keys()]) if (known === path || known.startsWith(`${path}.`)) fields.delete(known);
}

function folded(name, description, node) {
  return el("details", { class: "section", data: { section: name } },
    el("summary", {}, name.replaceAll("_", " "), " ", el("span", { class: "soft small" }, described(description))),
    el("div", { class: "inside" }, node));
}

/** Show each problem at its field, or at the one that its text begins with; those of no field are answered. */
function told({ fields }, node, found) {
  for (const field of fields.values()) field.problem(field.value() === NOT_JSON ? "is no JSON" : "");
  const left = found.filter(({ field, problem }) => {
    const shown = fields.get(field) ?? fields.get(/^[a-z_0-9.]+/.exec(problem)?.[0]);
    shown?.problem(problem);
    return !shown;
  });
  for (const section of node.querySelectorAll("details.section")) {
    const name = section.dataset.section;
    const faults = section.querySelectorAll("[aria-invalid=true]").length + left.filter(({ field }) => field === name).length;
    section.dataset.faults = String(faults);
    section.open ||= faults > 0;
  }
  return left;
}
