"""Trained tokens by bins, as a matrix with which any sum over tokens becomes the sums over all bins in one product."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from services.contracts.measures import BINS
from trainer.tokens import Tokens

WAYS = ("lag", "advantage", "clip", "position", "correct", "entropy")
"""The ways to divide, in the order of `token_bins`."""
OFFSETS = tuple(accumulate((len(BINS[by]) for by in WAYS), initial=1))
COLUMNS = {"": 0} | {f"/{by}/{name}": offset + i for by, offset in zip(WAYS, OFFSETS, strict=False) for i, name in enumerate(BINS[by])}
"""What a key ends with -> column of `token_bins`."""
LAG_BOUNDS = tuple(int(name.rstrip("+").partition("-")[0]) for name in BINS["lag"][1:])
"""Least lag of each bin but the first."""


def token_bins(
    entropy_T: Tensor, tokens: Tokens, *, clipped_up_T: Tensor, clipped_down_T: Tensor, correct_at: float
) -> Tensor:  # fmt: skip
    """(T, B) float64: 1 where the token is in the bin. The first column is all tokens, the others are as COLUMNS says."""
    count, device = tokens.count, entropy_T.device
    advantages_T, row_T = tokens.advantages_T, tokens.row_T
    fifth_T = torch.empty_like(row_T)
    fifth_T[entropy_T.argsort(stable=True)] = torch.arange(count, device=device) * 5 // count
    index_WT = torch.stack(
        [
            torch.bucketize(tokens.lags_T, torch.tensor(LAG_BOUNDS, device=device), right=True),
            (advantages_T < 0) + 2 * (advantages_T == 0),
            clipped_up_T + 2 * clipped_down_T,
            10 * tokens.position_T // tokens.lengths_R[row_T],
            (tokens.rewards_R < correct_at).long()[row_T],
            fifth_T,
        ]
    )
    bins_TB = torch.zeros(count, len(COLUMNS), dtype=torch.float64, device=device)
    bins_TB[:, 0] = 1
    return bins_TB.scatter_(1, (index_WT + torch.tensor(OFFSETS[:-1], device=device)[:, None]).T, 1.0)


def forking_threshold(entropy_T: Tensor) -> float:
    """80th percentile of the entropies, in nats: tokens above that of a run's first step are its forking tokens (arXiv 2506.01939)."""
    return float(entropy_T.sort().values[len(entropy_T) * 4 // 5])
