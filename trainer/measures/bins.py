"""Trained tokens, and completions, by bins: a matrix with which any sum over them becomes the sums over all bins in one product."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from services.contracts.measures import BINS
from trainer.tokens import Tokens

WAYS = ("lag", "advantage", "clip", "position", "correct", "entropy")
"""The ways to divide, in the order of `token_bins`."""
COMPLETION_WAYS = ("lag", "entropy")
"""The ways to divide, in the order of `completion_bins`."""


def _offsets(ways: tuple[str, ...]) -> tuple[int, ...]:
    """First column of each way, and what would be the next one's. Column 0 is everything."""
    return tuple(accumulate((len(BINS[by]) for by in ways), initial=1))


def _columns(ways: tuple[str, ...]) -> dict[str, int]:
    starts = zip(ways, _offsets(ways), strict=False)
    return {"": 0} | {f"/{by}/{name}": offset + i for by, offset in starts for i, name in enumerate(BINS[by])}


COLUMNS = _columns(WAYS)
"""What a key ends with -> column of `token_bins`."""
COMPLETION_COLUMNS = _columns(COMPLETION_WAYS)
"""What a key ends with -> column of `completion_bins`."""
LAG_BOUNDS = tuple(int(name.rstrip("+").partition("-")[0]) for name in BINS["lag"][1:])
"""Least lag of each bin but the first."""


def token_bins(
    entropy_T: Tensor, tokens: Tokens, *, clipped_up_T: Tensor, clipped_down_T: Tensor, correct_at: float
) -> Tensor:  # fmt: skip
    """(T, B) float64: 1 where the token is in the bin. The first column is all tokens, the others are as COLUMNS says."""
    advantages_T, row_T = tokens.advantages_T, tokens.row_T
    index_WT = torch.stack(
        [
            _lag_bin(tokens.lags_T),
            (advantages_T < 0) + 2 * (advantages_T == 0),
            clipped_up_T + 2 * clipped_down_T,
            10 * tokens.position_T // tokens.lengths_R[row_T],
            (tokens.rewards_R < correct_at).long()[row_T],
            _fifth(entropy_T),
        ]
    )
    return _matrix(index_WT, WAYS)


def completion_bins(entropy_T: Tensor, tokens: Tokens) -> Tensor:
    """(R, B) float64: 1 where the completion is in the bin, by the means of its tokens' lags and entropies."""
    lengths_R = tokens.lengths_R.clamp(min=1)
    lag_R, entropy_R = (tokens.row_sum(x_T.double()) / lengths_R for x_T in (tokens.lags_T, entropy_T))
    return _matrix(torch.stack([_lag_bin(lag_R.round()), _fifth(entropy_R)]), COMPLETION_WAYS)


def _lag_bin(lag_X: Tensor) -> Tensor:
    return torch.bucketize(lag_X, torch.tensor(LAG_BOUNDS, device=lag_X.device), right=True)


def _fifth(entropy_X: Tensor) -> Tensor:
    """The fifth of all X that each is in, by its entropy: 0 to 4."""
    count, device = len(entropy_X), entropy_X.device
    fifth_X = torch.empty(count, dtype=torch.long, device=device)
    fifth_X[entropy_X.argsort(stable=True)] = torch.arange(count, device=device) * 5 // count
    return fifth_X


def _matrix(index_WX: Tensor, ways: tuple[str, ...]) -> Tensor:
    """(X, B) float64 of the bin of each X in each way."""
    offsets = _offsets(ways)
    bins_XB = torch.zeros(index_WX.shape[1], offsets[-1], dtype=torch.float64, device=index_WX.device)
    bins_XB[:, 0] = 1
    return bins_XB.scatter_(1, (index_WX + torch.tensor(offsets[:-1], device=index_WX.device)[:, None]).T, 1.0)


def forking_threshold(entropy_T: Tensor) -> float:
    """80th percentile of the entropies, in nats: tokens above that of a run's first step are its forking tokens (arXiv 2506.01939)."""
    return float(entropy_T.sort().values[len(entropy_T) * 4 // 5])
