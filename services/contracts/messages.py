"""Everything that crosses a process boundary on a stream.

Token arrays are packed little-endian bytes with typed properties; no message is ever a pickle.
"""

from __future__ import annotations

import math
import struct
import time
from array import array
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from services.contracts.spec import KvPolicy

SCHEMA = 1
"""Version of the messages' schema. A consumer dead-letters what carries another."""


def pack_ints(values: list[int]) -> bytes:
    """int32, little-endian."""
    return array("i", values).tobytes()


def unpack_ints(packed: bytes) -> list[int]:
    return array("i", packed).tolist()


def pack_floats(values: list[float]) -> bytes:
    """float32, little-endian."""
    return array("f", values).tobytes()


def unpack_floats(packed: bytes) -> list[float]:
    return array("f", packed).tolist()


def pack_halves(values: list[float]) -> bytes:
    """float16, little-endian: three digits, for what is only looked at."""
    return struct.pack(f"<{len(values)}e", *values)


def unpack_halves(packed: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(packed) // 2}e", packed))


class Message(BaseModel):
    """Base of the messages: frozen, no unknown fields, stamped with the schema's version."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    kind: ClassVar[str]
    schema_version: int = Field(SCHEMA, ge=SCHEMA, le=SCHEMA)


class PromptGroup(Message):
    """One prompt to be completed `group_size` times. Dispatcher -> rollout server."""

    kind: ClassVar[str] = "prompt"
    run_id: str
    index: int
    """Place in the run's issue order; with the run's id it names the group."""
    prompt_id: str
    """The prompt's id in its data source."""
    prompt: str
    """The prompt as text, for people and verifiers."""
    prompt_tokens: bytes
    """(T,) int32: what the engine gets."""
    answer: JsonValue = None
    """What the verifiers compare with."""
    group_size: int
    seed: int
    """Completion g is sampled with seed + g."""
    temperature: float
    top_p: float
    max_tokens: int
    max_lag: int
    """Upper bound of the staleness window under which the group was issued."""
    issued_version: int
    issued_at: float = Field(default_factory=time.time)

    @property
    def group_id(self) -> str:
        return group_id(self.run_id, self.index)

    @property
    def prompt_ids(self) -> list[int]:
        return unpack_ints(self.prompt_tokens)


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


class VersionSpan(BaseModel):
    """Tokens [start, end) of a completion were sampled by this policy version."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int
    start: int
    end: int


class Completion(BaseModel):
    """One sampled answer. All arrays have the completion's length T."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    tokens: bytes
    """(T,) int32, the end-of-sequence token included."""
    logprobs: bytes
    """(T,) float32: log-probability of each token under the behaviour policy, at the sampling temperature, in nats."""
    spans: tuple[VersionSpan, ...]
    text: str
    finish: FinishReason

    @model_validator(mode="after")
    def _aligned(self) -> Completion:
        length, rest = divmod(len(self.tokens), 4)
        if rest or not length or len(self.logprobs) != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} bytes of tokens with {len(self.logprobs)} of log-probabilities: not as many of both, or none")
        if [*(span.start for span in self.spans), length] != [0, *(span.end for span in self.spans)]:
            raise ValueError(f"the version spans do not cover the {length} tokens from first to last")
        return self

    @property
    def length(self) -> int:
        """T, without unpacking."""
        return len(self.tokens) // 4

    @property
    def token_ids(self) -> list[int]:
        return unpack_ints(self.tokens)

    @property
    def logprob_values(self) -> list[float]:
        return unpack_floats(self.logprobs)

    @property
    def versions(self) -> list[int]:
        """(T,) policy version of each token."""
        return [span.version for span in self.spans for _ in range(span.end - span.start)]


class CompletionGroup(Message):
    """The completions of one group. Rollout server -> reward server."""

    kind: ClassVar[str] = "completion"
    group: PromptGroup
    completions: tuple[Completion, ...]
    server: str
    """Fleet id of the rollout server."""
    attempt: int
    started_at: float
    finished_at: float = Field(default_factory=time.time)

    @model_validator(mode="after")
    def _whole(self) -> CompletionGroup:
        if not self.completions or len(self.completions) != self.group.group_size:
            raise ValueError(f"{len(self.completions)} completions of a group of {self.group.group_size}")
        return self

    @property
    def start_version(self) -> int:
        return min(span.version for c in self.completions for span in c.spans)

    @property
    def newest_version(self) -> int:
        return max(span.version for c in self.completions for span in c.spans)


