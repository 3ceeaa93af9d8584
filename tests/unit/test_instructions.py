import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_server.verifiers import VERIFIERS, check_options
from reward_server.verifiers.instructions import LONGEST, variants_of
from reward_server.verifiers.instructions.language import language_of
from reward_server.verifiers.instructions.lengths import sentences
from reward_server.verifiers.instructions.registry import CONSTRAINTS
from reward_server.verifiers.verdict import Tools, Verdict
from services.contracts.messages import Outcome

ENGLISH = "the old house at the end of the street has been empty for many years"
GERMAN = "Das alte Haus am Ende der Straße steht seit vielen Jahren leer."
FRENCH = "La vieille maison au bout de la rue est vide depuis de nombreuses années."

AT_LEAST, LESS_THAN = "at least", "less than"

CASES: list[tuple[str, dict[str, object], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["cat", "dog"]}, ["A CAT and dogs", "concatenated hotdog"], ["a cat", "c a t dog", "DO G cat"]),
    ("keywords:existence", {"keywords": ["c++", "a.b"]}, ["C++ and a.b"], ["ccc and a.b", "c++ and axb"]),
    ("keywords:frequency", {"keyword": "to", "frequency": 3, "relation": AT_LEAST}, ["to To tomato"], ["to to", "t o t o t o"]),
    ("keywords:frequency", {"keyword": "to", "frequency": 3, "relation": LESS_THAN}, ["to to", "no"], ["to to to"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "big dog"]}, ["concatenate", "big", "dog big"], ["the CAT!", "a big dog."]),
    ("keywords:letter_frequency", {"letter": "A", "let_frequency": 3, "let_relation": AT_LEAST}, ["banAna", "aAa"], ["bana", "b"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": LESS_THAN}, ["hi!", "hi"], ["hi!!"]),
    ("language:response_language", {"language": "de"}, [GERMAN, GERMAN.upper()], [ENGLISH, FRENCH, "12345", "!?"]),
    ("language:response_language", {"language": "zh-cn"}, ["这所老房子已经空置多年了。"], ["この古い家は何年も空いています。"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": AT_LEAST}, ["one two three", "it's me"], ["one two", "- - - -"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS_THAN}, ["one two", "..."], ["one two three"]),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": AT_LEAST}, ["One. Two! Three?"], ["One. Two!"]),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": LESS_THAN},
     ["One. Two!"], ["One. Two! Three?", "One. Two. three Four. Five"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "***a***b", "a***b***"], ["a", "a\n\nb", "a******b", "a***b***c"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Well"},
        ["Yes.\n\nWell, no", "Yes\n\n'well' said he", "a\n\nWELL"],
        ["Well\n\nyes", "Yes.\nWell, no", "Yes\n\nwellness", "a\n\nwell\n\nb", "a\n\n\n\nwell"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2},
     ["[name] of [address]", "[[a] [b]", "[] []"], ["[name", "[a\n] [b]", "] [ ]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\np.s. more", "P. S. more"], ["Bye. PS more", "P.P.S more"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S more", "p. p. s more"], ["P.S. more"]),
    ("detectable_content:postscript", {"postscript_marker": "Later:"}, ["LATER: more"], ["Later more"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n  * b", "- a\ntext\n- b", "*a\n-b"], ["* a", "- a\n- b\n- c", "** a\n** b"]),
    ("detectable_format:constrained_response", {}, ["My answer is no.", "So: My answer is maybe. Or"], ["my answer is no.", "no", "My answer is"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and *b*", "*a b* **c**"], ["*a*", "* * and *b*", "*a\n* b"]),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2},
     ["Day 1\na\nDay 2\nb", "Day1 Day2 Day3"], ["Day 1", "Day\n\n1 day 2"]),
    ("detectable_format:json_format", {},
     ['{"a": [1, null]}', '```json\n{"a": 1}\n```', "3", '"x"', "9" * 6000], ["{a: 1}", "see {}", "NaN", "{}{}", ""]),
    ("detectable_format:title", {}, ["<<Joy>>\nyes", "see <<a>> b"], ["<Joy>", "<<>>", "<< >>", "<<a\nb>>", ">>a<<"]),
    ("combination:two_responses", {}, ["a******b", "******a\n******\nb******"], ["a", "a******a ", "a******b******c", "a************b", "a***b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Write a poem."},
     ["write a poem. Roses"], ["Sure: Write a poem.", "Write a", "Write  a poem."]),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, ["So. Any Questions? ", '"So. any questions?"'], ["Any questions? No", "questions?"]),
    ("startend:quotation", {}, ['"yes"', ' "a" b "c"\n', '""'], ["yes", '"yes', '"', "'yes'"]),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, ENGLISH.capitalize(), GERMAN.upper(), "123"]),
    ("change_case:english_lowercase", {}, [ENGLISH], [ENGLISH.upper(), ENGLISH.capitalize(), FRENCH.lower(), "123"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": AT_LEAST},
     ["I SAY so", "A-B and C"], ["WELL-KNOWN", "One Two"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": LESS_THAN}, ["I say", "WELL-KNOWN so"], ["I SAY"]),
    ("punctuation:no_comma", {}, ["no; none"], ["one, two"]),
]  # fmt: skip


def no_judge(judge, request):
    raise AssertionError(f"{judge} was asked {request}")


def score(text, answer, *, prompt="", **options):
    return VERIFIERS["instructions"].score(text, prompt=prompt, answer=answer, options=check_options("instructions", options), tools=Tools(no_judge))


def record(*constraints: tuple[str, dict[str, object] | None]) -> dict[str, object]:
    return {"instruction_id_list": [name for name, _ in constraints], "kwargs": [kwargs for _, kwargs in constraints]}


def test_every_constraint_has_cases():
    assert {name for name, *_ in CASES} == set(CONSTRAINTS)


@pytest.mark.parametrize(("name", "kwargs", "followed", "missed"), CASES, ids=[f"{name} {n}" for n, (name, *_) in enumerate(CASES)])
def test_a_constraint_tells_what_follows_it_from_what_does_not(name, kwargs, followed, missed):
    asked = record((name, kwargs))
    assert [text for text in followed if score(text, asked) != Verdict(1.0, Outcome.OK, "follows 1 of 1")] == []
    assert [text for text in missed if score(text, asked) != Verdict(0.0, Outcome.OK, f"follows 0 of 1, not {name}")] == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0), ("no end", 1), ("One. Two.", 2), ("He said: 'Go!' Then left.", 2), ("Dr. Who met J. Smith, e.g. Twice.", 1),
        ("It is 3.14 or so.", 1),
        ("Really?! Yes...  No", 3), ("1. First\n2. Second", 1), ("1. First.\n2. Second.", 2), ("今日。明日\uff01", 2), ("यह है। वह है।", 2),
        ("... !!! ???", 0),
        ("He left. and came", 1), ("No. I mean it.", 2), ("**Bold.** Next.", 2),
    ],
)  # fmt: skip
def test_sentences_are_counted_as_a_reader_would(text, count):
    assert sentences(text) == count


# the record


def test_nulls_and_other_fields_of_a_record_do_not_matter():
    kwargs = {"num_words": 2.0, "relation": AT_LEAST, "keyword": None, "letter": None}
    answer = {"key": 7, "prompt": "?", **record(("length_constraints:number_words", kwargs), ("punctuation:no_comma", None))}
    assert score("one two", answer).score == 1.0
    assert score("one", answer).score == 0.0


BAD: list[tuple[object, str]] = [
    (None, "no record"), ("text", "no record"), (3, "no record"), ([], "no record"), ({}, "instruction_id_list: Field required"),
    ({"instruction_id_list": [], "kwargs": []}, "at least 1"),
    ({"instruction_id_list": ["punctuation:no_comma"] * 65, "kwargs": [{}] * 65}, "at most 64"),
    ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "1 instructions and 0 kwargs"),
    ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": ["x"]}, "kwargs.0"),
    (record(("punctuation:no_commas", {})), "did you mean 'punctuation:no_comma'?"),
    (record(("punctuation:no_comma", {"x": 1})), "punctuation:no_comma: x: Extra inputs are not permitted. Arguments are: none"),
    (record(("length_constraints:number_words", {"num_words": 2})), "relation: Field required. Arguments are: num_words, relation"),
    (record(("length_constraints:number_words", {"num_words": 2, "relation": "at most"})), "relation: Input should be 'less than' or 'at least'"),
    (record(("length_constraints:number_words", {"num_words": -1, "relation": AT_LEAST})), "num_words"),
    (record(("length_constraints:number_words", {"num_words": "many", "relation": AT_LEAST})), "num_words"),
    (record(("keywords:existence", {"keywords": []})), "keywords"),
    (record(("keywords:existence", {"keywords": [" "]})), "keywords.0"),
    (record(("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": AT_LEAST})), "letter"),
    (record(("language:response_language", {"language": "klingon"})), "'klingon' is not known: use one of af,"),
    (record(("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "a"})), "(2) is above"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "words"), BAD)
def test_a_bad_record_is_unverifiable_and_says_why(answer, words):
    verdict = score("text", answer)
    assert (verdict.score, verdict.outcome) == (None, Outcome.UNVERIFIABLE)
    assert words in verdict.detail


# credit, thinking, strict and loose


def test_credit_is_for_all_or_by_share():
    asked = record(("punctuation:no_comma", {}), ("startend:quotation", {}), ("keywords:existence", {"keywords": ["yes"]}))
    assert score("yes", asked) == Verdict(0.0, Outcome.OK, "follows 2 of 3, not startend:quotation")
    assert score("yes", asked, credit="share").score == pytest.approx(2 / 3)
    assert score('"yes"', asked).score == 1.0
    assert score("a,b", asked, credit="share").score == 0.0


def test_the_thinking_part_does_not_count():
    asked = record(("punctuation:no_comma", {}))
    assert score("<think>a, b</think>yes", asked).score == 1.0
    assert score("a, b</think>yes", asked, prompt="<think>").score == 1.0
    assert score("<think>a b", asked).score == 0.0  # nothing was answered


@pytest.mark.parametrize("text", ["", " \n", "\u3000"])
def test_an_empty_completion_follows_nothing(text):
    for mode in ("strict", "loose"):
        assert score(text, record(("punctuation:no_comma", {})), mode=mode).score == 0.0


LOOSE = [
    ("startend:quotation", {}, 'Sure:\n"yes"'),
    ("startend:end_checker", {"end_phrase": "Bye."}, "So. Bye.\n(68 words)"),
    ("detectable_format:json_format", {}, "Here it is:\n{}\nEnjoy!"),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, "So. **Any questions?**"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Go"}, "Sure:\n**Go**"),
    ("startend:end_checker", {"end_phrase": "Bye"}, "So. *Bye*\nnote"),
    ("detectable_format:json_format", {}, "Here it is:\n*{}*\nEnjoy!"),
]


@pytest.mark.parametrize(("name", "kwargs", "text"), LOOSE)
def test_loose_forgives_an_introduction_a_closing_line_and_asterisks_and_strict_does_not(name, kwargs, text):
    asked = record((name, kwargs))
    assert score(text, asked).score == 0.0
    assert score(text, asked, mode="loose").score == 1.0


def test_loose_has_eight_variants():
    assert variants_of("*a*\n*b*\n*c*") == ["*a*\n*b*\n*c*", "*b*\n*c*", "*a*\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"]
    assert variants_of("x") == ["x", ""]


def test_loose_does_not_let_an_emptied_answer_pass():
    assert score("a, b", record(("punctuation:no_comma", {})), mode="loose").score == 0.0


def test_each_instruction_may_take_a_variant_of_its_own():
    asked = record(("startend:quotation", {}), ("keywords:existence", {"keywords": ["sure"]}))
    assert score('Sure:\n"yes"', asked, mode="loose").score == 1.0


# hostile answers

EVERYTHING = record(*{name: (name, kwargs) for name, kwargs, *_ in CASES}.values())
HOSTILE = {
    "angles": "<" * LONGEST,
    "brackets": "[" * LONGEST,
    "stars": "*" * LONGEST,
    "lines": "\n" * (LONGEST - 1) + "x",
    "marks": "." * LONGEST,
    "ends": ". " * (LONGEST // 2),
    "quotes": "." + '"' * (LONGEST - 1),
    "spaces": "." + " " * (LONGEST - 2) + "x",
    "digits": "Day " + "1" * (LONGEST - 4),
    "cats": "big " * (LONGEST // 4),
    "words": "a " * (LONGEST // 2),
    "hyphens": "A-" * (LONGEST // 2),
    "surrogates": "\ud800" * LONGEST,
    "nothing": "\x00" * LONGEST,
    "folds": "ŉİﬃ" * (LONGEST // 3),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_time_is_bounded_whatever_a_model_writes(text):
    language_of("warm")
    began = time.process_time()
    assert score(text, EVERYTHING, credit="share").outcome is Outcome.OK
    assert time.process_time() - began < 1.0  # of all 25 instructions together; quadratic ones would take minutes


def test_an_answer_of_a_megabyte_follows_nothing_at_once():
    began = time.process_time()
    assert score("a" * 2**20, EVERYTHING, credit="share", mode="loose") == Verdict(0.0, Outcome.OK, f"answer longer than {LONGEST} characters")
    assert time.process_time() - began < 0.1


@given(st.text(max_size=80), st.sampled_from(["strict", "loose"]))
def test_no_text_breaks_a_constraint(text, mode):
    verdict = score(text, EVERYTHING, mode=mode, credit="share")
    assert 0.0 <= verdict.score <= 1.0
    assert score(text, EVERYTHING, mode="loose", credit="share").score >= verdict.score


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_any_json_is_json(tree):
    assert CONSTRAINTS["detectable_format:json_format"]().followed_by(json.dumps(tree))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_deep_nesting_is_no_json(text):
    assert score(text, record(("detectable_format:json_format", {}))).score == 0.0
