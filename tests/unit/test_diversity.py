import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contracts.measures import EVALUATION_KEYS
from services.evaluation.diversity import answer_entropy, distinct, grams, jaccard_distance, ngram_diversity, self_bleu
from services.evaluation.results import Answer, PromptResult, evaluate, final_answer

answers_of = st.lists(st.lists(st.integers(0, 3), max_size=7).map(tuple), min_size=2, max_size=8)


def answer(text="", tokens=None, reward=0.0, logps=(-1.0,), truncated=False):
    return Answer(tokens=tuple(map(ord, text)) if tokens is None else tokens, text=text, reward=reward, logps=logps, truncated=truncated)


def test_grams_of_an_answer():
    assert grams((1, 2, 3, 4), 3) == [(1, 2, 3), (2, 3, 4)]
    assert grams((1, 2), 3) == []


def test_distinct_by_hand():
    answers = [(1, 2, 1, 2), (1, 2)]
    assert distinct(answers, 1) == pytest.approx(2 / 6)
    assert distinct(answers, 2) == pytest.approx(2 / 4)  # 12 21 12 and 12
    assert distinct(answers, 3) == 1
    assert distinct(answers, 4) == 1
    assert distinct([(1, 2), (3,)], 3) is None
    assert ngram_diversity(answers) == pytest.approx((2 / 6 + 2 / 4 + 1 + 1) / 4)
    assert ngram_diversity([(1, 1)]) == pytest.approx((1 / 2 + 1) / 2), "orders that no answer is long enough for are left out"
    assert ngram_diversity([()]) is None


def test_jaccard_by_hand():
    one, other = (1, 2, 3, 4), (2, 3, 4, 5)  # 123 234 and 234 345
    assert jaccard_distance([one, other]) == pytest.approx(1 - 1 / 3)
    assert jaccard_distance([one, one, other]) == pytest.approx((0 + 2 / 3 + 2 / 3) / 3)
    assert jaccard_distance([one]) is None


def test_jaccard_reads_sixteen_answers():
    assert jaccard_distance([(1, 2, 3)] * 16 + [(4, 5, 6)] * 16) == 0
    assert jaccard_distance([(1, 2, 3)] * 15 + [(4, 5, 6)]) == pytest.approx(15 / 120)


def test_answers_shorter_than_a_gram_are_one_gram_as_a_whole():
    assert jaccard_distance([(1, 2), (1, 2)]) == 0
    assert jaccard_distance([(1, 2), (2, 1)]) == 1
    assert jaccard_distance([(), ()]) == 0
    assert jaccard_distance([(), (1, 2, 3)]) == 1


def bleu_written_out(hypothesis, references):
    """BLEU-4 of one sentence: clipped precisions, 0.1 for none, up to the sentence's length; the nearest reference is its length."""
    product, orders = 1.0, min(4, len(hypothesis))
    for n in range(1, orders + 1):
        own = grams(hypothesis, n)
        matched = sum(min(own.count(gram), max(grams(reference, n).count(gram) for reference in references)) for gram in set(own))
        if n == 1 and matched == 0:
            return 0.0
        product *= (matched or 0.1) / len(own)
    nearest = min((len(reference) for reference in references), key=lambda length: (abs(length - len(hypothesis)), length))
    return math.exp(min(0.0, 1 - nearest / len(hypothesis))) * product ** (1 / orders)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=7).map(tuple), min_size=2, max_size=8))
def test_self_bleu_is_the_mean_bleu_of_each_answer_against_the_others(answers):
    expected = [bleu_written_out(one, answers[:at] + answers[at + 1 :]) for at, one in enumerate(answers)]
    assert self_bleu(answers) == pytest.approx(sum(expected) / len(expected), abs=1e-9)


def test_self_bleu_of_equal_unequal_empty_and_single_answers():
    assert self_bleu([(1, 2, 3, 4, 5)] * 3) == pytest.approx(1)
    assert self_bleu([(1,), (1,)]) == pytest.approx(1)
    assert self_bleu([(1, 2, 3), (4, 5, 6)]) == 0
    assert self_bleu([(), ()]) == pytest.approx(1)
    assert self_bleu([(1, 2, 3)]) is None


