"""Reward shaping by value, and what each part raises and lowers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.algorithms import Shaping
from trainer.shaping import Outcome, shaped_rewards


def outcome(reward: float = 1.0, *, tokens: int = 10, truncated: bool = False, logp: float = -5.0) -> Outcome:
    return Outcome(reward=reward, tokens=tokens, truncated=truncated, logp=logp)


OUTCOMES = st.builds(
    Outcome, reward=st.sampled_from([0.0, 0.5, 1.0]), tokens=st.integers(0, 40), truncated=st.booleans(), logp=st.integers(-80, 0).map(float)
)


@given(st.lists(OUTCOMES, max_size=6))
def test_without_shaping_rewards_are_as_they_were(group):
    assert shaped_rewards(Shaping(), group, max_tokens=32) == [o.reward for o in group]


# -- overlong punishment --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "truncated", "lost"),
    [(0, False, 0), (24, False, 0), (25, False, 1 / 8), (28, False, 0.5), (32, False, 1), (32, True, 1), (9, True, 1)],
)
def test_the_last_tokens_before_the_limit_cost_reward(tokens, truncated, lost):
    settings = Shaping(overlong_buffer=8, overlong_penalty=0.5)
    for reward in (1.0, 0.0, -0.25):
        assert shaped_rewards(settings, [outcome(reward, tokens=tokens, truncated=truncated)], max_tokens=32) == [reward - 0.5 * lost]


def test_the_punishment_grows_with_length_and_never_beyond_the_penalty():
    lengths = range(60)
    shaped = shaped_rewards(Shaping(overlong_buffer=16), [outcome(tokens=n) for n in lengths], max_tokens=40)
    assert shaped == sorted(shaped, reverse=True)
    assert (shaped[24], shaped[25], shaped[40], shaped[59]) == (1.0, 1 - 1 / 16, 0.0, 0.0)


# -- unlikeliness ---------------------------------------------------------------------------------------------------------------------


def test_the_likeliest_correct_completion_loses_most():
    # Mean log-probabilities: -1, -0.5, -2, -0.1. Likeliness ranks 3, 2, 4, 1 of 4.
    group = [outcome(tokens=10, logp=-10.0), outcome(tokens=4, logp=-2.0), outcome(0.0, tokens=1, logp=-2.0), outcome(tokens=20, logp=-2.0)]
    expected = [1 - 0.25 * (4 - rank) / 4 for rank in (3, 2, 4, 1)]
    expected[2] = 0.0
    assert shaped_rewards(Shaping(unlikeliness=0.25), group, max_tokens=32) == pytest.approx(expected, abs=1e-12)


def test_wrong_completions_count_in_the_rank_and_keep_their_reward():
    group = [outcome(logp=-1.0), outcome(-0.5, logp=-9.0), outcome(0.9, logp=-8.0)]
    assert shaped_rewards(Shaping(unlikeliness=0.3), group, max_tokens=32) == pytest.approx([1 - 0.3 * 2 / 3, -0.5, 0.9])


def test_equal_likelihoods_share_their_rank():
    group = [outcome(logp=-1.0), outcome(logp=-1.0), outcome(0.0, logp=-9.0), outcome(logp=-4.0)]
    assert shaped_rewards(Shaping(unlikeliness=1.0), group, max_tokens=32) == pytest.approx([1 - 2.5 / 4, 1 - 2.5 / 4, 0.0, 1 - 1 / 4])


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_group_all_right_or_all_wrong_gets_no_signal_from_likelihood(reward):
    group = [outcome(reward, logp=-1.0), outcome(reward, logp=-7.0)]
    assert shaped_rewards(Shaping(unlikeliness=0.5), group, max_tokens=32) == [reward, reward]


def test_an_empty_completion_and_an_empty_group_are_no_error():
    settings = Shaping(unlikeliness=0.5, overlong_buffer=4)
    assert shaped_rewards(settings, [], max_tokens=32) == []
    assert shaped_rewards(settings, [outcome(tokens=0, logp=0.0), outcome(0.0)], max_tokens=32) == [1 - 0.5 / 2, 0.0]


def test_the_overlong_punishment_comes_on_top_of_the_unlikeliness_reward():
    group = [outcome(tokens=30, logp=-1.0), outcome(0.0, tokens=32, logp=-64.0)]
    shaped = shaped_rewards(Shaping(unlikeliness=0.5, overlong_buffer=8), group, max_tokens=32)
    assert shaped == pytest.approx([(1 - 0.5 / 2) - 6 / 8, -1.0])


@given(st.lists(OUTCOMES, min_size=1, max_size=8), st.floats(0, 1))
def test_unlikeliness_only_lowers_and_never_turns_the_order_of_right_and_wrong(group, beta):
    shaped = shaped_rewards(Shaping(unlikeliness=beta), group, max_tokens=32)
    for before, after in zip(group, shaped, strict=True):
        assert before.reward * (1 - beta) <= after <= before.reward
        assert after == before.reward or before.reward == 1.0
