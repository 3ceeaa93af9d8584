"""The report of a study: a single HTML file that needs no network, with its figures inside; beside it the figures as PNG files and the numbers as CSV
and Parquet. Works with what there is: runs that go on, or none yet.

Texts of users and processes are data: they are made harmless, escaped by the template engine, and the page's own policy forbids scripts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w

from services.contracts.measures import EVALUATION_KEYS, REDUCERS, RUN_KEYS, STEP_KEYS
from services.contracts.states import RunState
from services.contracts.study import DECIDED, TESTED, StudySpec, metric_parts
from services.contracts.views import StudyRunView, StudyView
from services.studies.claims import in_words
from services.studies.correlations import Correlation, correlations_with_entropy
from services.studies.display import duration, harmless, number, one_line
from services.studies.page import clock, inlined, template
from services.studies.study_data import RunData, by_arm_and_seed
from services.studies.study_plots import drawings
from services.studies.study_tables import run_rows, step_rows, write_tables
from services.studies.verdicts import LEVEL, Decision, Verdict, claim_number, interval_text, markdown_verdicts, verdicts_of

CLASSES = {Decision.HOLDS: "holds", Decision.DOES_NOT_HOLD: "alarm", Decision.NOT_SEPARABLE: "soft", Decision.NO_DATA: "soft"}


def write_study_report(folder: Path, study: StudyView, runs: Sequence[RunData]) -> tuple[Path, list[Verdict]]:
    """Write report.html, the figures, the tables and verdicts.md into `folder`; the page's path, and the verdicts in the order of the claims."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = study.spec
    verdicts = verdicts_of(spec, runs)
    correlated = correlations_with_entropy([run for run in by_arm_and_seed(runs).values() if run.state is RunState.COMPLETED])
    drawn, left_out = drawings(spec, runs, verdicts, correlated)
    figures = [
        {"name": (path := drawing.save(folder)).name, "title": one_line(drawing.title), "caption": drawing.caption, "data": inlined(path)}
        for drawing in drawn
    ]
    tables = [path.name for name, rows in (("runs", run_rows(spec, runs)), ("steps", step_rows(runs))) for path in write_tables(folder, name, rows)]
    page = template("study_report.html.j2").render(
        name=one_line(study.name),
        study_id=study.study_id,
        text=harmless(spec.text),
        made=clock(datetime.now(UTC).timestamp()),
        warnings=[one_line(warning) for warning in study.warnings],
        rows=summary_rows(study),
        groups=verdict_groups(verdicts),
        chance=chance_text(spec),
        arms=arm_rows(study),
        excluded=excluded_rows(study),
        left_out=[one_line(sentence) for sentence in left_out],
        figures=figures,
        correlated=[_correlation_view(one) for one in correlated],
        tables=tables,
        spec=harmless(study_toml(spec)),
        tested=TESTED,
        decided=DECIDED,
        level=LEVEL,
    )
    (folder / "verdicts.md").write_text(markdown_verdicts(verdicts), encoding="utf-8")
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path, verdicts


def summary_rows(study: StudyView) -> list[tuple[str, str]]:
    """What was run, as lines of label and value."""
    spec = study.spec
    states = Counter("missing" if run.state is None else run.state.value for run in study.runs)
    started, ended = [run.started_at for run in study.runs if run.started_at], [run.ended_at for run in study.runs if run.ended_at]
    budget = " and ".join(f"{value:,} {name}" for name, value in (("rollouts", spec.budget.rollouts), ("updates", spec.budget.updates)) if value)
    went_on = duration(max(ended) - min(started)) if started and ended else "-"
    worked = sum(run.ended_at - run.started_at for run in study.runs if run.started_at and run.ended_at)
    return [
        ("runs", f"{len(spec.arms)} arms x {len(spec.seeds)} seeds: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}"),
        ("seeds", ", ".join(map(str, spec.seeds))),
        (
            "budget of a run",
            f"{budget}{', the one that ends first' if spec.budget.rollouts and spec.budget.updates else ''}; an arm may have its own",
        ),
        ("submitted", clock(study.created_at)),
        ("time", f"{went_on} from the first version to the last end; {duration(worked)} over all runs"),
    ]


