"""What every policy loss gives: the objective of each token, and what was clipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """What a policy loss maximises, token by token, before weights and normaliser. `_T` runs over trained tokens."""

    values_T: Tensor
    """Its gradient flows through the current log-probabilities only."""
    ratio_T: Tensor
    """Importance ratio to the anchor, detached; with GSPO the completion's on each of its tokens."""
    clipped_up_T: Tensor
    """bool: a token of positive advantage that is no longer pushed up, as it lies beyond the upper bound."""
    clipped_down_T: Tensor
    """bool: a token of negative advantage that is no longer pushed down, as it lies beyond the lower bound."""
    dual_clipped_T: Tensor
    """bool: a token whose weight is held at the dual clip."""


def unclipped(values_T: Tensor, ratio_T: Tensor) -> Objective:
    """The objective of a loss that never takes a token's gradient away."""
    none_T = torch.zeros_like(ratio_T, dtype=torch.bool)
    return Objective(values_T=values_T, ratio_T=ratio_T.detach(), clipped_up_T=none_T, clipped_down_T=none_T, dual_clipped_T=none_T)
