"""What one step measures on the tokens and groups that it trains on: sums and counts that add up over packs and updates, and their means at the end.

`_T` runs over trained tokens, `_G` over a group's members. With l = logp of the current policy - logp of another policy q, on tokens that q sampled
(Schulman, "Approximating KL divergence", 2020):

    KL(q || current):  k1 = mean(-l), unbiased, may be negative;  k3 = mean(exp(l) - 1 - l), never negative, less variance
    ESS share:         (sum w)^2 / (tokens * sum w^2) with w = exp(l) against the sampler: the share of the tokens that the batch is worth
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.advantages import has_signal
from trainer.losses import SurrogateLoss, importance_ratio

KEYS: dict[str, str] = {
    "entropy_nats": "Exact entropy of the current policy's next-token distribution, mean over trained tokens",
    "entropy_positive_nats": "Exact entropy, mean over tokens of positive advantage",
    "entropy_negative_nats": "Exact entropy, mean over tokens of negative advantage",
    "entropy_zero_nats": "Exact entropy, mean over tokens of zero advantage",
    "entropy_estimate_nats": "Mean of -logp of the trained tokens: estimates the entropy where the current policy sampled them",
    "ratio_behaviour_mean": "Mean importance ratio of the current policy to the sampler",
    "ratio_behaviour_max": "Greatest importance ratio of the current policy to the sampler",
    "ratio_proximal_mean": "Mean importance ratio of the current policy to the policy at the start of the step",
    "ratio_proximal_max": "Greatest importance ratio of the current policy to the policy at the start of the step",
    "kl_behaviour_k1_nats": "KL of the sampler to the current policy, estimator k1",
    "kl_behaviour_k3_nats": "KL of the sampler to the current policy, estimator k3",
    "kl_proximal_k1_nats": "KL of the policy at the start of the step to the current one, estimator k1 on the sampler's tokens",
    "kl_proximal_k3_nats": "KL of the policy at the start of the step to the current one, estimator k3 on the sampler's tokens",
    "ess_share": "Effective sample size of the trained tokens under the weights current/sampler, as a share of their number",
    "clip_up_share": "Share of trained tokens of positive advantage beyond the ratio's upper bound",
    "clip_down_share": "Share of trained tokens of negative advantage beyond the ratio's lower bound",
    "mismatch_lag0_nats": "Mean |logp of the trainer - logp of the sampler| over tokens of lag 0, before any update of the step",
    "lag_mean": "Mean lag of the trained tokens, in versions",
    "lag_max": "Greatest lag of a trained token, in versions",
    "reward_mean": "Mean reward of the completions",
    "completion_tokens_mean": "Mean length of the completions, in tokens",
    "truncated_share": "Share of the completions that were cut off at the longest length allowed",
    "zero_signal_share": "Share of the groups whose rewards are all equal",
}
"""Every key that `Measures.as_values` may give, with its meaning."""

_SQUARE = "ratio_behaviour_square"
"""Mean square of the importance ratio: kept for the ESS, not shown."""


@dataclass(frozen=True)
class Measures:
    """Sums over some of a step's tokens and groups. Adding two gives the sums over both; the empty one is `Measures()`."""

    sums: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Key -> sum and how many were summed."""
    maxima: Mapping[str, float] = field(default_factory=dict)
    lags: Mapping[int, int] = field(default_factory=dict)
    """Trained tokens by lag."""

    def __add__(self, other: Measures) -> Measures:
        sums = dict(self.sums)
        for key, (total, count) in other.sums.items():
            before, n = sums.get(key, (0.0, 0))
            sums[key] = (before + total, n + count)
        maxima = dict(self.maxima)
        for key, value in other.maxima.items():
            maxima[key] = max(value, maxima.get(key, value))
        lags = dict(self.lags)
        for lag, count in other.lags.items():
            lags[lag] = lags.get(lag, 0) + count
        return Measures(sums, maxima, lags)

    def as_values(self) -> dict[str, float]:
        """Means and maxima by their names in KEYS. A key with nothing behind it is left out: no NaN, and no 0 that nobody measured."""
        values = {key: total / count for key, (total, count) in self.sums.items() if count}
        square = values.pop(_SQUARE, 0.0)
        if square > 0:
            values["ess_share"] = values["ratio_behaviour_mean"] ** 2 / square
        tokens = sum(self.lags.values())
        if tokens:
            values["lag_mean"] = sum(lag * count for lag, count in self.lags.items()) / tokens
            values["lag_max"] = float(max(self.lags))
        return values | dict(self.maxima)


@torch.no_grad()
def token_measures(
    *,
    logp_T: Tensor,
    entropy_T: Tensor,
    behaviour_T: Tensor,
    advantages_T: Tensor,
    lags_T: Tensor,
    surrogate: SurrogateLoss,
    proximal_T: Tensor | None = None,
) -> Measures:
    """Measures of trained tokens under the policy that the update starts from; those against the proximal policy only where `proximal_T` is given."""
    if not len(logp_T):
        return Measures()
    everywhere_T = torch.ones_like(advantages_T, dtype=torch.bool)
    rows: dict[str, tuple[Tensor, Tensor]] = {
        "entropy_nats": (entropy_T, everywhere_T),
        "entropy_positive_nats": (entropy_T, advantages_T > 0),
        "entropy_negative_nats": (entropy_T, advantages_T < 0),
        "entropy_zero_nats": (entropy_T, advantages_T == 0),
        "entropy_estimate_nats": (-logp_T, everywhere_T),
        "clip_up_share": (surrogate.clipped_up_T, everywhere_T),
        "clip_down_share": (surrogate.clipped_down_T, everywhere_T),
    }
    maxima: dict[str, Tensor] = {}
    for name, other_T in {"behaviour": behaviour_T, "proximal": proximal_T}.items():
        if other_T is None:
            continue
        ratio_T, log_ratio_T = importance_ratio(logp_T, other_T), logp_T - other_T
        rows[f"ratio_{name}_mean"] = (ratio_T, everywhere_T)
        rows[f"kl_{name}_k1_nats"] = (-log_ratio_T, everywhere_T)
        # expm1 at full precision: near l = 0, where k3 is l^2 / 2, the float32 difference would be all rounding.
        rows[f"kl_{name}_k3_nats"] = (torch.expm1(log_ratio_T.double().clamp(max=20)) - log_ratio_T.double(), everywhere_T)
        maxima[f"ratio_{name}_max"] = ratio_T.max()
        if name == "behaviour":
            rows[_SQUARE] = (ratio_T.double() ** 2, everywhere_T)
    lags, counts = torch.unique(lags_T, return_counts=True)
    return Measures(
        sums=_masked_sums(rows),
        maxima=dict(zip(maxima, torch.stack(list(maxima.values())).tolist(), strict=True)),
        lags=dict(zip(lags.tolist(), counts.tolist(), strict=True)),
    )


@torch.no_grad()
def mismatch_measures(start_logp_T: Tensor, *, behaviour_T: Tensor, lags_T: Tensor) -> Measures:
    """How far trainer and sampler disagree on the same weights: tokens of lag 0 only; `start_logp_T` is of the policy at the start of the step."""
    return Measures(sums=_masked_sums({"mismatch_lag0_nats": ((start_logp_T - behaviour_T).abs(), lags_T == 0)}))


def group_measures(rewards_G: Sequence[float], *, lengths_G: Sequence[int], truncated_G: Sequence[bool]) -> Measures:
    """Measures of one group: its rewards, its completions' lengths in tokens, and which of them were cut off at the longest length."""
    members = len(rewards_G)
    return Measures(
        sums={
            "reward_mean": (float(sum(rewards_G)), members),
            "completion_tokens_mean": (float(sum(lengths_G)), members),
            "truncated_share": (float(sum(truncated_G)), members),
            "zero_signal_share": (float(not has_signal(torch.tensor(rewards_G, dtype=torch.float64))), 1),
        }
    )


def _masked_sums(rows: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[float, int]]:
    """Sum over the mask and size of the mask, for all rows in one transfer from the device."""
    values_KT = torch.stack([values_T.double() for values_T, _ in rows.values()])
    mask_KT = torch.stack([mask_T for _, mask_T in rows.values()])
    sums_K = torch.where(mask_KT, values_KT, 0.0).sum(1)
    both = torch.stack([sums_K, mask_KT.sum(1).double()]).tolist()
    return {key: (total, int(count)) for key, total, count in zip(rows, *both, strict=True)}
