"""Is what came out what was wanted? Pure functions of plain data, with Python's own notion of equality."""

from __future__ import annotations

import math
import re
from typing import Any

NUMBER = re.compile(r"[+-]?(?:[0-9]{1,400}(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,4})?")


def same(got: Any, wanted: Any, *, tolerance: float = 0.0, tuples_are_lists: bool = False) -> bool:
    """As `==` says, with these exceptions: NaN equals NaN, numbers may differ by the tolerance, and a tuple equals a list if so asked.

    As in Python, 1, 1.0 and True are equal, dictionaries have no order, a set is no list. Nested too deep to be compared is not the same.
    """
    try:
        return _same(got, wanted, tolerance, tuples_are_lists)
    except RecursionError:
        return False


def same_output(got: str, wanted: str, *, tolerance: float = 0.0) -> bool:
    """Line by line, without white space at the ends of lines and empty lines at the end; with a tolerance also word by word, numbers being close."""
    if _lines(got) == _lines(wanted):
        return True
    if not tolerance:
        return False
    left, right = got.split(), wanted.split()
    return len(left) == len(right) and all(a == b or _close_words(a, b, tolerance) for a, b in zip(left, right, strict=True))


def _same(got: Any, wanted: Any, tolerance: float, loose: bool) -> bool:
    if isinstance(got, int | float) and isinstance(wanted, int | float):
        return got == wanted or (got != got and wanted != wanted) or (tolerance > 0 and _close(got, wanted, tolerance))
    if isinstance(got, list | tuple) and isinstance(wanted, list | tuple):
        alike = loose or isinstance(got, tuple) == isinstance(wanted, tuple)
        return alike and len(got) == len(wanted) and all(_same(a, b, tolerance, loose) for a, b in zip(got, wanted, strict=True))
    if isinstance(got, dict) and isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(_same(got[key], wanted[key], tolerance, loose) for key in wanted)
    return bool(got == wanted)


def _close(a: float, b: float, tolerance: float) -> bool:
    try:
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # an int that no float can hold, beside a float
        return False


def _close_words(a: str, b: str, tolerance: float) -> bool:
    return NUMBER.fullmatch(a) is not None and NUMBER.fullmatch(b) is not None and _close(float(a), float(b), tolerance)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
