"""Measures of one optimiser update: of all trained tokens of its mini-batch under the policy that it starts from."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from services.contracts.measures import BINS
from trainer.losses.ratio import MAX_LOG_RATIO, clamped_exp
from trainer.measures.bins import COLUMNS, COMPLETION_COLUMNS, completion_bins, token_bins
from trainer.measures.sums import Measures, slots
from trainer.tokens import Tokens

LOW, HIGH = 0.001, 0.999
"""The percentiles of the log-ratio that are told."""

Sums = dict[str, tuple[float, float]]


@torch.no_grad()
def update_measures(
    *,
    logp_T: Tensor,
    entropy_T: Tensor,
    drift_T: Tensor | None,
    gradient_T: Tensor | None,
    tokens: Tokens,
    ratio_T: Tensor,
    clipped_up_T: Tensor,
    clipped_down_T: Tensor,
    dual_clipped_T: Tensor,
    rejected_T: Tensor,
    weight_T: Tensor,
    bounds: tuple[float, float] | None,
    forking_nats: float | None,
    correct_at: float,
    first: bool,
) -> Measures:
    """All measures of a mini-batch's tokens, in one product of rows and bins and two transfers from the device: sums, and lags.

    `ratio_T` is the ratio to the loss's anchor, `weight_T` the factor of each token's term, `bounds` what the loss allows the ratio, if anything.
    `forking_nats` is the `forking_threshold` of the run's first update. `first`: it is the step's first update, so that tokens of lag 0 are the
    policy's own samples. The predicted change of entropy needs `drift_T` and `gradient_T`, the loss's gradient by logp: for a clipped surrogate under
    the token-mean this is -r A w / tokens where nothing is clipped. It leaves out what an entropy bonus does.
    """
    if not tokens.count:
        return Measures()
    logp_T, entropy_T, behaviour_T, proximal_T, advantages_T, ratio_T, weight_T = torch.stack(
        [logp_T, entropy_T, tokens.behaviour_T, tokens.proximal_T, tokens.advantages_T, ratio_T, weight_T]
    ).double()
    log_ratio_T, proximal_log_ratio_T = logp_T - behaviour_T, logp_T - proximal_T
    flags = torch.stack([clipped_up_T, clipped_down_T, dual_clipped_T, rejected_T]).double()
    rows = (
        {"_count": torch.ones_like(logp_T), "entropy_nats": entropy_T, "_square:entropy_gap_nats": (logp_T + entropy_T) ** 2}
        | _ratio_rows(log_ratio_T, proximal_log_ratio_T, proximal_T - behaviour_T)
        | _covariance_rows(logp_T, advantages_T)
        | dict(zip(("clip_up_share", "clip_down_share", "dual_clip_share", "rejected_share"), flags, strict=True))
        | {"entropy_estimate_nats": -logp_T, "clip_mass_share": (weight_T * advantages_T * ratio_T).abs()}
    )
    if drift_T is not None and gradient_T is not None:
        # A step of size 1 down the gradient g moves the logits by -g (onehot(y) - p), and so the entropy by g drift.
        rows["entropy_change_predicted"] = tokens.count * gradient_T.double() * drift_T
    if bounds is not None:
        rows["beyond_unclipped_share"] = ((advantages_T < 0) & (ratio_T > bounds[1]) | (advantages_T > 0) & (ratio_T < bounds[0])).double()
    if forking_nats is not None:
        rows["forking_share"] = (entropy_T > forking_nats).double()
    bins_TB = token_bins(entropy_T, tokens, clipped_up_T=clipped_up_T, clipped_down_T=clipped_down_T, correct_at=correct_at)
    sums_KB = torch.stack(list(rows.values())) @ bins_TB
    sorted_T = log_ratio_T.sort().values
    low, high = (round(share * (tokens.count - 1)) for share in (LOW, HIGH))
    extremes = torch.stack([sorted_T[0], sorted_T[low], sorted_T[high], sorted_T[-1], proximal_log_ratio_T.max()])
    completion_rows = _completion_rows(log_ratio_T, tokens)
    completion_sums_KB = torch.stack(list(completion_rows.values())) @ completion_bins(entropy_T, tokens)
    *sums, told = _listed(*sums_KB, *completion_sums_KB, extremes)
    table = dict(zip(rows, sums[: len(rows)], strict=True))
    completions = dict(zip(completion_rows, sums[len(rows) :], strict=True))
    return Measures(
        sums=_token_sums(table, first=first)
        | _completion_sums(completions)
        | {
            "entropy_completion_nats": (table["entropy_nats"][0], tokens.rows),
            "log_ratio_low_nats": (told[1] * tokens.count, tokens.count),
            "log_ratio_high_nats": (told[2] * tokens.count, tokens.count),
        },
        maxima={
            "log_ratio_abs_max_nats": max(-told[0], told[3]),
            "ratio_behaviour_max": math.exp(min(told[3], MAX_LOG_RATIO)),
            "ratio_proximal_max": math.exp(min(told[4], MAX_LOG_RATIO)),
        },
        lags={lag: count for lag, count in enumerate(tokens.lags_T.bincount().tolist()) if count},
    )


@torch.no_grad()
def mismatch_measures(tokens: Tokens) -> Measures:
    """How far trainer and sampler disagree on the same weights: tokens of lag 0 only, under the policy at the start of the step."""
    fresh_T = tokens.lags_T == 0
    difference_T = torch.where(fresh_T, (tokens.proximal_T - tokens.behaviour_T).abs(), 0)
    total, count = torch.stack([difference_T.double().sum(), fresh_T.sum().double()]).tolist()
    return Measures(sums={"mismatch_lag0_nats": (total, count)})


@torch.no_grad()
def budget_measures(entropy_before_T: Tensor, entropy_after_T: Tensor) -> Measures:
    """The change of the exact entropy that a step made, on the same probe tokens: the realised side of the entropy budget."""
    return Measures(sums={"entropy_change_realised": (float((entropy_after_T - entropy_before_T).double().sum()), len(entropy_before_T))})


@torch.no_grad()
def moved_measures(logp_before_T: Tensor, logp_after_T: Tensor) -> Measures:
    """How far a step moved the policy: KL(before || after) by k3 on the probe tokens, sampled by the policy before the step or one a lag away."""
    log_ratio_T = (logp_after_T - logp_before_T).double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return Measures(sums={"kl_step_k3_nats": (float((torch.expm1(log_ratio_T) - log_ratio_T).sum()), len(log_ratio_T))})


def _ratio_rows(log_ratio_T: Tensor, proximal_T: Tensor, lag_T: Tensor) -> dict[str, Tensor]:
    """Of the log-ratios current/behaviour, current/proximal and proximal/behaviour."""
    log_ratios_3T = torch.stack([log_ratio_T, proximal_T, lag_T])
    # expm1 in float64: near l = 0, where k3 is l^2 / 2, the difference in float32 would be all rounding.
    growth_3T = torch.expm1(log_ratios_3T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    k3_3T, ratio_3T = growth_3T - log_ratios_3T, growth_3T + 1
    return {
        "log_ratio_mean_nats": log_ratio_T,
        "m2_behaviour": log_ratio_T**2,
        "ratio_behaviour_mean": ratio_3T[0],
        "kl_behaviour_k3_nats": k3_3T[0],
        "_weight:ess_share": ratio_3T[0],
        "_square:ess_share": ratio_3T[0] ** 2,
        "ratio_proximal_mean": ratio_3T[1],
        "kl_proximal_k1_nats": -proximal_T,
        "kl_proximal_k3_nats": k3_3T[1],
        "kl_lag_k3_nats": k3_3T[2],
    }


def _covariance_rows(logp_T: Tensor, advantages_T: Tensor) -> dict[str, Tensor]:
    rows: dict[str, Tensor] = {}
    for key, other_T in {"covariance_logp_advantage": advantages_T, "covariance_logp_weighted_advantage": logp_T.exp() * advantages_T}.items():
        rows |= {f"_x:{key}": logp_T, f"_y:{key}": other_T, f"_xy:{key}": logp_T * other_T}
    return rows


def _completion_rows(log_ratio_T: Tensor, tokens: Tokens) -> dict[str, Tensor]:
    """(R,) each: weights of completions and their squares, the weight being the product and the geometric mean of their tokens' ratios."""
    sums_R = tokens.row_sum(log_ratio_T)
    product_R, geometric_R = clamped_exp(torch.stack([sums_R, sums_R / tokens.lengths_R.clamp(min=1)]))
    return {
        "_count": torch.ones_like(product_R),
        "_weight:ess_completion_share": product_R,
        "_square:ess_completion_share": product_R**2,
        "_weight:ess_geometric_share": geometric_R,
        "_square:ess_geometric_share": geometric_R**2,
    }


