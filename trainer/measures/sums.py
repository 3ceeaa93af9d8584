"""Sums and counts that add up over updates and groups, and what they come to at the end of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.contracts.measures import BINNED, BINS

EFFECTIVE_SIZES = ("ess_share", "ess_completion_share", "ess_geometric_share")
COVARIANCES = ("covariance_logp_advantage", "covariance_logp_weighted_advantage")


def slots(key: str) -> tuple[str, ...]:
    """Where a key stands: by itself and with each of its bins."""
    return (key, *(f"{key}/{by}/{name}" for by in BINNED.get(key, ()) for name in BINS[by]))


@dataclass(frozen=True)
class Measures:
    """Sums over some of a step's tokens and groups. Adding two gives the sums over both; the empty one is `Measures()`."""

    sums: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Key -> sum, and what it is to be divided by: how many were summed, or another sum. `_square:KEY` and its like are moments that make KEY."""
    maxima: Mapping[str, float] = field(default_factory=dict)
    lags: Mapping[int, int] = field(default_factory=dict)
    """Trained tokens by lag."""

    def __add__(self, other: Measures) -> Measures:
        sums = dict(self.sums)
        for key, (total, count) in other.sums.items():
            before, n = sums.get(key, (0.0, 0.0))
            sums[key] = (before + total, n + count)
        maxima = dict(self.maxima)
        for key, value in other.maxima.items():
            maxima[key] = max(value, maxima.get(key, value))
        lags = dict(self.lags)
        for lag, count in other.lags.items():
            lags[lag] = lags.get(lag, 0) + count
        return Measures(sums, maxima, lags)

    def as_values(self) -> dict[str, float]:
        """What was measured, by its name in STEP_KEYS. A key with nothing behind it is left out: no NaN, and no 0 that nobody measured."""
        means = {key: total / count for key, (total, count) in self.sums.items() if count}
        values = {key: mean for key, mean in means.items() if not key.startswith("_")}
        for key in EFFECTIVE_SIZES:
            values |= {slot: means[f"_weight:{slot}"] ** 2 / square for slot in slots(key) if (square := means.get(f"_square:{slot}", 0.0)) > 0}
        for key in COVARIANCES:
            # The mean of (x - mean x)(y - mean y) over the bin's tokens, with the means of all tokens.
            x, y = means.get(f"_x:{key}", 0.0), means.get(f"_y:{key}", 0.0)
            for slot in slots(key):
                if f"_xy:{slot}" in means:
                    values[slot] = means[f"_xy:{slot}"] - y * means[f"_x:{slot}"] - x * means[f"_y:{slot}"] + x * y
        if "m2_behaviour" in means:
            values |= {slot.replace("m2_behaviour", "kl_behaviour_k2_nats"): means[slot] / 2 for slot in slots("m2_behaviour") if slot in means}
            values["log_ratio_std_nats"] = math.sqrt(max(0.0, means["m2_behaviour"] - means["log_ratio_mean_nats"] ** 2))
        if "_square:entropy_gap_nats" in means:
            # A token's term has mean 0 whatever came before it, so the terms are uncorrelated and their variances add up.
            total, count = self.sums["_square:entropy_gap_nats"]
            values["entropy_gap_error_nats"] = math.sqrt(total) / count
        if tokens := sum(self.lags.values()):
            values["lag_mean"] = sum(lag * count for lag, count in self.lags.items()) / tokens
            values["lag_max"] = float(max(self.lags))
        return values | dict(self.maxima)
