// All studies, newest first.
import { get, part } from "../api.js";
import { el, fill, refill, table } from "../dom.js";
import { clock, number } from "../format.js";
import { visible } from "../text.js";
import { every } from "../timer.js";

const REFRESH = 5_000;
const COLUMNS = [["Study", "wide"], ["Arms", "number"], ["Seeds", "number"], ["Claims", "number"], ["Runs", "wide"], ["Submitted", ""]];

export async function studiesPage(main, _, query, signal) {
  const list = el("div");
  fill(main, el("h1", {}, "Studies"), list);
  const show = async () => {
    const { studies } = await get("studies", {}, signal);
    refill(list, studies.length
      ? table("Studies", COLUMNS, studies.map((study) => [
          el("a", { href: `#/studies/${part(study.study_id)}` }, visible(study.study_id)), number(study.arms), number(study.seeds), number(study.claims),
          counts(study.counts), clock(study.created_at),
        ]))
      : el("p", { class: "card empty" }, "No study yet. ", el("code", {}, "offbeat study run FILE"), " submits one."));
  };
  await show();
  every(REFRESH, show, signal);
}

export const counts = (states) => el("span", { class: "row" }, Object.entries(states).map(([state, many]) => el("span", { class: `state ${state}` }, `${many} ${state}`)));