def _token_sums(table: dict[str, list[float]], *, first: bool) -> Sums:
    """`table` has each row's sums over the bins."""
    counts = table["_count"]
    sums = _by_bin(table, COLUMNS)

    def within(row: str, *bins: str) -> float:
        return sum(table[row][COLUMNS[bin]] for bin in bins or ("",))

    tokens = within("_count")
    for sign in BINS["advantage"]:
        if f"entropy_nats/advantage/{sign}" in sums:
            sums[f"entropy_{sign}_nats"] = sums[f"entropy_nats/advantage/{sign}"]
    for slot, bin in _places("kl_behaviour_k1_nats"):
        if counts[column := COLUMNS[bin]]:
            sums[slot] = (-table["log_ratio_mean_nats"][column], counts[column])
    for slot, bin in _places("chi2_behaviour"):
        if counts[column := COLUMNS[bin]]:
            sums[slot] = (table["_square:ess_share"][column] - counts[column], counts[column])
    sums |= {
        "clip_region_share": (within("clip_up_share") + within("clip_down_share"), tokens),
        "clip_mass_share": (within("clip_mass_share", "/clip/up", "/clip/down"), within("clip_mass_share")),
        "effective_tokens_share": (tokens - within("_count", "/advantage/zero"), tokens),
        "entropy_top20_share": (within("entropy_nats", "/entropy/highest"), within("entropy_nats")),
    }
    if "entropy_change_predicted" in table:
        for sign in ("positive", "negative"):
            sums[f"entropy_change_predicted_{sign}"] = (within("entropy_change_predicted", f"/advantage/{sign}"), tokens)
    del sums["_square:entropy_gap_nats"]
    if first and (own := within("_count", "/lag/0")):
        gap = within("entropy_estimate_nats", "/lag/0") - within("entropy_nats", "/lag/0")
        sums |= {"entropy_gap_nats": (gap, own), "_square:entropy_gap_nats": (within("_square:entropy_gap_nats", "/lag/0"), own)}
    return sums


