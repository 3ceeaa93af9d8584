import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_server.verifiers import VERIFIERS, answer_format, check_options, math_answer, reasoning_gym_score, sum_to_target
from reward_server.verifiers.extract import after_thinking, boxes, last_boxed, last_expression, last_tagged
from reward_server.verifiers.math_answer import equal, gold_text, number, tidy
from reward_server.verifiers.verdict import Tools, Unjudged, Verdict, shown
from services.contracts.messages import Outcome


def no_judge(judge, request):
    raise AssertionError(f"{judge} was asked {request}")


def score(verifier, text, answer, *, prompt="", ask=no_judge, **options):
    return VERIFIERS[verifier].score(text, prompt=prompt, answer=answer, options=check_options(verifier, options), tools=Tools(ask))


# extraction


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{}", None),
        (r"\boxed{1} and then \boxed{2", None),
        (r"\boxed 5", None),
        ("no box", None),
        (r"\boxed{" + "9" * 1024 + "}", "9" * 1024),
        (r"\boxed{" + "9" * 1025 + "}", None),
        (r"\boxed{5}" + "x" * 9000, None),
        (r"\boxed{1}" * 10_000, "1"),
        (r"\boxed{" * 10_000, None),
        ("\\boxed{5\\", None),
    ],
)
def test_the_answer_is_the_content_of_the_last_complete_box_near_the_end(text, found):
    assert last_boxed(text) == found


@pytest.mark.parametrize(
    ("text", "prompt", "visible"),
    [
        ("<think>it is \\boxed{1}</think>\\boxed{2}", "", "\\boxed{2}"),
        ("it is \\boxed{1}</think>\\boxed{2}", "Question <think>\n", "\\boxed{2}"),
        ("<think>it is \\boxed{1}", "", ""),
        ("it is \\boxed{1}", "Question <think>\n", ""),
        ("a</think>b<think>c</think>d", "", "d"),
        ("a</think>b<think>c", "", ""),
        ("no thinking", "", "no thinking"),
    ],
)
def test_thinking_is_cut_and_unfinished_thinking_leaves_nothing(text, prompt, visible):
    assert after_thinking(text, prompt) == visible


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("there are 3 cats and 4 dogs", "4"),
        ("#### 1,234", "1,234"),
        ("it costs 5, 6 or 7, I think", "7"),
        ("x is $\\sqrt{2}$.", "\\sqrt{2}"),
        ("\\(3\\) or \\(y+1\\)", "y+1"),
        ("the ratio is 3/4", "3/4"),
        ("the ratio is -\\frac{3}{4}", "-\\frac{3}{4}"),
        ("about -2.50 m", "-2.50"),
        ("none", None),
        ("", None),
    ],
)
def test_without_a_box_the_last_number_or_formula_is_the_answer(text, found):
    assert last_expression(text) == found


def test_the_last_tag_that_is_closed_is_the_answer():
    assert last_tagged("<answer>1</answer> no: <answer> 2 </answer>", "answer") == "2"
    assert last_tagged("<answer>1", "answer") is None
    assert last_tagged("1</answer>", "answer") is None
    assert boxes(r"\boxed{1}\boxed{") == 2


# math: what is decided without math-verify

