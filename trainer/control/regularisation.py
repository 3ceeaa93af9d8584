"""Adaptive entropy regularisation (Skywork-OR1, arXiv 2505.22312): an entropy bonus that is there only while entropy is below its target.

    c <- c + step if H < target, else c - step, in [0, greatest], after each version of entropy H
    coefficient of the mean entropy in the objective: c while H < target, 0 otherwise

c is an integral of sign(target - H), so it finds the size of bonus that the run needs; the gate keeps a c that is still winding down from pushing
entropy past its target, where a bonus that is too large makes it explode. Skywork-OR1 trains with start 0, target 0.2, step 1e-4, greatest 5e-3
(`or1_scripts/train/7b_8k.sh`); a small model with a high learning rate needs ten times the step and more.
"""

from __future__ import annotations

import math

from services.contracts.algorithms import AdaptiveRegularisation
from trainer.control.actuators import Reading
from trainer.control.state import State


def start(settings: AdaptiveRegularisation) -> State:
    return {"coefficient": settings.start}


def update(settings: AdaptiveRegularisation, state: State, reading: Reading) -> State:
    """The state after a step; as it was, if the step measured nothing."""
    if not math.isfinite(reading.entropy):
        return state
    state = start(settings) | state
    change = settings.step if reading.entropy < settings.target else -settings.step
    return state | {"coefficient": min(settings.greatest, max(0.0, state["coefficient"] + change)), "entropy": reading.entropy}


def coefficient(settings: AdaptiveRegularisation, state: State) -> float:
    """Coefficient of the bonus in the next step: 0 until an entropy below the target was measured."""
    if state.get("entropy", math.inf) >= settings.target:
        return 0.0
    return min(settings.greatest, (start(settings) | state)["coefficient"])
