"""Advantages: what a completion's reward is worth. Pure functions of the rewards of a batch's groups, in float64; `_G` is the members of a group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, assert_never

import numpy as np
import torch
from torch import Tensor

from services.contracts.algorithms import Advantage, DrGrpo, Grpo, Nsr, PassAtK, Psr, QuantileBaseline, ReinforcePlusPlus, Rloo, WReinforce


def advantages(settings: Advantage, rewards: Sequence[Sequence[float]], *, correct_at: float) -> list[tuple[float, ...]]:
    """An advantage for each completion of each group of a batch, as `settings` say.

    A completion whose reward is at least `correct_at` is correct: `psr`, `nsr`, `w_reinforce` and `pass_at_k` see nothing else of its reward, and
    the first three have no baseline, so that groups of equal rewards have advantages too. Under all others such a group gets exact zeros.
    """
    groups = [torch.tensor(group, dtype=torch.float64) for group in rewards]
    match settings:
        case Grpo():
            found = [group_advantages(rewards_G, normalise=settings.normalise, epsilon=settings.epsilon) for rewards_G in groups]
        case DrGrpo():
            found = [_centred(rewards_G) for rewards_G in groups]
        case Rloo():
            found = [_leave_one_out(rewards_G) for rewards_G in groups]
        case ReinforcePlusPlus():
            found = _whitened(groups, epsilon=settings.epsilon)
        case Psr():
            found = [_by_correctness(rewards_G >= correct_at, right=1.0, wrong=0.0) for rewards_G in groups]
        case Nsr():
            found = [_by_correctness(rewards_G >= correct_at, right=0.0, wrong=-1.0) for rewards_G in groups]
        case WReinforce():
            found = [_by_correctness(rewards_G >= correct_at, right=settings.weight, wrong=-1.0) for rewards_G in groups]
        case QuantileBaseline():
            found = [_above_quantile(rewards_G, quantile=settings.quantile, epsilon=settings.epsilon) for rewards_G in groups]
        case PassAtK():
            found = [_pass_at_k(rewards_G >= correct_at, k=settings.k) for rewards_G in groups]
        case _:
            assert_never(settings)
    return [tuple(advantages_G.tolist()) for advantages_G in found]


def has_signal(rewards_G: Tensor) -> bool:
    """Do the rewards of a group differ? Where they do not, estimators with a baseline give no member an advantage and the group moves no weight."""
    return bool((rewards_G != rewards_G[:1]).any())


def group_advantages(rewards_G: Tensor, *, normalise: Literal["std", "none"], epsilon: float) -> Tensor:
    """Advantages of GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1): A_g = (R_g - mean R) / (std R + epsilon).

    With `normalise="none"` the division is left out. std is the sample standard deviation (ddof 1): the paper does not say which, and veRL
    (`compute_grpo_outcome_advantage`) and TRL (`GRPOTrainer`) both call `torch.std`, whose default that is. A group of equal rewards, or of one
    member, gets exact zeros. Shape (G,), float64.
    """
    centred_G = _centred(rewards_G)
    if normalise == "none" or not has_signal(rewards_G):
        return centred_G
    return centred_G / (rewards_G.double().std() + epsilon)


def _centred(rewards_G: Tensor) -> Tensor:
    """R - mean R, without a division: Dr. GRPO (arXiv 2503.20783)."""
    rewards_G = rewards_G.double()
    if not has_signal(rewards_G):
        # Said outright: rounding in the mean leaves differences of 1e-17, which a small epsilon would blow up.
        return torch.zeros_like(rewards_G)
    return rewards_G - rewards_G.mean()


def _leave_one_out(rewards_G: Tensor) -> Tensor:
    """RLOO (Ahmadian et al., arXiv 2402.14740): A_g = R_g - mean of the others' rewards = G / (G - 1) (R_g - mean R). A lone member gets 0."""
    size = len(rewards_G)
    return _centred(rewards_G) * (size / (size - 1) if size > 1 else 0.0)


def _whitened(groups: Sequence[Tensor], *, epsilon: float) -> list[Tensor]:
    """REINFORCE++ with a group baseline (arXiv 2501.03262): A = (R_g - mean of the group) / (std of all of the batch + epsilon).

    The batch's mean needs no subtraction: each group's is 0 already. std is the sample standard deviation over the completions of the batch, each
    counted once; veRL (`compute_reinforce_plus_plus_baseline_outcome_advantage`) counts each as often as it has tokens.
    """
    centred = [_centred(rewards_G) for rewards_G in groups]
    whole = torch.cat(centred) if centred else torch.zeros(0, dtype=torch.float64)
    if not has_signal(whole):
        return centred
    return [centred_G / (whole.std() + epsilon) for centred_G in centred]


def _by_correctness(correct_G: Tensor, *, right: float, wrong: float) -> Tensor:
    """One advantage for right and one for wrong completions, without baseline (Zhu et al., arXiv 2506.01347, and their RLVR-Decomposed):

    PSR 1 and 0      NSR 0 and -1      W-REINFORCE lambda (0.1 recommended) and -1
    """
    return torch.tensor([right if correct else wrong for correct in correct_G.tolist()], dtype=torch.float64)


def _above_quantile(rewards_G: Tensor, *, quantile: float, epsilon: float) -> Tensor:
    """Quantile advantage (QAE, arXiv 2509.22611): A_g = (R_g - Q) / (std R + epsilon), Q the group's K-quantile.

    That is the least reward r such that a share of at least K of the rewards is <= r. With rewards 0 and 1 and a share p of ones: p <= 1 - K gives
    Q = 0, so that only successes have an advantage, and p > 1 - K gives Q = 1, so that only failures have one.
    """
    if not has_signal(rewards_G):
        return torch.zeros_like(rewards_G)
    baseline = float(np.quantile(rewards_G.numpy(), quantile, method="inverted_cdf"))
    return (rewards_G - baseline) / (rewards_G.std() + epsilon)


def _pass_at_k(correct_G: Tensor, *, k: int) -> Tensor:
    """Pass@k training, analytic (arXiv 2508.10751, `calc_adv` of RUCAIBox/Passk_Training), for a group of N completions, N_neg of them wrong.

    The reward of k of them is 1 if one is correct. Over all subsets of k its mean is rho = 1 - C(N_neg, k) / C(N, k) and its standard deviation
    sigma = sqrt(rho (1 - rho)); a completion's advantage is the mean of (reward - rho) / sigma over the subsets that it is in:

        right  (1 - rho) / sigma      wrong  (1 - rho - C(N_neg - 1, k - 1) / C(N - 1, k - 1)) / sigma

    Exact zeros where sigma is 0: none is right, or so many that each subset has one; so also in a group of k or fewer.
    """
    size, negative = len(correct_G), int((~correct_G).sum())
    if negative < k or negative == size:
        return torch.zeros(size, dtype=torch.float64)
    failing = math.comb(negative, k) / math.comb(size, k)  # 1 - rho
    sigma = math.sqrt(failing * (1 - failing))
    failing_with_a_wrong_one = math.comb(negative - 1, k - 1) / math.comb(size - 1, k - 1)
    return _by_correctness(correct_G, right=failing / sigma, wrong=(failing - failing_with_a_wrong_one) / sigma)
