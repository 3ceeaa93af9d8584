"""The trained tokens of a mini-batch as losses, corrections, controls and measures see them: flat, whole, without a trace of how they were packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """`_T` runs over trained tokens, `_R` over the completions that they belong to. All constants: no gradient flows into them."""

    behaviour_T: Tensor
    """Log-probability under the sampler, float32, in nats."""
    proximal_T: Tensor
    """Log-probability under the policy at the start of the step, float32, in nats."""
    advantages_T: Tensor
    """float32; a completion's advantage on each of its tokens."""
    lags_T: Tensor
    """int64, versions."""
    row_T: Tensor
    """int64: the completion of each token, 0 ... R - 1. The tokens of a completion are neighbours, in order."""
    position_T: Tensor
    """int64: place of the token in its completion, from 0."""
    rewards_R: Tensor
    """float32: reward of each completion, as the verifiers gave it."""

    @property
    def count(self) -> int:
        return len(self.row_T)

    @property
    def rows(self) -> int:
        return len(self.rewards_R)

    @property
    def lengths_R(self) -> Tensor:
        """int64: trained tokens of each completion."""
        return torch.bincount(self.row_T, minlength=self.rows)

    def row_sum(self, values_T: Tensor) -> Tensor:
        """(R,) sum over each completion's tokens, with gradient."""
        return values_T.new_zeros(self.rows).index_add(0, self.row_T, values_T)

    def row_mean(self, values_T: Tensor) -> Tensor:
        """(R,) mean over each completion's tokens, with gradient."""
        return self.row_sum(values_T) / self.lengths_R.clamp(min=1)
