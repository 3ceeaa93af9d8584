from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.evaluation.pass_at_k import majority_at_k, pass_at_k


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_sample(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    draws = [any(draw) for draw in combinations(correct, k)]
    assert pass_at_k(samples=len(correct), correct=sum(correct), k=k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_pass_at_k_of_known_cases():
    assert pass_at_k(samples=16, correct=0, k=16) == 0
    assert pass_at_k(samples=16, correct=1, k=16) == 1
    assert pass_at_k(samples=16, correct=4, k=1) == 0.25
    assert pass_at_k(samples=4, correct=2, k=2) == pytest.approx(5 / 6)
    assert pass_at_k(samples=10_000, correct=1, k=64) == pytest.approx(64 / 10_000)


@settings(deadline=None)
@given(st.integers(1, 300), st.data())
def test_pass_at_k_grows_with_k_and_with_correct_samples_and_is_a_probability(samples, data):
    correct = data.draw(st.integers(0, samples))
    by_k = [pass_at_k(samples=samples, correct=correct, k=k) for k in range(1, samples + 1)]
    assert by_k == sorted(by_k)
    assert by_k[0] == pytest.approx(correct / samples)
    assert by_k[-1] == (1 if correct else 0)
    if correct:
        assert by_k[0] > pass_at_k(samples=samples, correct=correct - 1, k=1)


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_cannot_be_drawn(samples, correct, k):
    with pytest.raises(ValueError, match="k must be 1 to the samples"):
        pass_at_k(samples=samples, correct=correct, k=k)


def test_majority_counts_ties_in_part():
    assert majority_at_k(["7", "7", "8"], [True, True, False]) == 1
    assert majority_at_k(["7", "8", "8"], [True, False, False]) == 0
    assert majority_at_k(["7", "8"], [True, False]) == 0.5
    assert majority_at_k(["7", "8", "9"], [True, False, True]) == pytest.approx(2 / 3)


def test_an_answer_that_was_scored_both_ways_counts_in_part():
    assert majority_at_k(["7", "7", "7", "7", "1"], [True, True, True, False, True]) == 0.75


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), min_size=1, max_size=8), st.randoms())
def test_majority_is_the_expected_correctness_of_a_random_one_of_the_most_frequent_samples(samples, random):
    votes = Counter(final for final, _ in samples)
    of_most = [yes for final, yes in samples if votes[final] == max(votes.values())]
    expected = sum(of_most) / len(of_most)  # tied answers have equally many samples
    random.shuffle(samples)
    assert majority_at_k([final for final, _ in samples], [yes for _, yes in samples]) == pytest.approx(expected)
