// Every process that lives, and what each one does.
import { get, part } from "../api.js";
import { el, fill, refill, table } from "../dom.js";
import { clock, count } from "../format.js";
import { visible } from "../text.js";
import { every } from "../timer.js";

const REFRESH = 2_000;
const COLUMNS = [["Process", "wide"], ["Role", ""], ["State", ""], ["Run", "wide"], ["Version", "number"], ["Idle now", "number"], ["Host", "wide"], ["Since", ""]];
const ROLES = { control_plane: "control plane", rollout: "rollout server", reward: "reward server", trainer: "trainer" };

export async function fleetPage(main, _, query, signal) {
  const list = el("div");
  const sums = el("p", { class: "soft", id: "fleet-sums" });
  const before = new Map();
  fill(main, el("h1", {}, "Fleet"), sums, list);
  const show = async () => {
    const { members } = await get("fleet", {}, signal);
    sums.textContent = Object.entries(ROLES).map(([role, name]) => count(members.filter((member) => member.role === role).length, name)).join(", ");
    refill(list, members.length ? table("Processes", COLUMNS, members.map((member) => row(member, before))) : el("p", { class: "card empty" }, "No process has given a sign of life in the last 6 seconds."));
    for (const member of members) before.set(member.member_id, member);
  };
  await show();
  every(REFRESH, show, signal);
}

function row(member, before) {
  const run = member.run_id ?? member.assigned;
  return [
    [el("a", { href: `#/logs?member=${part(member.member_id)}`, title: "Its log" }, visible(member.member_id)), el("div", { class: "small soft" }, visible(member.url))],
    ROLES[member.role] ?? visible(member.role),
    [el("span", { class: `state ${member.ready ? "ready" : "warning"}` }, member.ready ? "ready" : "not ready"), el("div", { class: "small soft" }, visible(member.detail, 200))],
    run ? el("a", { href: `#/runs/${part(run)}` }, visible(run)) : "\u2013",
    member.version === null ? "\u2013" : String(member.version),
    idle(member, before.get(member.member_id)),
    `${visible(member.host)} (${member.pid})`,
    clock(member.started_at),
  ];
}

/** Share of the time between its last two signs of life without work. */
function idle(member, was) {
  if (!was || was.started_at !== member.started_at || member.beat_at <= was.beat_at) return (member.idle = was?.idle ?? "\u2013");
  const share = (member.idle_seconds - was.idle_seconds) / (member.beat_at - was.beat_at);
  return (member.idle = `${Math.round(100 * Math.min(1, Math.max(0, share)))} %`);
}
