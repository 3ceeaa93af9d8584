"""The log of a process on its way to the fleet's stream in Redis: taken in the caller's thread, written by one of its own.

Consumes: log records. Produces: entries of the stream `LOGS`. Waits for: a record, or Redis. Who logs waits for nothing: a line is put into a bounded
queue, and where Redis is away for so long that it is full, the oldest line is dropped and counted.

The standard library's QueueHandler is not used: it merges the traceback into the message, and drops the newest record when its queue is full.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import socket
import threading
from collections import deque
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS

from services.contracts.messages import LogLevel, LogLine
from services.runtime.bus import Bus, LogRow, StoreAway, StoreRefuses
from services.runtime.codec import encode
from services.runtime.redaction import redacted

TEXT_BYTES, TRACEBACK_BYTES, VALUE_BYTES, NAME_BYTES = 4_096, 8_192, 512, 128
"""Longest message, traceback, particular, and name of anything."""
VALUES = 16
"""Particulars of a line."""
TAIL = 0.75
"""Share of a cut traceback that is of its end, where the error is."""
MARK_BYTES = 48
MARGIN = 1_024
"""Characters beyond a cut that are looked at for secrets: one that the cut goes through must not be left in part."""
QUEUED = 4_096
"""Lines that wait while Redis is away: about 2 MB as lines usually are."""
BATCH = 500
"""Lines of one round trip."""
GATHER_SECONDS = 0.1
"""From the first line of a batch to its writing."""
PAUSE_SECONDS = 0.5
"""Between two tries to write while Redis is away."""
CLOSE_SECONDS = 2.0
"""Longest wait of an ending process for its last lines to be written."""
EXACT = 2**53
"""Integers from here on are written as texts: a browser's numbers cannot hold them."""
STANDARD = frozenset({*RESERVED_ATTRS, "taskName", "role", "member", "run", "version", "color_message", "vllm_process_name"})
"""Attributes of a record that are no particulars of its line; nor are those with an underscore, which libraries such as Ray give to every record."""


