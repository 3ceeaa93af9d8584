"""Advantages by value against formulas written out in plain floats, by their signs, and by what they promise for any rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from statistics import fmean, pstdev, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contracts.algorithms import Advantage, DrGrpo, Grpo, Nsr, PassAtK, Psr, QuantileBaseline, ReinforcePlusPlus, Rloo, WReinforce
from trainer.advantages import advantages, group_advantages, has_signal

WITH_BASELINE: list[Advantage] = [Grpo(), Grpo(normalise="none"), DrGrpo(), Rloo(), ReinforcePlusPlus(), QuantileBaseline(), PassAtK(k=3)]
WITHOUT_BASELINE: list[Advantage] = [Psr(), Nsr(), WReinforce()]
EVERY = [*WITH_BASELINE, *WITHOUT_BASELINE]

REWARDS = st.lists(st.integers(-8, 8).map(lambda i: i / 4), min_size=2, max_size=12)
OUTCOMES = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=9)


def of(setting: Advantage, *groups: Sequence[float], correct_at: float = 1.0) -> list[tuple[float, ...]]:
    return advantages(setting, groups, correct_at=correct_at)


def name(setting: Advantage) -> str:
    return f"{setting.estimator}-{getattr(setting, 'normalise', '')}"


def rewards(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- GRPO ----------------------------------------------------------------------------------------------------------------------------


def test_std_is_the_sample_standard_deviation_plus_epsilon():
    # One right of four: mean 1/4, squared deviations 9/16 + 3/16 = 3/4, over 3 is 1/4, so std = 1/2.
    assert of(Grpo(epsilon=0.1), [1, 0, 0, 0]) == [pytest.approx([0.75 / 0.6, -0.25 / 0.6, -0.25 / 0.6, -0.25 / 0.6], abs=1e-12)]


@pytest.mark.parametrize("setting", [Grpo(normalise="none"), DrGrpo()])
def test_without_std_only_the_mean_goes(setting):
    assert of(setting, [1, 0, 0, 0], [2, 0]) == [(0.75, -0.25, -0.25, -0.25), (1.0, -1.0)]


def test_advantages_ignore_a_shift_of_the_rewards_and_std_their_scale():
    (base,), (moved,) = of(Grpo(epsilon=1e-9), [0.0, 0.3, 1.0]), of(Grpo(epsilon=1e-9), [5.0, 5.6, 7.0])
    assert moved == pytest.approx(base, abs=1e-7)
    assert of(DrGrpo(), [5.0, 5.6, 7.0]) != [pytest.approx(base, rel=0.01)]


@given(REWARDS)
def test_grpo_is_the_formula_and_without_std_sums_to_zero(group):
    (found,) = of(Grpo(), group)
    spread = stdev(group) + 1e-4
    assert found == pytest.approx([(r - fmean(group)) / spread for r in group], abs=1e-10)
    assert sum(of(DrGrpo(), group)[0]) == pytest.approx(0, abs=1e-12)


def test_integer_rewards_are_taken_as_numbers():
    assert group_advantages(torch.tensor([1, 0]), normalise="none", epsilon=1e-4).tolist() == [0.5, -0.5]


# -- groups without signal ------------------------------------------------------------------------------------------------------------


def test_a_group_has_signal_when_its_rewards_differ():
    assert has_signal(rewards(0, 0, 1e-9))
    assert not has_signal(rewards(1, 1, 1))
    assert not has_signal(rewards())


@pytest.mark.parametrize("setting", WITH_BASELINE, ids=name)
def test_equal_rewards_and_a_lone_member_get_exact_zeros_beside_a_group_with_signal(setting):
    # 0.1 has no exact mean in floating point; a bare division by epsilon would give advantages of about 1.
    for value in (0.0, 0.1, 0.7, 1.0):
        found = of(setting, [value] * 7, [1.0, 0.0, 0.0, 0.0], [value])
        assert found[0] == (0.0,) * 7
        assert found[2] == (0.0,)
        assert found[1][0] > 0 > min(found[1]) or isinstance(setting, QuantileBaseline)
    assert of(setting, [0.1] * 7, [0.3] * 5) == [(0.0,) * 7, (0.0,) * 5]


def test_a_tiny_epsilon_does_not_blow_up_the_rounding_of_a_mean():
    assert of(Grpo(epsilon=1e-17), [0.1] * 7) == [(0.0,) * 7]


@pytest.mark.parametrize("setting", EVERY, ids=name)
def test_an_empty_batch_has_no_advantages(setting):
    assert of(setting) == []


# -- RLOO and REINFORCE++ -------------------------------------------------------------------------------------------------------------


@given(REWARDS)
def test_rloo_subtracts_the_mean_of_the_others_which_is_the_mean_stretched(group):
    (found,) = of(Rloo(), group)
    size = len(group)
    assert found == pytest.approx([r - (sum(group) - r) / (size - 1) for r in group], abs=1e-12)
    assert found == pytest.approx([size / (size - 1) * (r - fmean(group)) for r in group], abs=1e-12)


@given(st.lists(st.lists(st.integers(-8, 8).map(lambda i: i / 4), min_size=1, max_size=6), min_size=1, max_size=5))
def test_reinforce_pp_whitens_over_the_batch(groups):
    found = of(ReinforcePlusPlus(epsilon=1e-8), *groups)
    centred = [[r - fmean(group) for r in group] for group in groups]
    whole = [r for group in centred for r in group]
    spread = stdev(whole) + 1e-8 if len(whole) > 1 else 1.0
    for got, expected in zip(found, centred, strict=True):
        assert got == pytest.approx([r / spread for r in expected], abs=1e-9)


def test_reinforce_pp_weighs_groups_of_a_batch_against_each_other():
    # Under GRPO both groups would have the same advantages; whitening over the batch keeps their scales apart.
    small, large = of(ReinforcePlusPlus(), [0.0, 0.1], [0.0, 1.0])
    assert large == pytest.approx([10 * a for a in small])
    assert pstdev(small + large) * math.sqrt(4 / 3) == pytest.approx(1, abs=1e-6)


# -- estimators that know only right and wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "right", "wrong"), [(Psr(), 1.0, 0.0), (Nsr(), 0.0, -1.0), (WReinforce(), 0.1, -1.0), (WReinforce(weight=0.5), 0.5, -1.0)]
)
def test_right_and_wrong_are_told_apart_by_correct_at_and_need_no_baseline(setting, right, wrong):
    assert of(setting, [1.0, 0.5, 0.4, -2.0], [1.0, 1.0], [0.0, 0.0], correct_at=0.5) == [
        (right, right, wrong, wrong), (right, right), (wrong, wrong),
    ]  # fmt: skip


# -- quantile baseline ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "signs"),
    [
        (1, (1, 0)),  # p = 0.1 <= 1 - K: the rare success is reinforced, failures are left alone
        (6, (1, 0)),  # p = 0.6 = 1 - K: still
        (7, (0, -1)),  # p = 0.7 > 1 - K: failures are punished, successes are left alone
        (9, (0, -1)),
    ],
)
def test_the_quantile_baseline_takes_rare_successes_or_rare_failures(right, signs):
    (found,) = of(QuantileBaseline(quantile=0.4, epsilon=1e-4), [1.0] * right + [0.0] * (10 - right))
    spread = stdev([1.0] * right + [0.0] * (10 - right)) + 1e-4
    assert found[:right] == pytest.approx([signs[0] / spread] * right)
    assert found[right:] == pytest.approx([signs[1] / spread] * (10 - right))


@given(REWARDS, st.integers(1, 9))
def test_the_baseline_is_the_least_reward_that_a_share_k_does_not_exceed(group, tenths):
    setting = QuantileBaseline(quantile=tenths / 10)
    (found,) = of(setting, group)
    baseline = min(r for r in group if Fraction(sum(other <= r for other in group), len(group)) >= Fraction(tenths, 10))
    spread = stdev(group) + setting.epsilon
    assert found == pytest.approx([(r - baseline) / spread if len(set(group)) > 1 else 0.0 for r in group], abs=1e-10)


# -- pass@k ---------------------------------------------------------------------------------------------------------------------------


def by_enumeration(group: Sequence[float], k: int) -> list[float]:
    """The advantage of each completion as the mean over all subsets of k that it is in of the subset's standardised reward."""
    k = min(k, len(group))
    subsets = list(combinations(range(len(group)), k))
    worth = [max(group[i] for i in subset) for subset in subsets]
    spread = pstdev(worth)
    if spread == 0:
        return [0.0] * len(group)
    return [fmean((r - fmean(worth)) / spread for subset, r in zip(subsets, worth, strict=True) if i in subset) for i in range(len(group))]


