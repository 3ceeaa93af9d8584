"""Advantages: what a completion's reward is worth beside those of its group. Pure functions of one group's rewards; `_G` is its members."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def has_signal(rewards_G: Tensor) -> bool:
    """Do the rewards of a group differ? Where they do not, no member has an advantage and the group moves no weight."""
    return bool(rewards_G.max() > rewards_G.min())


def group_advantages(rewards_G: Tensor, *, normalise: Literal["std", "none"], epsilon: float) -> Tensor:
    """Advantages of GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1): A_g = (R_g - mean R) / (std R + epsilon).

    With `normalise="none"` the division is left out. std is the sample standard deviation (ddof 1): the paper does not say which, and veRL
    (`compute_grpo_outcome_advantage`) and TRL (`GRPOTrainer`) both call `torch.std`, whose default that is. A group of equal rewards, or of one
    member, gets exact zeros. Shape (G,), float64.
    """
    rewards_G = rewards_G.double()
    if not has_signal(rewards_G):
        # Said outright: rounding in the mean leaves differences of 1e-17, which a small epsilon would blow up.
        return torch.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    return centred_G if normalise == "none" else centred_G / (rewards_G.std() + epsilon)
