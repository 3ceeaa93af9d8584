r"""`format`: the completion matches a regular expression as a whole, or its visible part has exactly one complete `\boxed{}`."""

from __future__ import annotations

import regex
from pydantic import JsonValue, field_validator, model_validator

from reward_server.verifiers.extract import after_thinking, boxes, last_boxed
from reward_server.verifiers.verdict import Ask, LimitedOptions, Unjudged, Verdict
from services.contracts.messages import Outcome

SECONDS = 0.25
"""Wall time of one match. A pattern that backtracks without end runs into it, and gives way to other threads meanwhile."""


class FormatOptions(LimitedOptions):
    pattern: str | None = None
    """Regular expression that the whole completion must match; `.` matches line breaks too."""
    boxed: bool = False
    r"""Exactly one complete `\boxed{}` after the thinking part."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                regex.compile(pattern, regex.DOTALL)
            except regex.error as wrong:
                raise ValueError(f"not a regular expression: {wrong}") from wrong
        return pattern

    @model_validator(mode="after")
    def _one(self) -> FormatOptions:
        if (self.pattern is None) != self.boxed:
            raise ValueError("give either a pattern or boxed = true")
        return self


def score(text: str, *, prompt: str, answer: JsonValue, options: FormatOptions, ask: Ask) -> Verdict:
    """1 when the completion has the format, else 0."""
    if options.pattern is None:
        visible = after_thinking(text, prompt)
        return Verdict(float(boxes(visible) == 1 and last_boxed(visible) is not None), detail=f"{boxes(visible)} boxes")
    try:
        # regex without concurrent=True keeps the interpreter's lock, and a slow pattern would stop every thread of the server
        match = regex.compile(options.pattern, regex.DOTALL).fullmatch(text, timeout=SECONDS, concurrent=True)
    except TimeoutError as late:
        raise Unjudged(Outcome.TIMEOUT, f"the pattern took more than {SECONDS} s") from late
    return Verdict(float(match is not None), detail="matches" if match else "does not match")
