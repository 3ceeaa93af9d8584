"""The bus: Redis Streams with consumer groups, on Redis 7.0 and newer, and on Valkey.

An entry of work is acknowledged after its effect, and reclaimed from a consumer that died; admission bounds how many there are.
All calls block; asynchronous processes make them in a thread.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from services.contracts.messages import Message
from services.contracts.topics import GROUPS, LOGS, LOGS_KEPT, RETENTION, Log, RunKeys, Work
from services.runtime.codec import Undecodable, decode, encode

log = logging.getLogger(__name__)
T = TypeVar("T")
M = TypeVar("M", bound=Message)
AWAY = (redis.ConnectionError, redis.TimeoutError)
MAX_DIGITS = 15
"""Of a number in an entry's fields: what Lua's numbers hold exactly."""
HANDED_BACK_MS = 86_400_000
"""Idle time that an entry is given when it is handed back: longer than any holder is silent."""
LUA_ARGUMENTS = 1000
"""Lua's `unpack` gives a function at most about 8,000 arguments."""
ENDING_PATIENCE = 2.0
"""Seconds that an ending process still waits for Redis."""


_GONE = object()
GONE_CODES = ("NOGROUP", "UNBLOCKED")
"""How Redis says that a stream is not there, and how 7.0 tells it to those who are waiting for its entries."""


class StoreAway(ConnectionError):
    """Redis did not answer within the caller's patience."""


class StoreRefuses(RuntimeError):
    """Redis answers, but not to us: wrong password, or too old."""


@dataclass(frozen=True)
class Entry:
    """One entry of a stream, not yet decoded."""

    stream: str
    id: str
    fields: dict[bytes, bytes]

    @property
    def index(self) -> int | None:
        """Index of the group that the entry is about, readable even when the message is not."""
        return _number(self.fields.get(b"index", b""))

    @property
    def seq(self) -> int:
        number = _number(self.fields.get(b"seq", b""))
        return -1 if number is None else number

    def message(self, model: type[M]) -> M:
        """Raises Undecodable."""
        if b"data" not in self.fields:
            raise Undecodable(f"an entry without data: fields {sorted(k.decode(errors='replace') for k in self.fields)}")
        return decode(model, self.fields[b"data"])


@dataclass(frozen=True)
class LogRow:
    """One line of the fleet's log as it is stored: what is filtered by beside the message, so that it need not be decoded to be passed over."""

    level: str
    role: str
    member: str
    run: str
    """Empty where the line speaks of none."""
    data: bytes


