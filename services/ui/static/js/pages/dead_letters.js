// What could not be processed, to be looked at and generated again.
import { get, part, post } from "../api.js";
import { el, fill, refill, table } from "../dom.js";
import { clock } from "../format.js";
import { problemBox } from "../problems.js";
import { textBlock, visible } from "../text.js";
import { every } from "../timer.js";

const REFRESH = 5_000;
const MOST = 200;
const COLUMNS = [["Run", "wide"], ["Group", "number"], ["Given up at", ""], ["Reason", "wide"], ["What it was", "wide"], ["Again", ""]];

export async function deadLettersPage(main, _, query, signal) {
  const list = el("div");
  fill(main, el("h1", {}, "Dead letters"), el("p", { class: "soft" }, "Work that was given up, with its reason. Nothing is lost: a group that could be read can be generated again."), list);
  await letters(list, { run: query.get("run") ?? undefined }, signal);
}

/** The letters in `list`, as they come; `replayed` is called after one went back to work. */
export async function letters(list, params, signal, replayed = () => undefined) {
  const answer = el("div", { "aria-live": "polite", tabIndex: -1 });
  const note = el("p", { class: "note", hidden: true }, `The newest ${MOST} are shown; those of one run are on its page, below Groups.`);
  const rows = el("div");
  let asked = 0;
  const show = async () => {
    const mine = ++asked;
    const found = (await get("dead-letters", { ...params, limit: MOST }, signal)).letters;
    if (mine !== asked) return; // what was asked before a replay still has its letter
    note.hidden = found.length < MOST;
    refill(rows, found.length
      ? table("Dead letters", COLUMNS, found.map((letter) => row(letter, again)), found.map((letter) => [letter.run_id, letter.evaluation, letter.id].join()))
      : el("p", { class: "card empty" }, "None: everything was processed."));
  };
  const again = async (letter) => {
    try {
      const done = await post(`dead-letters/${part(letter.run_id)}/${part(letter.id)}/replay`);
      fill(answer, el("p", { class: "done" }, `Group ${done.index} will be generated again`));
      replayed();
    } catch (error) {
      fill(answer, problemBox(error));
    }
    await show();
    answer.focus();
  };
  fill(list, answer, note, rows);
  await show();
  every(REFRESH, show, signal);
}

function row(letter, again) {
  return [
    [el("a", { href: `#/runs/${part(letter.run_id)}/groups` }, visible(letter.run_id)), letter.evaluation ? el("div", { class: "small soft" }, `evaluation ${visible(letter.evaluation)}`) : null],
    letter.index === null ? "\u2013" : String(letter.index),
    [visible(letter.stream), el("div", { class: "small soft" }, clock(letter.at))],
    visible(letter.reason),
    letter.prompt === null ? textBlock(letter.raw) : textBlock(letter.prompt),
    letter.replayable ? el("button", { onclick: () => again(letter) }, "Replay") : el("span", { class: "soft small" }, "cannot be replayed"),
  ];
}
