"""The run spec: one frozen tree that says everything about a run, and the few of its fields ("knobs") that may change while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from services.contracts.algorithms import (
    TAGS,
    Advantage,
    Aspo,
    Bapo,
    Clip,
    ClippedSurrogate,
    Correction,
    EntropyControl,
    Grpo,
    KlCov,
    Loss,
    NoControl,
    Nsr,
    PassAtK,
    Psr,
    Shaping,
    StalenessTarget,
    WReinforce,
)
from services.contracts.section import Section


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


class Model(Section):
    path: str = "deploy/models/tiny"
    """Folder of a Hugging Face causal language model with its tokenizer, or a name that the local cache holds."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights in the rollout servers and of the trainer's forward pass; the optimiser keeps float32."""
    max_model_len: int = Field(128, ge=8, le=1_048_576)
    """Longest prompt plus completion, in tokens."""


class Data(Section):
    source: str = "sum_to_target"
    """`sum_to_target`, `addition`, `functions`, `reasoning_gym:TASK`, `jsonl`, `parquet` or `huggingface`."""
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
    """How many prompts: so many are drawn by the run's seed, or made by a task of reasoning-gym; default: all there are, or the task's own number."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of a procedural source, such as `min_target` of `sum_to_target`."""
    ids: str | None = None
    """File with one prompt id a line: only these prompts are used. `offbeat data subset` writes one, at random or by clusters."""

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
    """Least lag of a trained token, in versions. *Knob.*"""
    max_lag: int = Field(2, ge=0, le=1024)
    """Greatest lag of a trained token, in versions. `{0,0}` is synchronous, `{k,k}` exact. *Knob.*"""
    order: Order = Order.READY
    """Which finished groups a batch takes; an exact window takes them in issue order in any case. *Knob.*"""
    target: StalenessTarget | None = None
    """Closed loop: max_lag is turned until a measure of off-policyness is at its target. None: it stays where it is set."""

    @property
    def taken(self) -> Order:
        """The order in force: an exact window takes groups in issue order, so that a run repeats itself whatever the speed of the machine is."""
        return Order.FIFO if self.min_lag == self.max_lag else self.order

    @model_validator(mode="after")
    def _window(self) -> Staleness:
        if self.min_lag > self.max_lag:
            raise ValueError(f"staleness.min_lag ({self.min_lag}) is above staleness.max_lag ({self.max_lag}): lower min_lag or raise max_lag")
        return self


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
    weight: float = Field(1.0, ge=-1e6, le=1e6)
    """Weight of its score in the reward."""
    least: float | None = None
    """A lower score counts as this one."""
    most: float | None = None
    """A higher score counts as this one."""
    gate: float | None = None
    """With a score below it the whole reward is `gate_reward`, whatever other verifiers would say; they are not asked then."""
    gate_reward: float = 0.0
    """The reward of what does not pass the gate."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of the verifier."""

    @model_validator(mode="after")
    def _bounds(self) -> Verifier:
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError(f"least ({self.least}) is above most ({self.most}): no score is between them")
        return self


class Checkpoint(Section):
    every: int = Field(10, ge=1)
    """Versions between checkpoints; one is also made when the run stops."""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints are kept."""


class Record(Section):
    samples: int = Field(4096, ge=0)
    """How many of the newest trained groups can be looked at through the API, with tokens, versions and lags."""


class EvaluationSet(Section):
    """Prompts on which the policy is evaluated at declared versions; never trained on by this."""

    name: str = Field(min_length=1, max_length=40, pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the set in metrics and reports."""
    domain: Literal["in", "out"] = "in"
    """In the domain of training, or out of it."""
    data: Data | None = None
    """Where its prompts come from; default: where those of training do. Nothing keeps a set apart from what is trained on but its own data."""
    rewards: tuple[Verifier, ...] = ()
    """Its rubric; empty: the run's own."""
    prompts: int = Field(32, ge=1)
    """Prompts that are used, drawn once by the run's seed; all there are if fewer."""
    samples: int = Field(16, ge=2)
    """Completions of each: n of pass@k."""
    temperature: float = Field(1.0, gt=0, le=10)
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the sampler."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest completion; default: that of training."""


class Evaluation(Section):
    every: int = Field(0, ge=0)
    """Versions between evaluations; the first and the last version are always evaluated when there are sets. 0: only these."""
    max_share: float = Field(0.5, gt=0, le=1)
    """Share of the run's time that training may stand still for evaluations. Once they took more, those between the first and the last version are
    passed over, with an event, until they take less. 1: none ever is."""
    sets: tuple[EvaluationSet, ...] = ()
    """What is evaluated on."""

    @model_validator(mode="after")
    def _names(self) -> Evaluation:
        names = [one.name for one in self.sets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"evaluation.sets: the name {', '.join(twice)} is used twice: give each set its own")
        return self


class Measure(Section):
    probe_tokens: int = Field(512, ge=0)
    """Trained tokens on which the entropy is measured again after a step, for the realised change beside the predicted one; 0: none."""
    probe_every: int = Field(4, ge=1)
    """Versions between these measurements."""
    prompt_entropy_every: int = Field(5, ge=0)
    """Versions between measurements of the prompt entropy on the prompts of the evaluation sets; 0: never."""


