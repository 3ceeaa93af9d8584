"""The loss of one optimiser update: policy loss, off-policy correction and entropy control put together. Pure, over the whole mini-batch.

    L = - N( w_correction w_control J ) + N( w_correction penalty ) - alpha N( H )

J is the policy loss's objective of each token (trainer.losses), with the advantages as entropy control shapes them; N the normaliser; H the exact
entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.contracts.algorithms import Aspo, Bapo, ClippedSurrogate
from services.contracts.spec import RunSpec
from trainer.control.actuators import Actuators
from trainer.control.bapo import search_bounds
from trainer.control.selection import select
from trainer.corrections import Corrected, correct
from trainer.losses import Objective, normalised, objective
from trainer.losses.ratio import importance_ratio
from trainer.tokens import Tokens


@dataclass(frozen=True)
class UpdateLoss:
    """A loss to be minimised, and what measures need of how it came about."""

    loss: Tensor
    objective: Objective
    corrected: Corrected
    weight_T: Tensor
    """Factor of each token's term: correction times control; 0 where the token has no part in the update."""
    bounds: tuple[float, float] | None
    """Of the importance ratio, where the loss has any."""


def update_loss(spec: RunSpec, actuators: Actuators, logp_T: Tensor, entropy_T: Tensor, tokens: Tokens, *, generator: torch.Generator) -> UpdateLoss:
    """The loss of an update on `tokens` under `spec`, with gradient through `logp_T` and, where entropy is rewarded, `entropy_T`."""
    corrected = correct(spec.correction, logp_T, tokens)
    anchor_T, clip = corrected.anchor_T, spec.clip
    if isinstance(spec.entropy, Bapo):
        clip = search_bounds(spec.entropy, importance_ratio(logp_T.detach(), anchor_T), tokens.advantages_T)

    def clipped_T() -> Tensor:
        plain = objective(spec.loss, clip, logp_T.detach(), anchor_T, tokens)
        return plain.clipped_up_T | plain.clipped_down_T

    chosen = select(spec.entropy, actuators, logp_T, entropy_T, anchor_T, tokens, clipped_T=clipped_T, generator=generator)
    if chosen.unclipped:
        clip = clip.model_copy(update={"off": True})
    aim = objective(spec.loss, clip, logp_T, anchor_T, tokens, advantages_T=chosen.advantages_T)
    weight_T = corrected.weight_T * chosen.weight_T

    def norm(values_T: Tensor) -> Tensor:
        return normalised(values_T, tokens, spec.loss.normaliser, max_tokens=spec.sampling.max_tokens)

    bounded = isinstance(spec.loss, ClippedSurrogate | Aspo) and not clip.off
    bounds = (1 - clip.low, 1 + clip.high) if bounded else None
    loss = -norm(weight_T * aim.values_T)
    if chosen.penalty_T is not None:
        loss = loss + norm(corrected.weight_T * chosen.penalty_T)
    if actuators.entropy_coefficient:
        loss = loss - actuators.entropy_coefficient * norm(entropy_T)
    return UpdateLoss(loss=loss, objective=aim, corrected=corrected, weight_T=weight_T, bounds=bounds)
