"""The life of a process: it serves beside its loop, is asked to end by a signal, and knows how long it stood idle."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry

from services.runtime import logs
from services.runtime.process import IdleClock, Shutdown, serving
from services.runtime.web import base_app


@pytest.fixture
def restored_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def unchanged_logging() -> Iterator[None]:
    root, hook = logging.getLogger(), sys.excepthook
    handlers, level, process = root.handlers, root.level, dict(logs._process)
    yield
    root.handlers, root.level, sys.excepthook = handlers, level, hook
    logs._process.clear()
    logs._process.update(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_process_to_end_and_wakes_who_waits(number: signal.Signals, restored_signals: None) -> None:
    shutdown = Shutdown().install()
    assert not shutdown.asked
    assert not shutdown.wait(0.01)
    threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
    began = time.monotonic()
    assert shutdown.wait(10)
    assert time.monotonic() - began < 5
    assert shutdown.asked


def test_health_is_answered_while_the_process_is_busy() -> None:
    port, missing = free_port(), "waits for Redis"
    app = base_app(title="t", description="d", registry=CollectorRegistry(), ready=lambda: missing)
    with serving(app, host="127.0.0.1", port=port), httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        assert http.get("/healthz").json() == {"status": "alive"}
        refused = http.get("/readyz")
        assert (refused.status_code, refused.json()["detail"]) == (503, "waits for Redis")
        missing = None
        assert http.get("/readyz").json() == {"status": "ready"}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False)


def test_a_process_says_once_where_it_listens_and_what_goes_wrong_in_its_server(unchanged_logging: None, capsys: pytest.CaptureFixture[str]) -> None:
    app = base_app(title="t", description="d", registry=CollectorRegistry(), ready=lambda: None)
    port = free_port()
    logs.set_up(role="reward", member="reward-0", level="DEBUG")
    with serving(app, host="127.0.0.1", port=port):
        logging.getLogger("uvicorn.error").warning("of the server")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    said = [(line["level"], line["message"], line.get("url")) for line in lines if line["logger"] not in ("asyncio", "concurrent.futures")]
    assert said == [("INFO", "listens", f"http://127.0.0.1:{port}"), ("WARNING", "of the server", None)]


def test_a_port_that_is_taken_is_an_error_at_once() -> None:
    app = base_app(title="t", description="d", registry=CollectorRegistry(), ready=lambda: None)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match="Address already in use"),
        serving(app, host="127.0.0.1", port=taken.getsockname()[1]),
    ):
        pytest.fail("it served on a port that is taken")


def test_a_server_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: None)  # as when the port is taken between the look and the start
    app = base_app(title="t", description="d", registry=CollectorRegistry(), ready=lambda: None)
    with pytest.raises(OSError, match="did not start"), serving(app, host="127.0.0.1", port=free_port()):
        pytest.fail("nobody serves")


def test_idle_time_is_the_sum_of_the_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = IdleClock()
    clock.end()
    now = 105.0
    with clock.waiting():
        now = 107.0
        assert clock.total == 2.0, "the wait that goes on is counted"
    now = 110.0
    assert clock.total == 2.0
    clock.begin()
    now = 111.0
    clock.begin()  # it waits already
    now = 112.5
    clock.end()
    clock.end()
    now = 120.0
    assert (clock.seconds, clock.total) == (4.5, 4.5)
