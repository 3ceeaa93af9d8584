"""What a verifier is: a function of a completion and its gold answer, with its options, that gives a verdict or raises Unjudged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from services.contracts.messages import Outcome

SHOWN = 60
"""Characters of model output that a detail quotes."""


class Verdict(NamedTuple):
    """What a verifier says of one completion."""

    score: float | None
    """None when it could not be judged: never 0 in its place."""
    outcome: Outcome = Outcome.OK
    detail: str = ""
    cause: str = ""
    """Of a limit: which; of an error: where."""
    tier: str = ""
    """Confinement under which the completion's code was run, if it was."""


class Unjudged(Exception):
    """The completion could not be judged; `outcome` and `cause` say why. It is no verdict on the answer."""

    def __init__(self, outcome: Outcome, detail: str, *, cause: str = "", tier: str = "") -> None:
        super().__init__(detail)
        self.outcome, self.detail, self.cause, self.tier = outcome, detail, cause, tier


class Options(BaseModel):
    """Arguments of a verifier, as a run's spec gives them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LimitedOptions(Options):
    """Arguments of a verifier that works under limits of time and memory."""

    timeout_score: float | None = Field(None, allow_inf_nan=False)
    """Score of an answer that cannot be judged within the limits of time and memory. By default there is none: the completion has no reward, and its
    group is tried again. Set it (to 0, say) where a policy learns to write such answers."""


Ask = Callable[[str, JsonValue], JsonValue]
"""Puts a request to the judge of that name, in a process that can be killed. Raises Unjudged."""


class Score(Protocol):
    """A verifier's function. `ask` is how it reaches its judge, if it has one."""

    def __call__(self, text: str, *, prompt: str, answer: JsonValue, options: Any, ask: Ask) -> Verdict: ...


class Judge(NamedTuple):
    """The part of a verifier that may hang or grow, and so runs in worker processes only."""

    warm: Callable[[], None]
    """Imports what judging needs, once, in the process from which the workers are forked."""
    decide: Callable[[Any], JsonValue]
    seconds: float
    """Wall time of one decision, after which the kernel kills the worker."""


class Verifier(NamedTuple):
    """An entry of the registry."""

    options: type[Options]
    score: Score
    judge: Judge | None = None


def shown(text: str) -> str:
    """The beginning of a piece of model output, quoted, in ASCII: fit for a message, a log and a terminal whatever is in it."""
    return ascii(text if len(text) <= SHOWN else text[:SHOWN] + "...")
