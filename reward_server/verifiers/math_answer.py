r"""`math`: the last boxed answer equals the gold answer, as math-verify sees it.

The thinking part is cut; the answer is the content of the last `\boxed{}`, or with `extract = "last"` the last number or formula where there is no
box. Integers, fractions, decimals and repeating decimals are compared here, exactly; everything else goes to math-verify, in a worker process with
math-verify's own time-outs off (they are alarms that work in a main thread only, and look like wrong answers).

Decided here: a full stop or dollar signs around an answer mean nothing; `0.\overline{3}` is 1/3; `6.02e23` is a number; a decimal that math-verify
finds equal to the gold answer after rounding to 6 places is right (`0.333333` for 1/3). As math-verify decides: units are ignored (`5 cm` equals
`5 m`), `10\%` equals both 10 and 0.1, of `x=5=6` the last part counts, `1,2` equals `\{1,2\}` and `(1,2)`. A gold answer that math-verify cannot
read is unverifiable, save for an answer that is the same text.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from pydantic import JsonValue

from reward_server.verifiers.extract import LONGEST, after_thinking, last_boxed, last_expression
from reward_server.verifiers.verdict import Judge, LimitedOptions, Tools, Unjudged, Verdict, shown
from services.contracts.messages import Outcome

INTEGER = re.compile(r"[+-]?(?:[0-9]{1,400}|[0-9]{1,3}(?:,[0-9]{3}){1,100})")
DECIMAL = re.compile(r"([+-]?(?:[0-9]{1,200}|[0-9]{1,3}(?:,[0-9]{3}){1,50})?\.[0-9]{1,200})")
SCIENTIFIC = re.compile(r"([+-]?[0-9]{1,40}(?:\.[0-9]{1,40})?)(?:[eE]|\s*(?:\\times|\\cdot)\s*10\s*\^)(?:\{([+-]?[0-9]{1,3})\}|([+-]?[0-9]{1,3}))")
FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{([+-]?[0-9]{1,200})\}\{([+-]?[0-9]{1,200})\}")
SLASH = re.compile(r"([+-]?)([0-9]{1,200})/([0-9]{1,200})")
REPEATING = re.compile(r"([+-]?)([0-9]{0,40})\.([0-9]{0,40})\\overline\{([0-9]{1,40})\}")

WORDS = {"right": 1.0, "wrong": 0.0, "unreadable": 0.0}
"""Scores by what the judge says."""


class MathOptions(LimitedOptions):
    extract: Literal["boxed", "last"] = "boxed"
    r"""`boxed`: only the last `\boxed{}` is an answer; `last`: where there is none, the last number or formula is."""


class Number(NamedTuple):
    """A number that can be compared exactly."""

    value: Fraction
    rounded: bool
    """Written as a decimal, so perhaps rounded: unequal is then for math-verify to decide."""
    latex: str
    """The same number as math-verify reads it."""


def score(text: str, *, prompt: str, answer: JsonValue, options: MathOptions, tools: Tools) -> Verdict:
    """1 for an answer equal to the gold one, 0 for another or none."""
    gold = gold_text(answer)
    if gold is None:
        return Verdict(None, Outcome.UNVERIFIABLE, f"the answer must be a number, or a text of at most {LONGEST} characters")
    visible = after_thinking(text, prompt)
    found = last_boxed(visible)
    if found is None and options.extract == "last":
        found = last_expression(visible)
    found = found and tidy(found)
    if not found:
        return Verdict(0.0, detail="no answer")
    right = equal(gold, found)
    if right is not None:
        return Verdict(float(right), detail=f"answer {shown(found)}")
    word = tools.ask("math", [_readable(gold), _readable(found)])
    if word == "unverifiable":
        raise Unjudged(Outcome.UNVERIFIABLE, f"math-verify cannot read the gold answer {shown(gold)}")
    return Verdict(WORDS[str(word)], detail=f"answer {shown(found)}{' is no expression' if word == 'unreadable' else ''}")


def gold_text(answer: JsonValue) -> str | None:
    r"""The gold answer as text: what stands in its last `\boxed{}` or after its last `####` (MATH, GSM8K), else all of it. None for other values.

    Of a record with an `answer`, such as reasoning-gym's, that is taken.
    """
    if isinstance(answer, dict):
        answer = answer.get("answer")
    if isinstance(answer, str):
        boxed = last_boxed(answer)
        text = tidy(answer.rpartition("####")[2] if boxed is None else boxed)
    elif isinstance(answer, float) and answer - answer == 0:  # finite
        text = format(Decimal(repr(answer)), "f")
    elif isinstance(answer, int) and not isinstance(answer, bool) and abs(answer) < 10**400:
        text = str(answer)
    else:
        return None
    return text if 0 < len(text) <= LONGEST else None


def gold(answer: JsonValue, options: MathOptions) -> str | None:
    r"""The gold answer in a box. One that is no plain number gets a `\!`, which means nothing but makes it another text: math-verify must read it."""
    text = gold_text(answer)
    if text is None:
        return None
    return rf"\boxed{{{text}}}" if number(text) else rf"\boxed{{\!{text}}}"


def tidy(text: str) -> str:
    """Without the dollar signs, full stop and spaces around it that belong to the sentence."""
    text = " ".join(text.split()).removesuffix(".").strip()
    return text[1:-1].strip().removesuffix(".") if len(text) > 2 and text[0] == text[-1] == "$" else text


def equal(gold: str, answer: str) -> bool | None:
    """True and False where exact arithmetic, or the texts being the same, settles it; None where math-verify must decide."""
    if gold == answer:
        return True
    a, b = number(gold), number(answer)
    if a is None or b is None:
        return None
    if a.value == b.value:
        return True
    return None if a.rounded or b.rounded else False


def number(text: str) -> Number | None:
    """The number that a text is, if it is one of the forms that can be compared exactly."""
    if INTEGER.fullmatch(text):
        return _number(Fraction(int(text.replace(",", ""))))
    if DECIMAL.fullmatch(text):
        return _decimal(text.replace(",", ""))
    if match := SCIENTIFIC.fullmatch(text):
        return _decimal(f"{match[1]}e{match[2] or match[3]}")
    if match := FRACTION.fullmatch(text) or SLASH.fullmatch(text):
        below = int(match[3])
        return _number(_signed(match[1], Fraction(int(match[2]), below))) if below else None
    if match := REPEATING.fullmatch(text):
        sign, whole, start, period = match.groups()
        # sum of the geometric series of the period, which begins after the digits of `start`
        value = Fraction(int(whole + start or 0)) + Fraction(int(period), 10 ** len(period) - 1)
        return _number(_signed(sign, value / 10 ** len(start)))
    return None


def _number(value: Fraction) -> Number:
    latex = str(value.numerator) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    return Number(value, rounded=False, latex=latex)


def _decimal(text: str) -> Number:
    value = Decimal(text)
    return Number(Fraction(value), rounded=True, latex=format(value, "f"))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _readable(text: str) -> str:
    """The text in the form that math-verify reads without mistakes, where there is one."""
    exact = number(text)
    return text if exact is None else exact.latex


ORDINARY = (
    (r"\frac{1}{2}", r"0.5x+\sqrt{2}"), ("x^2-1=0", "(x-1)(x+1)=0"), ("(1,2)", r"\{1,2\}"), (r"\frac{3\pi}{4}", r"2\sqrt{3}"),
    ("[0,1)", r"(-\infty,5]"), ("x=5", "3i+4"), ("e^{2}", r"\frac{x+1}{2}"), (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "-3"),
)  # fmt: skip
"""Shapes of answers that workers know from their first request on."""


def _warm() -> None:
    import logging

    from reward_server.verifiers import latex_predictions

    logging.disable(logging.CRITICAL)  # math-verify warns that its time-outs are off
    latex_predictions.remember()
    for gold, answer in ORDINARY:
        _decide([gold, answer])


@lru_cache(256)
def _parsed(text: str) -> list[Any]:
    """math-verify's reading of a boxed text: [expression, text], or [text] alone when it is no expression."""
    from math_verify import LatexExtractionConfig, parse

    # without the plain-number extractor, which takes the 0 out of what it cannot read
    return parse(f"\\boxed{{{text}}}", extraction_config=(LatexExtractionConfig(),), parsing_timeout=None)


def _decide(request: list[str]) -> JsonValue:
    """[gold, answer] -> right, wrong, unreadable (the answer is no expression) or unverifiable (the gold one is not). Runs in a worker only."""
    from math_verify import verify

    gold, answer = request
    if all(isinstance(reading, str) for reading in _parsed(gold)):
        return "unverifiable"
    reading = _parsed(answer)
    if verify(_parsed(gold), reading, timeout_seconds=None):
        return "right"
    return "unreadable" if all(isinstance(part, str) for part in reading) else "wrong"


JUDGE = Judge(warm=_warm, decide=_decide, seconds=1.0)
