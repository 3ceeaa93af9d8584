"""Entropy control: what the last steps measured (`Reading`) becomes what weighs in the next one (`Actuators`).

Methods that choose or penalise tokens within a mini-batch (Clip-Cov, KL-Cov, 80/20, ...) need nothing of this: they are parts of the loss, their
state is empty and their actuators change nothing.
"""

from __future__ import annotations

from services.contracts.algorithms import AdaptiveRegularisation, Bonus, EntroPic, EntropyControl, PositiveReweighting
from trainer.control import entropic, guard, regularisation, reweighting
from trainer.control.actuators import Actuators, Progress, Reading
from trainer.control.state import State


def start(settings: EntropyControl) -> State:
    """State before the first step."""
    match settings:
        case PositiveReweighting():
            return reweighting.start(settings)
        case AdaptiveRegularisation():
            return regularisation.start(settings)
        case EntroPic():
            return entropic.start(settings)
    return {}


def update(settings: EntropyControl, state: State, reading: Reading) -> State:
    """The state after a step, with the settings in force."""
    match settings:
        case PositiveReweighting():
            return reweighting.update(settings, state, reading)
        case AdaptiveRegularisation():
            return regularisation.update(settings, state, reading)
        case EntroPic():
            return entropic.update(settings, state, reading)
    return state


def actuate(settings: EntropyControl, state: State, progress: Progress) -> Actuators:
    """What weighs in the step at `progress`."""
    match settings:
        case PositiveReweighting():
            return Actuators(positive_weight=reweighting.weight(settings, state, progress), includes_zero=settings.includes_zero)
        case AdaptiveRegularisation():
            return Actuators(entropy_coefficient=regularisation.coefficient(settings, state))
        case Bonus():
            return Actuators(entropy_coefficient=settings.coefficient)
        case EntroPic():
            return Actuators(high_probability=entropic.alpha(settings, state), threshold=settings.threshold)
    return Actuators()


def shown(settings: EntropyControl, state: State, progress: Progress) -> dict[str, float]:
    """Values for the record of the step: the target and the last measured distance from it, and what was actuated."""
    values: dict[str, float] = {}
    match settings:
        case PositiveReweighting():
            values["control_weight"] = reweighting.weight(settings, state, progress)
            if settings.schedule != "entropy":
                return values
            if settings.guard:
                values["control_guard"] = float(guard.awake(state))
        case AdaptiveRegularisation():
            values["control_coefficient"] = regularisation.coefficient(settings, state)
        case Bonus():
            return {"control_coefficient": settings.coefficient}
        case EntroPic():
            values["control_coefficient"] = entropic.alpha(settings, state)
        case _:
            return values
    values["control_target_nats"] = settings.target
    if "entropy" in state:
        values["control_error_nats"] = state["entropy"] - settings.target
    return values
