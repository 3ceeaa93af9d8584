"""Closed-loop staleness: `max_lag` is turned until a measure of off-policyness stands at its target.

Off-policyness is what matters and lag is only its cause: what KL a lag costs depends on the learning rate and on the phase of the run, and what lag
a window gives depends on how fast the servers are. The loop closes that gap. With m the measure, averaged over five versions, and v its target:

    error   kl             1 - m / v               KL grows with lag
            ess            (m - v) / (1 - v)       the effective sample size is 1 without lag and falls with it
            entropy_slope  (v - m) / max(|v|, 1e-3)
            clipped to [-3, 1], and 0 within `band`; above 0 it asks for more lag. It is linear in m, so that the mean of m is what is held: the KL
            of a batch is heavy-tailed, and the mean of its logarithm lies far below the logarithm of its mean
    wish    u <- u + max(1, u) (exp(0.6 error) - 1), in [least, greatest]: relative, since KL is about a power of lag. Each version counts once
    reach   an error above 0 moves u no further than 2 lag + 1, with lag the mean lag of the tokens: where slow servers, and not the window, bound the
            lag, a wider window does nothing, and a wish that ran ahead would be paid for when the servers are fast again (anti-windup)
    rise    u goes no further above the max_lag in force than a third of it, or one version: beyond some lag a policy that follows its own delayed
            gradients begins to swing, and its KL grows for many versions at the same lag. Downward there is no such bound
    act     max_lag <- round(u) once u is more than 0.75 away from it (hysteresis: rounding alone would turn at 0.5)
    wait    a change made after the step at version k is in force at k + 2, for k + 1 is announced by then, and the first batch issued under it is
            trained max_lag versions later: until that batch the loop neither measures nor moves u

max_lag is an integer and the measure between two of them is met by going to and fro, so the average is held and not each version. The wait bounds how
often: two changes to and from n are at least n + 6 versions apart.

Which way the entropy slope acts was measured, not deduced: with the clip anchored on the behaviour policy, stale tokens are clipped, learning is
throttled and entropy falls more slowly, so more lag means a greater (less negative) slope. Without clip, or with the anchor recomputed, lag speeds
the fall, and the loop would run to one of its bounds: use `kl` or `ess` there. The slope is the difference of two exponential averages of the
entropy over the difference of their ages; it needs 20 more versions of waiting.

While there is a target, max_lag belongs to the loop: `update` goes on asking for what it last asked for, whatever was set by hand meanwhile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.contracts.algorithms import StalenessTarget
from trainer.control.state import State

GAIN = 0.6
"""Logarithm of the factor by which an error of 1 moves the wish."""
RISE = 1 / 3
"""Share of the max_lag in force by which one step may raise the wish above it; at least one version."""
WORST = -3.0
"""Least error that moves the wish."""
OUTLIER = 10.0
"""A KL counts as at most so many times its target: one broken batch is not to empty the window."""
HYSTERESIS = 0.75
MEMORY = 5
"""Versions over which KL and ESS are averaged before the wish is moved."""
FAST, SLOW = 5, 20
"""Memories, in versions, of the two averages of the entropy; the mean age of what is in one is its memory - 1."""
SLOPE_LEAST = 1e-3
"""Nats a version: least scale of the error of a slope, for targets about 0."""


@dataclass(frozen=True)
class StalenessReading:
    """What the step at `version` measured."""

    version: int
    kl: float
    """KL of the sampler to the current policy, nats."""
    ess: float
    """Effective sample size as a share of the tokens."""
    entropy: float
    """Mean entropy, nats."""
    lag: float
    """Mean lag of the batch's tokens, versions."""
    max_lag: int
    """In force at the step; where a loop without a state starts from."""


def start(target: StalenessTarget, max_lag: int) -> State:
    """State before the first step of a run whose window ends at `max_lag`."""
    first = _within(target, max_lag)
    return {"wish": first, "max_lag": first, "settled_at": _settling(target, first)}


def update(target: StalenessTarget, state: State, reading: StalenessReading) -> tuple[State, int]:
    """The state after a step, and the max_lag that should be in force from the next one on."""
    state = start(target, reading.max_lag) | state
    now = round(_within(target, state["max_lag"]))
    measured = {"kl": reading.kl, "ess": reading.ess, "entropy_slope": reading.entropy}[target.metric]
    broken = target.metric == "kl" and measured == math.inf  # as far off as can be, which is a measurement
    if not math.isfinite(reading.lag) or not (math.isfinite(measured) or broken):
        return state, now
    if target.metric == "entropy_slope":
        state = _with_slope(state, measured)
    if reading.version < state["settled_at"]:
        return state, now
    if target.metric != "entropy_slope":
        state = _with_average(state, max(0.0, min(measured, OUTLIER * target.value if target.metric == "kl" else 1.0)))
        if state["measured"] < MEMORY:
            return state, now
        state |= {"measured": 0.0}  # the next versions make the next average
    wish = _moved(target, state["wish"], _error(target, state["measure"]), now=now, lag=reading.lag)
    state |= {"wish": wish}
    if abs(wish - now) <= HYSTERESIS:
        return state, now
    settled = reading.version + _settling(target, max(now, round(wish)))
    kept = {name: value for name, value in state.items() if name not in ("measure", "measured")}
    return kept | {"max_lag": float(round(wish)), "settled_at": settled}, round(wish)


def _error(target: StalenessTarget, measure: float) -> float:
    if target.metric == "kl":
        error = 1 - measure / target.value
    elif target.metric == "ess":
        error = (measure - target.value) / (1 - target.value)
    else:
        error = (target.value - measure) / max(abs(target.value), SLOPE_LEAST)
    return 0.0 if abs(error) <= target.band else min(1.0, max(WORST, error))


def _moved(target: StalenessTarget, wish: float, error: float, *, now: int, lag: float) -> float:
    moved = wish + max(1.0, wish) * math.expm1(GAIN * error)
    if error > 0:
        moved = min(moved, max(wish, 2 * lag + 1), now + max(1.0, RISE * now))
    return _within(target, moved)


def _with_average(state: State, measured: float) -> State:
    """The mean of this reading and those since the last move of the wish, `measured` in number."""
    count = state.get("measured", 0.0) + 1
    before = state.get("measure", measured) if count > 1 else measured
    return state | {"measured": count, "measure": before + (measured - before) / count}


def _with_slope(state: State, entropy: float) -> State:
    fast, slow = state.get("entropy_fast", entropy), state.get("entropy_slow", entropy)
    fast, slow = fast + (entropy - fast) / FAST, slow + (entropy - slow) / SLOW
    return state | {"entropy_fast": fast, "entropy_slow": slow, "measure": (fast - slow) / (SLOW - FAST)}


def _settling(target: StalenessTarget, max_lag: float) -> float:
    """Versions from a change of max_lag until the measure shows it."""
    return max_lag + 2.0 + (SLOW if target.metric == "entropy_slope" else 0)


def _within(target: StalenessTarget, lag: float) -> float:
    return min(float(target.greatest), max(float(target.least), lag))
