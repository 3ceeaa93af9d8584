"""Policy losses: log-probabilities and advantages of trained tokens in, one scalar and what was clipped out. Pure functions; `_T` is trained tokens.

A loss is a sum over tokens divided by a denominator that the caller passes: the pieces of a mini-batch that were packed apart then add up to the
loss of the whole. The gradient flows through `logp_T` alone; anchor, weight and advantage are constants to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.contracts.algorithms import Anchor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before exp, as veRL does: exp(20) = 4.9e8 can be squared and summed. Beyond it the gradient is zero."""


@dataclass(frozen=True)
class SurrogateLoss:
    """A policy loss and what it did to each token."""

    loss: Tensor
    """Scalar, to be minimised."""
    ratio_T: Tensor
    """Importance ratio to the anchor; detached."""
    clipped_up_T: Tensor
    """bool: a token of positive advantage whose ratio passed the upper bound; it has no gradient."""
    clipped_down_T: Tensor
    """bool: a token of negative advantage whose ratio passed the lower bound; it has no gradient."""


def importance_ratio(logp_T: Tensor, anchor_logp_T: Tensor) -> Tensor:
    """exp(logp - anchor), the log-ratio clamped to +-MAX_LOG_RATIO. The anchor gets no gradient."""
    return torch.exp((logp_T - anchor_logp_T.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def anchor_logps(anchor: Anchor, behaviour_T: Tensor, proximal_T: Tensor | None, *, truncation: float) -> tuple[Tensor, Tensor]:
    """The log-probabilities in the ratio's denominator, and the weight of each token's term.

    behaviour: (mu, 1)                             lag is visible to the clip
    proximal:  (prox, 1)                           lag is invisible to the loss
    decoupled: (prox, min(prox / mu, truncation))  decoupled PPO (Hilton et al., arXiv 2110.00641), its weight truncated as AReaL and TIS do

    `behaviour_T` is what the sampler reported, `proximal_T` what the policy at the start of the step gives; the latter may be None for `behaviour`.
    """
    if anchor is Anchor.BEHAVIOUR:
        return behaviour_T, torch.ones_like(behaviour_T)
    if proximal_T is None:
        raise ValueError(f"the anchor {anchor.value!r} needs the proximal policy's log-probabilities")
    if anchor is Anchor.PROXIMAL:
        return proximal_T, torch.ones_like(proximal_T)
    return proximal_T, importance_ratio(proximal_T.detach(), behaviour_T).clamp(max=truncation)


def clipped_surrogate(
    logp_T: Tensor,
    anchor_logp_T: Tensor,
    advantages_T: Tensor,
    weight_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_off: bool,
    denominator: float,
) -> SurrogateLoss:
    """PPO's clipped surrogate (Schulman et al., arXiv 1707.06347) with separate bounds (DAPO, arXiv 2503.14476), token by token:

        L = - sum_T w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) / denominator,    r = exp(logp - anchor)

    Descent raises the probability of tokens with A > 0 until r > 1 + clip_high and lowers that of tokens with A < 0 until r < 1 - clip_low; beyond
    these the gradient is zero. On the other side (A > 0 and r small, A < 0 and r large) nothing is clipped. With `clip_off` nothing ever is.
    With `denominator` = trained tokens of the mini-batch this is the token-mean loss.
    """
    ratio_T = importance_ratio(logp_T, anchor_logp_T)
    value_T = ratio_T.detach()
    if clip_off:
        up_T = down_T = torch.zeros_like(value_T, dtype=torch.bool)
        kept_T = ratio_T
    else:
        up_T = (advantages_T > 0) & (value_T > 1 + clip_high)
        down_T = (advantages_T < 0) & (value_T < 1 - clip_low)
        kept_T = torch.where(up_T | down_T, value_T.clamp(1 - clip_low, 1 + clip_high), ratio_T)
    loss = -(weight_T.detach() * kept_T * advantages_T).sum() / denominator
    return SurrogateLoss(loss=loss, ratio_T=value_T, clipped_up_T=up_T, clipped_down_T=down_T)
