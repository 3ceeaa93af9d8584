"""Token-level entropy control by value against formulas in plain floats, by what it raises and lowers, and by what it promises for any tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
from trainer.control.selection import Selection, covariance, select
from trainer.tokens import Tokens

IDLE: list[EntropyControl] = [NoControl(), AdaptiveRegularisation(), Bonus(), Bapo()]
EVERY: list[EntropyControl] = [
    *IDLE,
    PositiveReweighting(),
    OneSign(sign="positive"),
    OneSign(sign="negative"),
    RandomPositiveClip(),
    ClipCov(),
    KlCov(),
    EntropyAdvantage(),
    ForkingTokens(),
    EntroPic(),
]
STRONG = Actuators(positive_weight=0.25, high_probability=-0.5, threshold=0.6)

ADVANTAGES = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0])
LOGPS = st.integers(-400, 0).map(lambda i: i / 50)
ENTROPIES = st.integers(0, 300).map(lambda i: i / 100)
TOKENS = st.lists(st.tuples(LOGPS, ADVANTAGES, ENTROPIES), min_size=1, max_size=60)


def doubles(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def choose(
    control: EntropyControl,
    advantages: Sequence[float],
    *,
    logps: Sequence[float] | None = None,
    entropies: Sequence[float] | None = None,
    anchors: Sequence[float] | None = None,
    clipped: Sequence[bool] | None = None,
    actuators: Actuators = STRONG,
    seed: int = 0,
) -> tuple[Selection, torch.Tensor]:
    """The selection for tokens of one completion, and the leaf of their log-probabilities."""
    count = len(advantages)
    logp_T = doubles(logps or [-1.0] * count).requires_grad_()
    anchor_T = doubles(anchors or [-1.0] * count)
    tokens = Tokens(
        behaviour_T=anchor_T,
        proximal_T=anchor_T,
        advantages_T=doubles(advantages),
        lags_T=torch.zeros(count, dtype=torch.int64),
        row_T=torch.zeros(count, dtype=torch.int64),
        position_T=torch.arange(count),
        rewards_R=torch.ones(1),
    )
    chosen = select(
        control, actuators, logp_T, doubles(entropies or [1.0] * count).requires_grad_(), anchor_T, tokens,
        clipped_T=None if clipped is None else lambda: torch.tensor(clipped, dtype=torch.bool), generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return chosen, logp_T


def weights(control: EntropyControl, advantages: Sequence[float], **more) -> list[float]:
    return choose(control, advantages, **more)[0].weight_T.tolist()


def covariances(logps: Sequence[float], advantages: Sequence[float]) -> list[float]:
    return [(logp - fmean(logps)) * (a - fmean(advantages)) for logp, a in zip(logps, advantages, strict=True)]


def name(control: EntropyControl) -> str:
    return f"{control.method}-{getattr(control, 'sign', '')}"


# -- all of them ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", EVERY, ids=name)
@pytest.mark.parametrize("advantages", [[], [0.0], [1.0, 1.0, 1.0], [-1.0, -2.0], [0.0, 0.0], [1.0, -1.0, 0.5]])
def test_whatever_the_tokens_the_selection_is_finite_and_only_the_penalty_has_a_gradient(control, advantages):
    chosen, _ = choose(control, advantages)
    for values_T in (chosen.weight_T, chosen.advantages_T):
        assert values_T.shape == (len(advantages),)
        assert torch.isfinite(values_T).all()
        assert not values_T.requires_grad
    assert chosen.penalty_T is None or (torch.isfinite(chosen.penalty_T).all() and chosen.penalty_T.requires_grad)


@pytest.mark.parametrize("control", IDLE, ids=name)
def test_methods_that_act_elsewhere_leave_every_token_as_it_is(control):
    chosen, _ = choose(control, [1.0, -1.0, 0.0])
    assert chosen.weight_T.tolist() == [1.0, 1.0, 1.0]
    assert chosen.advantages_T.tolist() == [1.0, -1.0, 0.0]
    assert chosen.penalty_T is None
    assert not chosen.unclipped


@pytest.mark.parametrize("control", EVERY, ids=name)
@settings(max_examples=20, deadline=None)
@given(tokens=TOKENS, seed=st.integers(0, 99))
def test_the_same_seed_chooses_the_same_tokens(control, tokens, seed):
    logps, advantages, entropies = zip(*tokens, strict=True)
    first, second = (choose(control, advantages, logps=logps, entropies=entropies, seed=seed)[0] for _ in range(2))
    assert torch.equal(first.weight_T, second.weight_T)
    assert torch.equal(first.advantages_T, second.advantages_T)
    assert (first.penalty_T is None) == (second.penalty_T is None)
    assert first.penalty_T is None or second.penalty_T is None or torch.equal(first.penalty_T, second.penalty_T)


# -- by the sign of the advantage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("includes_zero", "expected"), [(False, [0.3, 1.0, 1.0, 0.3]), (True, [0.3, 0.3, 1.0, 0.3])])
def test_lambda_weighs_tokens_of_positive_advantage(includes_zero, expected):
    actuators = Actuators(positive_weight=0.3, includes_zero=includes_zero)
    assert weights(PositiveReweighting(), [1.0, 0.0, -1.0, 1e-9], actuators=actuators) == expected


def test_lambda_of_one_changes_nothing():
    assert weights(PositiveReweighting(), [1.0, 0.0, -1.0], actuators=Actuators()) == [1.0, 1.0, 1.0]


def test_one_sign_keeps_zeros_with_either():
    assert weights(OneSign(sign="positive"), [1.0, 0.0, -1.0]) == [1.0, 1.0, 0.0]
    assert weights(OneSign(sign="negative"), [1.0, 0.0, -1.0]) == [0.0, 1.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.lists(ADVANTAGES, max_size=80), st.sampled_from([0.01, 0.1, 0.5, 1.0]), st.integers(0, 9))
def test_random_positive_clip_drops_its_share_of_the_positive_tokens_and_no_other(advantages, fraction, seed):
    kept = weights(RandomPositiveClip(fraction=fraction), advantages, seed=seed)
    positive = sum(a > 0 for a in advantages)
    assert kept.count(0.0) == min(max(1, int(fraction * positive)), positive)
    assert all(w == 1.0 or (w == 0.0 and a > 0) for w, a in zip(kept, advantages, strict=True))


@pytest.mark.parametrize(("positive", "dropped"), [(0, 0), (1, 1), (3, 1), (4, 2), (7, 3)])
def test_a_share_is_rounded_down_but_to_one_at_least(positive, dropped):
    assert weights(RandomPositiveClip(fraction=0.5), [1.0] * positive + [-1.0] * 3).count(0.0) == dropped


def test_random_positive_clip_drops_every_positive_token_equally_often():
    drops = np.zeros(20)
    for seed in range(2000):
        drops += 1 - np.array(weights(RandomPositiveClip(fraction=0.1), [1.0] * 20, seed=seed))
    assert drops.sum() == 4000
    assert abs(drops - 200).max() < 70, "five standard deviations of a share of 0.1 in 2000 draws"


# -- covariance -----------------------------------------------------------------------------------------------------------------------


@given(TOKENS)
def test_covariance_is_the_product_of_the_deviations_and_averages_to_that_of_numpy(tokens):
    logps, advantages, _ = zip(*tokens, strict=True)
    found_T = covariance(doubles(logps).requires_grad_(), doubles(advantages))
    assert found_T.tolist() == pytest.approx(covariances(logps, advantages), abs=1e-10)
    assert found_T.mean().item() == pytest.approx(np.cov(logps, advantages, bias=True)[0, 1], abs=1e-10)
    assert not found_T.requires_grad


@settings(max_examples=150, deadline=None)
@given(TOKENS, st.sampled_from([2e-4, 0.05, 0.3, 1.0]), st.data())
def test_clip_cov_drops_exactly_its_number_of_candidates(tokens, fraction, data):
    logps, advantages, _ = zip(*tokens, strict=True)
    clipped = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    control = ClipCov(fraction=fraction, low=0.5, high=3.0)
    kept = weights(control, advantages, logps=logps, clipped=clipped)
    near = any(abs(c - bound) < 1e-9 for c in covariances(logps, advantages) for bound in (0.5, 3.0))
    candidates = [0.5 < c < 3.0 and not done for c, done in zip(covariances(logps, advantages), clipped, strict=True)]
    assert near or kept.count(0.0) == min(max(1, int(fraction * len(tokens))), sum(candidates))
    assert near or all(candidate for w, candidate in zip(kept, candidates, strict=True) if w == 0.0)
    assert set(kept) <= {0.0, 1.0}


def test_clip_cov_drops_likely_tokens_of_good_and_unlikely_tokens_of_bad_completions():
    # log p of -1 and -9 around -5, A of 1 and -1 around 0: covariances 4, -4, 4, -4.
    logps, advantages = [-1.0, -1.0, -9.0, -9.0], [1.0, -1.0, -1.0, 1.0]
    assert weights(ClipCov(fraction=1.0), advantages, logps=logps) == [0.0, 1.0, 0.0, 1.0]
    assert weights(ClipCov(fraction=1.0, high=3.9), advantages, logps=logps) == [1.0] * 4
    assert weights(ClipCov(fraction=1.0), advantages, logps=logps, clipped=[True, False, False, False]) == [1.0, 1.0, 0.0, 1.0]


def test_clip_cov_draws_among_its_candidates_by_the_generator():
    logps, advantages = [-1.0, -9.0] * 50, [1.0, -1.0] * 50
    drawn = {weights(ClipCov(), advantages, logps=logps, seed=seed).index(0.0) for seed in range(60)}
    assert len(drawn) > 30


def test_a_band_of_covariance_without_width_is_refused():
    with pytest.raises(ValueError, match="no token would be a candidate"):
        ClipCov(low=5.0, high=5.0)


# -- KL-Cov ---------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(TOKENS, st.sampled_from([2e-4, 0.1, 1.0]), st.sampled_from([0.0, 0.1, 1.0]))
def test_kl_cov_penalises_the_drift_of_the_tokens_of_highest_covariance(tokens, fraction, coefficient):
    logps, advantages, _ = zip(*tokens, strict=True)
    anchors = [logp + (0.5 if i % 2 else -0.25) for i, logp in enumerate(logps)]
    chosen, logp_T = choose(KlCov(fraction=fraction, coefficient=coefficient), advantages, logps=logps, anchors=anchors)
    assert chosen.unclipped
    assert chosen.weight_T.tolist() == [1.0] * len(tokens)
    assert chosen.penalty_T is not None
    (gradient_T,) = torch.autograd.grad(chosen.penalty_T.sum(), logp_T)
    cov = covariances(logps, advantages)
    count = max(1, int(fraction * len(tokens)))
    threshold = sorted(cov, reverse=True)[count - 1]
    for i, (penalty, gradient) in enumerate(zip(chosen.penalty_T.tolist(), gradient_T.tolist(), strict=True)):
        drift = -0.5 if i % 2 else 0.25
        if penalty or gradient:
            assert cov[i] >= threshold - 1e-9
            assert penalty == pytest.approx(coefficient * abs(drift), abs=1e-12)
            # Descent lowers a token that has become likelier than under the anchor and raises one that has become rarer.
            assert gradient == pytest.approx(coefficient * math.copysign(1, drift))
    assert int(torch.count_nonzero(gradient_T)) == (count if coefficient else 0)


def test_kl_cov_does_nothing_while_the_policy_is_its_anchor():
    logps, advantages = [-1.0, -2.0, -3.0], [1.0, -1.0, 0.5]
    chosen, logp_T = choose(KlCov(fraction=1.0), advantages, logps=logps, anchors=logps)
    assert chosen.penalty_T is not None
    (gradient_T,) = torch.autograd.grad(chosen.penalty_T.sum(), logp_T)
    assert gradient_T.tolist() == [0.0, 0.0, 0.0]


# -- entropy advantage ----------------------------------------------------------------------------------------------------------------


@given(TOKENS, st.sampled_from([0.0, 0.4, 50.0]), st.sampled_from([1.0001, 2.0, 9.0]))
def test_entropy_shapes_advantages_and_never_turns_a_sign(tokens, coefficient, kappa):
    _, advantages, entropies = zip(*tokens, strict=True)
    shaped = choose(EntropyAdvantage(coefficient=coefficient, kappa=kappa), advantages, entropies=entropies)[0].advantages_T.tolist()
    assert shaped == pytest.approx([a + min(coefficient * h, abs(a) / kappa) for a, h in zip(advantages, entropies, strict=True)], abs=1e-12)
    assert [math.copysign(a != 0, a) for a in shaped] == [math.copysign(a != 0, a) for a in advantages]


def test_uncertain_tokens_of_good_completions_are_pushed_more_and_of_bad_ones_less():
    shaped = choose(EntropyAdvantage(), [1.0, 1.0, -1.0, -1.0, 0.0], entropies=[0.0, 1.0, 0.0, 1.0, 3.0])[0].advantages_T.tolist()
    assert shaped == pytest.approx([1.0, 1.4, -1.0, -0.6, 0.0])


def test_an_entropy_rounded_below_zero_shapes_nothing():
    assert choose(EntropyAdvantage(), [1.0], entropies=[-1e-6])[0].advantages_T.tolist() == [1.0]


# -- forking tokens -------------------------------------------------------------------------------------------------------------------


def test_the_fifth_of_highest_entropy_is_trained_on():
    assert weights(ForkingTokens(), [1.0] * 10, entropies=[0.1, 2.0, 0.3, 0.4, 1.5, 0.6, 0.7, 0.2, 0.9, 1.0]) == [0, 1, 0, 0, 1, 0, 0, 0, 0, 0]


@given(TOKENS, st.sampled_from([0.01, 0.2, 0.5, 1.0]))
def test_forking_tokens_lie_above_the_quantile(tokens, fraction):
    entropies = [h for *_, h in tokens]
    kept = weights(ForkingTokens(fraction=fraction), [1.0] * len(tokens), entropies=entropies)
    tau = np.quantile(entropies, 1 - fraction)
    assert all(bool(w) == (h >= tau) for w, h in zip(kept, entropies, strict=True) if abs(h - tau) > 1e-9)
    assert kept[int(np.argmax(entropies))] == 1.0
    if len(set(entropies)) == len(entropies):
        assert abs(sum(kept) - fraction * len(entropies)) <= 1


def test_equal_entropies_are_all_kept():
    assert weights(ForkingTokens(), [1.0] * 5, entropies=[0.7] * 5) == [1.0] * 5


# -- EntroPIC -------------------------------------------------------------------------------------------------------------------------


@given(TOKENS, st.sampled_from([-1.0, -0.3, 0.0, 0.6, 1.0]))
def test_entropic_adds_its_loss_on_likely_tokens(tokens, alpha):
    logps, advantages, _ = zip(*tokens, strict=True)
    anchors = [logp + (0.1 if i % 2 else -0.2) for i, logp in enumerate(logps)]
    actuators = Actuators(high_probability=alpha, threshold=0.6)
    chosen, logp_T = choose(EntroPic(), advantages, logps=logps, anchors=anchors, actuators=actuators)
    assert chosen.penalty_T is not None
    (gradient_T,) = torch.autograd.grad(chosen.penalty_T.sum(), logp_T)
    expected = [
        -alpha * math.exp(logp - anchor) * abs(a) if math.exp(logp) > 0.6 else 0.0 for logp, anchor, a in zip(logps, anchors, advantages, strict=True)
    ]
    assert chosen.penalty_T.tolist() == pytest.approx(expected, abs=1e-12)
    assert gradient_T.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("alpha", [-1.0, -0.4, 0.7])
def test_with_the_main_loss_entropic_weighs_likely_tokens_by_sign(alpha):
    # Likely and good, likely and bad, unlikely and good, unlikely and bad; policy and anchor equal, so that the ratio is 1.
    logps, advantages = [-0.01, -0.01, -3.0, -3.0], [1.0, -2.0, 1.0, -2.0]
    actuators = Actuators(high_probability=alpha, threshold=0.95)
    chosen, logp_T = choose(EntroPic(), advantages, logps=logps, anchors=logps, actuators=actuators)
    assert chosen.penalty_T is not None
    main_T = -torch.exp(logp_T - logp_T.detach()) * doubles(advantages)
    (gradient_T,) = torch.autograd.grad((main_T + chosen.penalty_T).sum(), logp_T)
    assert gradient_T.tolist() == pytest.approx([-(1 + alpha), 2 * (1 - alpha), -1.0, 2.0])
