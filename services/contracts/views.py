"""What the public API answers: shared by the control plane, which makes it, and the Python client, which reads it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from services.contracts.messages import FinishReason, LogLevel, Part, Role, Severity
from services.contracts.spec import KnobChange, RunSpec
from services.contracts.states import RunState
from services.contracts.study import StudySpec


class View(BaseModel):
    """Base of the answers: a client ignores fields that a newer server adds."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class RunView(View):
    """A run, as it stands."""

    run_id: str
    """Its id: names it in every route."""
    name: str
    """Name that the spec gives, for people."""
    state: RunState
    """Where it is in its life."""
    reason: str
    """Why it is in this state, when there is more to say: an error, or what paused it."""
    created_at: float
    """Unix time in seconds, as all times here."""
    started_at: float | None
    """When its first version was announced."""
    ended_at: float | None
    """When it completed, failed or was cancelled."""
    version: int | None
    """Newest version that all its rollout servers hold; None before the first."""
    versions: int
    """Versions that it is to publish."""
    trainer: str | None
    """Fleet id of the trainer that it was assigned to last."""
    spec: RunSpec
    """The spec with which it was submitted; knobs that were changed since are at `/knobs`."""


class RunPage(View):
    runs: list[RunView]
    """Newest first."""
    next: str | None
    """Cursor of the next page; None on the last one."""


class KnobAnswer(View):
    """A knob change was accepted."""

    run_id: str
    """The run."""
    version: int
    """The first version that it holds for."""
    knobs: dict[str, JsonValue]
    """All knobs as they will be at that version, by dotted name."""


class KnobsView(View):
    run_id: str
    """The run."""
    version: int | None
    """The version announced now; None before the first."""
    knobs: dict[str, JsonValue]
    """All knobs in force at that version, by dotted name."""
    changes: list[KnobChange]
    """Every change with the version from which it holds, oldest first."""


class StepView(View):
    """What one version measured, or the mean of several versions in a row."""

    version: int
    """Version at which the batch was taken; of several, the first."""
    count: int
    """How many versions this one stands for."""
    at: float
    """When it was recorded; of several, the last."""
    values: dict[str, float | None]
    """Measurements by name; None where a number was not finite. Of several versions, the mean of the finite ones."""
    lags: dict[int, int]
    """Trained tokens by lag in versions, summed."""
    window: tuple[int, int]
    """Least and greatest lag requested; of several, the last."""
    groups: list[int]
    """Indices of the groups trained on."""


class StepsView(View):
    run_id: str
    """The run."""
    steps: list[StepView]
    """In order of versions."""
    recorded: int
    """How many versions were recorded in the range, before any averaging."""


class LiveStep(View):
    """What one version measured, as one who watches gets it."""

    version: int
    """Version at which the batch was taken."""
    at: float
    """When it was recorded."""
    values: dict[str, float | None]
    """Those of its measurements that were asked for; None where a number was not finite."""
    lags: dict[int, int]
    """Trained tokens by lag in versions."""
    window: tuple[int, int]
    """Least and greatest lag requested."""


class LiveState(View):
    """Where a run stands, as one who watches gets it."""

    state: RunState
    """Where it is in its life."""
    version: int | None
    """Newest version that all its rollout servers hold; None before the first."""
    reason: str
    """Why it is in this state, when there is more to say."""


class EvaluationView(View):
    """What one version of the policy did on one evaluation set."""

    name: str
    """Name of the set."""
    domain: str
    """`in` or `out` of the domain of training."""
    version: int
    """The version that was evaluated: every token is of it."""
    at: float
    """When it was recorded."""
    prompts: int
    """Prompts that were completed; fewer than asked for when some went to the dead letters."""
    samples: int
    """Completions of each."""
    temperature: float
    """Sampling temperature."""
    top_p: float
    """Nucleus of the sampler."""
    max_tokens: int
    """Longest completion, in tokens."""
    values: dict[str, float | None]
    """Measurements by name; None where a number was not finite."""


class EvaluationsView(View):
    run_id: str
    """The run."""
    evaluations: list[EvaluationView]
    """In order of versions, and of sets within one."""


class EventView(View):
    """Something that happened to a run."""

    id: str
    """Place in the run's events: send it as Last-Event-ID to go on after it."""
    run_id: str
    """The run."""
    event: str
    """Short name, such as `knobs_changed`."""
    text: str
    """What happened, in a sentence."""
    severity: Severity
    """How much it matters."""
    version: int | None
    """The version announced at that time."""
    at: float
    """When."""
    data: dict[str, JsonValue]
    """Particulars, by name."""


class EventsView(View):
    run_id: str
    """The run."""
    events: list[EventView]
    """Oldest first."""


class LogView(View):
    """A line of a process's log."""

    id: str
    """Place in the log of the fleet: send it as `after` to go on behind it."""
    at: float
    """When."""
    level: LogLevel
    """How much it matters."""
    logger: str
    """The module that speaks."""
    role: str
    """What the process is."""
    member: str
    """Its id in the fleet; the ranks of a trainer share it."""
    host: str
    """The machine that it runs on."""
    pid: int
    """Its process id there."""
    run_id: str | None
    """The run that it worked for or spoke of."""
    version: int | None
    """The version that it spoke of."""
    text: str
    """What it said; long texts are cut."""
    traceback: str | None
    """Where it came from, of an error."""
    data: dict[str, JsonValue]
    """Particulars, by name."""


