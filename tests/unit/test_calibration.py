import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from services.evaluation.calibration import calibration, consistency, expected_calibration_error, likelihood

confidences = st.floats(0, 1, width=16) | st.sampled_from([0.25, 0.5, 0.75])
judged = st.lists(st.tuples(confidences, st.booleans()), min_size=1, max_size=40)


def split(pairs):
    return [confidence for confidence, _ in pairs], [yes for _, yes in pairs]


def test_consistency_is_the_share_of_samples_with_the_same_answer():
    assert consistency(["7", "8", "7", "7"]) == [0.75, 0.25, 0.75, 0.75]


def test_likelihood_is_the_geometric_mean_of_the_tokens_probabilities():
    assert likelihood([math.log(0.5), math.log(0.125)]) == pytest.approx(0.25)
    assert likelihood([1e-7, 0.0]) == 1, "rounding makes no probability above 1"


def test_calibration_error_by_hand_with_one_confidence_a_bin():
    confidence = [at / 10 for at in range(10)]
    correct = [True] * 5 + [False] * 5
    gaps = [abs(yes - c) for c, yes in zip(confidence, correct, strict=True)]
    assert expected_calibration_error(confidence, correct) == pytest.approx(sum(gaps) / 10)


def test_calibration_error_by_hand_with_twenty_answers_in_bins_of_two():
    confidence = [at / 20 for at in range(20)]
    correct = [at % 2 == 0 for at in range(20)]
    expected = sum(2 / 20 * abs(0.5 - (4 * pair + 1) / 40) for pair in range(10))
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected)


def test_equal_confidences_share_a_bin():
    assert expected_calibration_error([0.5] * 8, [True, False] * 4) == 0
    assert expected_calibration_error([0.25] * 4 + [0.75] * 4, [False, False, False, True] * 2) == pytest.approx((0 + 0.5) / 2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(confidences, st.booleans()), min_size=1, max_size=15))
def test_bins_are_those_of_scikit_learn(pairs):
    confidence, correct = split(pairs)

    def curve(of):
        return calibration_curve(of, confidence, n_bins=10, strategy="quantile", pos_label=True)

    accuracies, means = curve(correct)
    sizes = {}
    for at in range(len(pairs)):
        shares, _ = curve([at == other for other in range(len(pairs))])  # 1 / n_b in the answer's own bin
        sizes[int(shares.argmax())] = 1 / shares.max()
    assert sum(sizes.values()) == pytest.approx(len(pairs))
    expected = sum(size * abs(accuracies[b] - means[b]) for b, size in sizes.items()) / len(pairs)
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected)


def test_other_measures_by_hand():
    values = calibration([0.9, 0.8, 0.6, 0.6], [True, False, True, False])
    assert values["brier"] == pytest.approx((0.01 + 0.64 + 0.16 + 0.36) / 4)
    assert values["auroc"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)  # .9>.8 .9>.6 .6<.8 .6=.6
    assert values["gap"] == pytest.approx(2.9 / 4 - 0.5)
    assert values["confidence_wrong"] == pytest.approx(0.7)


def test_what_needs_right_and_wrong_answers_is_left_out_without_them():
    assert calibration([0.5, 0.75], [True, True]).keys() == {"ece", "brier", "gap"}
    assert calibration([0.5, 0.75], [False, False]).keys() == {"ece", "brier", "gap", "confidence_wrong"}
    assert calibration([0.5, 0.75], [False, False])["brier"] == pytest.approx((0.25 + 0.5625) / 2)
    assert calibration([], []) == {}


@settings(deadline=None)
@given(judged, st.randoms())
def test_calibration_is_bounded_consistent_and_independent_of_the_order(pairs, random):
    values = calibration(*split(pairs))
    assert calibration(*split(random.sample(pairs, len(pairs)))) == pytest.approx(values)
    assert all(0 <= values[key] <= 1 for key in values.keys() - {"gap"})
    assert abs(values["gap"]) <= values["ece"] + 1e-12, "bins cannot hide the mean gap"
    assert values["ece"] ** 2 <= values["brier"] + 1e-12, "Jensen: the mean |gap| of bins is at most the root of the mean square of single ones"


@settings(deadline=None)
@given(judged)
def test_auroc_of_the_opposite_confidence_is_the_complement(pairs):
    confidence, correct = split(pairs)
    values, opposite = calibration(confidence, correct), calibration([1 - c for c in confidence], correct)
    assert ("auroc" in values) == (0 < sum(correct) < len(correct))
    if "auroc" in values:
        wins = [(a > b) + (a == b) / 2 for a, yes in pairs if yes for b, no in pairs if not no]
        assert values["auroc"] == pytest.approx(sum(wins) / len(wins))
        assert opposite["auroc"] == pytest.approx(1 - values["auroc"])
