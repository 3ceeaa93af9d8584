"""The run store over Redis: runs by id and by age, and their events followed without a thread for each reader."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import redis.asyncio

from services.contracts.messages import RunEvent
from services.contracts.spec import RunSpec
from services.contracts.states import TERMINAL, RunState
from services.contracts.topics import ACTIVE, IDEMPOTENCY, LOGS, RETENTION, RUNS, Log, RunKeys, parent_of
from services.runtime.bus import AWAY, Bus, Entry, StoreAway
from services.runtime.codec import encode
from services.runtime.evaluations import EvaluationLedger
from services.runtime.lifecycle import RunLifecycle, UnknownRun

IDEMPOTENCY_SECONDS = 86_400
FIELDS = ("spec", "name", "state", "reason", "created_at", "started_at", "ended_at", "trainer", "version", "superseded", "unreadable", "requeued")
ID_TAKEN = -1
"""Answer of the script that creates a run when another run of that second has the same random digits."""
SCAN = 200
"""Runs looked at together when a page is made."""


class KeyTaken(ValueError):
    """The idempotency key has been used for another body."""


@dataclass(frozen=True)
class Run:
    """A run, as the store has it."""

    run_id: str
    spec_json: bytes
    name: str
    state: RunState
    reason: str
    created_at: float
    started_at: float | None
    ended_at: float | None
    trainer: str | None
    version: int | None
    superseded: int
    unreadable: int
    requeued: int = 0
    """How often it was queued again: it was resumed, or its trainer was lost."""

    @property
    def spec(self) -> RunSpec:
        return _parsed(self.spec_json)

    @property
    def generates(self) -> bool:
        """Whether it needs rollout servers: a replay trains on what another run has recorded."""
        return self.spec.replay is None


@lru_cache(maxsize=1024)
def _parsed(spec_json: bytes) -> RunSpec:
    """A spec never changes, and every tick of the loops asks for those of all open runs."""
    return RunSpec.model_validate_json(spec_json)


class RunStore:
    """All runs."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self._ended: set[str] = set()  # to end is for good, so these need no second look

    def create(self, spec: RunSpec, *, idempotency_key: str | None = None) -> tuple[Run, bool]:
        """The run and whether it is new: a key that was used before with the same spec gives the run that it made. Raises KeyTaken."""
        while True:
            made, found = self._create(new_run_id(spec.name), spec, idempotency_key)
            if made == ID_TAKEN:
                continue
            if not found:
                raise KeyTaken("this idempotency key was used for another spec: send a new key with a new spec")
            return self.get(found.decode()), bool(made)

    def create_as(self, run_id: str, spec: RunSpec) -> bool:
        """Make the run with this id; False when there is one already, which is left as it is."""
        return bool(self._create(run_id, spec, None)[0] != ID_TAKEN)

    def _create(self, run_id: str, spec: RunSpec, idempotency_key: str | None) -> Any:
        text, keys = spec.model_dump_json(), RunKeys(run_id)
        event = RunEvent(run_id=run_id, event="run_created", text="Submitted", data={"name": spec.name})
        return self.bus.script(
            _CREATE,
            [keys.info, RUNS, keys.stream(Log.EVENTS), keys.seq(Log.EVENTS), f"{IDEMPOTENCY}:{digest(idempotency_key or '')}"],
            [
                run_id, digest(text) if idempotency_key else "", IDEMPOTENCY_SECONDS, time.time(), encode(event), RETENTION[Log.EVENTS],
                "spec", text, "name", spec.name, "state", RunState.QUEUED, "reason", "",
            ],
        )  # fmt: skip

    def get(self, run_id: str) -> Run:
        """Raises UnknownRun, for an evaluation set too: it lives and ends with its run."""
        found = self.several([run_id]) if parent_of(run_id) is None else []
        if not found:
            raise UnknownRun(run_id)
        return found[0]

    def several(self, run_ids: list[str]) -> list[Run]:
        """These runs, in this order; those that are not known are left out."""
        pipe = self.bus.redis.pipeline(transaction=False)
        for run_id in run_ids:
            pipe.hmget(RunKeys(run_id).info, FIELDS)
        rows = self.bus.call(pipe.execute) if run_ids else []
        return [_run(run_id, row) for run_id, row in zip(run_ids, rows, strict=True) if row[0] is not None]

    def ids(self) -> list[str]:
        """All runs, oldest first."""
        return [raw.decode() for raw in self.bus.call(lambda: self.bus.redis.zrange(RUNS, 0, -1))]

    def page(self, *, state: RunState | None, name: str | None, cursor: str | None, limit: int) -> tuple[list[Run], str | None]:
        """Up to `limit` runs after the one that `cursor` names, newest first, and the next cursor; `name`: any part of a run's name, or how its
        id begins, in whatever case. Raises UnknownRun for a wrong cursor."""
        found: list[str] = []
        last = cursor
        while True:
            ids = self._after(last)
            found += self._fitting(ids, state=state, name=name)
            if len(found) > limit:
                return self.several(found[:limit]), found[limit - 1]
            if len(ids) < SCAN:
                return self.several(found), None
            last = ids[-1]

    def _after(self, run_id: str | None) -> list[str]:
        """The next SCAN runs that are older than this one; None: the newest. Raises UnknownRun."""
        place = 0
        if run_id is not None:
            rank = self.bus.call(lambda: self.bus.redis.zrevrank(RUNS, run_id))
            if rank is None:
                raise UnknownRun(run_id)
            place = rank + 1
        return [raw.decode() for raw in self.bus.call(lambda: self.bus.redis.zrevrange(RUNS, place, place + SCAN - 1))]

    def _fitting(self, run_ids: list[str], *, state: RunState | None, name: str | None) -> list[str]:
        """Those that a filter lets through. Without their specs, which are most of what a run is."""
        if state is None and name is None:
            return run_ids
        pipe = self.bus.redis.pipeline(transaction=False)
        for run_id in run_ids:
            pipe.hmget(RunKeys(run_id).info, "state", "name")
        rows = self.bus.call(pipe.execute) if run_ids else []
        part = (name or "").lower()
        return [
            run_id for run_id, (its_state, its_name) in zip(run_ids, rows, strict=True)
            if its_state is not None and (state is None or its_state.decode() == state)
            and (part in its_name.decode().lower() or run_id.lower().startswith(part))
        ]  # fmt: skip

    def open_runs(self) -> list[Run]:
        """The runs that have not ended for good, and those that have but were not yet closed; oldest first."""
        active = self.active()
        ids = [run_id for run_id in self.ids() if run_id not in self._ended or run_id in active]
        runs = self.several(ids)
        self._ended.update(run.run_id for run in runs if run.state in TERMINAL)
        return [run for run in runs if run.state not in TERMINAL or run.run_id in active]

    def active(self) -> set[str]:
        """The runs and evaluation sets whose streams of work the reward servers read."""
        return {raw.decode() for raw in self.bus.call(lambda: self.bus.redis.smembers(ACTIVE))}

    def activate(self, run_id: str) -> None:
        """Make the run's streams of work and let the reward servers read them."""
        self.bus.open_work(run_id)
        self.bus.call(lambda: self.bus.redis.sadd(ACTIVE, run_id))

    def deactivate(self, run_id: str) -> None:
        """The run has ended: reward servers forget it, and its evaluations end with it."""
        for child in self.active():
            if parent_of(child) == run_id:
                EvaluationLedger(self.bus, child).end()
        self.bus.call(lambda: self.bus.redis.srem(ACTIVE, run_id))

    def lifecycle(self, run_id: str) -> RunLifecycle:
        return RunLifecycle(self.bus, run_id)


