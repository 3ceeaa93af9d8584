"""Policy losses: log-probabilities and advantages of trained tokens in, the objective of each token out. Pure functions of the mini-batch whole.

A token's term is to be maximised; weights, the normaliser and the sign come from the caller. The gradient flows through `logp_T` alone and is finite
for every finite log-ratio.
"""

from __future__ import annotations

from torch import Tensor

from services.contracts.algorithms import Aspo, Cispo, Clip, ClippedSurrogate, Dppo, Gspo, Loss, Sapo, Topr
from trainer.losses.aspo import aspo
from trainer.losses.cispo import cispo
from trainer.losses.clipped import clipped
from trainer.losses.dppo import dppo
from trainer.losses.gspo import gspo
from trainer.losses.normalise import normalised
from trainer.losses.ratio import MAX_LOG_RATIO, importance_ratio
from trainer.losses.sapo import sapo
from trainer.losses.terms import Objective
from trainer.losses.topr import topr
from trainer.tokens import Tokens

__all__ = ["MAX_LOG_RATIO", "Objective", "importance_ratio", "normalised", "objective"]


def objective(loss: Loss, clip: Clip, logp_T: Tensor, anchor_T: Tensor, tokens: Tokens, *, advantages_T: Tensor | None = None) -> Objective:
    """The objective of each token under `loss`. `anchor_T` is the log-probability in the ratio's denominator; `advantages_T` stands in for that of
    `tokens` where entropy control has shaped it."""
    advantages_T = (tokens.advantages_T if advantages_T is None else advantages_T).detach()
    match loss:
        case ClippedSurrogate():
            return clipped(loss, clip, logp_T, anchor_T, advantages_T)
        case Cispo():
            return cispo(loss, logp_T, anchor_T, advantages_T)
        case Gspo():
            return gspo(loss, clip, logp_T, anchor_T, advantages_T, tokens)
        case Sapo():
            return sapo(loss, logp_T, anchor_T, advantages_T)
        case Dppo():
            return dppo(loss, logp_T, anchor_T, advantages_T)
        case Topr():
            return topr(loss, logp_T, anchor_T, advantages_T, tokens)
        case Aspo():
            return aspo(loss, clip, logp_T, anchor_T, advantages_T)
