"""Statistics over paired seeds: a number a seed, judged against what it would be if the arms were alike. Pure functions, float64.

The seeds of a study are few (3 to 10), so the test is exact where it can be: under the null hypothesis that a seed's difference is as likely to have
one sign as the other, all 2^n ways of giving signs to the n differences are equally likely (Fisher, The Design of Experiments, 1935, section 21).
With n seeds no p is below 2^-n one-sided, whatever the effect: 0.031 with five, 0.125 with three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from services.studies.curves import Values

Alternative = Literal["greater", "less", "two-sided"]
Pairs = Sequence[tuple[float, float]]

CONFIDENCE = 0.95
ENUMERATED = 15
"""Seeds up to which all signs are enumerated; past it they are drawn."""
DRAWS = 10_000
RESAMPLES = 2_000
LEAST_SEEDS = 3
"""Seeds from which an interval is given: of two, a t interval is 12.7 standard errors wide and says nothing."""


@dataclass(frozen=True)
class Paired:
    """Mean of one number a seed, with what is known of it."""

    n: int
    mean: float
    sd: float | None
    """Sample standard deviation over seeds; None with one seed."""
    low: float | None
    """Lower end of the 95 % interval of the mean; None below three seeds."""
    high: float | None


def paired(values: Sequence[float]) -> Paired:
    """Mean, standard deviation (ddof 1) and Student's t interval: mean +- t(n - 1, 0.975) sd / sqrt(n). At least one finite value is needed."""
    known = np.asarray(values, dtype=np.float64)
    n, mean = len(known), float(known.mean())
    if n < 2:
        return Paired(n, mean, None, None, None)
    sd = float(known.std(ddof=1))
    if n < LEAST_SEEDS:
        return Paired(n, mean, sd, None, None)
    from scipy import stats  # slow to load, and the command line imports this module for its types

    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return Paired(n, mean, sd, mean - half, mean + half)


def effect_size(differences: Sequence[float]) -> float | None:
    """Cohen's d_z = mean / sd of the paired differences; None where the seeds do not differ or there is one."""
    spread = paired(differences).sd
    return None if not spread else paired(differences).mean / spread


def sign_flip_p(differences: Sequence[float], alternative: Alternative, *, seed: int = 0) -> float:
    """p of the paired sign-flip permutation test: the share of the ways to give signs to the differences whose sum is at least as extreme.

    Exact up to 15 differences, the observed signs among those counted. Past it `DRAWS` random ones, p = (1 + extreme) / (1 + draws), which is
    never 0 and keeps the level (Phipson and Smyth, arXiv 1603.05766).
    """
    sizes = np.asarray(differences, dtype=np.float64)
    n = len(sizes)
    if n <= ENUMERATED:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(DRAWS, n))
    sums, observed = signs @ sizes, float(sizes.sum())
    slack = 1e-9 * float(np.abs(sizes).sum())  # sums that are equal but for rounding count as equal
    if alternative == "greater":
        extreme = sums >= observed - slack
    elif alternative == "less":
        extreme = sums <= observed + slack
    else:
        extreme = np.abs(sums) >= abs(observed) - slack
    count = int(extreme.sum())
    return count / len(sums) if n <= ENUMERATED else (1 + count) / (1 + len(sums))


def least_p(n: int, alternative: Alternative) -> float:
    """The least p that n seeds can give."""
    return min(1.0, 2.0**-n * (2 if alternative == "two-sided" else 1))


def spearman(pairs: Pairs) -> float | None:
    """Spearman's rank correlation: Pearson's of the ranks, ties with their mean rank. None with fewer than three pairs, or where one side is
    constant."""
    if len(pairs) < 3:
        return None
    rho = float(_weighted_spearman(np.asarray(pairs, dtype=np.float64), np.ones((1, len(pairs))))[0])
    return None if math.isnan(rho) else rho


def clustered_spearman(clusters: Mapping[int, Pairs], *, seed: int = 0) -> tuple[float | None, float | None, float | None]:
    """(rho, low, high): the rank correlation over the pairs of all seeds together, with the percentile interval of a bootstrap that draws whole
    seeds: the runs of one seed share weights and prompts, and are not independent. No interval below three seeds."""
    pairs = [pair for pairs in clusters.values() for pair in pairs]
    rho = spearman(pairs)
    if rho is None or len(clusters) < LEAST_SEEDS:
        return rho, None, None
    chosen = np.random.default_rng(seed).integers(len(clusters), size=(RESAMPLES, len(clusters)))
    times = (chosen[:, :, None] == np.arange(len(clusters))).sum(axis=1)
    weights = np.repeat(times, [len(pairs) for pairs in clusters.values()], axis=1).astype(np.float64)
    drawn = _weighted_spearman(np.asarray(pairs, dtype=np.float64), weights)
    low, high = np.nanquantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return rho, float(low), float(high)


def _weighted_spearman(pairs: Values, weights: Values) -> Values:
    """(draws,) rank correlations of (n, 2) pairs, the i-th taken weights[draw, i] times; NaN where one side is constant."""
    x, y = (_weighted_ranks(side, weights) for side in pairs.T)
    n = weights.sum(axis=1, keepdims=True)
    x, y = (side - (weights * side).sum(axis=1, keepdims=True) / n for side in (x, y))
    squares = (weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1)
    rho = np.divide((weights * x * y).sum(axis=1), np.sqrt(squares), out=np.full(len(weights), np.nan), where=squares > 1e-9)
    # Ranks are halves, so that rounding only ever touches the last digits: -1, 1 and 0.8 are to come out as that.
    return np.round(rho, 12)


def _weighted_ranks(values: Values, weights: Values) -> Values:
    """(draws, n) mean rank of each of the n values where the i-th is there weights[draw, i] times."""
    _, group = np.unique(values, return_inverse=True)
    counts = np.zeros((len(weights), int(group.max()) + 1))
    for place, at in enumerate(group):
        counts[:, at] += weights[:, place]
    ranks: Values = (np.cumsum(counts, axis=1) - (counts - 1) / 2)[:, group]
    return ranks