class EventTail:
    """Follows the events of runs on asyncio: a reader costs a connection to Redis while it waits, and no thread."""

    def __init__(self, url: str) -> None:
        self._redis: Any = redis.asyncio.Redis.from_url(url, socket_connect_timeout=2, socket_timeout=15)

    async def read(self, run_id: str, *, after: str, block_ms: int, count: int = 200) -> list[Entry]:
        """Events after the id `after`, oldest first; waits up to `block_ms` for the first one. Raises StoreAway."""
        stream = RunKeys(run_id).stream(Log.EVENTS)
        try:
            if not await self._redis.xread({stream: after}, count=1, block=block_ms):
                return []
            rows = await self._redis.xrange(stream, min=f"({after}", count=count)
        except AWAY as error:
            raise StoreAway(f"Redis is away: {error}") from error
        return [Entry(stream, entry_id.decode(), fields) for entry_id, fields in rows]

    async def read_logs(self, run_id: str, *, after: Mapping[Log, str], block_ms: int, count: int) -> list[tuple[Log, Entry]]:
        """Up to `count` entries of each log after the id that `after` gives it, in each log's order; waits up to `block_ms` for the first one.

        Raises StoreAway.
        """
        places = {RunKeys(run_id).stream(log): (log, entry_id) for log, entry_id in after.items()}
        asked = {stream: entry_id for stream, (_, entry_id) in places.items()}
        try:
            answer = await self._redis.xread(asked, count=count, block=block_ms)
        except AWAY as error:
            raise StoreAway(f"Redis is away: {error}") from error
        rows = [(name.decode(), found) for name, found in answer or ()]
        return [(places[name][0], Entry(name, entry_id.decode(), fields)) for name, found in rows for entry_id, fields in found]

    async def read_logs_of_fleet(self, *, after: str, block_ms: int, count: int) -> list[Entry]:
        """Up to `count` lines of the fleet's log after the id `after`, oldest first; waits up to `block_ms` for the first one. Raises StoreAway."""
        try:
            answer = await self._redis.xread({LOGS: after}, count=count, block=block_ms)
        except AWAY as error:
            raise StoreAway(f"Redis is away: {error}") from error
        return [Entry(LOGS, entry_id.decode(), fields) for _, found in answer or () for entry_id, fields in found]

    async def standing(self, run_id: str) -> tuple[RunState, int | None, str] | None:
        """State, version and reason of a run; None when it is gone. Raises StoreAway."""
        try:
            state, version, reason = await self._redis.hmget(RunKeys(run_id).info, "state", "version", "reason")
        except AWAY as error:
            raise StoreAway(f"Redis is away: {error}") from error
        return None if state is None else (RunState(state.decode()), int(version) if version else None, (reason or b"").decode())

    async def ended(self, run_id: str) -> bool:
        """Whether the run has ended for good. Raises StoreAway."""
        try:
            raw = await self._redis.hget(RunKeys(run_id).info, "state")
        except AWAY as error:
            raise StoreAway(f"Redis is away: {error}") from error
        return raw is None or RunState(raw.decode()) in TERMINAL

    async def close(self) -> None:
        await self._redis.aclose()


