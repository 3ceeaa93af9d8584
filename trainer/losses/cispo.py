"""CISPO (MiniMax-M1, arXiv 2506.13585; as ScaleRL uses it, arXiv 2510.13786)."""

from __future__ import annotations

from torch import Tensor

from services.contracts.algorithms import Cispo
from trainer.losses.ratio import importance_ratio
from trainer.losses.terms import Objective, unclipped


def cispo(loss: Cispo, logp_T: Tensor, anchor_T: Tensor, advantages_T: Tensor) -> Objective:
    """J = sg(clip(r, 1 - low, 1 + high)) A log pi: the weight is clipped, the gradient of a token never taken away."""
    ratio_T = importance_ratio(logp_T, anchor_T).detach()
    return unclipped(ratio_T.clamp(1 - loss.low, 1 + loss.high) * advantages_T * logp_T, ratio_T)
