"""The run spec: one frozen tree that says everything about a run, and the few of its fields ("knobs") that may change while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator


class Section(BaseModel):
    """A part of the spec: frozen, no unknown keys, and every field's docstring is its description in the API and in `--help`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Order(StrEnum):
    """Which finished groups a batch takes."""

    READY = "ready"
    """The finished groups with the earliest deadlines."""
    FIFO = "fifo"
    """The next groups in issue order: no selection by completion length at all."""


class KvPolicy(StrEnum):
    """What happens to the KV cache of running requests when new weights are loaded."""

    RECOMPUTE = "recompute"
    """Cleared and computed again: what follows is sampled by the new policy on the whole prefix."""
    KEEP = "keep"
    """Kept: what follows attends to keys and values of the old policy."""


class Anchor(StrEnum):
    """The policy in the denominator of the importance ratio."""

    BEHAVIOUR = "behaviour"
    """The sampler's own log-probabilities: lag is visible to the clip."""
    PROXIMAL = "proximal"
    """The policy at the start of the step: lag is invisible to the loss."""
    DECOUPLED = "decoupled"
    """The proximal policy in the clipped ratio, times the truncated weight proximal/behaviour (decoupled PPO)."""


class Model(Section):
    path: str = "deploy/models/tiny"
    """Folder of a Hugging Face causal language model with its tokenizer, or a name that the local cache holds."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights in the rollout servers and of the trainer's forward pass; the optimiser keeps float32."""
    max_model_len: int = Field(128, ge=8, le=1_048_576)
    """Longest prompt plus completion, in tokens."""


class Data(Section):
    source: str = "sum_to_target"
    """`sum_to_target`, `reasoning_gym:TASK`, `jsonl`, `parquet` or `huggingface`."""
    path: str | None = None
    """File of a `jsonl` or `parquet` source; folder or hub name of a `huggingface` one."""
    split: str = "train"
    """Split of a `huggingface` data set."""
    prompt_field: str = "prompt"
    """Field with the prompt: a text, or a list of chat messages."""
    answer_field: str = "answer"
    """Field with what the verifiers compare with."""
    chat: bool = False
    """Wrap text prompts in the tokenizer's chat template."""
    system: str | None = None
    """System message put before each chat prompt."""
    size: int | None = Field(None, ge=1)
    """How many prompts a procedural source makes, or how many of a file to use; default: the source's own size, or all."""
    options: dict[str, JsonValue] = {}
    """Arguments of a procedural source, such as `min_target` of `sum_to_target`."""

    @model_validator(mode="after")
    def _path(self) -> Data:
        if self.source in ("jsonl", "parquet", "huggingface") and not self.path:
            raise ValueError(f"data.path is needed for the source {self.source!r}: give the file or folder that holds the prompts")
        return self


class Sampling(Section):
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the sampler; below 1 the behaviour policy has holes and importance ratios are biased."""
    max_tokens: int = Field(16, ge=1)
    """Longest completion in tokens."""


class Staleness(Section):
    min_lag: int = Field(0, ge=0, le=1024)
    """Least lag of a trained token, in versions."""
    max_lag: int = Field(2, ge=0, le=1024)
    """Greatest lag of a trained token, in versions. `{0,0}` is synchronous, `{k,k}` exact."""
    order: Order = Order.READY
    """Which finished groups a batch takes."""

    @model_validator(mode="after")
    def _window(self) -> Staleness:
        if self.min_lag > self.max_lag:
            raise ValueError(f"staleness.min_lag ({self.min_lag}) is above staleness.max_lag ({self.max_lag}): lower min_lag or raise max_lag")
        return self


class Clip(Section):
    low: float = Field(0.2, ge=0, le=1)
    """The ratio's lower bound is 1 - low."""
    high: float = Field(0.2, ge=0, le=100)
    """The ratio's upper bound is 1 + high."""
    off: bool = False
    """No clipping at all."""


class Advantage(Section):
    normalise: Literal["std", "none"] = "std"
    """`std`: group mean subtracted, divided by the group's standard deviation (GRPO); `none`: mean subtracted only."""
    epsilon: float = Field(1e-4, gt=0)
    """Added to the standard deviation."""


class Correction(Section):
    anchor: Anchor = Anchor.BEHAVIOUR
    """The policy in the denominator of the importance ratio."""
    truncation: float = Field(2.0, gt=0)
    """Upper bound of the weight proximal/behaviour; read by `decoupled` only."""


class Optimizer(Section):
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's first moment."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """AdamW's second moment."""
    epsilon: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest global norm of the gradient."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over the versions of the run, after the warm-up, as a factor of the knob `learning_rate`."""
    warmup: int = Field(0, ge=0)
    """Versions over which the learning rate rises from 0."""


class Verifier(Section):
    name: str
    """A verifier of the reward service, such as `math` or `format`; an unknown name is refused with those that there are."""
    weight: float = 1.0
    """Weight of its score in the reward."""
    options: dict[str, JsonValue] = {}
    """Arguments of the verifier."""