def new_run_id(name: str) -> str:
    """Such as `demo-20261122-104501-3f9a`: ids of one name sort by age."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:32].strip("-") or "run"
    return f"{slug}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _run(run_id: str, row: list[bytes | None]) -> Run:
    field = dict(zip(FIELDS, row, strict=True))

    def text(name: str) -> str:
        return (field[name] or b"").decode()

    def number(name: str) -> float | None:
        return float(text(name)) if field[name] else None

    return Run(
        run_id=run_id, spec_json=field["spec"] or b"", name=text("name"), state=RunState(text("state")), reason=text("reason"),
        created_at=number("created_at") or 0.0, started_at=number("started_at"), ended_at=number("ended_at"), trainer=text("trainer") or None,
        version=int(text("version")) if field["version"] else None, superseded=int(text("superseded") or 0), unreadable=int(text("unreadable") or 0),
        requeued=int(text("requeued") or 0),
    )  # fmt: skip


_CREATE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return {-1, false} end
if ARGV[2] ~= '' then
  local known = redis.call('GET', KEYS[5])
  if known then
    local digest, run_id = string.match(known, '(%x+) (.*)')
    if digest ~= ARGV[2] then return {0, false} end
    return {0, run_id}
  end
  redis.call('SET', KEYS[5], ARGV[2] .. ' ' .. ARGV[1], 'EX', ARGV[3])
end
for i = 7, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], 'created_at', ARGV[4])
redis.call('ZADD', KEYS[2], ARGV[4], ARGV[1])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[6], '*', 'seq', redis.call('INCR', KEYS[4]), 'data', ARGV[5])
return {1, ARGV[1]}
"""
