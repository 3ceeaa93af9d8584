// Texts of models, users and processes, made harmless to show: what would move, hide or turn other text is shown as a sign.
import { el } from "./dom.js";

const SIGNS = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
const KEPT = new Set(["\n", "\t", "\u200c", "\u200d"]); // the joiners are needed by many scripts and move nothing
const FIRST = 4_000;
const MORE = 16_000;

/** What stands for a character that cannot be shown: a picture of a control character, or its number. */
export function signOf(char) {
  const code = char.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "\u2421";
  return `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
}

/** `text` with signs, as a string: for titles, cells and attributes. */
export function visible(text, most = 2_000) {
  const whole = String(text ?? "");
  const shown = whole.slice(0, most).replace(SIGNS, (char) => (KEPT.has(char) ? char : signOf(char)));
  return whole.length > most ? `${shown}\u2026` : shown;
}

/** Nodes of `text`, each sign as an element of its own. */
export function nodesOf(text) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(SIGNS)) {
    if (KEPT.has(match[0])) continue;
    if (match.index > from) nodes.push(text.slice(from, match.index));
    nodes.push(el("span", { class: "sign" }, signOf(match[0])));
    from = match.index + match[0].length;
  }
  if (from < text.length) nodes.push(text.slice(from));
  return nodes;
}

/** A block of text of any length, of which the first part is shown, and more when it is asked for. */
export function textBlock(text, label) {
  const box = el("div", { class: "text" });
  const rest = el("button", { class: "small" });
  const node = el("div", { "aria-label": label, role: label ? "group" : undefined }, box);
  let shown = 0;
  const grow = (count) => {
    let until = Math.min(text.length, shown + count);
    if (until < text.length && isHighSurrogate(text, until - 1)) until += 1; // not between the halves of one character
    box.append(...nodesOf(text.slice(shown, until)));
    shown = until;
    if (shown >= text.length) rest.remove();
    else rest.textContent = `Show more (${(text.length - shown).toLocaleString("en")} characters are not shown)`;
  };
  rest.addEventListener("click", () => grow(MORE));
  grow(FIRST);
  if (shown < text.length) node.append(rest);
  return node;
}

const isHighSurrogate = (text, at) => (text.charCodeAt(at) & 0xfc00) === 0xd800;