@settings(max_examples=150, deadline=None)
@given(OUTCOMES, st.integers(1, 6))
def test_pass_at_k_equals_the_enumeration_of_all_subsets(group, k):
    (found,) = of(PassAtK(k=k), group)
    assert found == pytest.approx(by_enumeration(group, k), abs=1e-9)


def test_pass_at_1_is_the_standardised_reward():
    (found,) = of(PassAtK(k=1), [1, 0, 0, 0])
    assert found == pytest.approx([0.75 / math.sqrt(3 / 16), *[-0.25 / math.sqrt(3 / 16)] * 3])


@pytest.mark.parametrize(("right", "zero"), [(0, True), (1, False), (4, False), (5, True), (8, True)])
def test_pass_at_k_is_exactly_zero_where_every_subset_passes_or_none(right, zero):
    # Of 8 with k = 4: from 5 right on, fewer than 4 are wrong and no subset can fail.
    (found,) = of(PassAtK(k=4), [1.0] * right + [0.0] * (8 - right))
    assert (found == (0.0,) * 8) is zero


@given(st.integers(2, 9), st.integers(1, 8), st.integers(1, 6))
def test_pass_at_k_raises_the_right_and_lowers_the_wrong(size, right, k):
    right = min(right, size - 1)
    (found,) = of(PassAtK(k=k), [1.0] * right + [0.0] * (size - right))
    assert min(found[:right]) >= 0 >= max(found[right:])
    assert sum(found) == pytest.approx(0, abs=1e-9)


# -- all ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", EVERY, ids=name)
@given(group=OUTCOMES)
def test_no_right_completion_is_lowered_and_no_wrong_one_raised(setting, group):
    (found,) = of(setting, group)
    for reward, advantage in zip(group, found, strict=True):
        assert advantage >= -1e-12 if reward else advantage <= 1e-12
