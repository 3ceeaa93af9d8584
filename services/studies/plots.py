"""What plots of runs are made of: the colours, curves out of steps, and the events that explain a bend in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.contracts.views import EventView, StepView

Values = NDArray[np.float64]

# Okabe and Ito's palette: told apart with every common kind of colour blindness.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#767676"
SMOOTHED_OVER = 10
"""Versions in the trailing mean of smoothed curves; as many as the summary's first and last mean."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at a version: a vertical line in every plot."""

    version: int
    kind: str
    """`knobs`, `back` or `trouble`."""


MARK_STYLES: dict[str, tuple[str, str, str]] = {
    "knobs": (PURPLE, "--", "knobs changed"),
    "back": (ORANGE, ":", "resumed or joined"),
    "trouble": (VERMILLION, "-.", "trouble"),
}
"""Colour, line style and meaning of each kind of mark."""


def column(steps: Sequence[StepView], key: str) -> Values:
    """(steps,) the values under `key`; NaN where a step has none."""
    return np.array([math.nan if (value := step.values.get(key)) is None else value for step in steps], dtype=np.float64)


def trailing_mean(values: Values, width: int = SMOOTHED_OVER) -> Values:
    """(n,) mean of each value and the up to width - 1 before it; NaNs are left out, and all NaN gives NaN."""
    known = np.isfinite(values)
    sums, counts = np.cumsum(np.where(known, values, 0.0)), np.cumsum(known)
    sums[width:], counts[width:] = sums[width:] - sums[:-width], counts[width:] - counts[:-width]
    means: Values = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
    return means


def lag_shares(steps: Sequence[StepView]) -> tuple[list[int], Values]:
    """The lags that occur, from least to greatest without gaps, and the (lags, steps) share of each step's trained tokens that had them."""
    seen = [lag for step in steps for lag in step.lags]
    if not seen:
        return [], np.zeros((0, len(steps)))
    lags = list(range(min(seen), max(seen) + 1))
    counts = np.array([[step.lags.get(lag, 0) for step in steps] for lag in lags], dtype=np.float64)
    totals = counts.sum(axis=0)
    return lags, np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)


def marks_of(events: Sequence[EventView]) -> list[Mark]:
    """The events that explain a bend in a curve."""
    found: set[tuple[int, str]] = set()
    for event in events:
        kind = _kind(event.event)
        first_join = event.event == "server_admitted" and event.version == 0
        if kind is not None and event.version is not None and not first_join:
            found.add((event.version, kind))
    return [Mark(version, kind) for version, kind in sorted(found)]


def _kind(event: str) -> str | None:
    if event == "knobs_steered":  # a controller's, and there may be one every few versions: its own plot shows them
        return None
    if event.startswith("knob"):
        return "knobs"
    if any(word in event for word in ("resumed", "admitted")):
        return "back"
    if any(word in event for word in ("fenced", "lost", "failed")):
        return "trouble"
    return None
