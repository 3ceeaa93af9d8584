"""`exact`: the completion is the answer, letter by letter."""

from __future__ import annotations

from pydantic import JsonValue

from reward_server.verifiers.verdict import Ask, Options, Verdict
from services.contracts.messages import Outcome


class ExactOptions(Options):
    strip: bool = True
    """White space around completion and answer does not count."""
    ignore_case: bool = False
    """Upper and lower case are the same."""


def score(text: str, *, prompt: str, answer: JsonValue, options: ExactOptions, ask: Ask) -> Verdict:
    """1 when the completion equals the answer, a text or a number, else 0."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return Verdict(None, Outcome.UNVERIFIABLE, "the answer must be a text or a number")
    written = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)  # a column of numbers makes 68 a 68.0
    given, wanted = (_plain(one, options) for one in (text, written))
    return Verdict(float(given == wanted), detail="equal" if given == wanted else "not equal")


def _plain(text: str, options: ExactOptions) -> str:
    text = text.strip() if options.strip else text
    return text.casefold() if options.ignore_case else text