def _completion_sums(table: dict[str, list[float]]) -> Sums:
    """`table` has each row's sums over the bins."""
    rows, square = table["_count"][0], table["_square:ess_completion_share"][0]
    return {slot: of for slot, of in _by_bin(table, COMPLETION_COLUMNS).items() if slot != "_count"} | {"chi2_completion": (square - rows, rows)}


def _by_bin(table: dict[str, list[float]], columns: dict[str, int]) -> Sums:
    """Each row's sum in each bin that it is divided by, beside how many are in the bin; nothing for an empty bin."""
    counts = table["_count"]
    places = ((row, slot, columns[bin]) for row in table for slot, bin in _places(row))
    return {slot: (table[row][column], counts[column]) for row, slot, column in places if counts[column]}


@cache
def _places(row: str) -> tuple[tuple[str, str], ...]:
    """Where a row's sums go: key with its bin, and the bin."""
    moment, _, key = row.rpartition(":")
    return tuple((f"{moment}:{slot}" if moment else slot, slot.removeprefix(key)) for slot in slots(key))


def _listed(*tensors: Tensor) -> list[list[float]]:
    """The tensors as lists, in one transfer from the device."""
    numbers, lists = torch.cat(tensors).tolist(), []
    for tensor in tensors:
        lists.append(numbers[: len(tensor)])
        del numbers[: len(tensor)]
    return lists
