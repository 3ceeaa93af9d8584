"""Entropy control at the level of tokens: which are trained on, with what weight, advantage and penalty. Pure functions; `_T` is trained tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from services.contracts.algorithms import (
    AdaptiveRegularisation,
    Bapo,
    Bonus,
    ClipCov,
    EntroPic,
    EntropyAdvantage,
    EntropyControl,
    ForkingTokens,
    KlCov,
    NoControl,
    OneSign,
    PositiveReweighting,
    RandomPositiveClip,
)
from trainer.control.actuators import Actuators
from trainer.losses.ratio import importance_ratio
from trainer.tokens import Tokens


@dataclass(frozen=True)
class Selection:
    """What entropy control makes of each token's term in the loss. The normaliser stays the number of tokens, whatever the weights are."""

    weight_T: Tensor
    """Factor of the token's term, detached; 0: no gradient."""
    advantages_T: Tensor
    """Advantage to be used, detached."""
    penalty_T: Tensor | None = None
    """Added to the loss of the token, with gradient."""
    unclipped: bool = False
    """The surrogate is used without clip."""


def select(
    settings: EntropyControl,
    actuators: Actuators,
    logp_T: Tensor,
    entropy_T: Tensor,
    anchor_T: Tensor,
    tokens: Tokens,
    *,
    clipped_T: Callable[[], Tensor] | None = None,
    generator: torch.Generator,
) -> Selection:
    """The selection of `settings` for the tokens of a mini-batch; methods that act elsewhere leave every token as it is.

    `anchor_T` is the policy in the ratio's denominator; `clipped_T()` says which tokens the policy loss clips already. Random choices are drawn from
    `generator` on the CPU, so that they are the same on every device.
    """
    advantages_T = tokens.advantages_T
    ones_T = torch.ones_like(advantages_T)
    if not tokens.count:
        return Selection(ones_T, advantages_T)
    match settings:
        case PositiveReweighting():
            return Selection(_positive_weight(actuators, advantages_T), advantages_T)
        case OneSign():
            kept_T = advantages_T >= 0 if settings.sign == "positive" else advantages_T <= 0
            return Selection(kept_T.to(ones_T), advantages_T)
        case RandomPositiveClip():
            chosen_T = _some(advantages_T > 0, at_most=_part(settings.fraction, int((advantages_T > 0).sum())), generator=generator)
            return Selection((~chosen_T).to(ones_T), advantages_T)
        case ClipCov():
            candidates_T = _clip_cov_candidates(settings, logp_T, advantages_T, clipped_T)
            chosen_T = _some(candidates_T, at_most=_part(settings.fraction, tokens.count), generator=generator)
            return Selection((~chosen_T).to(ones_T), advantages_T)
        case KlCov():
            return Selection(ones_T, advantages_T, penalty_T=_kl_cov_penalty(settings, logp_T, anchor_T, advantages_T), unclipped=True)
        case EntropyAdvantage():
            return Selection(ones_T, _entropy_shaped(settings, entropy_T, advantages_T))
        case ForkingTokens():
            return Selection(_forking(settings, entropy_T).to(ones_T), advantages_T)
        case EntroPic():
            return Selection(ones_T, advantages_T, penalty_T=_entropic_loss(actuators, logp_T, anchor_T, advantages_T))
        case NoControl() | AdaptiveRegularisation() | Bonus() | Bapo():
            return Selection(ones_T, advantages_T)
        case _:
            assert_never(settings)


def covariance(logp_T: Tensor, advantages_T: Tensor) -> Tensor:
    """Each token's part of cov(log pi, A): (log pi_t - mean)(A_t - mean) over the mini-batch (arXiv 2505.22617, equation 10); detached.

    Large where a likely token has a large advantage, or an unlikely one a low: updates on these lower entropy most.
    """
    logp_T = logp_T.detach()
    return (logp_T - logp_T.mean()) * (advantages_T - advantages_T.mean())


def _positive_weight(actuators: Actuators, advantages_T: Tensor) -> Tensor:
    """Positive Advantage Reweighting (arXiv 2511.05993): lambda on tokens with A > 0 (in v1, Progressive, A >= 0), 1 on the others."""
    positive_T = advantages_T >= 0 if actuators.includes_zero else advantages_T > 0
    return torch.ones_like(advantages_T).masked_fill(positive_T, actuators.positive_weight)


