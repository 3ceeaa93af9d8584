import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.control import guard


def after(rewards, drop=0.2):
    state, awake = guard.start(), []
    for reward in rewards:
        state = guard.watch(state, reward, drop=drop)
        awake.append(guard.awake(state))
    return state, awake


def noisy(mean, versions, seed, sd=0.05):
    rng = random.Random(seed)
    return [rng.gauss(mean, sd) for _ in range(versions)]


def test_mean_best_and_threshold_of_a_hand_computed_run():
    state, awake = after([1.0] * 9)
    assert "reward_best" not in state
    assert not any(awake)
    state, _ = after([1.0] * 10)
    assert (state["reward_mean"], state["reward_best"]) == (1.0, 1.0)
    state, awake = after([1.0] * 10 + [0.0])
    assert state["reward_mean"] == pytest.approx(0.9)
    assert state["reward_best"] == pytest.approx(0.998)  # 1 + (0.9 - 1) / 50
    assert not awake[-1]
    state, awake = after([1.0] * 10 + [0.0] * 2)
    assert state["reward_mean"] == pytest.approx(0.81)
    assert state["reward_best"] == pytest.approx(0.998 + (0.81 - 0.998) / 50)
    assert not awake[-1]  # 0.184 below a best of 0.994
    _, awake = after([1.0] * 10 + [0.0] * 3)
    assert awake[-1]  # 0.26 below


def test_it_sleeps_again_at_half_of_the_drop_and_not_before():
    rewards = [1.0] * 10 + [0.0] * 3 + [0.95] * 40
    state, states = guard.start(), []
    for reward in rewards:
        state = guard.watch(state, reward, drop=0.2)
        states.append(state)
    woke = next(i for i, s in enumerate(states) if guard.awake(s))
    slept = next(i for i, s in enumerate(states[woke:], woke) if not guard.awake(s))
    gaps = [(s["reward_best"] - s["reward_mean"]) / s["reward_best"] for s in states[9:]]
    assert gaps[woke - 9] > 0.2 >= gaps[woke - 10]
    assert gaps[slept - 9] <= 0.1 < gaps[slept - 10]
    assert not any(guard.awake(s) for s in states[slept:])


@pytest.mark.parametrize("level", [-2.0, -0.5, 0.5, 2.0])
def test_the_threshold_is_a_share_of_the_bests_size_whatever_its_sign(level):
    fall = abs(level) * 0.35
    assert after([level] * 20 + [level - fall] * 20)[1][-1]
    assert not any(after([level] * 20 + [level - fall / 4] * 20)[1])


def test_at_a_best_of_zero_any_fall_wakes_it_and_no_fall_does_not():
    assert not any(after([0.0] * 40)[1])
    assert after([0.0] * 10 + [-0.01])[1][-1]


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_wake_it_and_a_collapse_does(seed):
    assert not any(after(noisy(0.25, 200, seed))[1])
    assert after(noisy(0.25, 60, seed) + noisy(0.1, 20, seed))[1][-1]


@pytest.mark.parametrize("seed", range(5))
def test_a_lucky_early_batch_does_not_wake_it_for_ever(seed):
    lucky = [1.0, *noisy(0.25, 300, seed)]
    awake = after(lucky)[1]
    assert not any(awake[110:])
    lucky_streak = noisy(0.5, 15, seed) + noisy(0.25, 300, seed)
    awake = after(lucky_streak)[1]
    assert any(awake)
    assert not any(awake[180:])


@given(st.lists(st.floats(-1e6, 1e6), max_size=60), st.floats(0.01, 10))
def test_the_best_is_never_below_the_mean_nor_above_what_was_seen(rewards, drop):
    state, _ = after(rewards, drop)
    if "reward_best" in state:
        slack = 1e-9 * max(map(abs, rewards))
        assert state["reward_mean"] <= state["reward_best"] <= max(rewards) + slack


def test_a_state_that_lacks_a_name_starts_that_name_anew():
    assert guard.watch({}, 0.5, drop=0.2) == guard.watch(guard.start(), 0.5, drop=0.2)
    state, _ = after([1.0] * 30)
    del state["reward_best"]
    assert guard.watch(state, 0.9, drop=0.2)["reward_best"] == pytest.approx(0.99)