class Outcome(StrEnum):
    OK = "ok"
    TIMEOUT = "timeout"
    """The answer could not be judged in time: scored by the rubric's rule for it, and counted apart from wrong answers."""
    LIMIT = "limit"
    ERROR = "error"
    UNVERIFIABLE = "unverifiable"


class Part(BaseModel):
    """What one verifier said of one completion."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    verifier: str
    weight: float
    score: float | None
    outcome: Outcome
    cause: str = ""
    """Of `limit`: which (memory, cpu, output, files, processes); of `error`: where (verifier, sandbox, judge, remote)."""
    detail: str = ""
    tier: str = ""
    """Confinement under which untrusted code was run to find this out; empty when none was run."""
    seconds: float = 0.0

    @property
    def said(self) -> str:
        """The outcome with its cause: `ok`, `timeout`, `limit:memory`, `error:remote`."""
        return f"{self.outcome}:{self.cause}" if self.cause else self.outcome.value


class Score(BaseModel):
    """A completion's reward with its breakdown. `reward` is None when a verifier failed: never 0 in its place."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    reward: float | None
    parts: tuple[Part, ...]
    seconds: float = 0.0


class ScoredGroup(Message):
    """A group with its rewards. Reward server -> trainer."""

    kind: ClassVar[str] = "scored"
    completed: CompletionGroup
    scores: tuple[Score, ...]
    server: str
    scored_at: float = Field(default_factory=time.time)

    @model_validator(mode="after")
    def _judged(self) -> ScoredGroup:
        if len(self.rewards) != len(self.completed.completions):
            raise ValueError(f"{len(self.rewards)} rewards of {len(self.completed.completions)} completions")
        return self

    @property
    def group(self) -> PromptGroup:
        return self.completed.group

    @property
    def rewards(self) -> list[float]:
        return [score.reward for score in self.scores if score.reward is not None]


class VersionPublished(Message):
    """All live rollout servers hold this version. Trainer -> control plane."""

    kind: ClassVar[str] = "version"
    run_id: str
    version: int
    at: float = Field(default_factory=time.time)


class StepRecord(Message):
    """What one version of a run measured. Trainer -> API, reports. Names of `values` are those of the trainer's metrics."""

    kind: ClassVar[str] = "step"
    run_id: str
    version: int
    """Version at which the step's batch was taken."""
    at: float = Field(default_factory=time.time)
    values: dict[str, float]
    lags: dict[int, int]
    """Trained tokens by lag."""
    window: tuple[int, int]
    """Least and greatest lag requested."""
    groups: tuple[int, ...]
    """Indices of the groups trained on."""


class EvaluationRecord(Message):
    """What one version of the policy did on one evaluation set. Control plane -> API, reports."""

    kind: ClassVar[str] = "evaluation"
    run_id: str
    name: str
    """Name of the set."""
    domain: str
    """`in` or `out` of the domain of training."""
    version: int
    at: float = Field(default_factory=time.time)
    prompts: int
    """Prompts that were completed."""
    samples: int
    """Completions of each."""
    temperature: float
    top_p: float
    max_tokens: int
    values: dict[str, float]


class Severity(StrEnum):
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class RunEvent(Message):
    """Something that happened to a run, in a sentence. Every process -> API, UI, reports."""

    kind: ClassVar[str] = "event"
    run_id: str
    event: str
    """Short name from a closed set, such as `knobs_changed` or `server_fenced`."""
    text: str
    severity: Severity = Severity.INFO
    version: int | None = None
    at: float = Field(default_factory=time.time)
    data: dict[str, JsonValue] = {}


