"""SAPO (arXiv 2511.20347)."""

from __future__ import annotations

import torch
from torch import Tensor

from services.contracts.algorithms import Sapo
from trainer.losses.ratio import importance_ratio
from trainer.losses.terms import Objective, unclipped


def sapo(loss: Sapo, logp_T: Tensor, anchor_T: Tensor, advantages_T: Tensor) -> Objective:
    """J = (4 / tau) sigmoid(tau (r - 1)) A, with tau of the advantage's sign.

    The gradient is g r A with the gate g = sech^2(tau (r - 1) / 2): open at r = 1, closing as the ratio leaves 1 on either side.
    """
    ratio_T = importance_ratio(logp_T, anchor_T)
    tau_T = torch.where(advantages_T > 0, ratio_T.new_tensor(loss.tau_positive), ratio_T.new_tensor(loss.tau_negative))
    return unclipped(4 / tau_T * torch.sigmoid(tau_T * (ratio_T - 1)) * advantages_T, ratio_T)
