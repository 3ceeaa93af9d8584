"""What the benchmarks share: a local stack of their own in a temporary home, its processes on cores of their own, and runs that are timed."""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from services.client import Client
from services.contracts.spec import RunSpec
from services.contracts.states import RunState
from services.contracts.views import StepView
from services.local.stack import StackSettings, down, status, up

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "deploy/models/tiny"
POLL_SECONDS = 0.5
"""Between looks at a run: each costs the control plane some milliseconds of the processor."""
PATIENCE_SECONDS = 600.0
"""Longest wait for one run."""
LOG_LINES = 200
CLEAR_LOAD = 0.25
"""Load a core, before the benchmark, above which its figures are those of a busy machine."""


class Unfit(RuntimeError):
    """The run did not come to its end: there is nothing to report."""


@dataclass(frozen=True)
class Timed:
    """A run that has completed."""

    steps: list[StepView]
    cpu_seconds: dict[str, float]
    """Processor seconds by kind of process, while the versions [first, last) were made."""


class BenchStack:
    """One of each process."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.client = Client.local(home)

    def run(self, spec: RunSpec, *, first: int = 0, last: int | None = None) -> Timed:
        """Submit `spec` and wait for its end; processor time is counted from version `first` to version `last`. Raises Unfit."""
        last = spec.versions if last is None else last
        run_id, deadline = self.client.submit(spec).run_id, time.monotonic() + PATIENCE_SECONDS
        begin = end = None
        while (run := self.client.run(run_id)).state is not RunState.COMPLETED:
            version = run.version or 0
            if begin is None and version >= first:
                begin = self.cpu_seconds()
            if end is None and version >= last:
                end = self.cpu_seconds()
            if run.state is RunState.FAILED or time.monotonic() > deadline:
                raise Unfit(f"run {run_id} is {run.state} at version {version}: {run.reason or 'it takes too long'}")
            time.sleep(POLL_SECONDS)
        begin, end = begin or self.cpu_seconds(), end or self.cpu_seconds()
        self._refuse_restarts()
        return Timed(self.client.steps(run_id).steps, {name: end[name] - begin[name] for name in end})

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Each process that the supervisor started, with its children (vLLM's engine is one of the rollout server), by its name in the stack."""
        info = status(self.home)
        if info is None:
            raise Unfit("the stack is down")
        roots = {name: psutil.Process(process.pid) for name, process in info.processes.items() if process.pid is not None}
        return {name: [root, *root.children(recursive=True)] for name, root in roots.items()}

    def cpu_seconds(self) -> dict[str, float]:
        """Processor seconds so far, by kind of process; "engine" is what the rollout server's children used."""
        used: dict[str, float] = {}
        for name, (root, *children) in self.processes().items():
            kind = name.rpartition("-")[0] if name[-1].isdigit() else name
            used[kind] = sum(root.cpu_times()[:2])
            if kind == "rollout":
                used["engine"] = sum(sum(child.cpu_times()[:2]) for child in children)
        return used

    def _refuse_restarts(self) -> None:
        """A process that was started again took seconds that are nobody's throughput, and is on no core of its own."""
        info = status(self.home)
        for process in info.processes.values() if info else ():
            if process.restarts:
                tail = process.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
                raise Unfit("\n".join([f"{process.name} ended with status {process.last_exit} and was started again. Its log:", *tail]))

    def pin(self) -> dict[str, list[int]] | None:
        """Give the rollout server, with vLLM's engine, a core of its own, and the trainer another; what is left goes to the other cores, or to the
        trainer's where there are but two. Cores by kind of process; None where they cannot be had."""
        if not hasattr(os, "sched_setaffinity") or len(cores := sorted(os.sched_getaffinity(0))) < 2:
            return None
        place = {"rollout": cores[:1], "trainer": cores[1:2], "rest": cores[2:] or cores[1:2]}
        for name, processes in self.processes().items():
            own = place.get(name.removesuffix("-0"), place["rest"])
            for thread in (thread.id for process in processes for thread in process.threads()):
                with contextlib.suppress(ProcessLookupError):  # a thread that has ended meanwhile; those to come inherit
                    os.sched_setaffinity(thread, own)
        return place


@contextlib.contextmanager
def bench_stack() -> Iterator[BenchStack]:
    """A stack in a temporary home, gone with everything in it at the end, however this process ends."""
    with tempfile.TemporaryDirectory(prefix="offbeat-bench-") as folder:
        home = Path(folder) / "home"
        try:
            up(home, StackSettings(data=home / "runs", owner=os.getpid()))
            yield BenchStack(home)
        finally:
            down(home)


def machine() -> dict[str, Any]:
    """Where the figures come from, and how busy it was before them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    load = os.getloadavg()[0]
    return {"cores": cores, "processor": _processor(), "load_before": round(load, 2), "busy": load > CLEAR_LOAD * cores}


def tell_machine(console: Console, about: Mapping[str, Any], pinned: Mapping[str, Sequence[int]] | None) -> None:
    where = ", ".join(f"{name} on {'/'.join(map(str, cores))}" for name, cores in pinned.items()) if pinned else "not pinned to cores"
    console.print(f"{about['cores']} cores ({about['processor']}); {where}; load {about['load_before']} before the start", highlight=False)
    if about["busy"]:
        console.print("The machine was busy: these figures are not those of an idle one.", style="yellow")


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