SAME = [
    ("7", "07"), ("1234", "1,234"), ("+3", "3"), ("0", "-0"), ("0.5", r"\frac{1}{2}"), ("1/2", r"\dfrac{2}{4}"), ("-1/2", r"-\frac{1}{2}"),
    (r"\frac{-1}{2}", r"\frac{1}{-2}"), ("3", "3.00"), ("2.5", r"\tfrac{5}{2}"),
    (r"0.\overline{3}", "1/3"), (r"1.2\overline{34}", r"\frac{1222}{990}"),
    (r"0.\overline{9}", "1"), ("6.02e23", r"6.02 \times 10^{23}"), ("2000", r"2\cdot 10^3"), (".5", "1/2"), ("blue", "blue"),
]  # fmt: skip
DIFFERENT = [("7", "8"), ("7", "-7"), ("1/3", "1/2"), ("1,234", "1235"), (r"0.\overline{3}", "3"), ("9" * 300, "9" * 299 + "8")]
FOR_MATH_VERIFY = [
    ("1/3", "0.333333"),
    ("1/3", "0.33"),
    ("x", "x+0"),
    ("10", r"10\%"),
    ("1,23", "123"),
    ("1/0", "2/0"),
    ("1e-7", "0"),
    ("\u0663", "3"),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_equal_numbers_are_right_without_math_verify(a, b):
    assert equal(a, b) is True
    assert equal(b, a) is True


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different_exact_numbers_are_wrong_without_math_verify(a, b):
    assert equal(a, b) is False
    assert equal(b, a) is False


@pytest.mark.parametrize(("a", "b"), FOR_MATH_VERIFY)
def test_what_exact_arithmetic_does_not_settle_is_left_to_math_verify(a, b):
    assert equal(a, b) is None
    assert equal(b, a) is None


def spellings(value: Fraction) -> list[str]:
    n, d = value.numerator, value.denominator
    written = [f"{n}/{d}" if n >= 0 else f"-{-n}/{d}", rf"\frac{{{3 * n}}}{{{3 * d}}}", rf"\dfrac{{{-n}}}{{{-d}}}"]
    if d == 1:
        written += [str(n), f"{n:,}", f"{n}.0", f"{n}e0"]
    return written


rationals = st.one_of(st.integers(-(10**12), 10**12).map(Fraction), st.fractions(max_denominator=1000), st.fractions(-3, 3, max_denominator=9))


@given(rationals, rationals, st.data())
def test_the_fast_path_never_disagrees_with_exact_arithmetic(a, b, data):
    gold, answer = data.draw(st.sampled_from(spellings(a))), data.draw(st.sampled_from(spellings(b)))
    assert number(gold).value == a
    assert equal(gold, answer) in ((True,) if a == b else (False, None))


digits = st.text("0123456789", min_size=1, max_size=12)
signs = st.sampled_from(["", "-", "+"])


@st.composite
def written(draw):
    """(text, value): a decimal, a number in scientific notation or with groups of digits, and what Decimal and Fraction make of it."""
    sign, whole, places, exponent = draw(signs), draw(digits), draw(digits), draw(st.integers(-30, 30))
    grouped = f"{int(whole):,}"
    return draw(
        st.sampled_from(
            [
                (f"{sign}{whole}.{places}", Decimal(f"{sign}{whole}.{places}")),
                (f"{sign}.{places}", Decimal(f"{sign}.{places}")),
                (f"{sign}{grouped}", Decimal(f"{sign}{whole}")),
                (f"{sign}{grouped}.{places}", Decimal(f"{sign}{whole}.{places}")),
                (f"{sign}{whole}.{places}e{exponent}", Decimal(f"{sign}{whole}.{places}e{exponent}")),
                (rf"{sign}{whole} \times 10^{{{exponent}}}", Decimal(f"{sign}{whole}e{exponent}")),
                (rf"{sign}\frac{{{whole}}}{{{int(places) + 1}}}", Fraction(int(f"{sign}{whole}"), int(places) + 1)),
                (f"{sign}{whole}/{int(places) + 1}", Fraction(int(f"{sign}{whole}"), int(places) + 1)),
            ]
        )
    )


@given(written(), written(), st.booleans())
def test_no_way_of_writing_a_number_makes_the_fast_path_disagree_with_exact_arithmetic(a, b, alike):
    (gold, worth), (answer, value) = a, (str(Fraction(a[1])), a[1]) if alike else b
    assert number(gold).value == Fraction(worth)
    assert equal(gold, answer) in ((True,) if Fraction(worth) == Fraction(value) else (False, None))
    latex = number(gold).latex
    assert (Fraction(latex) if "frac" not in latex else number(latex).value) == Fraction(worth)


@given(st.integers(0, 999), st.text("0123456789", max_size=5), st.text("0123456789", min_size=1, max_size=5))
def test_repeating_decimals_are_the_limit_of_their_digits(whole, start, period):
    exact = number(f"{whole}.{start}\\overline{{{period}}}").value
    written = Fraction(f"{whole}.{start}{period * 20}")
    assert abs(exact - written) <= Fraction(1, 10 ** (len(start) + 20 * len(period)))


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_text_breaks_the_fast_path(a, b):
    assert equal(tidy(a), tidy(a)) is True
    assert equal(a, b) in (True, False, None)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (42, "42"), (0.5, "0.5"), (1e-7, "0.0000001"), ("  $42$. ", "42"), (r"Thus \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("reasons\n#### 1,234", "1,234"),
        (None, None), (True, None), ("", None), (" . ", None), ([1], None), ({"a": 1}, None), (math.nan, None), (math.inf, None), ("1" * 1025, None),
        pytest.param(10**5000, None, id="5001 digits"),
    ],
)  # fmt: skip
def test_gold_answers_are_numbers_texts_boxes_or_what_follows_four_hashes(answer, gold):
    assert gold_text(answer) == gold