def test_self_bleu_reads_eight_answers():
    alike, other = (1, 2, 3, 4), (5, 6, 7, 8)
    assert self_bleu([alike] * 8 + [other] * 8) == pytest.approx(1)
    assert self_bleu([alike] * 7 + [other]) == pytest.approx(7 / 8)


@settings(deadline=None)
@given(answers_of, st.randoms())
def test_diversity_is_bounded_and_does_not_depend_on_the_order_of_answers(answers, random):
    shuffled = random.sample(answers, len(answers))
    for measure in (jaccard_distance, self_bleu, ngram_diversity, lambda given: distinct(given, 2)):
        value = measure(answers)
        assert value is None or 0 <= value <= 1
        assert measure(shuffled) == (None if value is None else pytest.approx(value))


@settings(deadline=None)
@given(answers_of)
def test_the_same_answer_again_is_less_diverse(answers):
    assert distinct([*answers, *answers], 1) == (None if (once := distinct(answers, 1)) is None else pytest.approx(once / 2))
    assert jaccard_distance([*answers, *answers]) <= jaccard_distance(answers) + 1e-12


def test_answer_entropy_by_hand():
    assert answer_entropy(["7", "7", "7"]) == 0
    assert answer_entropy(["7", "8", "9", "5"]) == pytest.approx(math.log(4))
    assert answer_entropy(["7", "7", "7", "8"]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


@pytest.mark.parametrize(
    ("text", "final"),
    [
        (" 3+4 ", "3+4"),
        ("so \\boxed{3} or rather \\boxed{\\frac{1}{2}} .", "\\frac{1}{2}"),
        ("cut off in \\boxed{1", "1"),
        ("6 * 7 = 42\n#### 42", "42"),
        ("<think>#### 1</think> two  \n three", "two three"),
        ("I say <answer> a\tb </answer>.", "a b"),
        ("", ""),
    ],
)
def test_final_answer_is_what_is_marked_as_one_or_all_of_the_text(text, final):
    assert final_answer(text) == final


def test_evaluation_of_two_prompts_by_hand():
    first = PromptResult("a", (answer("abcd", reward=1, logps=(-1.0, -2.0)), answer("abcd", reward=1), answer("xyz"), answer("q", truncated=True)))
    second = PromptResult("b", (answer("ab", reward=0.4), answer("ac"), answer("ac"), answer("ac", logps=())))
    values = evaluate([first, second, PromptResult("lost", ())], correct_at=0.5)
    assert values["reward_mean"] == pytest.approx(2.4 / 8)
    assert values["correct_mean"] == pytest.approx((2 / 4 + 0) / 2)
    assert values["pass_at_1"] == pytest.approx(0.25)
    assert values["pass_at_2"] == pytest.approx(5 / 6 / 2)
    assert values["pass_at_4"] == pytest.approx(1 / 2)
    assert "pass_at_8" not in values
    assert values["majority_at_k"] == pytest.approx(1 / 2)
    assert values["entropy_estimate_nats"] == pytest.approx((1 + 2 + 6 * 1) / 8)
    assert values["length_mean"] == pytest.approx((4 + 4 + 3 + 1 + 2 * 4) / 8)
    assert values["truncated_share"] == pytest.approx(1 / 8)
    assert values["distinct_1"] == pytest.approx((8 / 12 + 3 / 8) / 2)
    assert values["distinct_3"] == pytest.approx(3 / 5), "the second prompt has no 3-grams"
    assert values["unique_correct"] == pytest.approx(1 / 2)
    assert values["unique_correct_share"] == pytest.approx(1 / 2), "the second prompt has nothing correct"
    entropies = [1.5 * math.log(2), -0.25 * math.log(0.25) - 0.75 * math.log(0.75)]
    assert values["answer_entropy_nats"] == pytest.approx(sum(entropies) / 2)
    assert values["effective_answers"] == pytest.approx(sum(map(math.exp, entropies)) / 2)
    agreement = (0.5 + 0.5 + 0.25 + 0.25 + 0.25 + 3 * 0.75) / 8
    assert values["consistency_gap"] == pytest.approx(agreement - 2 / 8)
    assert values["consistency_confidence_wrong"] == pytest.approx((0.25 * 3 + 3 * 0.75) / 6)
    likely = (math.exp(-1.5) + 6 * math.exp(-1)) / 7
    assert values["likelihood_gap"] == pytest.approx(likely - 2 / 7), "an answer without tokens has no likelihood"


numbers = st.floats(-5, 0) | st.sampled_from([-math.inf, math.nan])
made_answers = st.builds(
    Answer,
    tokens=st.lists(st.integers(0, 4), max_size=6).map(tuple),
    text=st.sampled_from(["", "1", "2", "\\boxed{1}"]),
    reward=st.sampled_from([0.0, 0.5, 1.0]),
    logps=st.lists(numbers, max_size=4).map(tuple),
    truncated=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.builds(PromptResult, st.just("p"), st.lists(made_answers, max_size=5).map(tuple)), max_size=4), st.randoms())
