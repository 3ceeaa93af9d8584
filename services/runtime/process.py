"""The life of a process: it starts, serves, and drains when it is asked to end."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

log = logging.getLogger(__name__)


class Shutdown:
    """Set by SIGTERM or SIGINT. Loops look at it; waits wake up from it."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._then: list[Callable[[], None]] = []

    def then(self, do: Callable[[], None]) -> None:
        """Have `do` called when the end is asked for."""
        self._then.append(do)

    def install(self) -> Shutdown:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        threading.excepthook = self._on_thread_error
        return self

    def ask(self) -> None:
        self._event.set()
        for do in self._then:
            do()

    @property
    def asked(self) -> bool:
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep, but not past the end; True when the end has been asked for."""
        return self._event.wait(seconds)

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        """A thread that dies of an error takes the process with it: half a process is worse than one that is started again."""
        log.critical("a thread died", exc_info=error.exc_value, extra={"thread": error.thread.name if error.thread else "?"})
        self.ask()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        log.info("asked to end", extra={"signal": signal.Signals(number).name})
        self.ask()


@contextlib.contextmanager
def serving(app: FastAPI, *, host: str, port: int) -> Iterator[None]:
    """Serve `app` from a thread of its own while the block runs, so that a busy loop never leaves /healthz without an answer.

    Raises OSError when the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
    server = uvicorn.Server(
        uvicorn.Config(app, host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=5, timeout_keep_alive=30)
    )
    thread = threading.Thread(target=server.run, name="http", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise OSError(f"the HTTP server on {host}:{port} did not start: its log says why")
        time.sleep(0.01)
    log.info("listens", extra={"url": f"http://{f'[{host}]' if ':' in host else host}:{port}"})
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=10)


class IdleClock:
    """Seconds spent waiting for work."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        self.begin()
        try:
            yield
        finally:
            self.end()

    def begin(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def end(self) -> None:
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
            self._since = None

    @property
    def total(self) -> float:
        """Seconds, the wait that goes on included."""
        since = self._since
        return self.seconds + (time.monotonic() - since if since is not None else 0.0)
