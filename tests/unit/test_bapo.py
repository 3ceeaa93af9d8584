"""BAPO's search by hand, against a search step by step in plain floats, and by what it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.contracts.algorithms import Bapo, Clip
from trainer.control.bapo import search_bounds

TOKENS = st.lists(st.tuples(st.integers(1, 64).map(lambda i: i / 16), st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0])), max_size=30)


def search(tokens, **changed) -> Clip:
    ratio_T = torch.tensor([r for r, _ in tokens], dtype=torch.float64)
    advantages_T = torch.tensor([a for _, a in tokens], dtype=torch.float64)
    return search_bounds(Bapo(**changed), ratio_T, advantages_T)


def bounds(clip: Clip) -> Any:
    """Its bounds of the ratio, to be compared."""
    return pytest.approx((1 - clip.low, 1 + clip.high), abs=1e-9)


def mass(tokens, low: float, high: float) -> tuple[float, float]:
    """|r A| of the positive and of the negative tokens that have a gradient under these bounds."""
    positive = sum(r * a for r, a in tokens if a > 0 and r <= high)
    return positive, -sum(r * a for r, a in tokens if a < 0 and r >= low)


def step_by_step(tokens, setting: Bapo) -> tuple[float, float]:
    low, high = setting.low_least, setting.high_least
    i = j = 0
    while True:
        positive, negative = mass(tokens, low, high)
        if positive >= setting.positive_share * (positive + negative):
            return low, high
        if high < setting.high_greatest:
            i += 1
            high = min(setting.high_least + i * setting.step_high, setting.high_greatest)
        elif low < setting.low_greatest:
            j += 1
            low = min(setting.low_least + j * setting.step_low, setting.low_greatest)
        else:
            return low, high


def test_bounds_stay_where_they_start_while_positives_have_their_share():
    assert bounds(search([(1.0, 1.0), (1.0, -1.0)])) == (0.6, 1.2)


def test_the_upper_bound_rises_first_and_just_far_enough():
    # Inside 1.2: 1 against 4, a share of 0.2. The token at 1.62 brings it to 2.62 / 6.62 = 0.396, the one at 1.8 to 4.42 / 8.42 > 0.4.
    tokens = [(1.0, 1.0), (1.62, 1.0), (1.8, 1.0), (1.0, -4.0)]
    assert bounds(search(tokens)) == (0.6, 1.8)


def test_then_the_lower_bound_rises_and_shuts_out_negatives_that_have_become_unlikely():
    # Positives have 1 however high the bound; negatives 0.71 * 2 + 1 = 2.42 until the bound passes 0.71, then 1: a share of 0.5.
    tokens = [(1.0, 1.0), (0.71, -2.0), (1.0, -1.0)]
    assert bounds(search(tokens, positive_share=0.45)) == (0.72, 3.0)


def test_tokens_at_a_bound_have_a_gradient():
    # A negative token at the lower bound counts: a share of 1/3 until the bound passes it. A positive one at the upper bound counts too.
    assert bounds(search([(1.0, 1.0), (0.5, -4.0)], low_least=0.5)) == (0.52, 3.0)
    assert bounds(search([(1.5, 1.0), (1.0, -1.0)], high_least=1.25, step_high=0.25)) == (0.6, 1.5)


def test_out_of_reach_it_ends_at_the_greatest_bounds():
    assert bounds(search([(1.0, -1.0), (2.0, -1.0)])) == (0.9, 3.0)
    assert bounds(search([(1.0, 0.1), (1.0, -9.0)])) == (0.9, 3.0)


@pytest.mark.parametrize("tokens", [[], [(1.0, 0.0), (2.0, 0.0)], [(1.0, 1.0), (5.0, 1.0)]])
def test_without_negatives_or_any_loss_nothing_is_searched(tokens):
    assert bounds(search(tokens)) == (0.6, 1.2)


def test_a_step_that_does_not_divide_the_range_ends_at_its_end():
    assert bounds(search([(1.0, -1.0)], high_least=1.2, high_greatest=1.33, step_high=0.05, low_least=0.8, low_greatest=0.8)) == (0.8, 1.33)


def test_the_search_does_not_touch_the_gradient():
    ratio_T = torch.ones(3, requires_grad=True)
    assert isinstance(search_bounds(Bapo(), ratio_T, torch.tensor([1.0, -1.0, -4.0])), Clip)
    assert ratio_T.grad is None


@settings(max_examples=200, deadline=None)
@given(TOKENS, st.sampled_from([0.1, 0.37, 0.4, 0.53, 0.9]))
@example([(1.0, 1.0), (1.0, -1.5)], 0.4)  # exactly at its share
def test_it_equals_the_search_step_by_step(tokens, share):
    # Ratios and advantages are sums of powers of two, so that sums are exact and a share is reached by both or by neither.
    setting = Bapo(positive_share=share, low_greatest=0.913)
    found = search(tokens, **setting.model_dump())
    assert bounds(found) == step_by_step(tokens, setting)


@settings(max_examples=200, deadline=None)
@given(TOKENS)
def test_it_stops_at_the_first_bounds_that_reach_the_share(tokens):
    setting = Bapo(positive_share=0.5)
    found = search(tokens, positive_share=0.5)
    positive, negative = mass(tokens, 1 - found.low - 1e-9, 1 + found.high + 1e-9)
    at_end = (1 - found.low, 1 + found.high) == pytest.approx((setting.low_greatest, setting.high_greatest))
    assert positive >= negative - 1e-9 or at_end
    if 1 - found.low > setting.low_least + 1e-9:
        assert 1 + found.high == pytest.approx(setting.high_greatest), "the lower bound waits for the upper one"


@pytest.mark.parametrize("wrong", [{"low_least": 0.9, "low_greatest": 0.8}, {"high_least": 3.5}])
def test_a_search_that_starts_beyond_its_end_is_refused(wrong):
    with pytest.raises(ValueError, match=r"is above entropy\."):
        Bapo(**wrong)
