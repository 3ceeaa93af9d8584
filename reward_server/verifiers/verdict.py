"""What a verifier is: a function of a completion and its gold answer, with its options, that gives a verdict or raises Unjudged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from reward_server.sandbox.jobs import Sandbox
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


def _no_sandbox() -> Sandbox:
    raise Unjudged(Outcome.ERROR, "this reward server has no sandbox", cause="sandbox")


def _no_post(url: str, body: bytes, *, seconds: float, attempts: int) -> bytes:
    raise Unjudged(Outcome.ERROR, "this reward server asks no other services", cause="remote")


class Post(Protocol):
    """POSTs a JSON document to a user's own service, and gives what it replies. Raises Unjudged."""

    def __call__(self, url: str, body: bytes, *, seconds: float, attempts: int) -> bytes: ...


@dataclass(frozen=True)
class Tools:
    """What a reward server lends to its verifiers."""

    ask: Ask
    sandbox: Callable[[], Sandbox] = _no_sandbox
    """Where untrusted code is run. Raises Unjudged when it cannot be anywhere."""
    post: Post = _no_post


class Score(Protocol):
    """A verifier's function."""

    def __call__(self, text: str, *, prompt: str, answer: JsonValue, options: Any, tools: Tools) -> Verdict: ...


class Judge(NamedTuple):
    """The part of a verifier that may hang or grow, and so runs in worker processes only."""

    warm: Callable[[], None]
    """Imports what judging needs, once, in the process from which the workers are forked."""
    decide: Callable[[Any], JsonValue]
    seconds: float
    """Processor time of one decision, after which the kernel kills the worker; it has some times that of wall time."""
    patience: float = 0.0
    """Seconds after which a decision is taken for a slow one, if more than usual. The worker of a slow one gives its place up and is not used again,
    and a first decision may have to load what the later ones use."""


class Example(NamedTuple):
    """A completion with its answer and what comes out; the documentation shows them, and a test runs them."""

    completion: str
    answer: JsonValue
    score: float | None
    options: Mapping[str, JsonValue] = MappingProxyType({})
    prompt: str = ""


class Verifier(NamedTuple):
    """An entry of the registry."""

    text: str
    """What it verifies, in a sentence."""
    options: type[Options]
    score: Score
    examples: tuple[Example, ...]
    judge: Judge | None = None
    gold: Callable[[JsonValue, Any], str | None] | None = None
    """The completion that gives this gold answer as the options want it, or None for an answer of which none can be known: data sets are checked with
    it. None: of this verifier's answers none ever can."""
    needs: str = ""
    """What its examples cannot be run without, beside this package: the sandbox, an optional package, a service of the user's."""

    @property
    def checks_gold(self) -> bool:
        """Its gold answers can be judged here alone: as completions where `gold` makes such, else whether they make sense at all."""
        return self.gold is not None or self.needs in ("", "sandbox")

    @property
    def cheap(self) -> bool:
        """Judged at once, in this process."""
        return self.judge is None and not self.needs


def valid(text: str) -> str:
    """The text as messages can carry it: halves of surrogate pairs are escaped."""
    return text.encode(errors="backslashreplace").decode()


def shown(text: str) -> str:
    """The beginning of a piece of model output, quoted, in ASCII: fit for a message, a log and a terminal whatever is in it."""
    return ascii(text if len(text) <= SHOWN else text[:SHOWN] + "...")
