"""Learning rate over a run, as a factor of the knob `learning_rate`. Pure functions of the version, so a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(schedule: Schedule, version: int, *, versions: int, warmup: int) -> float:
    """Factor in [0, 1] for the step at `version` (0 ... versions - 1) of a run of `versions`.

    Warm-up: (version + 1) / (warmup + 1) for the first `warmup` versions, so that the first step already moves weights. After it, with x the share of
    the remaining versions that is done: constant 1, linear 1 - x, cosine (1 + cos(pi x)) / 2; both would reach 0 at `versions`, one past the last.
    """
    if version < warmup:
        return (version + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (version - warmup) / max(1, versions - warmup))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
