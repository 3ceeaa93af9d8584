"""Tables of a run's report: what the run came to, and every measurement with its first and its last value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from services.contracts.measures import BINNED, BINS, EVALUATION_KEYS, RUN_KEYS, STEP_KEYS
from services.contracts.views import EvaluationView, StepView
from services.studies.curves import BUDGET_LEAST, FIT_LEAST, WIDTH, Curve, run_values
from services.studies.display import number

Measured = Mapping[str, float | None]
"""What a step or an evaluation measured."""
UNITS: dict[str, str] = {
    "entropy_half_life": "versions", "entropy_auc": "nats per token", "entropy_log_slope": "per version", "entropy_floor": "nats per token",
    "fit_r2": "of 1", "fit_a": "reward per unit of exp(entropy)", "fit_ceiling": "reward", "budget_slope": "nats per token, per predicted unit",
    "budget_r2": "of 1",
}  # fmt: skip
NO_FIT = f"not defined: fewer than {FIT_LEAST} blocks of {WIDTH} versions up to the peak of the reward, or they do not differ"
NO_BUDGET = f"not defined: fewer than {BUDGET_LEAST} versions measured both changes, or they do not differ"
UNDEFINED: dict[str, str] = {
    "entropy_half_life": "not reached: the entropy stayed above half of its start",
    "entropy_auc": "not defined: it takes two versions",
    "entropy_log_slope": "not defined: the last fifth of the run has fewer than two versions with an entropy above 0",
    "fit_r2": NO_FIT, "fit_a": NO_FIT, "fit_ceiling": NO_FIT, "budget_slope": NO_BUDGET, "budget_r2": NO_BUDGET,
}  # fmt: skip
"""Why a value of a run that measured its entropy may be missing."""
ENDS = 10
"""Versions in the means over the beginning and the end of a run; as many as the summary takes."""


@dataclass(frozen=True)
class Outcome:
    """One value that a whole run comes to."""

    key: str
    value: str
    """With its unit, or why there is none."""
    meaning: str


@dataclass(frozen=True)
class Measurement:
    """One key over a run, as text."""

    key: str
    meaning: str
    first: str
    last: str
    least: str
    greatest: str


def outcomes(steps: Sequence[StepView]) -> list[Outcome]:
    """What the run came to, every RUN_KEY: one that is not defined says why."""
    curves = [(step.version, step.values) for step in steps]
    values, measured = run_values(curves), len(Curve.of(curves, "entropy_nats")) > 0
    return [Outcome(key, _outcome(key, values.get(key), values, measured=measured), meaning) for key, meaning in RUN_KEYS.items()]


def _outcome(key: str, value: float | None, values: Mapping[str, float], *, measured: bool) -> str:
    if value is None:
        return UNDEFINED[key] if measured or key.startswith("budget") else "not defined: no entropy was measured"
    told = f"version {value:.0f}" if key == "entropy_half_life" else number(value, 4, UNITS[key])
    if key == "fit_ceiling":
        told += f", extrapolated with R² = {number(values['fit_r2'], 2)}"
        if values["fit_a"] < 0:
            told += "; no ceiling, since a is negative: reward rose with entropy"
    return told


def step_measurements(steps: Sequence[StepView]) -> list[Measurement]:
    """Every key that a step measured, in the catalogue's order, the whole before its bins: means over the first and the last ten versions."""
    return _measurements([step.values for step in steps], STEP_KEYS, ends=ENDS)


def evaluation_measurements(evaluations: Sequence[EvaluationView]) -> dict[str, list[Measurement]]:
    """By set: every key that its evaluations measured, at the first and at the last evaluated version."""
    by_set: dict[str, list[Measured]] = {}
    for one in evaluations:
        by_set.setdefault(one.name, []).append(one.values)
    return {name: _measurements(values, EVALUATION_KEYS, ends=1) for name, values in by_set.items()}


def _measurements(measured: Sequence[Measured], catalogue: Mapping[str, str], *, ends: int) -> list[Measurement]:
    there = {key for values in measured for key in values}
    ordered = [key for name in catalogue for key in (name, *_bins(name)) if key in there]
    rows = []
    for key in [*ordered, *sorted(there.difference(ordered))]:  # a newer trainer may measure what this catalogue does not know
        known = [value for values in measured if (value := values.get(key)) is not None and math.isfinite(value)]
        if known:
            ends_of = (fmean(known[:ends]), fmean(known[-ends:]), min(known), max(known))
            rows.append(Measurement(key, catalogue.get(key.partition("/")[0], ""), *(number(value, 4) for value in ends_of)))
    return rows


def _bins(name: str) -> list[str]:
    return [f"{name}/{by}/{one}" for by in BINNED.get(name, ()) for one in BINS[by]]