class Bus:
    """A connection to Redis. `patience` is how many seconds a call waits for Redis to come back; None waits for ever and says so in the log."""

    def __init__(self, url: str, *, patience: float | None = None) -> None:
        self.redis: Any = redis.Redis.from_url(
            url, retry=Retry(NoBackoff(), 0), socket_connect_timeout=2, socket_timeout=15, health_check_interval=15
        )
        self.patience = patience
        self.away_seconds = 0.0
        self.away = False
        """Redis did not answer the last call, of whatever thread."""
        self._scripts: dict[str, Any] = {}

    def call(self, do: Callable[[], T]) -> T:
        """Result of `do`, tried again while Redis is away. Raises StoreAway after `patience`, StoreRefuses when waiting cannot help."""
        start, said, pause = time.monotonic(), 0.0, 0.05
        while True:
            try:
                result = do()
            except redis.AuthenticationError as error:
                raise StoreRefuses(f"Redis refuses the password: {error}") from error
            except AWAY as error:
                self.away = True
                waited = time.monotonic() - start
                if self.patience is not None and waited >= self.patience:
                    raise StoreAway(f"Redis is away: {error}") from error
                if waited - said >= 5 or said == 0.0:
                    log.warning("waiting for Redis", extra={"waited_seconds": round(waited, 1), "error": str(error)})
                    said = max(waited, 0.001)
                time.sleep(pause)
                pause = min(1.0, pause * 2)
            else:
                self.away = False
                if said:
                    self.away_seconds += time.monotonic() - start
                    log.warning("Redis is back", extra={"waited_seconds": round(time.monotonic() - start, 1)})
                return result

    def hurry(self) -> None:
        """The process is ending: calls, those that wait now too, no longer wait for ever."""
        self.patience = ENDING_PATIENCE

    def check_version(self) -> str:
        """The server's name and version. Raises StoreRefuses below Redis 7.0."""
        info: dict[str, Any] = self.call(lambda: self.redis.info("server"))
        name = "valkey" if "valkey_version" in info else "redis"
        version = str(info.get("valkey_version") or info["redis_version"])
        if int(version.split(".")[0]) < 7:
            raise StoreRefuses(f"{name} {version} is too old: Offbeat needs Redis 7.0 or newer, or Valkey")
        return f"{name} {version}"

    def script(self, source: str, keys: list[str], args: list[Any]) -> Any:
        """Run a Lua script: its steps happen together or not at all."""
        if source not in self._scripts:
            self._scripts[source] = self.redis.register_script(source)
        return self.call(lambda: self._scripts[source](keys=keys, args=args))

    def append(self, run_id: str, topic: Log, message: Message, *, keep: int | None = None) -> None:
        """Add to a log stream, trimmed at its oldest end to about `keep` entries."""
        keys = RunKeys(run_id)
        self.script(_APPEND, [keys.stream(topic), keys.seq(topic)], [encode(message), RETENTION[topic] if keep is None else keep])

    def append_logs(self, rows: Sequence[LogRow]) -> None:
        """Add lines to the log of the fleet in one round trip. Raises StoreRefuses where Redis takes none, as when its memory is full."""
        pipe = self.redis.pipeline(transaction=False)
        for row in rows:
            pipe.xadd(LOGS, vars(row), maxlen=LOGS_KEPT, approximate=True)
        try:
            self.call(pipe.execute)
        except redis.RedisError as error:
            raise StoreRefuses(f"Redis takes no lines of the log: {error}") from error

    def logs(self, *, before: str = "+", after: str = "-", count: int) -> list[Entry]:
        """Lines of the fleet's log between two ids, newest first."""
        rows = self.call(lambda: self.redis.xrevrange(LOGS, max=before, min=after, count=count))
        return [Entry(LOGS, _text(entry_id), fields) for entry_id, fields in rows]

    def read_log(self, run_id: str, topic: Log, *, after: str = "0", count: int = 1000, block_ms: int | None = None) -> list[Entry]:
        """Entries after the id `after`, oldest first; waits up to `block_ms` for the first one."""
        stream = RunKeys(run_id).stream(topic)
        answer = self.call(lambda: self.redis.xread({stream: after}, count=count, block=block_ms))
        return _entries(answer)

    def range(
        self, run_id: str, topic: Log | Work, *, start: str = "-", end: str = "+", count: int | None = None, newest_first: bool = False
    ) -> list[Entry]:
        stream = RunKeys(run_id).stream(topic)
        if newest_first:
            rows = self.call(lambda: self.redis.xrevrange(stream, max=end, min=start, count=count))
        else:
            rows = self.call(lambda: self.redis.xrange(stream, min=start, max=end, count=count))
        return [Entry(stream, _text(entry_id), fields) for entry_id, fields in rows]

    def open_work(self, run_id: str) -> None:
        """Make the run's streams of work and their consumer groups; harmless when they are there."""
        keys = RunKeys(run_id)
        for topic, group in GROUPS.items():
            make = partial(self.redis.xgroup_create, keys.stream(topic), group, id="0", mkstream=True)
            try:
                self.call(make)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    def claim(self, run_ids: Iterable[str], topic: Work, consumer: str, *, count: int, block_ms: int | None) -> list[Entry]:
        """Up to `count` new entries of work for this consumer, of each of these runs; waits up to `block_ms` for the first one."""
        streams = {RunKeys(r).stream(topic): ">" for r in run_ids}
        while streams and count > 0:
            answer = self._of_group(partial(self.redis.xreadgroup, GROUPS[topic], consumer, streams, count=count, block=block_ms), _GONE)
            if answer is not _GONE:
                return _entries(answer)
            there = {stream: ">" for stream in streams if self.call(partial(self.redis.exists, stream))}
            streams = there if len(there) < len(streams) else {}
        if count > 0:
            time.sleep((block_ms or 0) / 1000)
        return []

    def claim_next(self, run_ids: Sequence[str], topic: Work, consumer: str) -> Entry | None:
        """One new entry of work of the first of these runs that has any."""
        if not run_ids:
            return None
        answer = self.script(_CLAIM_NEXT, [RunKeys(run_id).stream(topic) for run_id in run_ids], [GROUPS[topic], consumer])
        for stream, ((entry_id, flat),) in answer or ():
            return Entry(_text(stream), _text(entry_id), dict(zip(flat[::2], flat[1::2], strict=True)))
        return None

    def reclaim(self, run_id: str, topic: Work, consumer: str, *, idle_ms: int, count: int, own_after_ms: int = 0) -> list[Entry]:
        """Entries that another consumer has held for `idle_ms` without a sign of life, now this one's. What this consumer itself has handed back it
        leaves to others for `own_after_ms`."""
        stream, group = RunKeys(run_id).stream(topic), GROUPS[topic]
        # Not XAUTOCLAIM: it looks at 10 * count entries, and those of the dead may be behind more of the living.
        idle = self._of_group(lambda: self.redis.xpending_range(stream, group, min="-", max="+", count=count, idle=idle_ms), [])
        own = range(HANDED_BACK_MS, HANDED_BACK_MS + own_after_ms)
        ids = [row["message_id"] for row in idle if _text(row["consumer"]) != consumer or row["time_since_delivered"] not in own]
        rows = self._of_group(lambda: self.redis.xclaim(stream, group, consumer, min_idle_time=idle_ms, message_ids=ids), []) if ids else []
        return [Entry(stream, _text(entry_id), fields) for entry_id, fields in rows if fields]

    def touch(self, run_id: str, topic: Work, consumer: str, entry_ids: list[str]) -> None:
        """Sign of life for entries that this consumer is still working on; none for those that it has handed back, or lost to another."""
        if entry_ids:
            self.script(_SET_IDLE, [RunKeys(run_id).stream(topic)], [GROUPS[topic], consumer, 0, HANDED_BACK_MS, *entry_ids])

    def hand_back(self, run_id: str, topic: Work, consumer: str, entry_ids: list[str]) -> None:
        """Give up entries so that the next `reclaim` of anybody gets them at once."""
        if entry_ids:
            self.script(_SET_IDLE, [RunKeys(run_id).stream(topic)], [GROUPS[topic], consumer, HANDED_BACK_MS, HANDED_BACK_MS, *entry_ids])

    def deliveries(self, run_id: str, topic: Work, entry_id: str) -> int:
        """How often an entry has been given to a consumer."""
        stream = RunKeys(run_id).stream(topic)
        rows = self._of_group(lambda: self.redis.xpending_range(stream, GROUPS[topic], min=entry_id, max=entry_id, count=1), [])
        return int(rows[0]["times_delivered"]) if rows else 0

    def own(self, run_id: str, topic: Work, consumer: str, *, page: int = 1000) -> list[Entry]:
        """Entries that this consumer holds already: what a restarted one finds of its own."""
        stream, found, after = RunKeys(run_id).stream(topic), list[Entry](), "0"
        while True:
            answer = self._of_group(partial(self.redis.xreadgroup, GROUPS[topic], consumer, {stream: after}, count=page), [])
            rows = _rows(answer)
            found += _entries(answer)
            if len(rows) < page:
                return found
            after = rows[-1][1]

    def acknowledge(self, run_id: str, topic: Work, entry_ids: list[str]) -> None:
        """The effect of these entries is durable: acknowledge and delete them."""
        for i in range(0, len(entry_ids), LUA_ARGUMENTS):
            self.script(_ACKNOWLEDGE, [RunKeys(run_id).stream(topic)], [GROUPS[topic], *entry_ids[i : i + LUA_ARGUMENTS]])

    def _of_group(self, do: Callable[[], Any], gone: Any) -> Any:
        """Result of `do`, or `gone` when the stream is not there: the run has ended or its streams are being made."""
        try:
            return self.call(do)
        except redis.ResponseError as error:
            if not str(error).startswith(GONE_CODES):
                raise
            return gone

    def close(self) -> None:
        self.redis.close()


