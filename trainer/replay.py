"""What-if: a run trained again on the recorded groups of another one, with what its spec changes: no generation, no rollout servers.

The groups were sampled by the policies of the other run. For the policy that is trained here they are off-policy from the first step that differs,
and the more so the longer it goes on: the step's `ess_share` and KL say by how much. With nothing changed, every step comes out as it was.

    consumes    samples of the other run
    produces    steps, checkpoints
    waits for   nothing
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from services.contracts.messages import Sample, ScoredGroup
from services.contracts.spec import RunSpec
from services.contracts.states import Action, RunState
from services.contracts.topics import Log
from services.runtime.bus import Bus
from services.runtime.ledger import Ledger, Plan
from trainer.feed import Batch
from trainer.session import Session
from trainer.step import StepResult

CHUNK = 64
"""Recorded groups read together."""
NOTHING = Plan(indices=(), entry_ids=())


class Recording:
    """The recorded groups of a run, batch by batch, in the order in which they were trained on."""

    def __init__(self, bus: Bus, run_id: str, *, first: int) -> None:
        self.run_id = run_id
        self._batches = self._read(bus, first)

    def batch(self, version: int) -> tuple[ScoredGroup, ...]:
        """The groups that were trained on at `version`; versions must be asked for in order. Raises LookupError where the record has a gap."""
        for found, groups in self._batches:
            if found == version:
                return groups
            if found > version:
                break
        raise LookupError(f"run {self.run_id} has no recorded groups of version {version}: raise record.samples of a run that is to be replayed")

    def _read(self, bus: Bus, first: int) -> Iterator[tuple[int, tuple[ScoredGroup, ...]]]:
        at, start = first, "-"
        groups: list[ScoredGroup] = []
        while entries := bus.range(self.run_id, Log.SAMPLES, start=start, count=CHUNK):
            for entry in entries:
                sample = entry.message(Sample)
                if sample.trained_version != at and groups:
                    yield at, tuple(groups)
                    groups = []
                at = sample.trained_version
                if at >= first:
                    groups.append(sample.scored)
            start = f"({entries[-1].id}"
        if groups:
            yield at, tuple(groups)


class ReplaySession(Session):
    """A session whose batches are another run's, and whose versions go nowhere."""

    @cached_property
    def _recording(self) -> Recording:
        assert self.spec.replay is not None
        return Recording(self.bus, self.spec.replay, first=self.version)

    def data_size(self) -> int | None:
        """Of the run that generated: a replay opens no data, and an epoch is to be as long as it was."""
        spec, source = self.spec, self.ledger
        while spec.replay is not None:
            source = Ledger(self.bus, spec.replay)
            spec = source.spec()
        return source.data_size()

    def begin(self) -> None:
        self.ledger.announce(self.announced, trainer=self.settings.member)
        if self.lifecycle.state() is RunState.STARTING:
            self.lifecycle.move(Action.START, holder=self.settings.member)
        self._restart_clocks()

    def next_batch(self, version: int, spec: RunSpec) -> Batch:
        self._check_in()
        return Batch(NOTHING, self._recording.batch(version))

    def planned_batch(self, version: int) -> Batch:
        return Batch(NOTHING, self._recording.batch(version))

    def publish(self, version: int, batch: Batch, result: StepResult, spec: RunSpec) -> None:
        self.commit(version, batch, result, spec, extra={})
