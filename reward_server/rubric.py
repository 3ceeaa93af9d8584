"""A rubric: the reward of a completion is the weighted sum of its verifiers' scores, with the breakdown kept.

A part's score is held within its own `least` and `most`, the reward within the rubric's. A part whose score is below its gate decides alone: the
reward is its `gate_reward`, and what was not judged by then never is, so gates come first, the cheap ones before the others.
"""

from __future__ import annotations

import logging
import math
import time
from typing import NamedTuple

from pydantic import JsonValue

from reward_server.verifiers import VERIFIERS, check_options
from reward_server.verifiers.verdict import LimitedOptions, Options, Tools, Unjudged, Verdict, valid
from reward_server.verifiers.verdict import Score as ScoreFunction
from services.contracts.messages import Outcome, Part, Score
from services.contracts.spec import Verifier

log = logging.getLogger(__name__)
LONGEST = 2_000
"""Characters of a detail."""
LARGEST = 1e9
"""Score of a verifier, positive or negative: one beyond is a fault of whoever gave it, and no sum of such overflows."""


class _Item(NamedTuple):
    place: int
    spec: Verifier
    options: Options
    score: ScoreFunction
    cheap: bool

    @property
    def order(self) -> tuple[bool, bool, int]:
        return self.spec.gate is None, not self.cheap, self.place


class Rubric:
    """Scores completions; safe to use from several threads. Raises ValueError when a verifier or its options do not exist."""

    def __init__(self, verifiers: tuple[Verifier, ...], tools: Tools, *, least: float | None = None, most: float | None = None) -> None:
        self._tools, self._least, self._most = tools, least, most
        items = (
            _Item(i, one, check_options(one.name, one.options), VERIFIERS[one.name].score, VERIFIERS[one.name].cheap)
            for i, one in enumerate(verifiers)
        )  # fmt: skip
        self._items = tuple(sorted(items, key=lambda item: item.order))

    def score(self, text: str, *, prompt: str, answer: JsonValue) -> Score:
        """The reward: None as soon as one verifier could not judge and no gate decided, never 0 in its place. Bad model output never raises.

        The parts are in the rubric's order; those that a gate made needless are left out.
        """
        began = time.monotonic()
        parts: dict[int, Part] = {}
        reward: float | None = None
        for item in self._items:
            part = parts[item.place] = self._part(item, text, prompt, answer)
            if item.spec.gate is not None and part.score is not None and part.score < item.spec.gate:
                parts[item.place] = part.model_copy(update={"detail": f"{part.detail}; below its gate: the reward is {item.spec.gate_reward:g}"})
                reward = item.spec.gate_reward
                break
        else:
            if all(part.score is not None for part in parts.values()):
                reward = math.fsum(part.weight * part.score for part in parts.values() if part.score is not None)
        reward = _within(reward, self._least, self._most)
        return Score(reward=reward, parts=tuple(parts[place] for place in sorted(parts)), seconds=time.monotonic() - began)

    def _part(self, item: _Item, text: str, prompt: str, answer: JsonValue) -> Part:
        began = time.monotonic()
        try:
            verdict = item.score(text, prompt=prompt, answer=answer, options=item.options, tools=self._tools)
        except Unjudged as reason:
            verdict = _failed(reason, item.options)
        except Exception as wrong:  # a fault of ours: counted by its outcome, and its group is tried again
            log.exception("the verifier %s raised", item.spec.name)
            verdict = Verdict(None, Outcome.ERROR, f"{type(wrong).__name__} in the verifier", cause="verifier")
        if verdict.score is not None and not abs(verdict.score) <= LARGEST:
            verdict = Verdict(None, Outcome.ERROR, f"the score {verdict.score} is no number within {LARGEST:g}", cause="verifier", tier=verdict.tier)
        spec, score = item.spec, _within(verdict.score, item.spec.least, item.spec.most)
        return Part(
            verifier=spec.name, weight=spec.weight, score=score, outcome=verdict.outcome, cause=verdict.cause, detail=valid(verdict.detail[:LONGEST]),
            tier=verdict.tier, seconds=time.monotonic() - began,
        )  # fmt: skip


def _within(score: float | None, least: float | None, most: float | None) -> float | None:
    if score is None:
        return None
    score = score if least is None else max(score, least)
    return score if most is None else min(score, most)


def _failed(reason: Unjudged, options: Options) -> Verdict:
    """No score, save where the options give one to what ran out of time or memory."""
    limited = reason.outcome in (Outcome.TIMEOUT, Outcome.LIMIT) and isinstance(options, LimitedOptions)
    score = options.timeout_score if limited and isinstance(options, LimitedOptions) else None
    return Verdict(score, reason.outcome, str(reason), reason.cause, reason.tier)
