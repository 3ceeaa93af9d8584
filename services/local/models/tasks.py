"""The tasks that the tiny models are warmed up on. Half of the lines are wrong on purpose, so that a model knows the form and is right now and then:
what reinforcement learning needs to begin.

    sum_to_target    "17=" asks for digits 1-9 joined by "+" whose sum is 17 ("4+9+4"). It has very many right answers, so a policy can learn it
                     without losing its entropy.
    addition         "23+45=" asks for 68. It has one right answer: to learn it is to lose entropy.
    functions        "f(2)=5 f(9)=12 f(13)=16:" asks for a Python function such as "def f(x): return x+3". Its reward comes from running it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.control_plane.data.functions import CONSTANTS, FORMS, Function, family

TARGETS = range(8, 41)
"""Targets that sum_to_target trains on by default; the model is measured on them."""
MAX_TERMS = 7
ANSWER = re.compile(r"[1-9](\+[1-9])*")
OPERANDS = 30
"""Operands of `addition` are below this."""


@dataclass(frozen=True)
class Task:
    """What a tiny model is made for."""

    name: str
    line: Callable[[random.Random, float], str]
    """A line of the warm start: prompt and answer, wrong with the probability given."""
    measured: tuple[tuple[str, Any], ...]
    """Prompts, each with what it asks for, on which a model is measured."""
    is_right: Callable[[str, Any], bool]
    lines: str
    """What the lines are, in words."""
    longest: int = 16
    """Tokens that an answer may take."""


def expression(rng: random.Random, mislabelled: float) -> str:
    """A line such as "17=4+9+4": 2 to 7 digits, and, with probability `mislabelled`, a target moved by U{-4..4}."""
    digits = [rng.randint(1, 9) for _ in range(rng.randint(2, MAX_TERMS))]
    target = sum(digits)
    if rng.random() < mislabelled:
        target = max(2, target + rng.randint(-4, 4))
    return f"{target:02d}={'+'.join(map(str, digits))}"


def is_sum(text: str, target: int) -> bool:
    """Whether `text` is digits 1-9 joined by "+" that sum to `target`."""
    return ANSWER.fullmatch(text) is not None and sum(map(int, text.split("+"))) == target


def addition(rng: random.Random, mislabelled: float) -> str:
    """A line such as "23+45=68", its answer, with probability `mislabelled`, moved by U{-4..4}."""
    a, b = rng.randrange(OPERANDS), rng.randrange(OPERANDS)
    answer = a + b
    if rng.random() < mislabelled:
        answer = max(0, answer + rng.randint(-4, 4))
    return f"{a:02d}+{b:02d}={answer}"


def _measured_additions() -> tuple[tuple[str, int], ...]:
    rng = random.Random(0)
    pairs = [(rng.randrange(OPERANDS), rng.randrange(OPERANDS)) for _ in range(32)]
    return tuple((f"{a:02d}+{b:02d}=", a + b) for a, b in pairs)


def function(rng: random.Random, mislabelled: float) -> str:
    """A line such as "f(2)=5 f(9)=12 f(13)=16:def f(x): return x+3", its constant, with probability `mislabelled`, moved by U{-4..4}."""
    asked = Function(rng.choice(list(FORMS)), rng.choice(CONSTANTS))
    constant = asked.constant
    if rng.random() < mislabelled:
        constant = max(1, constant + rng.randint(-4, 4))
    return asked.prompt + Function(asked.form, constant).solution


def is_function(text: str, asked: Function) -> bool:
    """Whether `text` is a line of `function`, of whatever form, with the values that are asked for. Nothing is run to find out."""
    return any(one.solution == text and one.values == asked.values for one in family(range(1, CONSTANTS.stop + 4)))


TASKS: dict[str, Task] = {
    "sum_to_target": Task(
        "sum_to_target", expression, tuple((f"{target:02d}=", target) for target in TARGETS), is_sum,
        f"`17=4+9+4`: 2 to {MAX_TERMS} digits 1-9, of which a share stands under a wrong target",
    ),
    "addition": Task(
        "addition", addition, _measured_additions(), lambda text, answer: text == str(answer),
        "`23+45=68`: two numbers of two digits, of which a share has a wrong sum",
    ),
    "functions": Task(
        "functions", function, tuple((one.prompt, one) for one in family((3, 8))), is_function,
        "`f(2)=5 f(9)=12 f(13)=16:def f(x): return x+3`: values and a function, of which a share has a wrong constant", longest=32,
    ),
}  # fmt: skip