@contextlib.contextmanager
def without_redis() -> Iterator[None]:
    """End the process in order, and say why, when Redis is away for good or refuses it."""
    try:
        yield
    except (StoreAway, StoreRefuses) as error:
        log.error("ended", extra={"error": str(error)})
        sys.exit(1)


class SequenceCheck:
    """Watches the numbers of the entries that one reader sees of a stream: a gap means that entries were lost or trimmed unread."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self.gaps = 0

    def see(self, entry: Entry) -> int:
        """How many entries are missing before this one."""
        last = self._last.get(entry.stream)
        missing = max(0, entry.seq - last - 1) if last is not None and entry.seq >= 0 else 0
        if entry.seq >= 0:
            self._last[entry.stream] = max(entry.seq, last if last is not None else -1)
        self.gaps += missing
        return missing


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _number(raw: bytes) -> int | None:
    return int(raw) if raw.isdigit() and len(raw) <= MAX_DIGITS else None


def _rows(answer: Any) -> list[tuple[str, str, dict[bytes, bytes] | None]]:
    """(stream, entry id, fields) of each entry; the fields of one that was deleted are empty."""
    pairs = answer.items() if isinstance(answer, dict) else answer or []
    found: list[tuple[str, str, dict[bytes, bytes] | None]] = []
    for stream, rows in pairs:
        if rows and isinstance(rows[0], list) and (not rows[0] or isinstance(rows[0][0], (list, tuple))):  # RESP3 wraps the rows once more
            rows = [row for part in rows for row in part]
        found += [(_text(stream), _text(entry_id), fields) for entry_id, fields in rows]
    return found


def _entries(answer: Any) -> list[Entry]:
    return [Entry(stream, entry_id, fields) for stream, entry_id, fields in _rows(answer) if fields]


_CLAIM_NEXT = """
for i = 1, #KEYS do
  local found = redis.pcall('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', 1, 'STREAMS', KEYS[i], '>')
  if found and found.err and not string.find(found.err, 'NOGROUP', 1, true) then return found end
  if found and not found.err then return found end
end
return false
"""

_APPEND = """
local n = redis.call('INCR', KEYS[2])
return redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', 'seq', n, 'data', ARGV[1])
"""

_SET_IDLE = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
for i = 5, #ARGV do
  local held = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])[1]
  if held and held[3] < tonumber(ARGV[4]) then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'IDLE', ARGV[3], 'JUSTID')
  end
end
return 1
"""

_ACKNOWLEDGE = """
local ids = {}
for i = 2, #ARGV do ids[#ids + 1] = ARGV[i] end
redis.call('XACK', KEYS[1], ARGV[1], unpack(ids))
return redis.call('XDEL', KEYS[1], unpack(ids))
"""
