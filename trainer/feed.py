"""The trainer's feed: scored groups come in, batches that keep the staleness window go out.

consumes    scored
produces    batches, planned in the ledger before they are trained on
waits for   a batch that the staleness rules allow
unblocked by reward servers
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

from services.contracts.messages import ScoredGroup
from services.contracts.spec import Order, RunSpec
from services.contracts.staleness import Floor, GroupView, may_load, take
from services.contracts.topics import Work
from services.runtime.bus import Bus, Entry, SequenceCheck
from services.runtime.codec import Undecodable
from services.runtime.ledger import Ledger, Place, Plan
from services.runtime.metrics import TrainerMetrics
from trainer.advantages import has_signal

log = logging.getLogger(__name__)

CONSUMER = "trainer"
"""One name for whichever trainer has the run: a restarted one finds what its predecessor had received."""
RECOVER_SECONDS = 2.0
"""Between looks for entries that a predecessor received after this trainer had started."""


@dataclass(frozen=True)
class Batch:
    """The groups of one step."""

    plan: Plan
    groups: tuple[ScoredGroup, ...]


@dataclass(frozen=True)
class Skipped:
    """Groups that dynamic sampling let go: how many, and what they were like."""

    groups: int = 0
    tokens: int = 0
    rewards: float = 0.0
    """Sum of their rewards, one of each group: they are all equal in it."""

    def and_one(self, *, tokens: int, reward: float) -> Skipped:
        return Skipped(self.groups + 1, self.tokens + tokens, self.rewards + reward)

    def as_values(self) -> dict[str, float]:
        if not self.groups:
            return {}
        return {"skipped_groups": float(self.groups), "skipped_reward_mean": self.rewards / self.groups, "skipped_tokens": float(self.tokens)}


class Feed:
    """Scored groups of one run that are not yet trained on, and the rules that choose among them."""

    def __init__(self, bus: Bus, ledger: Ledger, *, trainer: str, metrics: TrainerMetrics) -> None:
        self.bus, self.ledger, self.trainer, self.metrics = bus, ledger, trainer, metrics
        self._ready: dict[int, tuple[Entry, ScoredGroup]] = {}
        self._sequence = SequenceCheck()
        self._plans = ledger.plans()
        """Batches that a predecessor took and no checkpoint covers."""
        self._taken: set[str] = set()
        """Entries in batches that no checkpoint covers yet: still unacknowledged."""
        self._recovered_at = 0.0
        self._may_skip = self._skip_from = 0
        self.skipped = Skipped()
        """Since the last batch."""

    def pull(self, *, block_ms: int | None) -> bool:
        """Receive what is there, waiting up to `block_ms` for the first, or not at all; True if something came."""
        entries = self.bus.claim([self.ledger.run_id], Work.SCORED, CONSUMER, count=256, block_ms=block_ms)
        for entry in entries:
            if missing := self._sequence.see(entry):
                log.error("entries of the scored stream were lost", extra={"missing": missing})
                self.metrics.sequence_gaps.inc(missing)
            self._receive(entry)
        if not entries and time.monotonic() - self._recovered_at > RECOVER_SECONDS:
            self._recovered_at = time.monotonic()
            for entry in self.bus.own(self.ledger.run_id, Work.SCORED, CONSUMER):
                if entry.id not in self._taken:
                    self._receive(entry)
        return bool(entries)

    def admit(self, spec: RunSpec, version: int) -> None:
        """From now on, until the next call: dynamic sampling as `spec` says, while servers hold `version`.

        Where a least lag is asked for, only groups of that version may go: another of the same version can still be made in their place.
        """
        self._may_skip = spec.shaping.skip_limit * spec.batch_groups if spec.shaping.skip_zero_signal else 0
        self._skip_from = version if spec.staleness.min_lag else 0
        self.skipped = Skipped()
        for index in sorted(self._ready):
            self._skip(*self._ready[index])

    def checkpointed(self, version: int) -> None:
        """A checkpoint of `version` is durable: what made it is acknowledged."""
        self._taken -= set(self.ledger.checkpointed(version))

    def take(self, version: int, *, batch: int, floor: Floor, order: Order) -> Batch | None:
        """The batch that the rules choose at `version`, if there is one."""
        chosen = take(self.views(), version=version, batch=batch, floor=floor, order=order)
        if chosen is None:
            return None
        plan = Plan(indices=tuple(chosen), entry_ids=tuple(self._ready[i][0].id for i in chosen))
        self.ledger.plan(version, plan, trainer=self.trainer)
        return self._pop(plan)

    def planned(self, version: int) -> Batch | None:
        """The batch that a predecessor took at `version`, if one did."""
        plan = self._plans.pop(version, None)
        if plan is None:
            return None
        self._recovered_at = 0.0
        while not self._ready.keys() >= set(plan.indices):
            came = self.pull(block_ms=100)
            missing = [i for i in plan.indices if i not in self._ready]
            if missing and not came:
                raise LookupError(f"groups {missing} of version {version} are planned, but no longer on the stream")
        return self._pop(plan)

    def may_load(self, loading: int, *, batch: int, min_lag: int, floor: Floor, order: Order) -> bool:
        return may_load(self.views(), loading=loading, batch=batch, min_lag=min_lag, floor=floor, order=order)

    def views(self) -> list[GroupView]:
        """The outstanding groups that are in no batch, as the staleness rules see them."""
        views = []
        for row in self.ledger.rows():
            if row.place is Place.TAKEN:
                continue
            if row.index in self._ready:
                done = self._ready[row.index][1].completed
                views.append(GroupView(row.index, max_lag=done.group.max_lag, start=done.start_version, newest=done.newest_version))
            else:
                views.append(GroupView(row.index, max_lag=row.max_lag, start=row.start))
        return views

    def _pop(self, plan: Plan) -> Batch:
        self._taken |= set(plan.entry_ids)
        return Batch(plan, tuple(self._ready.pop(i)[1] for i in plan.indices))

    def _receive(self, entry: Entry) -> None:
        """Scores are accepted once a group, so an index that is here already is the same entry again."""
        try:
            scored = entry.message(ScoredGroup)
        except Undecodable as error:
            log.error("dead-lettered", extra={"entry": entry.id, "reason": str(error)})
            if self.ledger.give_up(entry, Work.SCORED, str(error), group=None):
                self.metrics.dead_letters.labels(Work.SCORED.value).inc()
            return
        self._ready[scored.group.index] = (entry, scored)
        self._skip(entry, scored)

    def _skip(self, entry: Entry, scored: ScoredGroup) -> None:
        """Let a group without signal go, if that is asked for and it is in no batch yet: the dispatcher issues another one."""
        if (
            self.skipped.groups >= self._may_skip
            or scored.completed.newest_version < self._skip_from
            or has_signal(torch.tensor(scored.rewards, dtype=torch.float64))
        ):
            return
        if self.ledger.skip(scored.group.index, entry.id, trainer=self.trainer):
            del self._ready[scored.group.index]
            self.skipped = self.skipped.and_one(tokens=sum(c.length for c in scored.completed.completions), reward=scored.rewards[0])
