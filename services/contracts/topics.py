"""Names of streams and keys in Redis, in one place, with their bounds and the reason for each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

PREFIX = "offbeat"
RUNS = f"{PREFIX}:runs"
"""Sorted set of run ids by creation time."""
STUDIES = f"{PREFIX}:studies"
"""Sorted set of study ids by creation time."""
ACTIVE = f"{PREFIX}:active"
"""Set of the runs, and of their evaluation sets, whose streams reward servers read."""
FLEET = f"{PREFIX}:fleet"
"""Set of member ids, and prefix of each member's keys: its last heartbeat (Member), and the run that it is assigned to."""
LOGS = f"{PREFIX}:logs"
"""Stream of what the processes of the fleet log."""
LOGS_KEPT = 20_000
"""Lines in it, about: 7 MB as lines usually are, some 250 MB if every one had a message and a traceback of full length."""
CHILD = "~"
"""Between a run's id, which never has it, and the name of one of its evaluation sets."""
IDEMPOTENCY = f"{PREFIX}:idempotency"
"""Prefix of the keys that remember which run or study a submission's idempotency key made; kept a day."""


class Work(StrEnum):
    """Streams of work: an entry lives until it is acknowledged, and their length is bounded by admission: (max_lag + 1) * B groups in all."""

    PROMPTS = "prompts"
    COMPLETIONS = "completions"
    SCORED = "scored"


class Log(StrEnum):
    """Streams to be read many times; trimmed at their oldest end."""

    VERSIONS = "versions"
    STEPS = "steps"
    EVENTS = "events"
    EVALUATIONS = "evaluations"
    SAMPLES = "samples"
    DEAD = "dead"


RETENTION: dict[Log, int] = {
    Log.VERSIONS: 1_000,  # only its newest entries wake the dispatcher
    Log.STEPS: 1_000_000,  # the run's curve: about 5 KB a version
    Log.EVALUATIONS: 100_000,  # about 1 KB a set and evaluated version
    Log.EVENTS: 10_000,  # for people
    Log.SAMPLES: 4_096,  # overridden by record.samples of the spec
    Log.DEAD: 10_000,  # looked at and replayed by people
}

GROUPS: dict[Work, str] = {Work.PROMPTS: "rollout", Work.COMPLETIONS: "reward", Work.SCORED: "trainer"}
"""Consumer group of each stream of work."""


@dataclass(frozen=True)
class RunKeys:
    """Keys of one run."""

    run_id: str

    @property
    def _base(self) -> str:
        return f"{PREFIX}:run:{{{self.run_id}}}"

    def stream(self, topic: Work | Log) -> str:
        return f"{self._base}:{topic.value}"

    @property
    def info(self) -> str:
        """Hash: spec, state, version, counters of conservation."""
        return f"{self._base}:info"

    @property
    def ledger(self) -> str:
        """Hash: index of each outstanding group -> its place and versions."""
        return f"{self._base}:ledger"

    @property
    def plan(self) -> str:
        """Hash: version -> the batch taken at it; what a resumed trainer trains on again. Trimmed at each checkpoint.
        Of an evaluation set: version -> the groups issued for it, until they are recorded."""
        return f"{self._base}:plan"

    @property
    def probes(self) -> str:
        """Tokens of the prompts of the evaluation sets, for the trainer's prompt entropy."""
        return f"{self._base}:probes"

    @property
    def passed_over(self) -> str:
        """Set of the versions that were due to be evaluated and are not, since evaluations took more than their share of time."""
        return f"{self._base}:passed-over"

    @property
    def prompts_used(self) -> str:
        """Ids of the prompts that the run trains on, as JSON; not there before its data are opened, nor for a large source."""
        return f"{self._base}:prompts-used"

    @property
    def knobs(self) -> str:
        """List of knob changes with the version at which each takes effect."""
        return f"{self._base}:knobs"

    @property
    def weights(self) -> str:
        """The newest published version's LoadWeights, for servers that join late."""
        return f"{self._base}:weights"

    def seq(self, topic: Work | Log) -> str:
        """Counter behind the sequence numbers of a stream."""
        return f"{self._base}:seq:{topic.value}"


@dataclass(frozen=True)
class StudyKeys:
    """Keys of one study. Its runs have keys of their own, under ids that follow from the study's id, the arm and the seed."""

    study_id: str

    @property
    def info(self) -> str:
        """Hash: spec, name, created_at, cancelled_at."""
        return f"{PREFIX}:study:{{{self.study_id}}}:info"

    def run_id(self, arm: str, seed: int) -> str:
        """Id of the run of this arm and seed. Ids of other runs have no dot in them."""
        return f"{self.study_id}.{arm}.{seed}"


def evaluation_id(run_id: str, name: str) -> str:
    """Id under which an evaluation set of a run has its streams of work, its ledger and its rubric, as if it were a run: a child of that run."""
    return f"{run_id}{CHILD}{name}"


def parent_of(run_id: str) -> str | None:
    """The run that this is an evaluation set of; None for a run."""
    parent, child, _ = run_id.partition(CHILD)
    return parent if child else None


def set_of(run_id: str) -> str | None:
    """Name of the evaluation set whose id this is; None for a run."""
    return run_id.partition(CHILD)[2] or None


def run_of(stream: str) -> str:
    """The run, or the evaluation set, whose stream this is: offbeat:run:{ID}:completions."""
    return stream.split("{", 1)[1].split("}", 1)[0]
