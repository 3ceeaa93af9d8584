"""Importance ratios that cannot overflow, and weights that carry the gradient of a log-probability."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before exp, as veRL does: exp(20) = 4.9e8 can be squared and summed. Beyond it the gradient is zero."""


def importance_ratio(logp_T: Tensor, anchor_T: Tensor) -> Tensor:
    """exp(logp - anchor), the log-ratio clamped to +-MAX_LOG_RATIO. The anchor gets no gradient."""
    return clamped_exp(logp_T - anchor_T.detach())


def clamped_exp(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio clamped to +-MAX_LOG_RATIO."""
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def carried(weight_T: Tensor, logp_T: Tensor) -> Tensor:
    """w pi / sg(pi): the value of the weight w, a constant, and the gradient of w log pi."""
    return weight_T.detach() * torch.exp(logp_T - logp_T.detach())
