"""Where one solution is tried: sessions of the sandbox, one after the other, under one budget of time."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from reward_server.sandbox.jobs import Limits, Sandbox, Session

SLACK = 1.0
"""Seconds that a session is given beyond the budget: each request has its own limit, which is the one to be hit."""


class Unusable(Exception):
    """The solution cannot be tried at all: it does not load, or does not compile. Its fault."""


class Budget:
    """Time for all tests of a solution together; waiting for the sandbox is not counted."""

    def __init__(self, seconds: float, each: float) -> None:
        self.left, self.each = seconds, each

    @contextmanager
    def request(self) -> Iterator[float]:
        """Gives the seconds that a request may take, and takes off what it took."""
        began = time.monotonic()
        try:
            yield max(0.01, min(self.each, self.left))
        finally:
            self.left -= time.monotonic() - began


class Bench:
    """A session with the solution made ready in it, and a fresh one after that was stopped."""

    def __init__(self, sandbox: Sandbox, prepare: Callable[[Session], None], limits: Callable[[], Limits]) -> None:
        """`prepare` raises Unusable or Stopped."""
        self._sandbox, self._prepare, self._limits = sandbox, prepare, limits
        self._session: Session | None = None
        self._open = ExitStack()

    def session(self) -> Session:
        """Raises Refused, and what `prepare` raises."""
        if self._session is None:
            session = self._open.enter_context(self._sandbox.open(self._limits()))
            self._prepare(session)
            self._session = session
        return self._session

    def close(self) -> None:
        """Ends the session, if there is one; the next is a fresh one."""
        self._session = None
        self._open.close()


def limits_within(seconds: float, *, memory_bytes: int, commands: bool = False) -> Limits:
    """Of a session for requests of so much time together."""
    seconds = max(0.1, seconds) + SLACK
    return Limits(
        seconds=seconds, cpu_seconds=math.ceil(seconds), memory_bytes=memory_bytes, file_bytes=(64 if commands else 16) << 20,
        processes=32 if commands else 1, commands=commands,
    )  # fmt: skip


_turns: WeakKeyDictionary[Sandbox, threading.BoundedSemaphore] = WeakKeyDictionary()
_turns_lock = threading.Lock()


@contextmanager
def two_sessions(sandbox: Sandbox) -> Iterator[None]:
    """Held by who opens a second session while it has one: one place of the sandbox stays free of such, so that some of them always go on."""
    with _turns_lock:
        turns = _turns.setdefault(sandbox, threading.BoundedSemaphore(max(1, sandbox.places - 1)))
    with turns:
        yield
