// A completion as its tokens, each coloured by what was measured of it.
import { el } from "../dom.js";
import { number } from "../format.js";
import { nodesOf } from "../text.js";

const FIRST = 1_500;
const SEEN = new WeakMap(); // node of a view -> what draws it
const coming = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) if (isIntersecting) SEEN.get(target)?.();
}, { rootMargin: "600px" });
const MORE = 3_000;
const STEPS = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" };
const LONGEST_PIECE = 400; // no tokenizer has a longer one; what claims to be is cut

/** {label, of(completion, i), class(value), steps: [[class, words]]} */
export const COLOURINGS = {
  entropy: {
    label: "entropy", of: ({ entropies }, i) => entropies?.[i],
    class: (nats) => heat(nats, [0.1, 0.5, 1, 1.5, 2.5]),
    steps: [["heat-0", "below 0.1 nats"], ["heat-1", "0.1"], ["heat-2", "0.5"], ["heat-3", "1"], ["heat-4", "1.5"], ["heat-5", "2.5 and above"]],
  },
  lag: {
    label: "lag", of: ({ lags }, i) => lags[i],
    class: (lag) => heat(lag, [1, 2, 4, 8, 16]),
    steps: [["heat-0", "lag 0"], ["heat-1", "1"], ["heat-2", "2"], ["heat-3", "4"], ["heat-4", "8"], ["heat-5", "16 and above"]],
  },
  ratio: {
    label: "importance ratio", of: ({ log_ratios: ratios }, i) => (ratios ? Math.exp(ratios[i]) : undefined),
    class: (ratio) => (ratio < 1 ? ["heat-0", "cool-1", "cool-2", "cool-3"][above(1 / ratio, [1.05, 1.2, 2])] : heat(ratio, [1.05, 1.2, 1.5, 2, 4])),
    steps: [["cool-3", "below 1/2"], ["cool-2", "1/1.2"], ["cool-1", "1/1.05"], ["heat-0", "1"], ["heat-1", "1.05"], ["heat-2", "1.2"], ["heat-3", "1.5"], ["heat-4", "2"], ["heat-5", "4 and above"]],
  },
  none: { label: "nothing", of: () => undefined, class: () => "heat-0", steps: [] },
};

const above = (value, bounds) => bounds.filter((bound) => value >= bound).length;
const heat = (value, bounds) => `heat-${above(value, bounds)}`;

export function scaleOf(name) {
  return [el("span", {}, `Colour: ${COLOURINGS[name].label}`), ...COLOURINGS[name].steps.map(([kind, words]) => el("span", { class: `step ${kind}` }, words))];
}

/** {node, colour(name)} of a completion whose tokens' texts are known; null for any other. Tokens are made when they come into view: a page has
 * tens of thousands. What was measured of one is said below when one points at it, touches it, or goes to it with the arrow keys. */
export function tokenView(completion) {
  if (!completion.pieces) return null;
  const box = el("div", { class: "text" });
  const rest = el("button", { class: "small" });
  const tokens = el("div", { class: "tokens", tabIndex: 0, role: "group", "aria-label": "Tokens" }, box, rest);
  const said = el("p", { class: "small soft said", "aria-live": "polite" });
  const node = el("div", {}, tokens, said);
  let at = null;
  let shown = 0;
  let name = "none";
  const grow = (many) => {
    const until = Math.min(completion.pieces.length, shown + many);
    const fresh = [];
    for (; shown < until; shown++) fresh.push(el("span", { class: "token", data: { at: shown } }, nodesOf(completion.pieces[shown].slice(0, LONGEST_PIECE))));
    box.append(...fresh);
    paint(fresh);
    rest.textContent = `Show more (${(completion.pieces.length - shown).toLocaleString("en")} tokens are not shown)`;
    rest.hidden = shown >= completion.pieces.length;
  };
  const paint = (spans) => {
    const { of, class: classOf } = COLOURINGS[name];
    for (const span of spans) {
      const value = of(completion, Number(span.dataset.at));
      span.className = `token ${value === undefined || value === null ? "heat-0" : classOf(value)}`;
    }
  };
  const look = (span) => {
    at?.classList.remove("at");
    at = span;
    at.classList.add("at");
    said.textContent = wordsOf(completion, Number(at.dataset.at));
  };
  tokens.addEventListener("pointerover", ({ target }) => { if (target.closest(".token")) look(target.closest(".token")); });
  tokens.addEventListener("keydown", (event) => {
    if (event.target !== tokens || !STEPS[event.key] || !box.firstElementChild) return;
    event.preventDefault();
    look((at && at[STEPS[event.key]]) ?? at ?? box.firstElementChild);
    at.scrollIntoView({ block: "nearest" });
  });
  rest.addEventListener("click", () => grow(MORE));
  rest.hidden = true;
  tokens.style.minHeight = `${Math.min(20, 1 + Math.ceil(completion.pieces.length / 90))}lh`; // about what they will take
  SEEN.set(tokens, () => {
    coming.unobserve(tokens);
    SEEN.delete(tokens);
    tokens.style.minHeight = "";
    grow(FIRST);
  });
  coming.observe(tokens);
  return { node, colour: (wanted) => { name = wanted; paint(box.children); } };
}

function wordsOf(completion, i) {
  const words = [`token ${i}, id ${completion.tokens[i]}`, `version ${completion.versions[i]}, lag ${completion.lags[i]}`];
  if (completion.entropies) words.push(`entropy ${number(completion.entropies[i])} nats`);
  if (completion.log_ratios) words.push(`ratio ${number(Math.exp(completion.log_ratios[i]))}`);
  return words.join(" \u00b7 ");
}
