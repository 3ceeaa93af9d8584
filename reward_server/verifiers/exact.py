"""`exact`: the completion is the answer, letter by letter."""

from __future__ import annotations

from pydantic import JsonValue

from reward_server.verifiers.verdict import Options, Tools, Verdict
from services.contracts.messages import Outcome


class ExactOptions(Options):
    strip: bool = True
    """White space around completion and answer does not count."""
    ignore_case: bool = False
    """Upper and lower case are the same."""


def score(text: str, *, prompt: str, answer: JsonValue, options: ExactOptions, tools: Tools) -> Verdict:
    """1 when the completion equals the answer, a text or a number, else 0."""
    written = _written(answer)
    if written is None:
        return Verdict(None, Outcome.UNVERIFIABLE, "the answer must be a text or a number")
    given, wanted = (_plain(one, options) for one in (text, written))
    return Verdict(float(given == wanted), detail="equal" if given == wanted else "not equal")


def gold(answer: JsonValue, options: ExactOptions) -> str | None:
    """The answer itself."""
    return _written(answer)


def _written(answer: JsonValue) -> str | None:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)  # a column of numbers makes 68 a 68.0


def _plain(text: str, options: ExactOptions) -> str:
    text = text.strip() if options.strip else text
    return text.casefold() if options.ignore_case else text