def verdict_groups(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The verdicts by the number before the dot, each as the page shows it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for v in verdicts:
        metrics = [{"name": name, "meaning": meaning(name)} for name in v.claim.metrics]
        shown = {
            "id": v.claim.id, "text": one_line(v.claim.text), "reads": v.reads, "kind": CLASSES[v.decision], "effect": interval_text(v), "n": v.n,
            "p": number(v.p), "size": number(v.effect_size, 2), "why": v.why, "formula": in_words(v.claim), "metrics": metrics,
            "per_seed": [(seed, number(value, 4)) for seed, value in v.per_seed.items()], "excluded": [one_line(line) for line in v.excluded],
        }  # fmt: skip
        groups.setdefault(claim_number(v.claim.id), []).append(shown)
    return [{"number": name, "verdicts": members} for name, members in groups.items()]


def meaning(name: str) -> str:
    """What a metric measures, in words."""
    source, *parts = metric_parts(name)
    if source == "run":
        return RUN_KEYS[parts[0]]
    key, _, part = parts[-2].partition("/")
    what = STEP_KEYS[key] if source == "steps" else f"{EVALUATION_KEYS[key]}, on {parts[0]}"
    how = REDUCERS.get(parts[-1], f"value where the summed KL reaches {parts[-1].removeprefix('at_kl_').replace('m', ' thousandths')} of a nat")
    return f"{what}{f' (of {part})' if part else ''}; {how}"


def chance_text(spec: StudySpec) -> str:
    """How many one-sided claims would hold by chance alone."""
    n, claims = len(spec.seeds), sum(claim.direction in ("greater", "less") for claim in spec.claims)
    if n < DECIDED or not claims:
        return ""
    attainable = math.floor(LEVEL * 2**n) / 2**n if n >= TESTED else 2.0**-n
    return (
        f"If there were nothing in any of the {claims} one-sided claims, with {n} seeds about {number(claims * attainable, 1)} of them would hold "
        "all the same: verdicts are not corrected for their number."
    )


def arm_rows(study: StudyView) -> list[dict[str, str]]:
    """The arms: what each changes, how long its runs are, and what became of them."""
    rows = []
    for arm in study.spec.arms:
        own = [run for run in study.runs if run.arm == arm.name]
        states = Counter("missing" if run.state is None else run.state.value for run in own)
        changes = study.spec.overrides(arm.name)
        rows.append({
            "name": arm.name,
            "set": one_line(", ".join(f"{name} = {value}" for name, value in changes.items()), 400) or "nothing: the base run",
            "factors": one_line(", ".join(f"{name} = {value}" for name, value in arm.factors.items()), 400),
            "versions": f"{study.spec.run(arm.name, study.spec.seeds[0]).versions:,}",
            "states": ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "-",
        })  # fmt: skip
    return rows


def excluded_rows(study: StudyView) -> list[dict[str, str]]:
    """The runs that no verdict counts, and why."""
    return [
        {"arm": run.arm, "seed": str(run.seed), "run": run.run_id or "-", "state": _state(run), "reason": one_line(run.reason) or "-"}
        for run in study.runs
        if run.state is not RunState.COMPLETED
    ]


def _state(run: StudyRunView) -> str:
    return "missing: not made yet" if run.state is None else run.state.value


def _correlation_view(one: Correlation) -> dict[str, str]:
    interval = "-" if one.low is None else f"{number(one.low, 2)} to {number(one.high, 2)}"
    return {
        "key": one.key,
        "meaning": EVALUATION_KEYS[one.key],
        "set": one.name,
        "rho": number(one.rho, 2),
        "interval": interval,
        "runs": str(one.runs),
    }


def study_toml(spec: StudySpec) -> str:
    """The study as a file that `offbeat study run` takes."""
    return tomli_w.dumps(_without_none(spec.model_dump(mode="json", exclude_none=True)))


def _without_none(value: Any) -> Any:
    """TOML has no null; in a spec it says no more than the field's absence."""
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value if one is not None] if isinstance(value, list) else value
