"""The runs of a study as its analysis reads them: their curves, and the numbers that a claim's metric names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from services.contracts.spec import RunSpec
from services.contracts.states import RunState
from services.contracts.views import StepView
from services.studies.curves import AT_KL, Curve, Values, reduced, run_values
from services.studies.plots import column

KL = "kl_step_k3_nats"
"""KL of the policy before a step to the one after it, summed over versions as an axis: never negative, so that the sum only rises."""
KL_WITHOUT_PROBE = "kl_behaviour_k3_nats"
"""What stands for it in a run without a probe: KL of the sampler to the current policy, next to 0 for one update on fresh samples."""
Axis = Literal["rollouts", "updates", "kl"]


class Evaluated(Protocol):
    """One evaluation of one version on one set, as a record or as the API answers it."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def values(self) -> Mapping[str, float | None]: ...


@dataclass(frozen=True)
class RunData:
    """One run of a study with all that it measured."""

    run_id: str
    arm: str
    seed: int
    state: RunState
    reason: str
    """Why it is in that state, when there is more to say."""
    spec: RunSpec
    steps: Sequence[StepView]
    """In order of versions."""
    evaluations: Sequence[Evaluated] = ()


def by_arm_and_seed(runs: Sequence[RunData]) -> dict[tuple[str, int], RunData]:
    """The run of each arm and seed; of several, the last that completed, or the last."""
    table: dict[tuple[str, int], RunData] = {}
    for run in sorted(runs, key=lambda run: run.state is RunState.COMPLETED):
        table[run.arm, run.seed] = run
    return table


def metric(run: RunData, name: str) -> float | None:
    """The number that `steps.KEY.REDUCER`, `evaluation.SET.KEY.REDUCER` or `run.KEY` names; None where the run did not measure it."""
    source, *parts = name.split(".")
    steps = [(step.version, step.values) for step in run.steps]
    kl = Curve(np.array([step.version for step in run.steps], dtype=np.float64), kl_of_steps(run)) if AT_KL.fullmatch(parts[-1]) else None
    if source == "run":
        value = run_values(steps).get(parts[0])
    elif source == "steps":
        value = reduced(Curve.of(steps, parts[0]), parts[1], kl=kl)
    else:
        evaluated = [(one.version, one.values) for one in run.evaluations if one.name == parts[0]]
        value = reduced(Curve.of(evaluated, parts[1]), parts[2], width=1, kl=kl)
    return value if value is not None and math.isfinite(value) else None


def spent(run: RunData, axis: Axis) -> Values:
    """(steps,) what the run had spent by the end of each step: completions trained on, optimiser updates, or nats of KL per token."""
    if axis == "rollouts":
        each = np.array([run.spec.group_size * len(step.groups) for step in run.steps], dtype=np.float64)
    elif axis == "updates":
        updates = column(run.steps, "updates")
        each = np.where(np.isfinite(updates), updates, run.spec.updates_per_batch) * _counts(run)
    else:
        each = kl_of_steps(run)
    return np.cumsum(each)


def kl_of_steps(run: RunData) -> Values:
    """(steps,) nats of KL per token of each step. The probe is taken every few versions: what it measured stands for the versions up to the next one
    (and the first of all for those before it)."""
    known = np.flatnonzero(np.isfinite(measured := column(run.steps, KL)))
    if len(known):
        each = measured[known[np.maximum(np.searchsorted(known, np.arange(len(measured)), side="right") - 1, 0)]]
    else:
        each = np.nan_to_num(column(run.steps, KL_WITHOUT_PROBE), nan=0.0, posinf=0.0)
    return each * _counts(run)


def _counts(run: RunData) -> Values:
    return np.array([step.count for step in run.steps], dtype=np.float64)


def entropy_at_end(run: RunData) -> float | None:
    """Nats per token, of the final policy on fresh samples where it was evaluated: the estimate of the last version's evaluation on the first set in
    the domain of training, whose prompts are the same for all arms. Else the exact entropy of the last five batches, which under lag are an older
    policy's samples."""
    name = next((one.name for one in run.spec.evaluation.sets if one.domain == "in"), None)
    evaluated = Curve.of(((one.version, one.values) for one in run.evaluations if one.name == name), "entropy_estimate_nats")
    if len(evaluated) and run.steps and evaluated.versions[-1] >= run.steps[-1].version:
        return float(evaluated.values[-1])
    return metric(run, "steps.entropy_nats.end")


def total(run: RunData, key: str) -> float | None:
    """Sum over the run of what each step measured under `key`; steps without it (a probe is taken every few versions) count as the mean of those
    with it. None where none has it."""
    values, counts = column(run.steps, key), _counts(run)
    known = np.isfinite(values)
    return float(np.average(values[known], weights=counts[known]) * counts.sum()) if known.any() else None
