"""math-verify's parser reads the same with remembered choices as without: in processes of their own, since remembering lasts as long as they."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator, Sequence

from reward_server.verifiers import latex_predictions
from reward_server.verifiers.math_decisions import DECISIONS


def expressions(draw: random.Random, count: int) -> Iterator[str]:
    """Answers, of few shapes and many numbers, some of them broken."""
    leaves = (
        lambda: str(draw.randrange(2000)),
        lambda: draw.choice("xyzn"),
        lambda: rf"\sqrt{{{draw.randrange(99)}}}",
        lambda: r"\pi",
        lambda: "2.5",
    )

    def term(depth: int) -> str:
        if depth == 0:
            return draw.choice(leaves)()
        a, b = term(depth - 1), term(depth - 1)
        return draw.choice(
            (f"{a}+{b}", f"{a}-{b}", rf"\frac{{{a}}}{{{b}}}", f"{{{a}}}^{{{draw.randrange(2, 6)}}}", f"{a}{b}", rf"{a} \cdot {b}",
             f"({a},{b})", f"[{a},{b})", f"{a},{b}", f"{a}={b}", rf"\{{{a},{b}\}}", rf"\sin({a})", f"x_{{{a}}}", rf"{a}\%", f"|{a}|",
             rf"{a} \leq {b}", rf"\left({a}\right)", rf"({a},{b}) \cup [{b},\infty)", rf"\begin{{pmatrix}} {a} \\ {b} \end{{pmatrix}}", f"{a}+",
             f"({a}", rf"{a} \text{{ and }} {b}", f"{a} ? {b}")
        )  # fmt: skip

    for _ in range(count):
        yield term(draw.choice((0, 1, 1, 2)))


def readings(texts: Sequence[str]) -> list[str]:
    from latex2sympy2_extended import latex2sympy2

    found = []
    for text in texts:
        try:
            found.append(repr(latex2sympy2.latex2sympy(text)))
        except Exception as wrong:  # the same complaint is expected of both
            found.append(f"{type(wrong).__name__}: {wrong}")
    return found


def test_no_reading_changes() -> None:
    texts = [*(text for row in DECISIONS for text in (row.gold, row.answer)), *expressions(random.Random(0), 250)]
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as plain, spawn.Pool(1, latex_predictions.remember) as remembering:
        without = plain.apply_async(readings, [texts])
        once, again = (remembering.apply(readings, [texts]) for _ in range(2))
        expected = without.get()
    assert sum(not text.startswith("Exception") for text in expected) > 150, "most are expressions"
    assert once == expected
    assert again == expected