def test_math_scores_the_boxed_answer():
    assert score("math", r"so \boxed{42}", "42") == Verdict(1.0, Outcome.OK, "answer '42'")
    assert score("math", r"so \boxed{41}", "42") == Verdict(0.0, Outcome.OK, "answer '41'")
    assert score("math", r"so \boxed{7.}", 7).score == 1.0
    assert score("math", "so 42", "42") == Verdict(0.0, Outcome.OK, "no answer")
    assert score("math", "so 42", "42", extract="last").score == 1.0
    assert score("math", r"<think>\boxed{42}", "42").detail == "no answer"
    assert score("math", r"\boxed{42}", None).outcome is Outcome.UNVERIFIABLE


def test_math_gives_math_verify_the_forms_that_it_reads_without_mistakes():
    asked = []

    def ask(judge, request):
        asked.append((judge, request))
        return "wrong"

    assert score("math", r"\boxed{x+1.}", r"0.\overline{3}", ask=ask).score == 0.0
    assert score("math", r"\boxed{1/3}", "3.3e-1", ask=ask).score == 0.0
    assert asked == [("math", [r"\frac{1}{3}", "x+1"]), ("math", ["0.33", r"\frac{1}{3}"])]


@pytest.mark.parametrize(("word", "value"), [("right", 1.0), ("wrong", 0.0), ("unreadable", 0.0)])
def test_math_takes_the_judges_word(word, value):
    assert score("math", r"\boxed{x}", "y", ask=lambda judge, request: word).score == value


def test_a_gold_answer_that_cannot_be_read_is_unverifiable_not_wrong():
    with pytest.raises(Unjudged) as failure:
        score("math", r"\boxed{x}", r"\sqrt{2", ask=lambda judge, request: "unverifiable")
    assert failure.value.outcome is Outcome.UNVERIFIABLE
    assert score("math", r"\boxed{\sqrt{2}}", r"\sqrt{2}").score == 1.0


# sum_to_target


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("9+9+2", 20, 1.0), ("9+9+2", "20", 1.0), ("5", 5, 1.0), ("9+9+1", 20, 0.0), ("", 0, 0.0), ("+5", 5, 0.0), ("5+", 5, 0.0), ("5++5", 10, 0.0),
        ("0+5", 5, 0.0), ("15+5", 20, 0.0), ("5 +5", 10, 0.0), ("5+5\n", 10, 0.0), ("5+5=10", 10, 0.0), ("\u0665+5", 10, 0.0), ("\ud800", 5, 0.0),
        ("\x00", 5, 0.0), ("+".join("1" * 500_000), 500_000, 1.0), ("__import__('os')", 5, 0.0),
    ],
)  # fmt: skip
def test_sum_to_target_wants_digits_joined_by_plus_and_nothing_else(text, answer, value):
    assert score("sum_to_target", text, answer)[:2] == (value, Outcome.OK)


@pytest.mark.parametrize("answer", [None, True, 5.0, "five", "-5", "", [5], 10**30])
def test_a_target_that_is_no_whole_number_is_unverifiable(answer):
    assert score("sum_to_target", "5", answer)[:2] == (None, Outcome.UNVERIFIABLE)


# format


def test_format_matches_the_whole_completion():
    assert score("format", "<a>1\n2</a>", None, pattern="<a>.*</a>").score == 1.0
    assert score("format", "<a>1</a> ", None, pattern="<a>.*</a>").score == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [(r"so \boxed{1}", 1.0), ("so 1", 0.0), (r"\boxed{1}\boxed{2}", 0.0), (r"\boxed{1", 0.0), (r"<think>\boxed{0}</think>\boxed{1}", 1.0), ("", 0.0)],
)
def test_format_wants_exactly_one_box(text, value):
    assert score("format", text, None, boxed=True).score == value


