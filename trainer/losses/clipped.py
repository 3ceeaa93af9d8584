"""PPO's clipped surrogate (arXiv 1707.06347) with separate bounds (DAPO, arXiv 2503.14476) and dual clip (arXiv 1912.09729)."""

from __future__ import annotations

import torch
from torch import Tensor

from services.contracts.algorithms import Clip, ClippedSurrogate
from trainer.losses.ratio import importance_ratio
from trainer.losses.terms import Objective


def clipped(loss: ClippedSurrogate, clip: Clip, logp_T: Tensor, anchor_T: Tensor, advantages_T: Tensor) -> Objective:
    """`surrogate` of each token's own ratio."""
    return surrogate(importance_ratio(logp_T, anchor_T), advantages_T, clip, dual_clip=loss.dual_clip)


def surrogate(ratio_T: Tensor, advantages_T: Tensor, clip: Clip, *, dual_clip: float | None = None) -> Objective:
    """The smaller of the plain and the clipped term; for A < 0 at least c A under dual clip:

        J = min(r A, clip(r, 1 - low, 1 + high) A),    for A < 0:  max(J, c A)

    Ascent raises the probability of tokens with A > 0 until r > 1 + high and lowers that of tokens with A < 0 until r < 1 - low; beyond these the
    gradient is zero. On the other side (A > 0 and r small, A < 0 and r large) nothing is clipped, except r > c by the dual clip, which `clip.off`
    does not switch off.
    """
    value_T = ratio_T.detach()
    up_T, down_T = beyond(value_T, advantages_T, clip)
    dual_T = torch.zeros_like(up_T) if dual_clip is None else (advantages_T < 0) & (value_T > dual_clip)
    kept_T = torch.where(up_T | down_T, value_T.clamp(1 - clip.low, 1 + clip.high), ratio_T)
    if dual_clip is not None:
        kept_T = torch.where(dual_T, dual_clip, kept_T)
    return Objective(values_T=kept_T * advantages_T, ratio_T=value_T, clipped_up_T=up_T, clipped_down_T=down_T, dual_clipped_T=dual_T)


def beyond(ratio_T: Tensor, advantages_T: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """bool: tokens of A > 0 with r > 1 + high, tokens of A < 0 with r < 1 - low; none with `clip.off`."""
    if clip.off:
        none_T = torch.zeros_like(ratio_T, dtype=torch.bool)
        return none_T, none_T
    return (advantages_T > 0) & (ratio_T > 1 + clip.high), (advantages_T < 0) & (ratio_T < 1 - clip.low)
