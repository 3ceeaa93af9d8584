"""The reward guard: has the reward fallen so far below its best that entropy must wait?

Entropy-guided reweighting can latch up: with too little weight on positive tokens the policy degrades, its entropy falls because of that, and the
rule answers with less weight still. Reward falls first, which is what the guard looks at:

    mean    of the rewards, plain over the first 10, then exponential with a memory of 10 versions
    best    from the 10th reward on: max(mean, best + (mean - best) / 50)
    awake   once best - mean > drop |best|, until best - mean <= drop |best| / 2

A lucky batch cannot keep it awake for ever: ten rewards make the first mean, and the best forgets, by a third in 20 versions, so that a run which
has settled at a lower reward is let go. The price is that a fall slower than drop |best| / 50 a version is not seen; there the floor of the weight
holds alone. The threshold is a share of |best|, so it works for rewards below 0 as above; with a best of exactly 0 any fall wakes it.
"""

from __future__ import annotations

from trainer.control.state import State

MEMORY = 10
"""Versions over which the reward is averaged: with 128 completions a version, noise then stays below a drop of 0.2."""
FORGET = 50
"""Versions in which the best would reach the mean, if it went on as it starts."""


def start() -> State:
    return {"reward_count": 0.0, "reward_mean": 0.0, "guard_awake": 0.0}


def watch(state: State, reward: float, *, drop: float) -> State:
    """The state after a version of mean reward `reward`. `drop`: fall that wakes the guard, as a share of the best."""
    state = start() | state
    count = state["reward_count"] + 1
    mean = state["reward_mean"] + (reward - state["reward_mean"]) / min(count, MEMORY)
    state |= {"reward_count": min(count, float(MEMORY)), "reward_mean": mean}
    if count < MEMORY:
        return state
    best = state.get("reward_best", mean)
    best = max(mean, best + (mean - best) / FORGET)
    threshold = drop * abs(best) * (0.5 if awake(state) else 1.0)
    return state | {"reward_best": best, "guard_awake": float(best - mean > threshold)}


def awake(state: State) -> bool:
    return state.get("guard_awake", 0.0) > 0
