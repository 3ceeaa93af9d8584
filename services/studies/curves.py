"""What a curve over versions comes to: one number by a reducer, the statistics of an entropy collapse, and the fits of one curve on another.

Every function takes known, finite points only and answers None where there are too few of them. "Five versions" are versions, not points: of a
curve that is measured at every fifth version they hold one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

WIDTH = 5
"""Versions that `first`, `mid` and `end` average, and in a block of the reward-entropy fit."""
FIT_LEAST = 6
"""Least blocks of the reward-entropy fit."""
BUDGET_LEAST = 3
"""Least points of the budget fit: two always lie on a line."""
AT_KL = re.compile(r"at_kl_(\d+(?:e-?\d+)?)(m?)")


@dataclass(frozen=True)
class Curve:
    """A measured quantity over versions, both (n,): versions rise, and all values are finite."""

    versions: Values
    values: Values

    @classmethod
    def of(cls, steps: Iterable[tuple[int, Mapping[str, float | None]]], key: str) -> Curve:
        """The values under `key` by version, in any order; what is missing, None or not finite is left out, and of a version given twice the last
        one counts."""
        known = {version: value for version, values in steps if (value := values.get(key)) is not None and math.isfinite(value)}
        versions = sorted(known)
        return cls(np.array(versions, dtype=np.float64), np.array([known[version] for version in versions], dtype=np.float64))

    def __len__(self) -> int:
        return len(self.versions)


def reduced(curve: Curve, reducer: str, *, width: int = WIDTH, kl: Curve | None = None) -> float | None:
    """The curve as one number, by a reducer of REDUCERS or `at_kl_Nm`, which needs the curve of each version's KL. `width` is 5 for what every
    version measures and 1 for evaluations. None where there is nothing to reduce. Raises ValueError for a reducer that there is not."""
    if found := AT_KL.fullmatch(reducer):
        if kl is None:
            raise ValueError(f"{reducer!r} needs the curve of the KL")
        return at_kl(curve, kl, float(found[1]) / (1000 if found[2] else 1))
    if reducer not in _REDUCERS:
        raise ValueError(f"no reducer {reducer!r}; there are {', '.join(_REDUCERS)} and at_kl_Nm")
    return _REDUCERS[reducer](curve, width) if len(curve) else None


def _first(curve: Curve, width: int) -> float:
    return float(curve.values[curve.versions < curve.versions[0] + width].mean())


def _end(curve: Curve, width: int) -> float:
    return float(curve.values[curve.versions > curve.versions[-1] - width].mean())


def _mid(curve: Curve, width: int) -> float:
    """Mean over the `width` versions around the middle of the run; the value nearest to it, the earlier of two, where none was measured there."""
    from_middle = curve.versions - (curve.versions[0] + curve.versions[-1]) / 2
    around = (-width / 2 <= from_middle) & (from_middle < width / 2)
    return float(curve.values[around].mean() if around.any() else curve.values[np.abs(from_middle).argmin()])


def _last_third(curve: Curve, width: int) -> float:
    last, count = curve.versions[-1], curve.versions[-1] + 1 - curve.versions[0]
    return float(curve.values[curve.versions > last - math.ceil(count / 3)].mean())


def _line_slope(curve: Curve, width: int) -> float | None:
    return None if (line := _line(curve.versions, curve.values)) is None else line.slope


_REDUCERS: dict[str, Callable[[Curve, int], float | None]] = {
    "first": _first,
    "end": _end,
    "mid": _mid,
    "change": lambda curve, width: _end(curve, width) - _first(curve, width),
    "mean": lambda curve, width: float(curve.values.mean()),
    "last_third": _last_third,
    "slope": _line_slope,
    "min": lambda curve, width: float(curve.values.min()),
    "max": lambda curve, width: float(curve.values.max()),
}


def at_kl(curve: Curve, kl: Curve, amount: float) -> float | None:
    """Value at the first version at which the sum of the KL of all versions so far, nats, reaches `amount`; between versions both sum and value are
    interpolated. None where the sum never reaches it, or only after the curve's last point."""
    sums = np.cumsum(kl.values)
    reached = np.flatnonzero(sums >= amount)
    if not len(curve) or not len(reached):
        return None
    at = int(reached[0])
    version = kl.versions[at]
    if at:
        version -= (sums[at] - amount) / (sums[at] - sums[at - 1]) * (version - kl.versions[at - 1])
    return float(np.interp(version, curve.versions, curve.values)) if version <= curve.versions[-1] else None


def half_life(entropy: Curve) -> float | None:
    """First version with H <= H0 / 2, H0 the mean over the first five versions. None where there is none."""
    if not len(entropy):
        return None
    fallen = np.flatnonzero(entropy.values <= _first(entropy, WIDTH) / 2)
    return float(entropy.versions[fallen[0]]) if len(fallen) else None


def auc(curve: Curve) -> float | None:
    """Area under the curve by trapezia, divided by the versions that it spans: the mean over the run, however the points are spaced."""
    if len(curve) < 2:
        return None
    return float(np.trapezoid(curve.values, curve.versions) / (curve.versions[-1] - curve.versions[0]))


