// What is wrong with a spec, as one types: by its JSON schema, in words, with the dotted names that the server uses too.
import { Validator } from "../../vendor/json-schema/validator.js";
import { settled } from "./schema.js";

const WRAPPERS = new Set(["properties", "prefixItems", "items", "$ref", "anyOf", "oneOf", "allOf", "additionalProperties"]);

/** [{field, problem}] */
export function problemsOf(root, tree) {
  const { errors } = new Validator(settled(root, root, tree), "2020-12", false).validate(tree);
  const found = new Map();
  for (const { keyword, instanceLocation, error } of errors) {
    if (WRAPPERS.has(keyword)) continue;
    const field = instanceLocation.replace(/^#\/?/, "").split("/").map((step) => step.replaceAll("~1", "/").replaceAll("~0", "~")).join(".");
    if (!found.has(field)) found.set(field, inWords(keyword, error));
  }
  return [...found].map(([field, problem]) => ({ field: field || "(whole)", problem }));
}

function inWords(keyword, error) {
  if (keyword === "type") return `is no ${/Expected "(.*)"/.exec(error)?.[1] ?? "such value"}`.replace("no integer", "no whole number").replace("no string", "no text");
  if (keyword === "enum") return `must be one of ${/\[(.*)\]/.exec(error)?.[1] ?? "those that there are"}`;
  if (keyword === "pattern") return "has characters that it may not have";
  return error.replace(/^Instance(?: type)? ?/, "").replace(/\.$/, "");
}
