"""Reward shaping: what is added to and taken from the rewards of a group before they become advantages. Pure functions in plain floats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.contracts.algorithms import Shaping


@dataclass(frozen=True)
class Outcome:
    """One completion as shaping sees it."""

    reward: float
    """As the verifiers gave it."""
    tokens: int
    """Its length."""
    truncated: bool
    """It was cut off before it ended."""
    logp: float
    """Sum of its tokens' log-probabilities under the sampler, nats."""


def shaped_rewards(settings: Shaping, group: Sequence[Outcome], *, max_tokens: int) -> list[float]:
    """The rewards of a group's completions after shaping: the unlikeliness reward, then the overlong punishment. Both off: the rewards themselves."""
    rewards = [outcome.reward for outcome in group]
    if settings.unlikeliness:
        rewards = _unlikeliness(group, beta=settings.unlikeliness, correct_at=settings.correct_at)
    if settings.overlong_buffer:
        excess = [_overlong(outcome, max_tokens=max_tokens, buffer=settings.overlong_buffer) for outcome in group]
        rewards = [reward - settings.overlong_penalty * share for reward, share in zip(rewards, excess, strict=True)]
    return rewards


def _overlong(outcome: Outcome, *, max_tokens: int, buffer: int) -> float:
    """Share of the soft overlong punishment (DAPO, arXiv 2503.14476, equation 13) that a completion of length L gets:

        0 for L <= L_max - buffer      (L - (L_max - buffer)) / buffer up to L_max      1 for one that did not end

    Rises with each token of the buffer; a truncated one gets all of it, also where the model's context cut it off before L_max.
    """
    if outcome.truncated:
        return 1.0
    return min(max((outcome.tokens - (max_tokens - buffer)) / buffer, 0.0), 1.0)


def _unlikeliness(group: Sequence[Outcome], *, beta: float, correct_at: float) -> list[float]:
    """Unlikeliness reward (He et al., arXiv 2506.02355): R (1 - beta (G - rank) / G) for correct completions, rank 1 the likeliest of the group's G.

    So the likeliest loses most, beta (G - 1) / G of its reward, and the least likely nothing; 0.25 is the authors' beta. As in their code
    (rewarding-unlikely-release, `_compute_advantages`) likelihood is the mean log-probability of a token, so that length alone gives no rank, and
    groups all right or all wrong are left as they are: the authors do not train on them. Equal likelihoods share their mean rank.
    """
    right = [outcome.reward >= correct_at for outcome in group]
    if all(right) or not any(right):
        return [outcome.reward for outcome in group]
    likelihoods = [outcome.logp / max(outcome.tokens, 1) for outcome in group]
    below = [sum(other < own for other in likelihoods) + (likelihoods.count(own) - 1) / 2 for own in likelihoods]
    return [
        outcome.reward * (1 - beta * less_likely / len(group)) if correct else outcome.reward
        for outcome, correct, less_likely in zip(group, right, below, strict=True)
    ]