def log_slope(entropy: Curve) -> float | None:
    """Slope of log H on the version, per version, over the last fifth of the run; points at 0 have no logarithm and are left out."""
    if not len(entropy):
        return None
    first, last = entropy.versions[0], entropy.versions[-1]
    late = (entropy.versions >= last - (last - first) / 5) & (entropy.values > 0)
    line = _line(entropy.versions[late], np.log(entropy.values[late]))
    return None if line is None else line.slope


def floor(curve: Curve) -> float | None:
    """Least mean over five points in a row, so that one point's noise makes no floor; the mean of all where there are fewer."""
    if not len(curve):
        return None
    width = min(WIDTH, len(curve))
    return float(np.lib.stride_tricks.sliding_window_view(curve.values, width).mean(axis=1).min())


@dataclass(frozen=True)
class Fit:
    """R = -a exp(H) + b."""

    a: float
    """Reward that one unit of exp(H) costs."""
    b: float
    r2: float
    ceiling: float
    """b - a: the reward at H = 0, when all entropy is spent."""
    blocks: int
    """Blocks up to the peak, which the fit rests on."""


def reward_entropy_fit(entropy: Curve, reward: Curve) -> Fit | None:
    """The law of Cui et al. (arXiv 2505.22617), R = -a exp(H) + b, by least squares of R on exp(H), both as means over blocks of five versions: the
    reward of one batch is so noisy that no law could explain much of its variance. The fit ends with the block of the greatest reward: past the peak
    a policy may collapse without any gain. None with fewer than six such blocks, or without spread in them."""
    versions, h, r = _paired(entropy, reward)
    x, y = _block_means(versions, np.exp(h)), _block_means(versions, r)
    blocks = int(y.argmax()) + 1 if len(y) else 0
    if blocks < FIT_LEAST or (line := _line(x[:blocks], y[:blocks])) is None or line.r2 is None:
        return None
    return Fit(a=-line.slope, b=line.intercept, r2=line.r2, ceiling=line.intercept + line.slope, blocks=blocks)


def _block_means(versions: Values, values: Values) -> Values:
    """Means over blocks of five versions from the first on. A block of which there is nothing has none, nor has one that the curve ends within."""
    if not len(versions):
        return values
    of = (versions - versions[0]) // WIDTH
    whole = of < (versions[-1] + 1 - versions[0]) // WIDTH
    return np.array([values[of == block].mean() for block in np.unique(of[whole])], dtype=np.float64)


@dataclass(frozen=True)
class BudgetFit:
    """realised = slope * predicted + constant."""

    slope: float
    r2: float
    n: int


def budget_fit(predicted: Curve, realised: Curve) -> BudgetFit | None:
    """The realised change of entropy on the predicted one, over the versions that have both: a slope above 0 and an r2 above chance bear the
    prediction out. None with fewer than three, or without spread."""
    _, x, y = _paired(predicted, realised)
    line = _line(x, y) if len(x) >= BUDGET_LEAST else None
    return None if line is None or line.r2 is None else BudgetFit(line.slope, line.r2, len(x))


def run_values(steps: Iterable[tuple[int, Mapping[str, float | None]]]) -> dict[str, float]:
    """The RUN_KEYS that can be had of a run's steps, (version, values) each."""
    steps = list(steps)
    entropy = Curve.of(steps, "entropy_nats")
    fit = reward_entropy_fit(entropy, Curve.of(steps, "reward_mean"))
    budget = budget_fit(Curve.of(steps, "entropy_change_predicted"), Curve.of(steps, "entropy_change_realised"))
    values = {
        "entropy_half_life": half_life(entropy),
        "entropy_auc": auc(entropy),
        "entropy_log_slope": log_slope(entropy),
        "entropy_floor": floor(entropy),
    }
    if fit is not None:
        values |= {"fit_r2": fit.r2, "fit_a": fit.a, "fit_ceiling": fit.ceiling}
    if budget is not None:
        values |= {"budget_slope": budget.slope, "budget_r2": budget.r2}
    return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class _Line:
    slope: float
    intercept: float
    r2: float | None
    """None where all y are equal: there is no variance to explain."""


def _line(x: Values, y: Values) -> _Line | None:
    """The straight line of least squares; None where the x do not differ."""
    from scipy.stats import linregress

    if len(x) < 2 or np.ptp(x) <= 1e-12 * np.abs(x).max():
        return None
    found = linregress(x, y)
    varied = np.ptp(y) > 1e-12 * np.abs(y).max()
    return _Line(float(found.slope), float(found.intercept), float(found.rvalue) ** 2 if varied else None)


def _paired(one: Curve, other: Curve) -> tuple[Values, Values, Values]:
    """The versions that two curves have both, and the values of either there."""
    versions, at, of = np.intersect1d(one.versions, other.versions, assume_unique=True, return_indices=True)
    return versions, one.values[at], other.values[of]
