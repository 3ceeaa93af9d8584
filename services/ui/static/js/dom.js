// Elements out of words. Texts become text nodes: nothing here, and nothing in the page, makes HTML of a string.

/** An element. `props`: `class`, `data`, event handlers as `onclick`, properties by their names, anything else as an attribute. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && !name.includes("-") && !READ_ONLY.has(name)) node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== false));
  return node;
}

const READ_ONLY = new Set(["list", "form", "role"]);

/** Put these in the place of all that is in `node`. */
export function fill(node, ...children) {
  node.replaceChildren(...children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== false));
  return node;
}

/** `fill` for what is shown again and again: what did not change stays, of a table each row, and with it the focus, a selection, a click that has
 * begun, the place to which one scrolled. What a node does when it is clicked must follow from what it shows. */
export function refill(node, ...children) {
  const fresh = el("div", {}, ...children);
  const [had, has] = [node, fresh].map((one) => one.querySelector("tbody"));
  if (!had || !has) return sameNodes(fresh, node) ? node : fill(node, ...fresh.childNodes);
  if (has.rows[0]?.dataset.key) return keyed(had, has), node;
  const key = had.contains(document.activeElement) ? keyOf(document.activeElement) : null;
  const rows = [...has.rows];
  while (had.rows.length > rows.length) had.rows[rows.length].remove();
  rows.forEach((row, i) => {
    if (!had.rows[i]) had.append(row);
    else if (!had.rows[i].isEqualNode(row)) had.rows[i].replaceWith(row);
  });
  if (key && document.activeElement === document.body) [...had.querySelectorAll("a, button, input")].find((one) => keyOf(one) === key)?.focus({ preventScroll: true });
  return node;
}

/** Rows that never change: one that is there stays as it is, whatever came before it, and with what one has unfolded in it. */
function keyed(had, has) {
  const rows = [...has.rows];
  const wanted = new Set(rows.map((row) => row.dataset.key));
  for (const row of [...had.rows]) if (!wanted.has(row.dataset.key)) row.remove();
  rows.forEach((row, i) => {
    const there = had.rows[i];
    if (!there) had.append(row);
    else if (there.dataset.key !== row.dataset.key) there.before(row);
  });
  while (had.rows.length > rows.length) had.rows[rows.length].remove();
}

const sameNodes = (a, b) => a.childNodes.length === b.childNodes.length && [...a.childNodes].every((node, i) => node.isEqualNode(b.childNodes[i]));
const keyOf = (node) => node.getAttribute("href") ?? node.getAttribute("aria-label") ?? node.textContent;

/** Tell those who do not see the page. */
export function say(text) {
  document.getElementById("say").textContent = text;
}

/** A description of the API as nodes: what is between backticks as code. */
export function described(text) {
  return (text ?? "").replaceAll(/\s*\*Knobs?\.\*/g, "").split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));
}

let ids = 0;
export const newId = (prefix) => `${prefix}-${++ids}`;

/** Ask before something that cannot be undone. */
export function confirmed(question, yes) {
  return new Promise((resolve) => {
    const title = newId("ask");
    const dialog = el(
      "dialog", { "aria-labelledby": title, onclose: () => { resolve(dialog.returnValue === "yes"); dialog.remove(); } },
      el("p", { id: title }, question),
      el("div", { class: "row" },
        el("button", { class: "danger", onclick: () => dialog.close("yes") }, yes),
        el("button", { autofocus: true, onclick: () => dialog.close("no") }, "Back")),
    );
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** A table with a caption for those who do not see it. `columns`: [title, class]; a `quiet` title is not seen. `keys`: of rows that never change. */
export function table(caption, columns, rows, keys = []) {
  return el("div", { class: "table", tabIndex: 0, role: "region", "aria-label": caption },
    el("table", {},
      el("caption", { class: "visually-hidden" }, caption),
      el("thead", {}, el("tr", {}, columns.map(([title, kind]) => el("th", { scope: "col", class: kind }, kind === "quiet" ? el("span", { class: "visually-hidden" }, title) : title)))),
      el("tbody", {}, rows.map((cells, n) => el("tr", { data: keys.length ? { key: keys[n] } : null }, cells.map((cell, i) => el("td", { class: columns[i][1] }, cell)))))));
}
