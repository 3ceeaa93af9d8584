"""What is kept of single tokens for people who look at samples: exact entropy and importance ratio, of so many tokens of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from services.contracts.messages import TokenMeasures
from trainer.minibatch import Minibatch

MOST_TOKENS = 65_536
"""Tokens of one step that are kept: 256 KB beside the samples themselves, whatever the batch."""
GREATEST = 60_000.0
"""What a float16 can hold."""


@torch.no_grad()
def token_measures(minibatch: Minibatch, logp_T: Tensor, entropy_T: Tensor, *, most: int) -> dict[tuple[int, int], TokenMeasures]:
    """Of whole completions, by their place, until `most` tokens are reached. `logp_T` and `entropy_T` are the policy's before the update, in nats."""
    if most <= 0:
        return {}
    log_ratio_T = logp_T - minibatch.gathered("behaviour_T")
    rows, lengths = (found.tolist() for found in torch.unique_consecutive(minibatch.row_T, return_counts=True))
    told_2T = torch.stack([entropy_T, log_ratio_T])[:, :most].clamp(-GREATEST, GREATEST).half().cpu()
    kept, start = {}, 0
    for row, length in zip(rows, lengths, strict=True):
        stop = start + length
        if stop > most:
            break
        entropies, log_ratios = (part.numpy().tobytes() for part in told_2T[:, start:stop].contiguous())
        kept[minibatch.sources[row][0].place] = TokenMeasures(entropies=entropies, log_ratios=log_ratios)
        start = stop
    return kept