def _clip_cov_candidates(settings: ClipCov, logp_T: Tensor, advantages_T: Tensor, clipped_T: Callable[[], Tensor] | None) -> Tensor:
    """Clip-Cov (arXiv 2505.22617; veRL `compute_policy_loss_clip_cov`): tokens with low < cov < high that the policy loss has not clipped already.

    Of these min(max(1, int(fraction T)), candidates), chosen at random, get no gradient: likely tokens of good completions and unlikely ones of bad
    are no longer pushed to the extremes, and entropy falls more slowly. veRL's fraction 2e-4, low 1, high 5.
    """
    cov_T = covariance(logp_T, advantages_T)
    candidates_T = (cov_T > settings.low) & (cov_T < settings.high)
    return candidates_T if clipped_T is None else candidates_T & ~clipped_T()


def _kl_cov_penalty(settings: KlCov, logp_T: Tensor, anchor_T: Tensor, advantages_T: Tensor) -> Tensor:
    """KL-Cov (arXiv 2505.22617; veRL `compute_policy_loss_kl_cov`): coefficient |log pi - log anchor| on the tokens of highest covariance.

    They are max(1, int(fraction T)), and are drawn back to the anchor; no token is clipped. While policy and anchor are equal its gradient is 0:
    on-policy it does nothing. Fraction 2e-4 and coefficient 1 are the defaults of veRL's function; its configuration file has 0.1.
    """
    chosen_T = torch.zeros_like(logp_T, dtype=torch.bool)
    chosen_T[covariance(logp_T, advantages_T).topk(_part(settings.fraction, len(logp_T))).indices] = True
    return torch.where(chosen_T, settings.coefficient * (logp_T - anchor_T.detach()).abs(), 0.0)


def _entropy_shaped(settings: EntropyAdvantage, entropy_T: Tensor, advantages_T: Tensor) -> Tensor:
    """Entropy-shaped advantages (arXiv 2506.14758): A + min(coefficient H, |A| / kappa), H a constant.

    At tokens of high entropy good completions are pushed more and bad ones less. kappa > 1 keeps every sign. With GRPO the paper has coefficient 0.4
    and kappa 2.
    """
    bonus_T = settings.coefficient * entropy_T.detach().clamp(min=0)  # rounding can put an entropy of 0 a little below
    return advantages_T + torch.minimum(bonus_T, advantages_T.abs() / settings.kappa)


def _forking(settings: ForkingTokens, entropy_T: Tensor) -> Tensor:
    """80/20 (arXiv 2506.01939): tokens with H >= tau, tau the (1 - fraction)-quantile of the mini-batch's entropies; the paper's fraction is 0.2.

    The quantile interpolates, as TRL's does (`top_entropy_quantile`). Tokens that tie with tau are all kept.
    """
    entropy_T = entropy_T.detach()
    return entropy_T >= torch.quantile(entropy_T, 1 - settings.fraction)


def _entropic_loss(actuators: Actuators, logp_T: Tensor, anchor_T: Tensor, advantages_T: Tensor) -> Tensor:
    """EntroPIC's extra loss (arXiv 2511.15248): alpha (-r |A|) on tokens whose probability is above the threshold.

    With the main loss -r A it makes the weight 1 + alpha on positive and 1 - alpha on negative ones of these tokens: alpha < 0, while entropy is
    below its target, raises likely tokens less and lowers them more. Like every token's term it is divided by the normaliser of the loss; the
    authors' code (yk7333/EntroPIC) divides by the number of likely tokens, so that the weights there depend on how many these are.
    """
    likely_T = logp_T.detach().exp() > actuators.threshold
    return torch.where(likely_T, -actuators.high_probability * importance_ratio(logp_T, anchor_T) * advantages_T.abs(), 0.0)


def _part(fraction: float, count: int) -> int:
    """int(fraction count), at least 1 where there is one."""
    return min(max(1, int(fraction * count)), count)


def _some(candidates_T: Tensor, *, at_most: int, generator: torch.Generator) -> Tensor:
    """bool: `at_most` of the candidates, drawn without replacement; all of them where they are fewer."""
    places = candidates_T.nonzero().squeeze(1)
    drawn = torch.randperm(len(places), generator=generator)[:at_most]
    chosen_T = torch.zeros_like(candidates_T)
    chosen_T[places[drawn.to(places.device)]] = True
    return chosen_T