class LogsView(View):
    lines: list[LogView]
    """Newest first."""
    next: str | None
    """Cursor of older lines; None when there are no more."""


class CompletionView(View):
    """One completion as it was trained on. All lists have one entry a token."""

    text: str
    """The completion as text."""
    tokens: list[int]
    """Token ids, the end-of-sequence token included."""
    versions: list[int]
    """The policy version that sampled each token."""
    lags: list[int]
    """Trained version minus sampling version, of each token."""
    finish: FinishReason
    """Whether it ended by itself or at its greatest length."""
    reward: float | None
    """Weighted sum of the verifiers' scores; None when a verifier failed."""
    parts: list[Part]
    """What each verifier said."""
    advantage: float | None
    """What it was trained with."""
    entropies: list[float] | None = None
    """Exact entropy of the policy that was being trained, in nats; None where it was not recorded."""
    log_ratios: list[float] | None = None
    """Log-probability under that policy less that under the sampler, in nats; None where it was not recorded."""
    pieces: list[str] | None = None
    """The text that each token adds, where `pieces` was asked for; None for a completion that is too long, or of a model that is not there."""


class SampleView(View):
    """A group that was trained on."""

    run_id: str
    """The run."""
    index: int
    """Place in the run's issue order."""
    prompt_id: str
    """Id of the prompt in its data source."""
    prompt: str
    """The prompt as text."""
    answer: JsonValue
    """What the verifiers compared with."""
    trained_version: int
    """Version at which it was trained on."""
    issued_version: int
    """Version at which it was issued."""
    max_lag: int
    """Upper bound of the window under which it was issued."""
    server: str
    """Fleet id of the rollout server."""
    attempt: int
    """How often generation was started."""
    completions: list[CompletionView]
    """In the order of their seeds."""


class SamplesView(View):
    run_id: str
    """The run."""
    samples: list[SampleView]
    """Newest first."""
    next: str | None
    """Cursor of the next page, of older groups; None on the last one."""


class CheckpointView(View):
    name: str
    """Name of its folder."""
    path: str
    """The folder."""
    version: int
    """Version that it holds."""
    consumed: int
    """Groups consumed by then."""
    issued: int
    """The prompt cursor by then."""
    knobs: dict[str, JsonValue]
    """Knobs in force then, by dotted name."""
    made_at: float
    """When it was written."""


class CheckpointsView(View):
    run_id: str
    """The run."""
    checkpoints: list[CheckpointView]
    """Oldest first."""


class PromptsView(View):
    run_id: str
    """The run."""
    prompts: int | None
    """Prompts in its source, or in the subset of it that `data.ids` names; None while its data are not opened."""
    ids: list[str] | None
    """All of them, in the source's order; None while the data are not opened, where there are more than 20,000, and for a replay."""


class ConservationView(View):
    """Every group since the run was made, by what became of it: issued = consumed + skipped + outstanding + replaying + dead + cancelled."""

    run_id: str
    """The run."""
    issued: int
    """Groups issued since the run was made."""
    consumed: int
    """Trained on."""
    queued: int
    """Wait for a rollout server."""
    running: int
    """Are being generated."""
    generated: int
    """Wait for their rewards."""
    scored: int
    """Wait for the trainer."""
    taken: int
    """Are being trained on."""
    replaying: int
    """Dead letters that wait to be issued again."""
    skipped: int = 0
    """Without signal, and replaced by others: dynamic sampling."""
    dead: int
    """Dead-lettered and not replayed."""
    cancelled: int
    """Outstanding when the run ended."""
    outstanding: int
    """queued + running + generated + scored + taken"""
    superseded: int
    """Completions that came from an attempt which another one had replaced; their group is counted once, above."""
    unreadable: int
    """Entries that named no group, such as garbage; they are in the dead letters and in no other count."""
    holds: bool
    """Whether the equation holds."""


class DeadLetterView(View):
    """What could not be processed."""

    id: str
    """Its id, with which it is replayed."""
    run_id: str
    """The run."""
    evaluation: str | None = None
    """The evaluation set whose group it is; None for a group of training."""
    stream: str
    """The stream that it was on."""
    reason: str
    """Why it was given up."""
    at: float
    """When."""
    index: int | None
    """Index of the group, when it could be read."""
    prompt_id: str | None
    """Id of the prompt in its data source."""
    prompt: str | None
    """The prompt as text."""
    replayable: bool
    """Whether it can be generated again: its group is known, and is one of training."""
    raw: str
    """The first bytes of what could not be read, with escapes."""


class DeadLettersView(View):
    letters: list[DeadLetterView]
    """Newest first, by run."""


class ReplayView(View):
    run_id: str
    """The run."""
    letter: str
    """The dead letter, which is gone now."""
    index: int
    """The group that will be generated again."""