class Checkpoint(Section):
    every: int = Field(10, ge=1)
    """Versions between checkpoints; one is also made when the run stops."""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints are kept."""


class Record(Section):
    samples: int = Field(4096, ge=0)
    """How many of the newest trained groups can be looked at through the API, with tokens, versions and lags."""


class Weights(Section):
    transport: Literal["shm", "gloo", "nccl"] = "shm"
    """How weights travel: shared memory on one host, or torch.distributed over the network."""
    timeout: float = Field(120.0, gt=0)
    """Seconds after which a server that has not confirmed a version is fenced."""
    canary_tolerance: float | None = Field(None, gt=0)
    """Largest mean absolute difference of log-probabilities of the canary; default: 1e-3 in float32, 0.1 in bfloat16."""


class RunSpec(Section):
    """Everything about a run. Fields marked *knob* may be changed while it goes on, through `PATCH /v1/runs/{id}/knobs`."""

    name: str = Field("run", min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name, for people."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the prompt order, of sampling and of the trainer."""
    versions: int = Field(100, ge=1)
    """Policy versions to publish: the run's length."""
    batch_groups: int = Field(16, ge=1)
    """B: groups in a batch. One batch makes one version."""
    group_size: int = Field(8, ge=2)
    """G: completions of one prompt. *Knob.*"""
    updates_per_batch: int = Field(1, ge=1)
    """N: optimiser updates made on one batch; must divide `batch_groups`. *Knob.*"""
    learning_rate: float = Field(3e-4, ge=0, le=1)
    """AdamW's learning rate before the schedule. *Knob.*"""
    temperature: float = Field(1.0, gt=0, le=10)
    """Sampling temperature; log-probabilities and entropies are taken at it. *Knob.*"""
    kv_policy: KvPolicy = KvPolicy.RECOMPUTE
    """What happens to the KV cache of running requests at a weight update. *Knob.*"""
    max_attempts: int = Field(5, ge=1)
    """Tries at a group before it goes to the dead letters."""
    model: Model = Model()
    """The policy's initial weights and number format."""
    data: Data = Data()
    """Where the prompts come from."""
    sampling: Sampling = Sampling()
    """How completions are sampled."""
    staleness: Staleness = Staleness()
    """The staleness window. *Knobs.*"""
    clip: Clip = Clip()
    """Bounds of the importance ratio. *Knobs.*"""
    advantage: Advantage = Advantage()
    """How rewards become advantages."""
    correction: Correction = Correction()
    """How the loss corrects for off-policyness."""
    optimizer: Optimizer = Optimizer()
    """AdamW and its learning-rate schedule."""
    rewards: tuple[Verifier, ...] = Field((Verifier(name="sum_to_target"),), min_length=1)
    """The rubric: the reward is the weighted sum of these verifiers' scores."""
    checkpoint: Checkpoint = Checkpoint()
    """How often checkpoints are made."""
    record: Record = Record()
    """What is kept for people to look at."""
    weights: Weights = Weights()
    """How weights reach the rollout servers."""

    @model_validator(mode="after")
    def _whole(self) -> RunSpec:
        if self.batch_groups % self.updates_per_batch:
            raise ValueError(f"updates_per_batch ({self.updates_per_batch}) must divide batch_groups ({self.batch_groups})")
        if self.sampling.max_tokens >= self.model.max_model_len:
            raise ValueError(
                f"sampling.max_tokens ({self.sampling.max_tokens}) leaves no room for a prompt in model.max_model_len ({self.model.max_model_len})"
            )
        return self


KNOBS = frozenset(
    {
        "staleness.min_lag", "staleness.max_lag", "staleness.order", "updates_per_batch", "learning_rate",
        "clip.low", "clip.high", "clip.off", "temperature", "kv_policy", "group_size",
    }
)  # fmt: skip
"""Dotted names of the fields that may change during a run."""

Knobs = dict[str, Any]
"""Values by dotted name."""


def knobs_of(spec: RunSpec) -> Knobs:
    """Current values of the knobs of `spec`, by dotted name."""
    tree = spec.model_dump(mode="json")
    return {name: _get(tree, name) for name in sorted(KNOBS)}


def with_values(spec: RunSpec, values: Knobs) -> RunSpec:
    """`spec` with the fields at these dotted names replaced, validated as a whole. Raises ValueError (pydantic's) if it no longer holds."""
    tree = spec.model_dump(mode="json")
    for name, value in values.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name}: {parent} has no fields")
        node[leaf] = value
    return RunSpec.model_validate(tree)


def flatten(tree: dict[str, Any], prefix: str = "") -> Knobs:
    """A nested mapping as values by dotted name: {"clip": {"low": 0.1}} and {"clip.low": 0.1} both give {"clip.low": 0.1}."""
    flat: Knobs = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


class KnobChange(BaseModel):
    """A change of knobs and the version from which it holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int
    values: dict[str, JsonValue]


def spec_at(spec: RunSpec, changes: Sequence[KnobChange], version: int) -> RunSpec:
    """`spec` with the changes that are in force at `version`, in the order in which they were made."""
    values: Knobs = {}
    for change in changes:
        if change.version <= version:
            values.update(change.values)
    return with_knobs(spec, values) if values else spec


def with_knobs(spec: RunSpec, changes: Knobs) -> RunSpec:
    """`spec` after a knob change. Raises ValueError when a name is no knob or the result is not a valid spec."""
    wrong = sorted(set(changes) - KNOBS)
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: not a knob; knobs are {', '.join(sorted(KNOBS))}")
    return with_values(spec, changes)


def _get(tree: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree
