r"""`format`: the completion matches a regular expression as a whole, or its visible part has exactly one complete `\boxed{}`."""

from __future__ import annotations

from pydantic import JsonValue, model_validator

from reward_server.verifiers.extract import after_thinking, boxes, last_boxed
from reward_server.verifiers.patterns import PatternText, compiled, found
from reward_server.verifiers.verdict import LimitedOptions, Tools, Verdict


class FormatOptions(LimitedOptions):
    pattern: PatternText = None
    """Regular expression that the whole completion must match; `.` matches line breaks too."""
    boxed: bool = False
    r"""Exactly one complete `\boxed{}` after the thinking part."""

    @model_validator(mode="after")
    def _one(self) -> FormatOptions:
        if (self.pattern is None) != self.boxed:
            raise ValueError("give either a pattern or boxed = true")
        return self


def score(text: str, *, prompt: str, answer: JsonValue, options: FormatOptions, tools: Tools) -> Verdict:
    """1 when the completion has the format, else 0."""
    if options.pattern is None:
        visible = after_thinking(text, prompt)
        return Verdict(float(boxes(visible) == 1 and last_boxed(visible) is not None), detail=f"{boxes(visible)} boxes")
    match = found(compiled(options.pattern), text, how="whole")
    return Verdict(float(match is not None), detail="matches" if match else "does not match")
