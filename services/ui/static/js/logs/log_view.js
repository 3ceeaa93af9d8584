// What processes log, as it comes: the server filters, and of the lines no more than the newest are in the page.
import { get, part } from "../api.js";
import { el, fill, say } from "../dom.js";
import { clock, count, timeOfDay } from "../format.js";
import { follow } from "../live.js";
import { problemBox } from "../problems.js";
import { place } from "../router.js";
import { nodesOf, textBlock, visible } from "../text.js";
import { atMostEvery } from "../timer.js";

const SHOWN = 1_000;
const DRAW = 150;
const TYPING = 300;
const NEAR_END = 30; // pixels
const LEVELS = { debug: "everything", info: "info and above", warning: "warnings and above", error: "errors" };
const ROLES = { "": "every kind", control_plane: "control planes", rollout: "rollout servers", reward: "reward servers", trainer: "trainers" };
const STATES = { debug: "info", critical: "error" };

/** The log of the fleet in `body`, or of one run. `query` is the address's: a filter can be linked to. */
export async function logView(body, { run, query, signal }) {
  const level = choice("log-level", LEVELS, query.get("level") ?? "debug");
  const role = choice("log-role", ROLES, query.get("role") ?? "");
  const member = el("select", { id: "log-member", onchange: () => restart() });
  const text = el("input", { id: "log-text", type: "search", value: query.get("text") ?? "", size: 18, maxLength: 200, oninput: () => { clearTimeout(typing); typing = setTimeout(restart, TYPING); } });
  const following = el("input", { id: "log-follow", type: "checkbox", checked: true, onchange: () => { if (following.checked) toEnd(); } });
  const about = el("span", { class: "soft small", id: "log-about" });
  const link = el("span", { class: "live connecting" }, el("span", { class: "live-dot" }), el("span"));
  const list = el("ul");
  const empty = el("p", { class: "empty" });
  const box = el("div", { class: "lines card", id: "logs", tabIndex: 0, role: "region", "aria-label": "Lines of the log", onscroll: () => { following.checked = atEnd(); } }, list, empty);
  const fault = el("div");
  const members = new Set();
  let typing;
  let stop = new AbortController();
  let waiting = [];
  let connection = "connecting";

  const atEnd = () => box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END;
  const toEnd = () => { box.scrollTop = box.scrollHeight; };
  const know = (ids) => {
    for (const id of ids) {
      if (members.has(id)) continue;
      members.add(id);
      member.append(el("option", { value: id }, visible(id, 60)));
    }
  };
  const draw = atMostEvery(DRAW, () => {
    if (signal.aborted) return;
    know(waiting.map((line) => line.member));
    list.append(...waiting.map((line) => row(line, run, () => { following.checked = false; })));
    waiting = [];
    while (list.childElementCount > SHOWN) list.firstChild.remove();
    const shown = list.childElementCount;
    about.textContent = shown === SHOWN ? `the newest ${SHOWN.toLocaleString("en")} lines` : count(shown, "line");
    empty.hidden = shown > 0;
    empty.textContent = shown ? "" : connection === "connecting" ? "Loading" : "No line that fits was logged, of the last 20,000 of the fleet.";
    link.className = `live ${connection}`;
    link.lastChild.textContent = { open: "live", away: "trying again", connecting: "connecting" }[connection];
    if (following.checked) toEnd();
  });
  const restart = () => {
    stop.abort();
    stop = new AbortController();
    const mine = AbortSignal.any([signal, stop.signal]);
    const wanted = { level: level.value === "debug" ? "" : level.value, role: role.value, member: member.value, text: text.value };
    remember(wanted);
    waiting = [];
    connection = "connecting";
    fill(list);
    fill(fault);
    following.checked = true;
    follow("logs", {
      params: { run, ...wanted, limit: SHOWN }, signal: mine,
      on: (_, lines) => { if (!mine.aborted) { waiting = [...waiting, ...lines].slice(-SHOWN); draw(); } },
      connection: (now) => { if (!mine.aborted) { connection = now; draw(); } },
    }).catch((error) => { fill(fault, problemBox(error)); say(error.message); });
    draw();
  };
  level.addEventListener("change", restart);
  role.addEventListener("change", restart);
  signal.addEventListener("abort", () => clearTimeout(typing), { once: true });

  member.append(el("option", { value: "" }, "every one"));
  const wantedMember = query.get("member");
  if (wantedMember) {
    know([wantedMember]);
    member.value = wantedMember;
  }
  fill(body,
    el("div", { class: "row filters" },
      labelled("Show", level), labelled("of", role), labelled("Process", member), labelled("Text", text),
      el("span", { class: "row" }, following, el("label", { htmlFor: "log-follow" }, "Follow"))),
    el("div", { class: "spread" }, about, link), fault, box);
  restart();
  know((await get("fleet", {}, signal)).members.map((one) => one.member_id));
}

function choice(id, options, value) {
  return el("select", { id }, Object.entries(options).map(([name, text]) => el("option", { value: name, selected: name === value }, text)));
}

const labelled = (text, field) => el("span", { class: "row" }, el("label", { htmlFor: field.id }, text), field);

/** The filter in the address, without another entry in the browser's history. */
function remember(wanted) {
  const query = new URLSearchParams(Object.entries(wanted).filter(([, value]) => value));
  history.replaceState(history.state, "", `#/${place().path}${query.size ? `?${query}` : ""}`);
}

function row(line, run, opened) {
  const data = Object.entries(line.data).map(([name, value]) => `${name}=${value}`).join(" ");
  const version = line.version === null ? "" : `v${line.version} `;
  return el("li", { data: { level: line.level } },
    el("span", { class: "soft", title: clock(line.at) }, timeOfDay(line.at)),
    el("span", { class: `state ${STATES[line.level] ?? line.level}` }, line.level),
    el("span", { title: `${visible(line.role, 60)}, process ${line.pid} on ${visible(line.host, 80)}` }, visible(line.member, 60)),
    el("div", { class: "said" },
      !run && line.run_id ? [el("a", { class: "small", href: `#/runs/${part(line.run_id.split("~")[0])}` }, visible(line.run_id, 80)), " "] : null,
      version, el("span", { class: "text" }, nodesOf(line.text)),
      data ? [" ", el("span", { class: "text soft" }, nodesOf(data))] : null,
      line.traceback ? trace(line.traceback, opened) : null));
}

/** Folded; its last line, which names the error, is the summary. */
function trace(text, opened) {
  const last = text.trimEnd().split("\n").at(-1);
  const details = el("details", { ontoggle: () => {
    if (!details.open) return;
    opened();
    if (details.childElementCount === 1) details.append(textBlock(text, "Traceback"));
  } }, el("summary", {}, el("span", { class: "text" }, visible(last, 300))));
  return details;
}
