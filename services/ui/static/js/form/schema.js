// JSON schemas as forms need them: references followed, variants chosen, defaults as a tree.

/** The schema that `node` refers to, with what is said beside the reference. */
export function followed(root, node) {
  if (!node?.$ref) return node;
  const target = root.$defs[node.$ref.split("/").at(-1)];
  const { $ref: _, ...beside } = node;
  return { ...followed(root, target), ...beside };
}

/** {tag, names, of(name)} of a section with variants; null for any other. */
export function variants(root, node) {
  if (!node?.discriminator) return null;
  const { propertyName, mapping } = node.discriminator;
  return { tag: propertyName, names: Object.keys(mapping), of: (name) => followed(root, { $ref: Object.hasOwn(mapping, name) ? mapping[name] : Object.values(mapping)[0] }) };
}

/** The schema of what a nullable field holds when it is not null; null for a field that is not nullable. */
export function nullable(root, node) {
  const kinds = node?.anyOf;
  if (!kinds?.some((kind) => kind.type === "null")) return null;
  const held = kinds.filter((kind) => kind.type !== "null");
  return { ...followed(root, held[0]), title: node.title, description: node.description ?? followed(root, held[0]).description };
}

export const isSection = (node) => node?.type === "object" && Boolean(node.properties);

/** The default of a field, as a tree of its own. */
export function defaultOf(root, given) {
  const node = followed(root, given);
  if (node.default !== undefined && !isSection(node) && !variants(root, node)) return structuredClone(node.default);
  const kinds = variants(root, node);
  if (kinds) {
    const chosen = node.default?.[kinds.tag] ?? kinds.names[0];
    return { ...sectionDefaults(root, kinds.of(chosen)), ...structuredClone(node.default ?? {}), [kinds.tag]: chosen };
  }
  if (isSection(node)) return { ...sectionDefaults(root, node), ...structuredClone(node.default ?? {}) };
  if (node.const !== undefined) return node.const;
  if (node.type === "array") return [];
  if (node.type === "object") return {};
  return undefined;
}

export function sectionDefaults(root, node) {
  const entries = Object.entries(node.properties).map(([name, field]) => [name, defaultOf(root, field)]);
  return Object.fromEntries(entries.filter(([, value]) => value !== undefined));
}

/** The schema for this very value, without references or variants: what a validator says of it names the fields that are shown. */
export function settled(root, given, value) {
  const node = followed(root, given);
  const kinds = variants(root, node);
  if (kinds) {
    const known = kinds.names.includes(value?.[kinds.tag]);
    return known ? settled(root, kinds.of(value[kinds.tag]), value) : { properties: { [kinds.tag]: { enum: kinds.names } } };
  }
  const held = nullable(root, node);
  if (held) return value === null || value === undefined ? {} : settled(root, held, value);
  if (isSection(node)) {
    const properties = Object.entries(node.properties).map(([name, field]) => [name, settled(root, field, value?.[name])]);
    return { type: "object", properties: Object.fromEntries(properties), required: node.required, additionalProperties: node.additionalProperties };
  }
  if (node.type === "array" && node.items) {
    return { type: "array", minItems: node.minItems, prefixItems: (Array.isArray(value) ? value : []).map((item) => settled(root, node.items, item)) };
  }
  if (node.type === "object") return { type: "object" };
  const { $defs: _defs, default: _default, description: _description, title: _title, ...rest } = node;
  return rest;
}

/** The field at a dotted name in a spec, such as `entropy.target`; undefined when the spec's variant has none. */
export function fieldAt(root, name, spec) {
  let node = root;
  let value = spec;
  for (const step of name.split(".")) {
    const field = nullable(root, followed(root, node)) ?? followed(root, node);
    const kinds = variants(root, field);
    const section = kinds ? kinds.of(value?.[kinds.tag]) : field;
    node = section?.properties?.[step];
    value = value?.[step];
  }
  return node && (nullable(root, followed(root, node)) ?? followed(root, node));
}

/** `tree` without what is as `base` has it. */
export function difference(tree, base) {
  if (!isTree(tree) || !isTree(base)) return same(tree, base) ? undefined : tree;
  const parts = Object.entries(tree).map(([name, value]) => [name, difference(value, base[name])]).filter(([, value]) => value !== undefined);
  return parts.length ? Object.fromEntries(parts) : undefined;
}

const isTree = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
