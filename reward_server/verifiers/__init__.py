"""The verifiers: one file each, and the one registry that names them."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError

from reward_server.verifiers import (
    answer_format,
    code,
    exact,
    instructions,
    length,
    library_rubric,
    math_answer,
    reasoning_gym_score,
    regex_match,
    remote,
    sum_to_target,
)  # fmt: skip
from reward_server.verifiers.verdict import Example, Options, Verifier

VERIFIERS: dict[str, Verifier] = {
    "math": Verifier(
        r"The last `\boxed{}` equals the gold answer, by exact arithmetic or as math-verify sees it.",
        math_answer.MathOptions,
        math_answer.score,
        (
            Example(r"so $x$ is \boxed{\frac{1}{2}}.", "0.5", 1.0),
            Example(r"\boxed{(x-1)(x+1)}", "x^2-1", 1.0),
            Example("I think that it is 42", "42", 1.0, {"extract": "last"}),
            Example(r"\boxed{43}", "42", 0.0),
        ),
        judge=math_answer.JUDGE,
        gold=math_answer.gold,
    ),
    "code": Verifier(
        "The program in the last code block passes the tests, run in the sandbox.",
        code.CodeOptions,
        code.score,
        (
            Example(
                "```python\ndef add(a, b):\n    return a + b\n```",
                {"function": "add", "calls": [{"args": [1, 2], "expected": 3}, {"args": ["a"], "kwargs": {"b": "b"}, "expected": "ab"}]},
                1.0,
            ),
            Example(
                "```python\nprint(int(input()) // 2)\n```",
                {"programs": [{"stdin": "8\n", "stdout": "4\n"}, {"stdin": "7\n", "stdout": "3.5\n"}]},
                0.5,
                {"credit": "share"},
            ),
            Example("```python\nwhile True:\n    pass\n```", {"test_list": ["assert add(1, 2) == 3"]}, 0.0, {"seconds_per_test": 1.0}),
        ),
        gold=code.gold,
        needs="sandbox",
    ),
    "instructions": Verifier(
        "The completion follows instructions that a program can check, in the manner of IFEval.",
        instructions.InstructionOptions,
        instructions.score,
        (
            Example("no commas here", {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, 1.0),
            Example(
                "few commas, or none",
                {
                    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
                    "kwargs": [{}, {"num_words": 3, "relation": "at least"}],
                },
                0.5,
                {"credit": "share"},
            ),
            Example('Sure:\n"quoted"', {"instruction_id_list": ["startend:quotation"], "kwargs": [{}]}, 1.0, {"mode": "loose"}),
        ),
    ),
    "reasoning_gym": Verifier(
        "The scorer of a reasoning-gym task judges what stands in the last `<answer>` tags.",
        reasoning_gym_score.ReasoningGymOptions,
        reasoning_gym_score.score,
        (Example("<answer>12</answer>", {"answer": "12", "metadata": {"source_dataset": "chain_sum"}}, 1.0, prompt="5 + 7 ="),),
        judge=reasoning_gym_score.JUDGE,
        gold=reasoning_gym_score.gold,
        needs="reasoning_gym",
    ),
    "verifiers": Verifier(
        "The rubric of an environment of the library `verifiers` judges.",
        library_rubric.LibraryOptions,
        library_rubric.score,
        (Example("The answer is 4", {"answer": "4", "info": {}}, 1.0, {"environment": "my_environment"}, prompt="What is 2+2?"),),
        judge=library_rubric.JUDGE,
        needs="verifiers",
    ),
    "remote": Verifier(
        "A service of the user's judges, over HTTP.",
        remote.RemoteOptions,
        remote.score,
        (Example("an answer", "its gold answer", 0.5, {"url": "https://rewards.example.com/score"}),),
        needs="service",
    ),
    "exact": Verifier(
        "The completion is the answer, letter by letter.",
        exact.ExactOptions,
        exact.score,
        (Example(" Paris\n", "Paris", 1.0), Example("paris", "Paris", 0.0), Example("paris", "Paris", 1.0, {"ignore_case": True})),
        gold=exact.gold,
    ),
    "regex": Verifier(
        "A regular expression is found in the completion, or what it captures is the answer.",
        regex_match.RegexOptions,
        regex_match.score,
        (
            Example("see https://example.org", "https?://", 1.0),
            Example("Answer: 41. No. Answer: 42", "42", 1.0, {"pattern": r"Answer: (\d+)", "captures_answer": True}),
        ),
    ),
    "format": Verifier(
        r"The whole completion matches a regular expression, or has exactly one `\boxed{}`.",
        answer_format.FormatOptions,
        answer_format.score,
        (
            Example("<think>hm</think>yes", None, 1.0, {"pattern": "<think>.*</think>.+"}),
            Example(r"\boxed{1} or \boxed{2}", None, 0.0, {"boxed": True}),
        ),
    ),
    "length": Verifier(
        "The completion is as long as it is to be.",
        length.LengthOptions,
        length.score,
        (
            Example("one two three", None, 1.0, {"unit": "words", "most": 3}),
            Example("one two three four", None, 0.5, {"unit": "words", "most": 3, "fade": 2}),
        ),
    ),
    "sum_to_target": Verifier(
        "The completion is digits 1 to 9 joined by `+`, and they add up to the answer.",
        sum_to_target.SumOptions,
        sum_to_target.score,
        (Example("9+8", 17, 1.0), Example("9+9", 17, 0.0)),
        gold=sum_to_target.gold,
    ),
}


def check_options(name: str, options: dict[str, Any]) -> Options:
    """The options of this verifier, validated. Raises ValueError with what is allowed."""
    if name not in VERIFIERS:
        near = difflib.get_close_matches(name, VERIFIERS, n=1)
        meant = f": did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"there is no verifier {name!r}{meant} Verifiers are {', '.join(VERIFIERS)}")
    model = VERIFIERS[name].options
    try:
        return model.model_validate(options)
    except ValidationError as wrong:
        faults = "; ".join(f"{'.'.join(map(str, error['loc'])) or 'options'}: {error['msg']}" for error in wrong.errors())
        allowed = ", ".join(model.model_fields) or "none"
        raise ValueError(f"options of the verifier {name!r}: {faults}. Options are: {allowed}") from wrong
