"""TOPR, tapered off-policy REINFORCE (arXiv 2503.14286)."""

from __future__ import annotations

import torch
from torch import Tensor

from services.contracts.algorithms import Topr
from trainer.losses.ratio import clamped_exp
from trainer.losses.terms import Objective, unclipped
from trainer.tokens import Tokens


def topr(loss: Topr, logp_T: Tensor, anchor_T: Tensor, advantages_T: Tensor, tokens: Tokens) -> Objective:
    """J = A log pi for A > 0, sg(min(r, 1)) A log pi otherwise: what is wrong fades once the policy no longer says it, what is right never does.

    r is the token's ratio, or the completion's, the product of its tokens', as `loss.level` says.
    """
    log_ratio_T = logp_T.detach() - anchor_T.detach()
    if loss.level == "completion":
        log_ratio_T = tokens.row_sum(log_ratio_T)[tokens.row_T]
    ratio_T = clamped_exp(log_ratio_T)
    return unclipped(torch.where(advantages_T > 0, 1.0, ratio_T.clamp(max=1)) * advantages_T * logp_T, ratio_T)
