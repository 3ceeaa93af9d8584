"""DPPO with the binary total variation (arXiv 2602.04879), and prime-rl's penalty on the squared log-ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from services.contracts.algorithms import Dppo
from trainer.losses.ratio import MAX_LOG_RATIO, carried, importance_ratio
from trainer.losses.terms import Objective


def dppo(loss: Dppo, logp_T: Tensor, anchor_T: Tensor, advantages_T: Tensor) -> Objective:
    """The plain importance-weighted objective, without the tokens whose probability p has already moved too far the way they are pushed:

        J = M min(r, truncation) A - penalty (log r)^2,    M = 0 where A > 0 and p - p_anchor > high, or A < 0 and p - p_anchor < -low, else 1

    The truncated ratio keeps its gradient: that of min(r, truncation) A log pi. Masked tokens keep the penalty's.
    """
    ratio_T = importance_ratio(logp_T, anchor_T).detach()
    shift_T = logp_T.detach().exp() - anchor_T.detach().exp()
    up_T, down_T = (advantages_T > 0) & (shift_T > loss.high), (advantages_T < 0) & (shift_T < -loss.low)
    values_T = torch.where(up_T | down_T, 0.0, carried(ratio_T.clamp(max=loss.truncation), logp_T) * advantages_T)
    if loss.penalty:
        values_T = values_T - loss.penalty * (logp_T - anchor_T.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).square()
    return Objective(values_T=values_T, ratio_T=ratio_T, clipped_up_T=up_T, clipped_down_T=down_T, dual_clipped_T=torch.zeros_like(up_T))
