"""Starts processes, watches them, starts them again when they end, and ends them in order.

    start    the lowest stage first, until it is ready; then all others together (they wait for one another by themselves)
    watch    a process that ends by itself is started again, after 0.5 s, 1 s, 2 s ... 30 s; a healthy while of 10 s forgives it.
             It never gives up: the count of restarts and the last exit status are in the state file and in the log
    end      from the highest stage to the lowest: SIGTERM, a time of grace, SIGKILL

A process that hangs but lives is only shown as not ready: loading a model may keep it from answering for as long as it takes.

Children die with a supervisor that is killed: each is started through `setpriv --pdeathsig KILL`. The kernel sends that signal when the *thread* that
started the child ends, so children are started from the main thread only, and nothing here starts another thread. A child's own children are not
reached that way; they are in the child's process group, which is swept when the child has ended, and should have a leash of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict

log = logging.getLogger(__name__)

LEASH = ("setpriv", "--pdeathsig", "KILL", "--")
LOG_BYTES = 10_000_000
LOGS_KEPT = 3


class ProcessState(StrEnum):
    STARTING = "starting"
    """Runs, has not been ready yet."""
    READY = "ready"
    UNREADY = "unready"
    """Runs, was ready, and does not answer that it is now."""
    BACKING_OFF = "backing off"
    """Ended by itself; is started again after a pause."""
    ENDED = "ended"
    """Not started, or ended by the supervisor."""


class ProcessInfo(BaseModel):
    """One process as the state file shows it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    state: ProcessState = ProcessState.ENDED
    pid: int | None = None
    start_ticks: int | None = None
    """When the kernel started it, in clock ticks since boot: with the pid it names a process for good."""
    port: int | None = None
    url: str | None = None
    log: Path
    restarts: int = 0
    last_exit: int | None = None
    """Exit status of the life before this one; the negative number of a signal."""


@dataclass(frozen=True)
class ProcessSpec:
    name: str
    argv: Sequence[str]
    probe: Callable[[], Awaitable[bool]]
    """Whether the process is ready, answered within a second or two."""
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the supervisor's own environment."""
    stage: int = 0
    grace_s: float = 20.0
    """Seconds between SIGTERM and SIGKILL."""
    port: int | None = None
    url: str | None = None


@dataclass(frozen=True)
class Policy:
    first_delay_s: float = 0.5
    longest_delay_s: float = 30.0
    healthy_s: float = 10.0
    """A process that was ready for so long starts again with the first delay."""
    probe_starting_s: float = 0.1
    probe_ready_s: float = 1.0
    unready_after: int = 3
    """Probes that must fail in a row before a ready process counts as not ready: a busy machine answers late."""


def delay_s(failures: int, policy: Policy) -> float:
    """Pause before the next start, in seconds, after `failures` >= 1 ends in a row."""
    return min(policy.longest_delay_s, policy.first_delay_s * 2.0 ** (failures - 1))


def probe_client() -> httpx.AsyncClient:
    """For probes on this machine: no proxy, no certificates (20 ms to load), no connection kept to a process that may be another by now."""
    return httpx.AsyncClient(timeout=2.0, trust_env=False, verify=False, limits=httpx.Limits(max_keepalive_connections=0))


def http_probe(client: httpx.AsyncClient, url: str) -> Callable[[], Awaitable[bool]]:
    """Ready when a GET of `url` answers 200."""

    async def probe() -> bool:
        try:
            return (await client.get(url)).status_code == 200
        except httpx.TransportError:
            return False

    return probe


