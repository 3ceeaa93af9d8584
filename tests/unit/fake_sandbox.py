"""A sandbox that confines nothing: code of the tests runs in this process. It notes what its sessions were told, and obeys `stop(cause)`."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from typing import Any

from reward_server.sandbox.jobs import Cause, Limits, Refused, Reply, Stopped, Tier

RECURSION_LIMIT = sys.getrecursionlimit()
"""Some code raises it, beyond what the libraries of this process can stand."""
_one_at_a_time = threading.Lock()  # standard input and output are the process's


class _Stop(BaseException):
    pass


def _stop(cause: str | None) -> None:
    raise _Stop(cause)


class FakeSession:
    def __init__(self, sandbox: FakeSandbox, limits: Limits) -> None:
        self.sandbox, self.limits = sandbox, limits
        self.names: dict[str, Any] = {}
        self.told: list[Any] = []
        self.over = False

    def load(self, code: str, *, seconds: float) -> Reply:
        self.told.append(code)
        self.names = {"__name__": "solution", "stop": _stop}
        return self._done(lambda: exec(compile(code, "solution", "exec"), self.names), seconds, keep=False)

    def call(self, name: str, args: list[Any], kwargs: dict[str, Any], *, seconds: float) -> Reply:
        self.told.append((name, args, kwargs))
        if self.sandbox.kills:
            self.sandbox.kills -= 1
            self.over = True
            raise Stopped(Cause.MEMORY, "killed", killed=True)

        def called() -> Any:
            owner, _, method = name.rpartition(".")
            function = getattr(self.names[owner](), method) if owner else self.names[name]
            return function(*args, **kwargs)

        return self._done(called, seconds)

    def program(self, code: str, stdin: str, *, seconds: float) -> Reply:
        self.told.append((code, stdin))
        names = {"__name__": "__main__", "stop": _stop}

        def run() -> None:
            real, sys.stdin = sys.stdin, io.StringIO(stdin)
            try:
                exec(compile(code, "program", "exec"), names)
            finally:
                sys.stdin = real

        return self._done(run, seconds, keep=False)

    def write(self, name: str, content: bytes) -> None:
        self.told.append((name, content))

    def command(self, argv: list[str], stdin: str, *, seconds: float) -> Reply:
        self.told.append((argv, stdin))
        return self.sandbox.commands.pop(0)

    def __enter__(self) -> FakeSession:
        self.sandbox.open_now += 1
        self.sandbox.most_open = max(self.sandbox.most_open, self.sandbox.open_now)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setrecursionlimit(RECURSION_LIMIT)
        self.over = True
        self.sandbox.open_now -= 1
        self.sandbox.room.release()

    def _done(self, what: Any, seconds: float, *, keep: bool = True) -> Reply:
        assert not self.over, "the session was over"
        printed = io.StringIO()
        began = time.monotonic()
        try:
            with _one_at_a_time, contextlib.redirect_stdout(printed):
                value = what()
        except _Stop as stop:
            self.over = True
            cause = stop.args[0]
            raise Stopped(Cause(cause) if cause else None, f"stopped by {cause}" if cause else "the process ended") from None
        except Exception as wrong:
            return Reply(output=printed.getvalue(), error=f"{type(wrong).__name__}: {wrong}")
        if time.monotonic() - began > seconds:
            self.over = True
            raise Stopped(Cause.TIME, "out of time")
        return Reply(value=value if keep else None, output=printed.getvalue())


class FakeSandbox:
    tier = Tier.LANDLOCK

    def __init__(self, *, places: int = 2, refuses_after: int | None = None, kills: int = 0) -> None:
        """The first `kills` calls end their session from outside."""
        self.places, self.refuses_after, self.kills = places, refuses_after, kills
        self.room = threading.Semaphore(places)
        self.sessions: list[FakeSession] = []
        self.commands: list[Reply] = []
        self.open_now = self.most_open = 0

    def open(self, limits: Limits) -> FakeSession:
        if self.refuses_after is not None and len(self.sessions) >= self.refuses_after:
            raise Refused("closing")
        assert self.room.acquire(timeout=20), "everyone waits for everyone"
        self.sessions.append(FakeSession(self, limits))
        return self.sessions[-1]

    def close(self) -> None:
        pass
