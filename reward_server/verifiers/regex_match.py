"""`regex`: a regular expression is found in the completion, or what it captures is the answer."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue, model_validator

from reward_server.verifiers.extract import after_thinking
from reward_server.verifiers.patterns import PatternText, compiled, found
from reward_server.verifiers.verdict import LimitedOptions, Tools, Verdict, shown
from services.contracts.messages import Outcome


class RegexOptions(LimitedOptions):
    pattern: PatternText = None
    """The regular expression; `.` matches line breaks too. By default the answer is the pattern."""
    match: Literal["search", "whole"] = "search"
    """Somewhere in the text, or all of it."""
    captures_answer: bool = False
    """The first group of the last match must be the answer, but for white space around it. Needs `pattern`."""
    ignore_case: bool = False
    """Upper and lower case are the same."""
    thinking: bool = False
    """The thinking part is looked at too."""

    @model_validator(mode="after")
    def _has_group(self) -> RegexOptions:
        if self.captures_answer and (self.pattern is None or compiled(self.pattern).groups < 1):
            raise ValueError("captures_answer needs a pattern with a group, such as 'answer: (.+)'")
        return self


def score(text: str, *, prompt: str, answer: JsonValue, options: RegexOptions, tools: Tools) -> Verdict:
    """1 or 0."""
    pattern = answer if options.pattern is None else options.pattern
    wanted = str(answer) if isinstance(answer, int | float) and not isinstance(answer, bool) else answer
    if not isinstance(pattern, str) or (options.captures_answer and not isinstance(wanted, str)):
        return Verdict(None, Outcome.UNVERIFIABLE, "the answer must be a text")
    try:
        expression = compiled(pattern, ignore_case=options.ignore_case)
    except ValueError as wrong:
        return Verdict(None, Outcome.UNVERIFIABLE, f"the answer is {wrong}")
    visible = text if options.thinking else after_thinking(text, prompt)
    if not options.captures_answer:
        match = found(expression, visible, how=options.match)
        return Verdict(float(match is not None), detail="matches" if match else "does not match")
    match = found(expression, visible, how="whole" if options.match == "whole" else "last")
    if match is None or match[1] is None:
        return Verdict(0.0, detail="does not match")
    given = match[1].strip()
    right = _plain(given, options) == _plain(str(wanted).strip(), options)
    return Verdict(float(right), detail=f"captures {shown(given)}")


def _plain(text: str, options: RegexOptions) -> str:
    return text.casefold() if options.ignore_case else text
