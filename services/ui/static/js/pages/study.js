// A study: its arms side by side, how far its runs are, and what they say of its claims.
import { get, part, post } from "../api.js";
import { confirmed, el, fill, refill, table } from "../dom.js";
import { count, number } from "../format.js";
import { MEASUREMENTS, overlays, stepsOf } from "../overlay.js";
import { problemBox } from "../problems.js";
import { visible } from "../text.js";
import { every } from "../timer.js";
import { counts } from "./studies.js";

const REFRESH = 5_000;
const COLOURS = 8;
const DRAWN = 8; // arms whose curves are drawn at first: more cannot be told apart at a glance
const SAYS = { holds: "good", differs: "good", "does not hold": "bad" };

export async function studyPage(main, { study: studyId }, query, signal) {
  const path = `studies/${part(studyId)}`;
  let study = await get(path, {}, signal);
  const answer = el("div");
  const [states, arms, claims, curves] = Array.from({ length: 4 }, () => el("div"));
  const moves = el("div", { class: "row" });
  const key = el("select", { id: "key", onchange: () => draw() }, Object.entries(MEASUREMENTS).map(([name, [title]]) => el("option", { value: name }, title)));
  let charts = [];
  let decided = -1;
  let asked = 0;
  const fetched = new Map();
  const drawn = new Set(study.spec.arms.slice(0, DRAWN).map((arm) => arm.name));

  const draw = async () => {
    const mine = ++asked;
    const shown = study.spec.arms.filter((arm) => drawn.has(arm.name));
    const runs = study.runs.filter((run) => run.run_id && run.version && drawn.has(run.arm));
    const found = await Promise.all(runs.map((run) => known(run)));
    if (mine !== asked || signal.aborted) return;
    const lines = shown.map((arm, i) => ({ label: visible(arm.name, 60), colour: (i % COLOURS) + 1, dash: i >= COLOURS, steps: meanOf(found.filter((_, k) => runs[k].arm === arm.name)) }));
    for (const chart of charts) chart.close();
    charts = overlays(lines, path, [key.value]);
    fill(curves, el("p", { class: "soft small" }, `${drawn.size} of ${count(study.spec.arms.length, "arm")} drawn; the ticks in the table above choose. A mean ends where the slowest of its seeds is.`), charts.map((chart) => chart.node));
  };
  const tick = (arm) => el("input", { type: "checkbox", "aria-label": `Draw ${visible(arm.name, 60)}`, checked: drawn.has(arm.name), onchange: ({ target }) => {
    if (target.checked) drawn.add(arm.name);
    else drawn.delete(arm.name);
    return draw();
  } });
  const known = async (run) => {
    const at = fetched.get(run.run_id);
    if (at?.version === run.version) return at.steps;
    const steps = await stepsOf(run.run_id, signal);
    fetched.set(run.run_id, { version: run.version, steps });
    return steps;
  };
  const show = () => {
    const done = study.runs.reduce((sum, run) => sum + (run.version ?? 0), 0);
    const all = study.runs.reduce((sum, run) => sum + run.versions, 0);
    fill(states, counts(study.counts), el("progress", { max: all, value: done, "aria-label": `${done} of ${all} versions` }), el("p", { class: "small soft" }, `${number(done)} of ${number(all)} versions`));
    refill(arms, table("Arms", [["Drawn", ""], ["Arm", "wide"], ["Changes", "wide"], ["Runs by seed", "wide"]], study.spec.arms.map((arm) => [tick(arm), visible(arm.name), changesOf(arm), cells(study.runs.filter((run) => run.arm === arm.name))])));
    refill(moves, ["pause", "resume", "cancel"].map((action) => el("button", { class: action === "cancel" ? "danger" : null, disabled: Boolean(study.cancelled_at), onclick: () => move(action) }, { pause: "Pause", resume: "Resume", cancel: "Cancel" }[action])));
  };
  const decide = async () => {
    const completed = study.counts.completed ?? 0;
    if (!study.spec.claims.length || completed === decided) return;
    decided = completed;
    fill(claims, verdictTable((await get(`${path}/verdicts`, {}, signal)).verdicts));
  };
  const move = async (action) => {
    if (action === "cancel" && !(await confirmed(`Cancel all runs of ${visible(studyId)} for good?`, "Cancel the study"))) return;
    try {
      study = await post(`${path}/${action}`);
      fill(answer);
      show();
    } catch (error) {
      fill(answer, problemBox(error));
    }
  };
  fill(main,
    el("div", { class: "spread" }, el("h1", {}, visible(study.study_id)), moves), answer,
    study.spec.text ? el("p", {}, visible(study.spec.text)) : null,
    study.warnings.map((warning) => el("p", { class: "note" }, visible(warning))),
    states, el("h2", {}, "Arms"), arms,
    el("h2", {}, "Claims"), claims,
    el("div", { class: "spread" }, el("h2", {}, "Curves, mean over seeds"), el("div", { class: "row" }, el("label", { htmlFor: "key" }, "Measurement"), key)), curves);
  show();
  fill(claims, el("p", { class: "soft" }, study.spec.claims.length ? "Reading the runs" : "It has none."));
  signal.addEventListener("abort", () => { for (const chart of charts) chart.close(); }, { once: true });
  const shownOnce = Promise.all([draw(), decide()]);
  every(REFRESH, async () => {
    const before = JSON.stringify(study.counts);
    study = await get(path, {}, signal);
    show();
    if (study.counts.running || JSON.stringify(study.counts) !== before) await draw();
    await decide();
  }, signal);
  await shownOnce;
}