def test_a_pattern_that_backtracks_without_end_times_out():
    with pytest.raises(Unjudged) as failure:
        score("format", "a" * 40 + "b", None, pattern="(a|aa)*c|(a?){40}x(a*)*$")
    assert failure.value.outcome is Outcome.TIMEOUT


# reasoning_gym


def test_reasoning_gym_hands_the_entry_and_the_tagged_answer_to_the_scorer():
    asked = []

    def ask(judge, request):
        asked.append((judge, request))
        return 0.25

    entry = {"answer": "12", "metadata": {"source_dataset": "chain_sum"}}
    assert score("reasoning_gym", "<think>5</think>so <answer> 12 </answer>", entry, prompt="5+7?", ask=ask).score == 0.25
    assert asked == [("reasoning_gym", {"task": "chain_sum", "config": {}, "entry": {"question": "5+7?", **entry}, "answer": "12"})]
    score("reasoning_gym", "so\n12\n\n", "12", task="chain_sum", extract="last_line", ask=ask)
    assert asked[1][1]["answer"] == "12"
    assert asked[1][1]["entry"] == {"question": "", "answer": "12", "metadata": {}}


@pytest.mark.parametrize(
    "answer", [None, "12", {"answer": "12"}, {"metadata": {}}, {"answer": "12", "metadata": {}}, {"answer": "12", "metadata": 3}]
)
def test_reasoning_gym_cannot_judge_without_the_task(answer):
    assert score("reasoning_gym", "<answer>12</answer>", answer)[:2] == (None, Outcome.UNVERIFIABLE)


def test_reasoning_gym_gives_nothing_for_no_answer():
    entry = {"answer": "12", "metadata": {"source_dataset": "chain_sum"}}
    assert score("reasoning_gym", "12", entry) == Verdict(0.0, Outcome.OK, "no answer")
    assert score("reasoning_gym", f"<answer>{'1' * 20_000}</answer>", entry).score == 0.0


@pytest.mark.parametrize("text", ["3*(4+5)-1", "x**2/3 + sin(x)*exp(-2.5*x) + C", "sqrt(2)*pi", "-.5", "2*x*y"])
def test_plain_algebra_may_be_evaluated(text):
    assert reasoning_gym_score.SAFE_ALGEBRA.fullmatch(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "exec(1)",
        "open(0)",
        "x.func",
        "1 .real",
        "(1).real",
        "(1) . a",
        "eval(x)",
        "[1]",
        "a_b",
        "sinx(1)",
        "input()",
        "exit()",
        "lambda",
        "1;2",
        "é",
    ],
)
def test_what_python_would_look_up_is_never_evaluated(text):
    assert not reasoning_gym_score.SAFE_ALGEBRA.fullmatch(text)


# options


def test_options_are_validated_with_what_is_allowed():
    assert check_options("math", {"extract": "last", "timeout_score": 0}) == math_answer.MathOptions(extract="last", timeout_score=0.0)
    with pytest.raises(ValueError, match="there is no verifier 'maths': did you mean 'math'"):
        check_options("maths", {})
    with pytest.raises(
        ValueError,
        match=r"there is no verifier 'zzz'\. Verifiers are math, code, instructions, reasoning_gym, verifiers, remote, exact, regex, format,",
    ):
        check_options("zzz", {})
    with pytest.raises(ValueError, match=r"extrakt: Extra inputs are not permitted\. Options are: timeout_score, extract"):
        check_options("math", {"extrakt": "last"})
    with pytest.raises(ValueError, match=r"pattern: .*not a regular expression"):
        check_options("format", {"pattern": "("})
    for neither in ({}, {"pattern": "a", "boxed": True}):
        with pytest.raises(ValueError, match="either a pattern or boxed"):
            check_options("format", neither)
    with pytest.raises(ValueError, match="Options are: none"):
        check_options("sum_to_target", {"a": 1})
    assert check_options("format", {"boxed": True}) == answer_format.FormatOptions(boxed=True)
    assert check_options("sum_to_target", {}) == sum_to_target.SumOptions()


def test_model_output_is_quoted_in_ascii_whatever_is_in_it():
    assert shown("a\x00\ud800\x1b[31m") == "'a\\x00\\ud800\\x1b[31m'"
    assert len(shown("é" * 1000)) < 300
