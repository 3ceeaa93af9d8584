"""The catalogue of what is measured: keys of StepRecord.values and of EvaluationRecord.values, and what a whole run comes to. Each with its meaning.

A step's key may have bins: `entropy_nats/lag/2-3` is the entropy over the tokens whose lag was 2 or 3. `BINS` lists the bins of each way to divide.
"""

from __future__ import annotations

BINS: dict[str, tuple[str, ...]] = {
    "lag": ("0", "1", "2-3", "4-7", "8-15", "16-31", "32+"),
    "advantage": ("positive", "negative", "zero"),
    "clip": ("kept", "up", "down"),
    "position": tuple(str(decile) for decile in range(10)),
    "correct": ("right", "wrong"),
    "entropy": ("lowest", "low", "middle", "high", "highest"),
}
"""Ways to divide trained tokens. `position` is the decile of the place in the completion, `entropy` the fifth of the batch's token entropies."""

STEP_KEYS: dict[str, str] = {}
"""Key -> meaning; filled in with the measures of the trainer."""

BINNED: dict[str, tuple[str, ...]] = {}
"""Key -> the ways in which it is divided."""

EVALUATION_KEYS: dict[str, str] = {}
"""Key of EvaluationRecord.values -> meaning."""

RUN_KEYS: dict[str, str] = {}
"""What a whole run comes to -> meaning."""

REDUCERS: dict[str, str] = {
    "first": "mean over the first five versions (evaluations: the first)",
    "end": "mean over the last five versions (evaluations: the last)",
    "mid": "mean over the five versions around the middle (evaluations: the one nearest to it)",
    "change": "end - first",
    "mean": "mean over the run",
    "last_third": "mean over the last third",
    "slope": "slope of a straight line through the run, per version",
    "min": "least value",
    "max": "greatest value",
}
"""How a curve becomes a number."""


def known_step_key(key: str) -> bool:
    """Is there such a key, with or without a bin?"""
    base, *rest = key.split("/")
    if base not in STEP_KEYS:
        return False
    return not rest or (len(rest) == 2 and rest[0] in BINNED.get(base, ()) and rest[1] in BINS[rest[0]])