function changesOf(arm) {
  const set = Object.entries(arm.set).map(([name, value]) => `${name} = ${JSON.stringify(value)}`);
  return visible([arm.like ? `as ${arm.like}` : "", ...set].filter(Boolean).join(", ") || "nothing: the base run", 500);
}

function cells(runs) {
  return el("span", { class: "cells" }, runs.map((run) => {
    const words = `seed ${run.seed}: ${run.state ?? "missing"}`;
    const inside = [el("span", { class: `state ${run.state ?? "missing"}` }, `${run.seed}`), run.state === "running" ? ` ${Math.floor((100 * (run.version ?? 0)) / run.versions)} %` : ""];
    return run.run_id ? el("a", { href: `#/runs/${part(run.run_id)}`, title: words, "aria-label": words }, inside) : el("span", { class: "cell", title: words }, inside, el("span", { class: "visually-hidden" }, " missing"));
  }));
}

function verdictTable(verdicts) {
  return table("Verdicts", [["Claim", ""], ["Statement", "wide"], ["Verdict", ""], ["Effect, 95 % interval", "number"], ["Seeds", "number"], ["p", "number"], ["Why", "wide"]],
    verdicts.map((v) => [
      visible(v.id), [visible(v.text), el("div", { class: "small soft mono" }, visible(v.formula))], el("span", { class: `says ${SAYS[v.reads] ?? "open"}` }, v.reads),
      v.low === null ? number(v.effect) : `${number(v.effect)} [${number(v.low)}, ${number(v.high)}]`, number(v.seeds), number(v.p),
      [visible(v.why), ...v.excluded.map((line) => el("div", { class: "small soft" }, visible(line)))],
    ]));
}

/** Mean of several runs' steps at the versions that all of them have. */
function meanOf(runs) {
  const measured = runs.filter((steps) => steps.length);
  if (measured.length < 2) return measured[0] ?? [];
  const tables = measured.map((steps) => new Map(steps.map((step) => [step.version, step.values])));
  return measured[0].filter((step) => tables.every((one) => one.has(step.version))).map(({ version }) => ({
    version,
    values: Object.fromEntries(Object.keys(MEASUREMENTS).map((name) => {
      const values = tables.map((one) => one.get(version)[name]).filter((value) => value !== null && value !== undefined);
      return [name, values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null];
    })),
  }));
}
