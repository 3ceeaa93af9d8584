"""Python functions of one number, each of which can be asked for by some of its values and tested by more of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pydantic import JsonValue

SHOWN = (2, 9, 13)
"""Arguments whose values are told: they tell all forms with constants of 2 to 12 apart."""
HIDDEN = (0, 4, 25)
"""Arguments whose values are only tested: a function that looks the told ones up fails."""
CONSTANTS = range(2, 10)

FORMS: dict[str, Callable[[int, int], int]] = {
    "x+{a}": operator.add,
    "{a}-x": lambda x, a: a - x,
    "x*{a}": operator.mul,
    "x*x+{a}": lambda x, a: x * x + a,
    "x%{a}": operator.mod,
    "max(x,{a})": max,
    "min(x,{a})": min,
    "abs(x-{a})": lambda x, a: abs(x - a),
}
"""Expressions with one constant, and what each is of x and the constant."""


@dataclass(frozen=True)
class Function:
    """A form with its constant."""

    form: str
    constant: int

    @property
    def values(self) -> tuple[int, ...]:
        """At all arguments that are tested."""
        return tuple(FORMS[self.form](x, self.constant) for x in (*SHOWN, *HIDDEN))

    @property
    def prompt(self) -> str:
        """Such as "f(2)=5 f(9)=12 f(13)=16:"."""
        return " ".join(f"f({x})={value}" for x, value in zip(SHOWN, self.values, strict=False)) + ":"

    @property
    def expression(self) -> str:
        """Such as "x+3"."""
        return self.form.format(a=self.constant)

    @property
    def solution(self) -> str:
        """Such as "def f(x): return x+3"."""
        return f"def f(x): return {self.expression}"

    @property
    def record(self) -> dict[str, JsonValue]:
        """What the verifier `code` takes."""
        calls: list[JsonValue] = [{"args": [x], "expected": value} for x, value in zip((*SHOWN, *HIDDEN), self.values, strict=True)]
        return {"function": "f", "calls": calls, "solution": self.solution}


def family(constants: Iterable[int] = CONSTANTS) -> tuple[Function, ...]:
    """Every form with each of these constants."""
    return tuple(Function(form, constant) for form in FORMS for constant in constants)
