"""The ledger of a run: where each outstanding group is, which version started it, and the counters of conservation. Every move is one script.

    queued -> running -> generated -> scored -> taken -> consumed        at any place: dead-lettered or cancelled
    issued = consumed + skipped + outstanding (queued, running, generated, scored, taken) + replaying + dead-lettered + cancelled

A group's `attempt` is a fencing token: it grows with each start, and only the newest attempt's completions are accepted. So work is at least
once and its effect is once, by group, whoever dies in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from services.contracts.messages import CompletionGroup, DeadLetter, PromptGroup, Sample, ScoredGroup, StepRecord, VersionPublished
from services.contracts.spec import KnobChange, Knobs, RunSpec
from services.contracts.topics import GROUPS, RETENTION, Log, RunKeys, Work
from services.runtime import ledger_scripts as lua
from services.runtime.bus import Bus, Entry
from services.runtime.codec import decode, encode


class Place(StrEnum):
    QUEUED = "q"
    RUNNING = "r"
    GENERATED = "g"
    SCORED = "s"
    TAKEN = "t"


PLACES: dict[Work, str] = {Work.PROMPTS: Place.QUEUED + Place.RUNNING, Work.COMPLETIONS: Place.GENERATED, Work.SCORED: Place.SCORED}
"""Places of the groups that a stream of work holds: what else it names, such as a second copy, is not the group."""


@dataclass(frozen=True)
class Row:
    """One outstanding group."""

    index: int
    place: Place
    start: int | None
    attempt: int
    max_lag: int


@dataclass(frozen=True)
class Conservation:
    """Counters of groups since the run was made."""

    issued: int
    consumed: int
    queued: int
    running: int
    generated: int
    scored: int
    taken: int
    replaying: int
    dead: int
    cancelled: int
    skipped: int = 0
    """Groups without signal that dynamic sampling replaced by others."""

    @property
    def outstanding(self) -> int:
        return self.queued + self.running + self.generated + self.scored + self.taken

    @property
    def holds(self) -> bool:
        return self.issued == self.consumed + self.skipped + self.outstanding + self.replaying + self.dead + self.cancelled


class StartRefused(StrEnum):
    GONE = "gone"
    """Consumed, cancelled or dead-lettered meanwhile: acknowledge and forget."""
    DONE = "done"
    """Somebody has published it: acknowledge and forget."""
    STALE = "stale"
    """This server does not hold the current version: load it first."""
    SPENT = "spent"
    """Tried too often: dead-letter it."""


@dataclass(frozen=True)
class Plan:
    """The batch taken at a version: group indices with the stream entries that hold them."""

    indices: tuple[int, ...]
    entry_ids: tuple[str, ...]


class NotOurs(RuntimeError):
    """Another trainer has taken over this run, or it was ended: stop."""


class Ledger:
    """The ledger of one run. Used by the dispatcher, the servers and the trainer."""

    def __init__(self, bus: Bus, run_id: str) -> None:
        self.bus, self.run_id, self.keys = bus, run_id, RunKeys(run_id)

    # -- dispatcher -------------------------------------------------------------------------------------------------------------------

    def issue(self, group: PromptGroup) -> bool:
        """Queue the next group; False if it has been issued already or the run has ended."""
        return bool(
            self.bus.script(
                lua.ISSUE,
                [self.keys.stream(Work.PROMPTS), self.keys.seq(Work.PROMPTS), self.keys.ledger, self.keys.info],
                [group.index, encode(group), group.max_lag],
            )
        )

    def issue_replay(self, *, max_lag: int, version: int) -> bool:
        """Queue a group that was asked to be replayed, under the present window; False if none waits."""
        raw = self.bus.call(lambda: self.bus.redis.lindex(self.keys.stream(Log.DEAD) + ":replay", 0))
        if raw is None:
            return False
        group = decode(PromptGroup, raw).model_copy(update={"max_lag": max_lag, "issued_version": version})
        return bool(
            self.bus.script(
                lua.ISSUE_REPLAY,
                [
                    self.keys.stream(Work.PROMPTS),
                    self.keys.seq(Work.PROMPTS),
                    self.keys.ledger,
                    self.keys.info,
                    self.keys.stream(Log.DEAD) + ":replay",
                ],
                [group.index, encode(group), max_lag, raw],
            )
        )

    # -- rollout and reward servers ---------------------------------------------------------------------------------------------------

    def start(self, index: int, *, held: int, max_attempts: int) -> int | StartRefused:
        """Start a group under version `held`; the attempt's number, or why not."""
        answer = self.bus.script(lua.START, [self.keys.ledger, self.keys.info], [index, held, max_attempts])
        return answer if isinstance(answer, int) else StartRefused(answer.decode())

    def finish(self, entry: Entry, done: CompletionGroup) -> bool:
        """Publish completions and acknowledge the prompt; False if a newer attempt has superseded this one."""
        return self._advance(entry, done, Work.PROMPTS, Work.COMPLETIONS, Place.RUNNING, Place.GENERATED, encode(done))

    def score(self, entry: Entry, scored: ScoredGroup) -> bool:
        """Publish rewards and acknowledge the completions; False if somebody else has."""
        return self._advance(entry, scored.completed, Work.COMPLETIONS, Work.SCORED, Place.GENERATED, Place.SCORED, encode(scored))

    def _advance(self, entry: Entry, done: CompletionGroup, source: Work, target: Work, before: Place, after: Place, payload: bytes) -> bool:
        return bool(
            self.bus.script(
                lua.ADVANCE,
                [self.keys.stream(source), self.keys.stream(target), self.keys.seq(target), self.keys.ledger, self.keys.info],
                [done.group.index, done.attempt, entry.id, GROUPS[source], before, after, payload, done.start_version],
            )
        )

    def give_up(self, entry: Entry, topic: Work, reason: str, *, group: PromptGroup | None) -> bool:
        """Move an entry to the dead letters with its reason and acknowledge it; False if it is no longer there."""
        index = group.index if group is not None else entry.index
        letter = DeadLetter(
            run_id=self.run_id,
            stream=topic.value,
            reason=reason[:2000],
            group=group,
            raw=b"" if group is not None else entry.fields.get(b"data", b"")[:4096],
        )
        return bool(
            self.bus.script(
                lua.GIVE_UP,
                [self.keys.stream(topic), self.keys.stream(Log.DEAD), self.keys.seq(Log.DEAD), self.keys.ledger, self.keys.info],
                ["" if index is None else index, entry.id, GROUPS[topic], encode(letter), RETENTION[Log.DEAD], PLACES[topic]],
            )
        )

    # -- trainer ----------------------------------------------------------------------------------------------------------------------

    def announce(self, version: int, *, trainer: str) -> None:
        """Say which version a (re)started trainer has published, without consuming anything.

        A group that was started under the version that its predecessor did not live to announce goes on under this one, which is then its oldest.
        """
        self._own(
            self.bus.script(
                lua.ANNOUNCE,
                [self.keys.info, self.keys.stream(Log.VERSIONS), self.keys.seq(Log.VERSIONS), self.keys.ledger],
                [trainer, version, encode(VersionPublished(run_id=self.run_id, version=version)), RETENTION[Log.VERSIONS]],
            )
        )

    def skip(self, index: int, entry_id: str, *, trainer: str) -> bool:
        """Count a scored group as skipped: another one may be issued in its place. False if it is in a batch already."""
        answer = int(
            self.bus.script(
                lua.SKIP, [self.keys.info, self.keys.ledger, self.keys.stream(Work.SCORED)], [trainer, index, entry_id, GROUPS[Work.SCORED]]
            )
        )
        self._own(answer)
        return bool(answer)

    def plan(self, version: int, plan: Plan, *, trainer: str) -> None:
        """Record the batch taken at `version`, before it is trained on: a resumed trainer takes the same one."""
        self._own(
            self.bus.script(
                lua.PLAN, [self.keys.plan, self.keys.ledger, self.keys.info], [trainer, version, msgspec.msgpack.encode(plan), *plan.indices]
            )
        )

    def plans(self) -> dict[int, Plan]:
        """Batches taken since the last checkpoint, by version."""
        rows = self.bus.call(lambda: self.bus.redis.hgetall(self.keys.plan))
        return {int(version): msgspec.msgpack.decode(raw, type=Plan) for version, raw in rows.items()}

    def loading(self, version: int, *, trainer: str) -> None:
        """Servers may hold `version` from now on, beside the announced one."""
        self._own(self.bus.script(lua.LOADING, [self.keys.info], [trainer, version]))

    def commit(self, plan: Plan, step: StepRecord, samples: Sequence[Sample], *, trainer: str, keep_samples: int) -> None:
        """All live servers hold step.version + 1: announce it, count its groups as consumed and record the step. Once, however often it is called."""
        published = VersionPublished(run_id=self.run_id, version=step.version + 1)
        topics = (Log.VERSIONS, Log.STEPS, Log.SAMPLES)
        self._own(
            self.bus.script(
                lua.COMMIT,
                [self.keys.info, self.keys.ledger, *(k for t in topics for k in (self.keys.stream(t), self.keys.seq(t)))],
                [
                    trainer, step.version, published.version, encode(published), encode(step),
                    RETENTION[Log.VERSIONS], RETENTION[Log.STEPS], max(1, keep_samples),
                    len(plan.indices), *plan.indices, *(encode(sample) for sample in samples if keep_samples),
                ],
            )
        )  # fmt: skip

    def checkpointed(self, version: int) -> list[str]:
        """A checkpoint of `version` is durable: acknowledge what made it, forget the plans before it. The entry ids acknowledged."""
        past = {v: p for v, p in self.plans().items() if v < version}
        entry_ids = [entry_id for p in past.values() for entry_id in p.entry_ids]
        self.bus.acknowledge(self.run_id, Work.SCORED, entry_ids)
        if past:
            self.bus.call(lambda: self.bus.redis.hdel(self.keys.plan, *[str(v) for v in past]))
        return entry_ids

    # -- everybody --------------------------------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """The outstanding groups, in issue order."""
        raw = self.bus.call(lambda: self.bus.redis.hgetall(self.keys.ledger))
        rows = []
        for index, value in raw.items():
            place, start, attempt, max_lag = value.decode().split(":")
            rows.append(Row(int(index), Place(place), int(start) if int(start) >= 0 else None, int(attempt), int(max_lag)))
        return sorted(rows, key=lambda row: row.index)

    def version(self) -> int | None:
        """The announced version; None before the first."""
        raw = self.bus.call(lambda: self.bus.redis.hget(self.keys.info, "version"))
        return None if raw is None else int(raw)

    def data_size(self) -> int | None:
        """Prompts in the run's data source: an epoch. None before it was opened."""
        raw = self.bus.call(lambda: self.bus.redis.hget(self.keys.info, "prompts"))
        return None if raw is None else int(raw)

    def set_data_size(self, prompts: int) -> None:
        self.bus.call(lambda: self.bus.redis.hset(self.keys.info, "prompts", prompts))

    def knobs(self) -> list[KnobChange]:
        rows = self.bus.call(lambda: self.bus.redis.lrange(self.keys.knobs, 0, -1))
        return [KnobChange(version=int(raw.split(b":", 1)[0]), values=msgspec.json.decode(raw.split(b":", 1)[1])) for raw in rows]

    def preset(self, changes: Sequence[KnobChange]) -> None:
        """The knob changes that a run is to begin with; before it is made."""
        rows = [f"{change.version}:".encode() + msgspec.json.encode(change.values) for change in changes]
        self.bus.call(lambda: self.bus.redis.delete(self.keys.knobs))
        if rows:
            self.bus.call(lambda: self.bus.redis.rpush(self.keys.knobs, *rows))

    def turn(self, values: Knobs, *, expected: int) -> int | None:
        """Store a knob change after the `expected` ones known; the version from which it holds, or None if another change came first."""
        answer = int(self.bus.script(lua.TURN, [self.keys.info, self.keys.knobs], [expected, msgspec.json.encode(values)]))
        return answer if answer >= 0 else None

    def spec(self) -> RunSpec:
        """The spec with which the run was submitted."""
        raw = self.bus.call(lambda: self.bus.redis.hget(self.keys.info, "spec"))
        if raw is None:
            raise NotOurs(f"run {self.run_id} is not known")
        return RunSpec.model_validate_json(raw)

    def conservation(self) -> Conservation:
        """Counters and places, read at one moment."""
        counters, places = self.bus.script(lua.COUNT, [self.keys.info, self.keys.ledger], [])
        issued, consumed, dead, cancelled, replaying, skipped = (int(n or 0) for n in counters)
        at = Counter(bytes(p).decode() for p in places)
        return Conservation(
            issued=issued, consumed=consumed, dead=dead, cancelled=cancelled, replaying=replaying, skipped=skipped,
            queued=at["q"], running=at["r"], generated=at["g"], scored=at["s"], taken=at["t"],
        )  # fmt: skip

    def replay(self, letter_id: str) -> bool:
        """Have a dead-lettered group generated again, as soon as admission allows; False if it is not there, names no group, or the run has ended."""
        rows = self.bus.range(self.run_id, Log.DEAD, start=letter_id, end=letter_id)
        group = rows[0].message(DeadLetter).group if rows else None
        if group is None:
            return False
        return bool(
            self.bus.script(
                lua.REPLAY, [self.keys.stream(Log.DEAD), self.keys.stream(Log.DEAD) + ":replay", self.keys.info], [letter_id, encode(group)]
            )
        )

    def close(self) -> None:
        """The run has ended: what is outstanding is cancelled and its streams of work are deleted."""
        streams = [self.keys.stream(topic) for topic in Work]
        self.bus.script(lua.CLOSE, [self.keys.info, self.keys.ledger, self.keys.plan, self.keys.stream(Log.DEAD) + ":replay", *streams], [])

    def _own(self, answer: int) -> None:
        if answer < 0:
            raise NotOurs(f"run {self.run_id} is no longer this trainer's")