class Child:
    """One process through all its lives."""

    def __init__(self, spec: ProcessSpec, policy: Policy, changed: Callable[[], None]) -> None:
        self.spec = spec
        self.info = ProcessInfo(name=spec.name, port=spec.port, url=spec.url, log=spec.log)
        self.ready = asyncio.Event()
        self._policy = policy
        self._changed = changed
        self._ending = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        self._task = asyncio.create_task(self._keep(), name=self.spec.name)
        return self._task

    async def end(self) -> None:
        """SIGTERM, a time of grace, SIGKILL; returns when the process is gone."""
        self._ending.set()
        if self._task is None:
            return
        if self._process is not None and self._process.returncode is None:
            os.kill(self._process.pid, signal.SIGTERM)  # Popen.terminate() would wait for a child that has ended, and so free its pid
            await asyncio.wait({self._task}, timeout=self.spec.grace_s)
            if not self._task.done():
                log.warning("%s did not end within %g s of SIGTERM: killed", self.spec.name, self.spec.grace_s)
                _kill_group(self._process.pid)
        await asyncio.wait({self._task})

    async def _keep(self) -> None:
        failures = 0
        while not self._ending.is_set():
            ready_since = None
            try:
                process = self._spawn()
            except OSError as error:
                log.error("%s cannot be started: %s", self.spec.name, error)
                status = None
            else:
                ready_since = await self._watch(process)
                status = process.returncode
            self.ready.clear()
            if self._ending.is_set():
                break
            healthy = ready_since is not None and time.monotonic() - ready_since >= self._policy.healthy_s
            failures = 1 if healthy else failures + 1
            pause = delay_s(failures, self._policy)
            log.warning("%s ended with status %s: starting it again in %g s (restart %d)", self.spec.name, status, pause, self.info.restarts + 1)
            self._show(state=ProcessState.BACKING_OFF, pid=None, start_ticks=None, restarts=self.info.restarts + 1, last_exit=status)
            await _within(self._ending.wait(), pause)
        log.info("%s has ended", self.spec.name)
        self._show(state=ProcessState.ENDED, pid=None, start_ticks=None)

    def _spawn(self) -> subprocess.Popen[bytes]:
        rotate(self.spec.log)
        with open(self.spec.log, "ab") as output:
            self._process = subprocess.Popen(
                [*LEASH, *self.spec.argv],
                env={**os.environ, **self.spec.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        log.info("%s started, pid %d", self.spec.name, self._process.pid)
        self._show(state=ProcessState.STARTING, pid=self._process.pid, start_ticks=start_ticks(self._process.pid))
        return self._process

    async def _watch(self, process: subprocess.Popen[bytes]) -> float | None:
        """Probe until the process has ended. Returns since when it was ready, by the monotonic clock."""
        ready_since = None
        failed = 0
        with _exit_of(process.pid) as exited:
            while not exited.is_set():
                ready = await self.spec.probe()
                if exited.is_set():
                    break
                failed = 0 if ready else failed + 1
                if ready and ready_since is None:
                    ready_since = time.monotonic()
                    log.info("%s is ready", self.spec.name)
                    self.ready.set()
                    self._show(state=ProcessState.READY)
                elif failed >= self._policy.unready_after and ready_since is not None:
                    ready_since = None
                    log.warning("%s lives but is no longer ready", self.spec.name)
                    self._show(state=ProcessState.UNREADY)
                await _within(exited.wait(), self._policy.probe_starting_s if ready_since is None else self._policy.probe_ready_s)
        _kill_group(process.pid)  # before wait(): until then the pid cannot be another's
        process.wait()
        return ready_since

    def _show(self, **changes: object) -> None:
        self.info = self.info.model_copy(update=changes)
        self._changed()


class Supervisor:
    """Keeps the processes of `specs` until it is asked to end; `changed` is called with their state after each change."""

    def __init__(self, specs: Sequence[ProcessSpec], *, changed: Callable[[dict[str, ProcessInfo]], None], policy: Policy | None = None) -> None:
        self._children = [Child(spec, policy or Policy(), self._on_change) for spec in specs]
        self._report = changed

    async def run(self, end: asyncio.Event) -> None:
        """Returns when `end` is set and every process is gone."""
        stages = sorted({child.spec.stage for child in self._children})
        first = [child for child in self._children if child.spec.stage == stages[0]]
        asked = asyncio.create_task(end.wait())
        kept = [child.start() for child in first]
        ready = asyncio.gather(*(child.ready.wait() for child in first))
        waited: set[asyncio.Future[Any]] = {ready, asked, *kept}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if not asked.done():
            kept += [child.start() for child in self._children if child not in first]
            await asyncio.wait({*waited - {ready}, *kept}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        for stage in reversed(stages):
            await asyncio.gather(*(child.end() for child in self._children if child.spec.stage == stage))
        for task in kept:
            task.result()

    def _on_change(self) -> None:
        self._report({child.spec.name: child.info for child in self._children})


def start_ticks(pid: int) -> int | None:
    """When `pid` was started, in clock ticks since boot; None when there is no such process, or it has ended and was not waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(pid: int | None, ticks: int | None) -> bool:
    """Whether that very process lives: a pid alone may meanwhile be another's."""
    return pid is not None and ticks is not None and start_ticks(pid) == ticks


def send_signal(pid: int, ticks: int, number: signal.Signals) -> bool:
    """Signal that very process; False when it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if start_ticks(pid) != ticks:
            return False
        signal.pidfd_send_signal(fd, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)


def kill_leftovers(processes: Sequence[ProcessInfo], *, patience_s: float = 10.0) -> list[str]:
    """Kill those of `processes` that still live, of a supervisor that is gone, and wait until they are. Returns their names."""
    left = [info for info in processes if is_alive(info.pid, info.start_ticks)]
    for info in left:
        assert info.pid is not None
        _kill_group(info.pid)
    deadline = time.monotonic() + patience_s
    while any(is_alive(info.pid, info.start_ticks) for info in left) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [info.name for info in left]


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, below the range from which the kernel gives outgoing connections theirs.

    A port of that range may be taken by any connection in the moment in which its process is being started again.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(min(20_000, lowest // 2), lowest), k=1_000):
        if len(ports) == count:
            break
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    assert len(ports) == count, "hardly any port is free"
    return ports


def rotate(path: Path, *, limit: int = LOG_BYTES, kept: int = LOGS_KEPT) -> None:
    """Move a log of at least `limit` bytes to `path`.1, the one before to `path`.2, and so on up to `kept`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.stat().st_size < limit:
        return
    names = [path, *(path.with_name(f"{path.name}.{i}") for i in range(1, kept + 1))]
    for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
        if newer.exists():
            newer.replace(older)


def _kill_group(pid: int) -> None:
    """SIGKILL to what is left of a session that this supervisor, or the one before it, started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


async def _within(awaitable: Awaitable[object], seconds: float) -> None:
    """Wait for it, but not longer."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(awaitable, seconds)


@contextlib.contextmanager
def _exit_of(pid: int) -> Iterator[asyncio.Event]:
    """An event that is set when the child `pid` ends; the child stays to be waited for."""
    loop = asyncio.get_running_loop()
    exited = asyncio.Event()
    fd = os.pidfd_open(pid)
    loop.add_reader(fd, exited.set)
    try:
        yield exited
    finally:
        loop.remove_reader(fd)
        os.close(fd)
