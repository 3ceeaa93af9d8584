"""Regular expressions of users, under a limit of time."""

from __future__ import annotations

from collections import deque
from typing import Annotated, Literal

import regex
from pydantic import AfterValidator

from reward_server.verifiers.verdict import Unjudged
from services.contracts.messages import Outcome

SECONDS = 0.25
"""Time of one match, as the library counts it: of the processor, for all threads of the server together. A pattern that backtracks without end runs
into it, and gives way to other threads meanwhile."""
LONGEST = 10_000
"""Characters of the longest pattern."""


def compiled(pattern: str, *, ignore_case: bool = False) -> regex.Pattern[str]:
    """`.` matches line breaks too. Raises ValueError."""
    if len(pattern) > LONGEST:
        raise ValueError(f"longer than {LONGEST} characters")
    try:
        return regex.compile(pattern, regex.DOTALL | (regex.IGNORECASE if ignore_case else 0))
    except (regex.error, RecursionError, OverflowError) as wrong:
        raise ValueError(f"not a regular expression: {wrong}") from wrong


def found(pattern: regex.Pattern[str], text: str, *, how: Literal["whole", "search", "last"]) -> regex.Match[str] | None:
    """A match of all of the text, the first in it, or the last. Raises Unjudged when it takes too long."""
    try:
        # regex without concurrent=True keeps the interpreter's lock, and a slow pattern would stop every thread of the server
        if how == "whole":
            return pattern.fullmatch(text, timeout=SECONDS, concurrent=True)
        if how == "search":
            return pattern.search(text, timeout=SECONDS, concurrent=True)
        last = deque(pattern.finditer(text, timeout=SECONDS, concurrent=True), maxlen=1)
        return last[0] if last else None
    except TimeoutError as late:
        raise Unjudged(Outcome.TIMEOUT, f"the pattern took more than {SECONDS} s") from late


def _compiles(pattern: str | None) -> str | None:
    if pattern is not None:
        compiled(pattern)
    return pattern


PatternText = Annotated[str | None, AfterValidator(_compiles)]