class LogShipper(logging.Handler):
    """Writes what is logged from `level` on to the stream. `close`, which is called at the interpreter's end, writes what is left. It is also called
    whenever a library configures logging, which closes all handlers: the next line opens the shipper again. A forked child ships nothing. A line may
    be written twice where Redis went away in the middle of a batch."""

    def __init__(self, redis_url: str, *, level: str, queued: int = QUEUED) -> None:
        super().__init__(level)
        self.dropped = 0
        """Lines that were never written."""
        self._bus = Bus(redis_url, patience=0.0)  # with any more it would log that it waits
        self._queue: deque[Taken] = deque()
        self._queued, self._pid, self._host = queued, os.getpid(), socket.gethostname()
        self._some: SimpleQueue[None] = SimpleQueue()
        """Holds something when there is something to do. An event's lock would stop a thread whose signal handler logs while it is held."""
        self._closing = threading.Event()
        self._open()
        atexit.register(self.close)  # once a library has closed all handlers, logging's own end no longer knows this one

    def _open(self) -> None:
        self._thread = threading.Thread(target=self._work, name="log-shipper", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Called under the handler's lock. Whatever is wrong with a record, who logged it does not learn of it here."""
        if threading.get_ident() == self._thread.ident or os.getpid() != self._pid:
            return
        try:
            self._queue.append(take(record))
        except Exception:  # a record that cannot be formatted: the handler of standard error says so
            self.dropped += 1
            return
        if len(self._queue) > self._queued:
            self.dropped += len(self._taken(1))
        if self._closing.is_set() and not self._thread.is_alive():
            self._closing.clear()
            with contextlib.suppress(RuntimeError):  # no thread can be started once the interpreter ends
                self._open()
        if self._some.empty():
            self._some.put(None)

    def close(self) -> None:
        if os.getpid() == self._pid and not self._closing.is_set():
            self._closing.set()
            self._some.put(None)
            self._thread.join(CLOSE_SECONDS)
        super().close()

    def _taken(self, most: int) -> list[Taken]:
        """The oldest lines. Without a lock: at its end the interpreter holds the handler's while it waits for this thread."""
        found: list[Taken] = []
        with contextlib.suppress(IndexError):
            while len(found) < most:
                found.append(self._queue.popleft())
        return found

    def _work(self) -> None:
        ending = False
        while not ending:
            self._some.get()
            ending = self._closing.wait(GATHER_SECONDS)
            while batch := self._taken(BATCH):
                rows = [row for taken in batch if (row := self._row(taken)) is not None]
                while not self._written(rows):
                    if self._closing.wait(PAUSE_SECONDS):
                        return

    def _row(self, taken: Taken) -> LogRow | None:
        try:
            line = line_of(taken, host=self._host, pid=self._pid)
            return LogRow(level=line.level.value, role=line.role, member=line.member, run=line.run_id or "", data=encode(line))
        except Exception:  # a line that cannot be written must not end the thread, and with it the process
            self.dropped += 1
            return None

    def _written(self, rows: list[LogRow]) -> bool:
        try:
            self._bus.append_logs(rows)
        except (StoreAway, StoreRefuses):  # whose work needs Redis says so in the log
            return False
        return True


@dataclass(frozen=True, slots=True)
class Taken:
    """A record as it was when it was logged: what it speaks of may change before it is written. Its texts are bounded, not yet free of secrets."""

    at: float
    level: int
    logger: str
    stamps: tuple[Any, Any, Any, Any]
    """Role, member, run and version."""
    text: str
    traceback: str | None
    data: dict[str, str | float | int | bool]


def take(record: logging.LogRecord) -> Taken:
    """In the thread of who logs, so no more than must be done there."""
    given = record.__dict__
    traceback = record.exc_text
    if traceback is None and record.exc_info and record.exc_info[0] is not None:
        traceback = _FORMATTER.formatException(record.exc_info)
    return Taken(
        at=record.created,
        level=record.levelno,
        logger=record.name,
        stamps=(given.get("role"), given.get("member"), given.get("run"), given.get("version")),
        text=_held(record.getMessage(), TEXT_BYTES),
        traceback=None if traceback is None else _held(traceback, TRACEBACK_BYTES, tail=TAIL),
        data={name: plain(value) for name, value in given.items() if name not in STANDARD and not name.startswith("_") and value is not None},
    )


def line_of(taken: Taken, *, host: str, pid: int) -> LogLine:
    """In the shipper's own thread."""
    role, member, run, version = taken.stamps
    return LogLine(
        at=taken.at,
        level=level_of(taken.level),
        logger=excerpt(taken.logger, NAME_BYTES),
        role=excerpt(str(role or ""), NAME_BYTES),
        member=excerpt(str(member or ""), NAME_BYTES),
        host=host,
        pid=pid,
        run_id=None if run is None else excerpt(str(run), NAME_BYTES),
        version=version if isinstance(version, int) and abs(version) < EXACT else None,
        text=excerpt(taken.text, TEXT_BYTES),
        traceback=None if taken.traceback is None else excerpt(taken.traceback, TRACEBACK_BYTES, tail=TAIL),
        data={
            excerpt(name, NAME_BYTES): excerpt(value, VALUE_BYTES) if isinstance(value, str) else value
            for name, value in list(taken.data.items())[:VALUES]
        },
    )


def level_of(number: int) -> LogLevel:
    """The level at or below a number: libraries have levels of their own between the standard ones."""
    return next((level for least, level in _LEVELS if number >= least), LogLevel.DEBUG)


def plain(value: object) -> str | float | int | bool:
    """A particular as JSON can hold it."""
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) < EXACT) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _held(str(value), VALUE_BYTES)


def excerpt(text: str, most: int, *, tail: float = 0.0) -> str:
    """`text` without secrets, as at most so many bytes of UTF-8. Of a longer one: its beginning, how long it was, and of its end a share `tail`."""
    if len(text) <= most:
        whole = redacted(text).encode("utf-8", "backslashreplace")
        if len(whole) <= most:
            return whole.decode()
    room = most - MARK_BYTES
    last = int(room * tail)
    mark = f" [cut: {len(text):,} characters] "
    return _first(text, room - last) + mark + (_last(text, last) if last else "")


def _held(text: str, most: int, *, tail: float = 0.0) -> str:
    """What may wait in the queue: of a text that is too long whatever its bytes are, an excerpt."""
    return text if len(text) <= most else excerpt(text, most, tail=tail)


def _first(text: str, most: int) -> str:
    seen = redacted(text[: most + MARGIN])
    kept = seen[:-MARGIN] if len(text) > most + MARGIN else seen
    return kept.encode("utf-8", "backslashreplace")[:most].decode("utf-8", "ignore")


def _last(text: str, most: int) -> str:
    seen = redacted(text[-most - MARGIN :])
    kept = seen[MARGIN:] if len(text) > most + MARGIN else seen
    return kept.encode("utf-8", "backslashreplace")[-most:].decode("utf-8", "ignore")


_FORMATTER = logging.Formatter()
_LEVELS = (
    (logging.CRITICAL, LogLevel.CRITICAL), (logging.ERROR, LogLevel.ERROR), (logging.WARNING, LogLevel.WARNING), (logging.INFO, LogLevel.INFO),
)  # fmt: skip