class MemberView(View):
    """A process of the fleet, as it said itself last."""

    member_id: str
    """Its id in the fleet."""
    role: Role
    """What kind of process it is."""
    url: str
    """Where its HTTP routes are."""
    pid: int
    """Its process id on that host."""
    host: str
    """The host that it runs on."""
    ready: bool
    """Whether it can work."""
    detail: str
    """What it says that it does."""
    assigned: str | None
    """The run that the scheduler gave it."""
    run_id: str | None
    """The run that it works for."""
    version: int | None
    """The policy version that a rollout server holds."""
    idle_seconds: float
    """Seconds without work since it started."""
    started_at: float
    """When the process started."""
    beat_at: float
    """Its last sign of life."""


class FleetView(View):
    members: list[MemberView]
    """Ordered by id."""


class StudyRunView(View):
    """A run of a study. One that failed, or that was never made, is shown like the others."""

    arm: str
    """Its arm."""
    seed: int
    """Its seed."""
    run_id: str | None
    """The run; None where it has not been made yet: resuming the study makes it."""
    state: RunState | None
    """Where it is in its life; None where it has not been made."""
    reason: str
    """Why it is in this state, when there is more to say."""
    version: int | None
    """Newest version that all its rollout servers hold; None before the first."""
    versions: int
    """Versions that it is to publish."""
    started_at: float | None
    """When its first version was announced."""
    ended_at: float | None
    """When it completed, failed or was cancelled."""


class StudyView(View):
    """A study, with all its runs as they stand."""

    study_id: str
    """Its id: names it in every route."""
    name: str
    """Name that the spec gives, for people."""
    created_at: float
    """When it was submitted."""
    cancelled_at: float | None
    """When it was cancelled for good."""
    spec: StudySpec
    """As submitted: arms, seeds, and the claims that were registered before anything ran."""
    runs: list[StudyRunView]
    """Seed by seed, in the order of the arms."""
    counts: dict[str, int]
    """Runs by state; those that have not been made yet are `missing`."""
    warnings: list[str]
    """What the study cannot tell."""


class StudySummary(View):
    """A study in a list."""

    study_id: str
    """Its id: names it in every route."""
    name: str
    """Name that the spec gives, for people."""
    created_at: float
    """When it was submitted."""
    cancelled_at: float | None
    """When it was cancelled for good."""
    arms: int
    """How many arms it has."""
    seeds: int
    """Runs of each arm."""
    claims: int
    """Claims that it is to decide."""
    counts: dict[str, int]
    """Runs by state; those that have not been made yet are `missing`."""


class StudiesView(View):
    studies: list[StudySummary]
    """Newest first."""


class VerdictView(View):
    """What the seeds of a study say of a claim."""

    id: str
    """Id of the claim."""
    text: str
    """The claim in words."""
    formula: str
    """The claim as a formula."""
    reads: str
    """`holds`, `does not hold`, `differs`, `not separable` or `no data`."""
    effect: float | None
    """Mean over seeds of the claim's statistic."""
    low: float | None
    """Lower end of its 95 % interval."""
    high: float | None
    """Upper end."""
    p: float | None
    """Sign-flip permutation p; None where there is none."""
    seeds: int
    """Seeds that count."""
    why: str
    """The decision's reason, in a sentence."""
    excluded: list[str]
    """Seeds and runs that are left out, with the reason."""


class VerdictsView(View):
    study_id: str
    """The study."""
    verdicts: list[VerdictView]
    """In the order of the claims, from the runs that are completed by now."""
    completed: int
    """How many these are."""


class StudyValidationView(View):
    """The study is good: it would be accepted."""

    valid: Literal[True]
    """Always true: a study that is not good is answered with a problem document."""
    spec: StudySpec
    """With all defaults filled in."""
    runs: int
    """Runs that it would make."""
    versions: int
    """Versions that these would publish, in all."""
    rewards_checked: bool
    """Whether a reward server was there to check the names and options of the verifiers."""
    warnings: list[str]
    """What the study cannot tell."""


class ValidationView(View):
    """The spec is good: a run of it would be accepted."""

    valid: Literal[True]
    """Always true: a spec that is not good is answered with a problem document."""
    spec: RunSpec
    """With all defaults filled in."""
    prompts: int
    """Prompts of the data source."""
    first_prompt: str
    """The prompt of the run's first group, as text."""
    first_prompt_tokens: int
    """Its length in tokens."""
    rewards_checked: bool
    """Whether a reward server was there to check the names and options of the verifiers."""


class SchemaView(View):
    spec: dict[str, Any]
    """JSON schema of a run spec."""
    knobs: list[str]
    """Dotted names of the fields that may change during a run."""


class FieldProblem(View):
    """One field that was wrong."""

    field: str
    """Dotted name of the field."""
    problem: str
    """What was wrong and what is allowed."""


class ProblemDocument(View):
    """An error, as RFC 9457 describes it."""

    type: str = "about:blank"
    """A URI of the kind of problem."""
    title: str
    """The kind of problem."""
    status: int
    """The HTTP status."""
    detail: str = ""
    """What was wrong this time, and what to do."""
    errors: list[FieldProblem] = []
    """The fields that were wrong."""
