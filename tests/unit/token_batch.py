"""Mini-batches of tokens by hand, in float64: one list of log-probabilities to a completion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.tokens import Tokens

Rows = Sequence[Sequence[float]]


def flat(rows: Rows, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=dtype)


def batch(advantages: Sequence[float], behaviour: Rows, proximal: Rows | None = None, *, dtype: torch.dtype = torch.float64) -> Tokens:
    """The tokens of completions with these advantages; where `proximal` is not given it is the sampler."""
    rows = [row for row, values in enumerate(behaviour) for _ in values]
    return Tokens(
        behaviour_T=flat(behaviour, dtype), proximal_T=flat(behaviour if proximal is None else proximal, dtype),
        advantages_T=torch.tensor([advantages[row] for row in rows], dtype=dtype), lags_T=torch.zeros(len(rows), dtype=torch.int64),
        row_T=torch.tensor(rows, dtype=torch.int64),
        position_T=torch.tensor([t for values in behaviour for t in range(len(values))], dtype=torch.int64),
        rewards_R=torch.tensor([float(a > 0) for a in advantages], dtype=dtype),
    )  # fmt: skip
