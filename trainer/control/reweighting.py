"""Positive-Advantage Reweighting (arXiv 2511.05993; v1 calls it Progressive): the loss of tokens with positive advantage is multiplied by lambda.

    stage      0 while k < K / 2, then (k - K / 2) / (K / 2), at version k of K
    epoch      (e - 1) / (E - 1), in epoch e of E; 1 in a run of one epoch
    constant   `start`
    entropy    lambda <- lambda - step if H < target, else lambda + step, after each version of entropy H

All are kept in [floor, 1]. The paper has start 0, floor 0, step 0.05, target 0.2 and no guard, which can latch up: see `trainer.control.guard`.
H is the trainer's entropy on tokens of mean lag s, so what lambda does to it is seen s versions late, and a rule that only knows up and down
overshoots by about step * s. `lag_scaled` makes the step step / (1 + s). While the guard is awake lambda rises by the whole step.
"""

from __future__ import annotations

import math

from services.contracts.algorithms import PositiveReweighting
from trainer.control import guard
from trainer.control.actuators import Progress, Reading
from trainer.control.state import State


def start(settings: PositiveReweighting) -> State:
    return {"positive_weight": settings.start} | guard.start() if settings.schedule == "entropy" else {}


def update(settings: PositiveReweighting, state: State, reading: Reading) -> State:
    """The state after a step; as it was, if the step measured nothing."""
    if settings.schedule != "entropy" or not all(map(math.isfinite, (reading.entropy, reading.lag, reading.reward))):
        return state
    state = guard.watch(start(settings) | state, reading.reward, drop=settings.guard_drop)
    change = settings.step / (1 + max(0.0, reading.lag)) if settings.lag_scaled else settings.step
    if settings.guard and guard.awake(state):
        change = settings.step
    elif reading.entropy < settings.target:
        change = -change
    return state | {"positive_weight": _bounded(settings, state["positive_weight"] + change), "entropy": reading.entropy}


def weight(settings: PositiveReweighting, state: State, progress: Progress) -> float:
    """lambda of the step at `progress`."""
    if settings.schedule == "stage":
        half = progress.versions / 2
        return _bounded(settings, (progress.version - half) / half)
    if settings.schedule == "epoch":
        return _bounded(settings, (progress.epoch - 1) / (progress.epochs - 1) if progress.epochs > 1 else 1.0)
    if settings.schedule == "constant":
        return _bounded(settings, settings.start)
    return _bounded(settings, (start(settings) | state)["positive_weight"])


def _bounded(settings: PositiveReweighting, value: float) -> float:
    return min(1.0, max(settings.floor, value))