class LogLevel(StrEnum):
    """In order, the least first."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


class LogLine(Message):
    """What a process of the fleet logged. Every process -> API, UI. Texts are cut, and secrets of the process are left out."""

    kind: ClassVar[str] = "log"
    at: float
    level: LogLevel
    logger: str
    """Name of the logger: the module that speaks."""
    role: str
    member: str
    """Fleet id of the process; the ranks of a trainer share it."""
    host: str
    pid: int
    run_id: str | None = None
    """The run, or the evaluation set, that it worked for or spoke of."""
    version: int | None = None
    text: str
    traceback: str | None = None
    data: dict[str, JsonValue] = {}
    """Particulars, by name."""


class TokenMeasures(BaseModel):
    """What the trainer saw of a completion's tokens, under the policy that its update started from. Both have the completion's length T."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    entropies: bytes
    """(T,) float16: exact entropy of the distribution that each token was drawn from, in nats."""
    log_ratios: bytes
    """(T,) float16: log-probability of each token less that under the sampler, in nats."""

    @property
    def entropy_values(self) -> list[float]:
        return unpack_halves(self.entropies)

    @property
    def log_ratio_values(self) -> list[float]:
        return unpack_halves(self.log_ratios)


class Sample(Message):
    """A trained group as it was trained on: for the sample browser and for checks of the window. Trainer -> API."""

    kind: ClassVar[str] = "sample"
    scored: ScoredGroup
    trained_version: int
    advantages: tuple[float, ...]
    measured: tuple[TokenMeasures | None, ...] = ()
    """Of each completion; None for one that was not trained on, empty for a group beyond the bound of what is kept of a step."""

    @property
    def lags(self) -> list[list[int]]:
        """Lag of each token of each completion, in versions."""
        return [[self.trained_version - v for v in c.versions] for c in self.scored.completed.completions]


class DeadLetter(Message):
    """What could not be processed, with its reason. Every consumer -> API."""

    kind: ClassVar[str] = "dead_letter"
    run_id: str
    stream: str
    reason: str
    group: PromptGroup | None = None
    """The group that was given up, when it could be read; it can be replayed then."""
    raw: bytes = b""
    """The first bytes of what could not be read."""
    at: float = Field(default_factory=time.time)


class Role(StrEnum):
    CONTROL_PLANE = "control_plane"
    ROLLOUT = "rollout"
    REWARD = "reward"
    TRAINER = "trainer"


class Member(Message):
    """A process of the fleet, as it says itself with every heartbeat. Every process -> control plane, trainer."""

    kind: ClassVar[str] = "member"
    member_id: str
    role: Role
    url: str
    """Where its HTTP routes are."""
    pid: int
    host: str
    run_id: str | None = None
    """The run that it works for now."""
    only_run: str | None = None
    """The only run that a trainer takes; None: any."""
    version: int | None = None
    """The policy version that a rollout server holds."""
    ready: bool = False
    idle_seconds: float = 0.0
    """Seconds without work since start."""
    detail: str = ""
    started_at: float
    beat_at: float = Field(default_factory=time.time)


class LoadWeights(BaseModel):
    """Request to a rollout server to load a version. Trainer -> rollout server, over HTTP; also the stored record from which a late one loads."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    run_id: str
    version: int
    transport: str
    kv_policy: KvPolicy
    canary: tuple[int, ...] = ()
    """Tokens whose log-probabilities the server answers with, from the new weights."""
    expected: tuple[float, ...] = ()
    """Log-probabilities of the canary's tokens after the first, as the trainer has them: a server that loads by itself checks itself."""
    tolerance: float = 0.0
    """Largest mean absolute difference from them, in nats."""
    source: dict[str, Any] = {}
    """What the transport needs: a path, or names, shapes, types and the rendezvous."""


class LoadedWeights(BaseModel):
    """Answer to LoadWeights: what the server holds now."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    version: int
    stall_seconds: float
    """Time for which generation stood still."""
    load_seconds: float
    canary_logprobs: tuple[float, ...] = ()

    def difference(self, expected: Sequence[float]) -> float:
        """Mean absolute difference of the canary's log-probabilities, in nats; infinite when they are not as many."""
        if len(self.canary_logprobs) != len(expected):
            return math.inf
        return sum(abs(a - b) for a, b in zip(self.canary_logprobs, expected, strict=True)) / max(1, len(expected))


MESSAGES: dict[str, type[Message]] = {
    m.kind: m
    for m in (
        PromptGroup, CompletionGroup, ScoredGroup, VersionPublished, StepRecord, EvaluationRecord, RunEvent, LogLine, Sample, DeadLetter, Member,
    )
}  # fmt: skip


def group_id(run_id: str, index: int) -> str:
    return f"{run_id}:{index}"