class Weights(Section):
    transport: Literal["auto", "shm", "gloo", "nccl"] = "auto"
    """How weights travel: by shared memory on one host, or over the network by torch.distributed (gloo) or between GPUs (nccl). `auto`: as the
    deployment says, by the trainer's setting OFFBEAT_WEIGHT_TRANSPORT."""
    timeout: float = Field(120.0, gt=0)
    """Seconds after which a server that has not confirmed a version is fenced."""
    canary_tolerance: float | None = Field(None, gt=0)
    """Largest mean absolute difference of log-probabilities of the canary; default: 1e-3 in float32, 0.1 in bfloat16."""

    def transport_where(self, deployed: str) -> str:
        """How they travel where the deployment says `deployed`."""
        return deployed if self.transport == "auto" else self.transport


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
    advantage: Advantage = Grpo()
    """How rewards become advantages."""
    shaping: Shaping = Shaping()
    """What is done to rewards and groups before."""
    loss: Loss = ClippedSurrogate()
    """The policy loss."""
    correction: Correction = Correction()
    """How the loss corrects for off-policyness."""
    entropy: EntropyControl = NoControl()
    """How entropy is controlled."""
    optimizer: Optimizer = Optimizer()
    """AdamW and its learning-rate schedule."""
    rewards: tuple[Verifier, ...] = Field((Verifier(name="sum_to_target"),), min_length=1)
    """The rubric: the reward is the weighted sum of these verifiers' scores."""
    reward_least: float | None = None
    """A lower reward counts as this one."""
    reward_most: float | None = None
    """A higher reward counts as this one."""
    checkpoint: Checkpoint = Checkpoint()
    """How often checkpoints are made."""
    record: Record = Record()
    """What is kept for people to look at."""
    evaluation: Evaluation = Evaluation()
    """What the policy is evaluated on, beside training."""
    measure: Measure = Measure()
    """What is measured at some cost."""
    weights: Weights = Weights()
    """How weights reach the rollout servers."""
    replay: str | None = None
    """Id of a run on whose recorded groups this one trains again, without generation: what-if."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Words for people and studies, such as `study` and `arm`."""

    @model_validator(mode="before")
    @classmethod
    def _tags(cls, tree: Any) -> Any:
        """A section with variants that does not say which is of the default one."""
        if not isinstance(tree, dict):
            return tree
        tree = dict(tree)
        for section, tag in TAGS.items():
            if isinstance(given := tree.get(section), dict) and tag not in given:
                tree[section] = {tag: getattr(cls.model_fields[section].default, tag)} | given
        return tree

    @model_validator(mode="after")
    def _whole(self) -> RunSpec:
        if isinstance(self.advantage, PassAtK) and self.advantage.k > self.group_size:
            raise ValueError(f"advantage.k ({self.advantage.k}) is above group_size ({self.group_size}): so many cannot be drawn")
        if isinstance(self.advantage, Psr | Nsr | WReinforce | PassAtK) and (self.shaping.overlong_buffer or self.shaping.unlikeliness):
            raise ValueError(
                f"advantage.estimator {self.advantage.estimator!r} knows right and wrong alone: set shaping.overlong_buffer and"
                " shaping.unlikeliness to 0"
            )
        if isinstance(self.advantage, Psr | Nsr | WReinforce) and self.shaping.skip_zero_signal:
            raise ValueError(
                f"advantage.estimator {self.advantage.estimator!r} has no baseline and learns from groups of equal rewards too: set"
                " shaping.skip_zero_signal = false"
            )
        if isinstance(self.entropy, Bapo | KlCov) and not isinstance(self.loss, ClippedSurrogate | Aspo):
            raise ValueError(f"entropy.method {self.entropy.method!r} moves the bounds of `clip`, which loss.kind {self.loss.kind!r} does not have")
        if isinstance(self.entropy, Bapo) and self.clip.off:
            raise ValueError("entropy.method 'bapo' searches the clip's bounds, which clip.off would switch off: set clip.off = false")
        if self.shaping.overlong_buffer > self.sampling.max_tokens:
            raise ValueError(f"shaping.overlong_buffer ({self.shaping.overlong_buffer}) is above sampling.max_tokens ({self.sampling.max_tokens})")
        target = self.staleness.target
        if target is not None and not target.exact and self.staleness.min_lag > target.least:
            raise ValueError(
                f"staleness.min_lag ({self.staleness.min_lag}) is above staleness.target.least ({target.least}): max_lag could fall"
                " below min_lag; raise staleness.target.least"
            )
        if self.reward_least is not None and self.reward_most is not None and self.reward_least > self.reward_most:
            raise ValueError(f"reward_least ({self.reward_least}) is above reward_most ({self.reward_most}): no reward is between them")
        if self.replay is not None and (self.evaluation.sets or target is not None):
            raise ValueError("a replay generates nothing: set evaluation.sets = [] and leave staleness.target out")
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
        "clip.low", "clip.high", "clip.off", "temperature", "kv_policy", "group_size", "staleness.target.value", "advantage.weight",
        "entropy.target", "entropy.step", "entropy.floor", "entropy.greatest", "entropy.coefficient", "entropy.fraction", "entropy.sign",
        "entropy.proportional", "entropy.integral", "entropy.positive_share",
    }
)  # fmt: skip
"""Dotted names of the fields that may change during a run; those of a variant only in a run of that variant."""

Knobs = dict[str, Any]
"""Values by dotted name."""


def knobs_of(spec: RunSpec) -> Knobs:
    """Current values of the knobs that `spec` has, by dotted name."""
    tree = flatten(spec.model_dump(mode="json"))
    return {name: tree[name] for name in sorted(KNOBS & tree.keys())}


def with_values(spec: RunSpec, values: Knobs) -> RunSpec:
    """`spec` with the fields at these dotted names replaced, validated as a whole. Raises ValueError (pydantic's) if it no longer holds."""
    tree = spec.model_dump(mode="json")
    for section, tag in TAGS.items():
        variant = values.get(f"{section}.{tag}")
        if variant is not None and variant != tree[section][tag]:
            tree[section] = {tag: variant}
    for name, value in values.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
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
