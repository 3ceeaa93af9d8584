"""The whole system over real processes: Valkey, the control plane, vLLM, a reward server and a trainer.

One warm stack serves all tests that leave it whole.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from services.client import Client, Unreachable
from services.contracts.spec import RunSpec, flatten, with_values
from services.contracts.states import RunState
from services.contracts.views import RunView, SampleView, StepView
from services.local.stack import StackInfo, StackSettings, down, status, up

ROOT = Path(__file__).parents[2]


@dataclass
class Stack:
    """A running stack and a client for it."""

    home: Path
    client: Client

    @property
    def info(self) -> StackInfo:
        info = status(self.home)
        assert info is not None, "the stack is down"
        return info

    def submit(self, **values: Any) -> str:
        """A run of the tiny model; keyword arguments are spec fields, nested ones as dicts."""
        spec = with_values(RunSpec.model_validate({"model": {"path": str(ROOT / "deploy/models/tiny"), "max_model_len": 64}}), flatten(values))
        return self.client.submit(spec).run_id

    def wait(self, run_id: str, holds: Callable[[RunView], bool], *, seconds: float = 120.0) -> RunView:
        deadline = time.monotonic() + seconds
        while (run := self._look(run_id, deadline)) is None or not holds(run):
            if run is None:
                continue
            assert run.state is not RunState.FAILED, run.reason
            assert time.monotonic() < deadline, f"after {seconds:g} s: {run.state} at version {run.version}; {self.info.not_ready}"
            time.sleep(0.05)
        return run

    def _look(self, run_id: str, deadline: float) -> RunView | None:
        """None while the API or Redis does not answer: on a machine that is this busy they may be late."""
        try:
            return self.client.run(run_id)
        except Unreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
            return None

    def finish(self, run_id: str, *, seconds: float = 180.0) -> RunView:
        return self.wait(run_id, lambda run: run.state is RunState.COMPLETED, seconds=seconds)

    def reach(self, run_id: str, version: int, *, seconds: float = 120.0) -> RunView:
        return self.wait(run_id, lambda run: (run.version or 0) >= version, seconds=seconds)

    def samples(self, run_id: str) -> list[SampleView]:
        """Everything that was trained on, as recorded."""
        found: list[SampleView] = []
        for version in range(self.client.run(run_id).version or 0):
            found += self.client.samples(run_id, first=version, last=version, limit=200).samples
        return found

    def steps(self, run_id: str) -> list[StepView]:
        return self.client.steps(run_id).steps

    def kill(self, name: str) -> None:
        """SIGKILL one process of the stack."""
        pid = self.info.processes[name].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while self.info.processes[name].pid == pid:
            assert time.monotonic() < deadline, f"the supervisor does not see that {name} is gone"
            time.sleep(0.02)

    def ready(self, *, seconds: float = 90.0) -> None:
        """Wait until the supervisor has brought everything up again."""
        deadline = time.monotonic() + seconds
        while not ((info := status(self.home)) and info.ready):
            assert time.monotonic() < deadline, "the stack did not get ready again"
            time.sleep(0.1)


def start(home: Path, **settings: Any) -> Stack:
    up(home, StackSettings(data=home / "runs", **settings), timeout_s=180)
    return Stack(home, Client.local(home))


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One of each process. Tests may kill single processes, but leave all of them running."""
    home = tmp_path_factory.mktemp("stack") / "home"
    try:
        yield start(home)
    finally:
        down(home)
