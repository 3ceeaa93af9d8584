"""Off-policy corrections: which policy stands in the ratio's denominator, what each token weighs, and which tokens are rejected. Pure; no gradient.

Three policies (decoupled PPO, Hilton et al., arXiv 2110.00641): the sampler mu (behaviour), the policy at the start of the step (proximal), and the
one that is being updated (current). The weight w = proximal/behaviour of a token corrects for lag and for a mismatch between sampler and trainer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.contracts.algorithms import Anchor, Correction, Weighting
from trainer.losses.ratio import clamped_exp
from trainer.tokens import Tokens


@dataclass(frozen=True)
class Corrected:
    """What a correction makes of the tokens of a mini-batch."""

    anchor_T: Tensor
    """Log-probabilities in the ratio's denominator."""
    weight_T: Tensor
    """Factor of each token's term, 0 where it is rejected."""
    rejected_T: Tensor
    """bool"""


@torch.no_grad()
def correct(correction: Correction, logp_T: Tensor, tokens: Tokens) -> Corrected:
    """The anchor and the weights of `correction`; `logp_T` is the current policy's, for M2PO and OPSM.

    behaviour: (mu, 1)        lag is visible to the clip
    proximal:  (proximal, 1)  lag is invisible to the loss
    decoupled: (proximal, w)  w as `correction.weight` makes it
    A rejected token weighs 0 with every anchor.
    """
    weight_T, rejected_T = _weights(correction, tokens)
    log_ratio_T = logp_T - tokens.behaviour_T
    if correction.m2 is not None:
        rejected_T = rejected_T | beyond_second_moment(log_ratio_T, tokens.advantages_T, bound=correction.m2)
    if correction.opsm is not None:
        rejected_T = rejected_T | ((tokens.advantages_T < 0) & (-tokens.row_mean(log_ratio_T) > correction.opsm)[tokens.row_T])
    if correction.anchor is not Anchor.DECOUPLED:
        weight_T = torch.ones_like(weight_T)
    return Corrected(
        anchor_T=tokens.behaviour_T if correction.anchor is Anchor.BEHAVIOUR else tokens.proximal_T,
        weight_T=torch.where(rejected_T, 0.0, weight_T),
        rejected_T=rejected_T,
    )


def _weights(correction: Correction, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """w of each token as `correction.weight` makes it, and where that rejects it. TIS and masked IS on tokens and completions: veRL's and TRL's
    definitions; IcePop: arXiv 2510.18855."""
    log_weight_T = tokens.proximal_T - tokens.behaviour_T
    weight_T = clamped_exp(log_weight_T)
    none_T = torch.zeros_like(weight_T, dtype=torch.bool)

    def outside(values_T: Tensor) -> Tensor:
        return (values_T < correction.reject_below) | (values_T > correction.reject_above)

    match correction.weighting:
        case Weighting.NONE:
            return weight_T, none_T
        case Weighting.TRUNCATE:
            return weight_T.clamp(max=correction.truncation), none_T
        case Weighting.MASK:
            return weight_T, outside(weight_T)
        case Weighting.SEQUENCE_TRUNCATE:
            return clamped_exp(tokens.row_sum(log_weight_T))[tokens.row_T].clamp(max=correction.truncation), none_T
        case Weighting.SEQUENCE_MASK:
            product_T = clamped_exp(tokens.row_sum(log_weight_T))[tokens.row_T]
            return product_T, outside(product_T)
        case Weighting.GEOMETRIC_MASK:
            return weight_T, outside(clamped_exp(tokens.row_mean(log_weight_T)))[tokens.row_T]


def beyond_second_moment(log_ratio_T: Tensor, advantages_T: Tensor, *, bound: float) -> Tensor:
    """M2PO (arXiv 2510.01161), bool: the tokens to be masked so that the mean of (log r)^2 over those left is at most `bound`.

    As in the authors' code, only tokens that already moved the way they are pushed count and can be masked: A > 0 with r > 1, A < 0 with r < 1. Those
    of the largest squares go; of tokens with equal squares all go or none, so that the order of tokens does not matter.
    """
    counted_T = ((advantages_T > 0) & (log_ratio_T > 0)) | ((advantages_T < 0) & (log_ratio_T < 0))
    squares_T = log_ratio_T.double().square().masked_fill(~counted_T, torch.inf)
    ascending_T = squares_T.sort().values
    means_T = ascending_T.cumsum(0) / torch.arange(1, len(ascending_T) + 1, device=ascending_T.device)
    kept = (means_T <= bound).sum()  # means of an ascending row never fall, so the first `kept` of them are those within the bound
    least = torch.cat([ascending_T, ascending_T.new_full((1,), torch.inf)])[kept]
    return counted_T & (squares_T >= least)
