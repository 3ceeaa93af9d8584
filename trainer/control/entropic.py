"""EntroPIC (arXiv 2511.15248): proportional-integral control of entropy by the tokens that the policy is sure of.

    e = H - target        alpha = clip(Kp e + Ki sum(e), -1, 1), over the versions so far

alpha weighs an extra loss, the mean of -r |A| over tokens of high probability: below the target alpha is negative and takes weight from sure tokens
of positive advantage, gives it to those of negative advantage. The proportional part alone stops where its push equals the run's own drift, at a
steady error of drift / Kp; the sum removes it. The authors' code has Kp 1, Ki 0.01, target 0.1 and lets the sum grow without bound, so that a long
climb to the target is paid for by as long an overshoot. Here the sum is held, where alpha is at its bound and e would push it further, and
Ki |sum| <= 1 (anti-windup).
"""

from __future__ import annotations

import math

from services.contracts.algorithms import EntroPic
from trainer.control.actuators import Reading
from trainer.control.state import State


def start(settings: EntroPic) -> State:
    return {"error_sum": 0.0}


def update(settings: EntroPic, state: State, reading: Reading) -> State:
    """The state after a step; as it was, if the step measured nothing."""
    if not math.isfinite(reading.entropy):
        return state
    state = start(settings) | state
    error = reading.entropy - settings.target
    before = settings.proportional * error + settings.integral * state["error_sum"]
    total = state["error_sum"]
    if settings.integral > 0 and not (abs(before) >= 1 and before * error > 0):
        total = _clip(total + error, 1 / settings.integral)
    return state | {"error_sum": total, "entropy": reading.entropy}


def alpha(settings: EntroPic, state: State) -> float:
    """alpha of the next step: 0 until an entropy was measured."""
    if "entropy" not in state:
        return 0.0
    return _clip(settings.proportional * (state["entropy"] - settings.target) + settings.integral * (start(settings) | state)["error_sum"], 1.0)


def _clip(value: float, bound: float) -> float:
    return min(bound, max(-bound, value))