def test_evaluation_has_known_finite_values_that_do_not_depend_on_the_order(prompts, random):
    values = evaluate(prompts, correct_at=0.75)
    assert values.keys() <= EVALUATION_KEYS.keys()
    assert all(math.isfinite(value) for value in values.values())
    shuffled = [PromptResult("p", tuple(random.sample(one.answers, len(one.answers)))) for one in random.sample(prompts, len(prompts))]
    assert evaluate(shuffled, correct_at=0.75) == pytest.approx(values, abs=1e-9)
    if any(one.answers for one in prompts):
        assert values["pass_at_1"] == pytest.approx(values["correct_mean"])
    else:
        assert values == {}


def test_one_correct_answer_is_all_there_is_to_be_unique():
    one, two = (answer("a", reward=1), answer("b")), (answer("a", reward=1), answer("a", reward=1))
    assert evaluate([PromptResult("one", one), PromptResult("two", two)], correct_at=1)["unique_correct_share"] == pytest.approx((1 + 1 / 2) / 2)


def test_answers_with_a_log_probability_that_is_no_number_have_no_likelihood():
    known, unknown = answer("a", reward=1, logps=(math.log(0.5),)), answer("b", logps=(-1.0, math.nan))
    values = evaluate([PromptResult("p", (known, unknown))], correct_at=1)
    assert values["likelihood_gap"] == pytest.approx(0.5 - 1)
    assert "entropy_estimate_nats" not in values


def test_self_bleu_reads_sixty_four_prompts():
    alike, unlike = PromptResult("a", (answer("abcd"),) * 2), PromptResult("b", (answer("abcd"), answer("efgh")))
    assert evaluate([alike] * 64 + [unlike] * 64, correct_at=1)["self_bleu"] == pytest.approx(1)
    assert evaluate([alike] * 63 + [unlike], correct_at=1)["self_bleu"] == pytest.approx(63 / 64)


def made_evaluation(prompts, samples, most):
    rng = np.random.default_rng(0)
    made = []
    for _ in range(prompts):
        lengths = rng.integers(most // 2, most, samples)
        texts = ["+".join(map(str, rng.integers(1, 10, length // 2 + 1))) for length in lengths]
        made.append([answer(text, reward=float(rng.random() < 0.3), logps=tuple(-rng.random(len(text) + 1))) for text in texts])
    return [PromptResult(str(at), tuple(answers)) for at, answers in enumerate(made)]


def test_every_key_that_sixteen_samples_can_have_is_measured():
    values = evaluate(made_evaluation(8, 16, 12), correct_at=1)
    assert values.keys() == EVALUATION_KEYS.keys() - {"pass_at_32", "pass_at_64"}
    assert evaluate(made_evaluation(2, 64, 12), correct_at=1).keys() == EVALUATION_KEYS.keys()


def test_a_small_evaluation_takes_little_time():
    prompts = made_evaluation(33, 16, 12)
    evaluate(prompts, correct_at=1)  # the libraries are imported
    spent = []
    for _ in range(3):
        start = time.process_time()
        evaluate(prompts, correct_at=1)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.3
