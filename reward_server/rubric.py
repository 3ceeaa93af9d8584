"""A rubric: the reward of a completion is the weighted sum of its verifiers' scores, with the breakdown kept."""

from __future__ import annotations

import logging
import math
import time
from typing import NamedTuple

from pydantic import JsonValue

from reward_server.verifiers import VERIFIERS, check_options
from reward_server.verifiers.verdict import Ask, LimitedOptions, Options, Unjudged, Verdict
from reward_server.verifiers.verdict import Score as ScoreFunction
from services.contracts.messages import Outcome, Part, Score
from services.contracts.spec import Verifier

log = logging.getLogger(__name__)


class _Item(NamedTuple):
    spec: Verifier
    options: Options
    score: ScoreFunction


class Rubric:
    """Scores completions; safe to use from several threads. Raises ValueError when a verifier or its options do not exist."""

    def __init__(self, verifiers: tuple[Verifier, ...], ask: Ask) -> None:
        """`ask` is `JudgePools.ask`."""
        self._ask = ask
        self._items = tuple(_Item(v, check_options(v.name, v.options), VERIFIERS[v.name].score) for v in verifiers)

    def score(self, text: str, *, prompt: str, answer: JsonValue) -> Score:
        """The reward: None as soon as one verifier could not judge, never 0 in its place. Bad model output never raises."""
        began = time.monotonic()
        parts = tuple(self._part(item, text, prompt, answer) for item in self._items)
        reward = None
        if all(part.score is not None for part in parts):
            reward = math.fsum(part.weight * part.score for part in parts if part.score is not None)
        return Score(reward=reward, parts=parts, seconds=time.monotonic() - began)

    def _part(self, item: _Item, text: str, prompt: str, answer: JsonValue) -> Part:
        try:
            verdict = item.score(text, prompt=prompt, answer=answer, options=item.options, ask=self._ask)
        except Unjudged as reason:
            verdict = _failed(reason, item.options)
        except Exception as wrong:  # a fault of ours: counted by its outcome, and its group is tried again
            log.exception("the verifier %s raised", item.spec.name)
            verdict = Verdict(None, Outcome.ERROR, f"{type(wrong).__name__} in the verifier")
        return Part(verifier=item.spec.name, weight=item.spec.weight, score=verdict.score, outcome=verdict.outcome, detail=verdict.detail)


def _failed(reason: Unjudged, options: Options) -> Verdict:
    """No score, save where the options give one to what ran out of time or memory."""
    limited = reason.outcome in (Outcome.TIMEOUT, Outcome.LIMIT) and isinstance(options, LimitedOptions)
    return Verdict(options.timeout_score if limited and isinstance(options, LimitedOptions) else None, reason.outcome, reason.detail)
