"""`sum_to_target`: the whole completion is digits 1 to 9 joined by `+`, and they add up to the answer."""

from __future__ import annotations

import re

from pydantic import JsonValue

from reward_server.verifiers.verdict import Options, Tools, Verdict
from services.contracts.messages import Outcome

SUM = re.compile(r"[1-9](?:\+[1-9])*")
TARGET = re.compile(r"[0-9]{1,18}")


class SumOptions(Options):
    pass


def score(text: str, *, prompt: str, answer: JsonValue, options: SumOptions, tools: Tools) -> Verdict:
    """1 for a well-formed sum that equals the answer, else 0. The answer is a whole number, or its digits."""
    target = _target(answer)
    if target is None:
        return Verdict(None, Outcome.UNVERIFIABLE, "the answer must be a whole number")
    if not SUM.fullmatch(text):
        return Verdict(0.0, detail="not a sum of digits 1-9")
    total = sum(map(int, text[::2]))
    return Verdict(float(total == target), detail=f"sum {total}, target {target}")


def gold(answer: JsonValue, options: SumOptions) -> str | None:
    """Nines and a rest."""
    target = _target(answer)
    if target is None or not 1 <= target <= 100_000:
        return None
    nines, rest = divmod(target, 9)
    return "+".join(["9"] * nines + [str(rest)] * (rest > 0))


def _target(answer: JsonValue) -> int | None:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if abs(answer) < 10**18 else None
    return int(answer) if isinstance(answer, str) and TARGET.fullmatch(answer) else None
