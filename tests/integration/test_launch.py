"""A trainer of two ranks on a real local Ray: replays of recorded groups, which need no rollout server, in one launcher's life."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from prometheus_client import CollectorRegistry

from services.contracts.messages import Role, RunEvent, Sample, StepRecord
from services.contracts.spec import RunSpec
from services.contracts.states import RunState
from services.contracts.topics import Log, RunKeys
from services.control_plane.scheduler import Scheduler
from services.control_plane.store import RunStore
from services.runtime.bus import Bus
from services.runtime.fleet import Fleet
from services.runtime.ledger import Ledger
from services.runtime.metrics import ControlPlaneMetrics
from tests.integration.conftest import CLUSTER_TOKEN, OwnRedis, free_port, new_redis, wait_until
from tests.integration.rank_world import batch, spec, steps
from tests.unit.tiny_policy import tiny_policy
from trainer.checkpoint import Checkpoints
from trainer.policy import Policy
from trainer.ranks import ALONE

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.timeout(1200),  # six processes start, and start again, on what may be two busy cores
]
ROOT = Path(__file__).parents[2]
MEMBER = "launched"
LONG, EVERY = 24, 4
"""Versions of the run that is interrupted, and between its checkpoints."""


@dataclass
class World:
    """A store with a scheduler, a model, the record of a run, and a launcher."""

    bus: Bus
    model: Path
    data: Path
    launcher: subprocess.Popen[bytes]
    log: Path

    def replay(self, run_id: str, versions: int) -> RunSpec:
        """Submit a replay of the record."""
        settings = spec(
            versions=versions,
            replay="source",
            batch_groups=4,
            updates_per_batch=2,
            learning_rate=5e-4,
            model={"path": str(self.model)},
            checkpoint={"every": EVERY},
        )
        assert RunStore(self.bus).create_as(run_id, settings)
        return settings

    def state(self, run_id: str) -> RunState:
        assert self.launcher.poll() is None, self.log.read_text()
        return RunStore(self.bus).get(run_id).state

    def finish(self, run_id: str) -> None:
        wait_until(lambda: self.state(run_id) in (RunState.COMPLETED, RunState.FAILED), seconds=700)
        assert self.state(run_id) is RunState.COMPLETED, RunStore(self.bus).get(run_id).reason

    def events(self, run_id: str) -> list[RunEvent]:
        return [entry.message(RunEvent) for entry in self.bus.range(run_id, Log.EVENTS)]

    def steps(self, run_id: str) -> list[StepRecord]:
        return [entry.message(StepRecord) for entry in self.bus.range(run_id, Log.STEPS)]

    def processes(self, module: str) -> dict[str, psutil.Process]:
        """The launcher's processes of a module, by rank."""
        found = {}
        for process in psutil.Process(self.launcher.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.cmdline()[-2:] == ["-m", module]:
                    found[process.environ().get("RANK", "")] = process
        return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRedis]:
    own = new_redis(tmp_path_factory.mktemp("redis"))
    own.start()
    yield own
    own.stop()


@contextlib.contextmanager
def scheduling(bus: Bus) -> Iterator[None]:
    """A scheduler at work in a thread."""
    scheduler, over = Scheduler(RunStore(bus), Fleet(bus), ControlPlaneMetrics(CollectorRegistry())), threading.Event()

    def tick() -> None:
        while not over.wait(0.1):
            scheduler.tick()

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def world(store: OwnRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    bus, model, data = Bus(store.url), folder / "model", folder / "data"
    tiny_policy().model.save_pretrained(model)
    for version in range(LONG):
        for group in batch(version):
            bus.append("source", Log.SAMPLES, Sample(scored=group, trained_version=version, advantages=(0.0, 0.0)))
    bus.redis.hset(RunKeys("source").info, mapping={"spec": spec().model_dump_json()})
    (folder / "token").write_text(CLUSTER_TOKEN)
    environment = {
        "OFFBEAT_REDIS_URL": store.url, "OFFBEAT_DATA": str(data), "OFFBEAT_CLUSTER_TOKEN_FILE": str(folder / "token"), "OFFBEAT_MEMBER": MEMBER,
        "OFFBEAT_PORT": str(free_port()), "OFFBEAT_TRAINER_RANKS": "2", "OFFBEAT_ROLLOUT_SERVERS": "1", "OFFBEAT_RANK_TIMEOUT": "300",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    with (folder / "log").open("wb") as log, scheduling(Bus(store.url)):
        launcher = subprocess.Popen([sys.executable, "-m", "trainer.launch"], cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log)
        try:
            yield World(bus, model, data, launcher, folder / "log")
        finally:
            if launcher.poll() is None:
                launcher.terminate()
                launcher.wait(timeout=200)


def assert_trained_as_by_one(world: World, run_id: str, settings: RunSpec) -> None:
    """The last checkpoint has the weights that one rank comes to."""
    found = Checkpoints(world.data / run_id / "checkpoints", keep=9).newest()
    assert found is not None
    assert found[1].version == settings.versions
    alone, _, _ = steps(ALONE, world.model, settings, {v: batch(v) for v in range(settings.versions)}, forking_nats=None)
    launched = dict(Policy.load(found[0]).model.named_parameters())
    for name, tensor in alone.model.named_parameters():
        assert torch.allclose(tensor, launched[name], rtol=0, atol=1e-4), name


def test_two_ranks_on_ray_train_as_one_does(world: World) -> None:
    settings = world.replay("five", 5)
    world.finish("five")
    assert [step.version for step in world.steps("five")] == list(range(5))
    assert_trained_as_by_one(world, "five", settings)
    assert world.processes("trainer").keys() == {"0", "1"}


def test_a_rank_that_is_killed_costs_nothing_but_time(world: World) -> None:
    before = world.processes("trainer")
    settings = world.replay("killed", LONG)
    ledger = Ledger(world.bus, "killed")
    wait_until(lambda: (ledger.version() or 0) >= EVERY + 2, seconds=300)
    os.kill(before["1"].pid, signal.SIGKILL)
    world.finish("killed")
    assert [step.version for step in world.steps("killed")] == list(range(LONG)), "none lost, none twice"
    assert_trained_as_by_one(world, "killed", settings)
    (told,) = [event for event in world.events("killed") if event.event == "ranks_restarted"]
    assert "rank 1 ended by signal 9 (SIGKILL)" in told.text
    assert "All 2 start again, time 1 of 3" in told.text
    after = world.processes("trainer")
    assert not {process.pid for process in before.values()} & {process.pid for process in after.values()}
    assert not any(process.is_running() for process in before.values())


def test_a_rollout_server_beside_the_ranks_joins_the_fleet_and_comes_back_when_it_is_killed(world: World) -> None:
    fleet, name = Fleet(world.bus), f"{MEMBER}-rollout-0"

    def started_at() -> float:
        return max((member.started_at for member in fleet.members(role=Role.ROLLOUT) if member.member_id == name), default=0.0)

    first = wait_until(started_at, seconds=300)
    (server,) = world.processes("rollout_server").values()
    trainers = world.processes("trainer")
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: started_at() > first, seconds=300)
    assert world.processes("trainer") == trainers, "ranks do not mind"


def test_the_launcher_ends_in_order_and_leaves_nothing(world: World) -> None:
    family = psutil.Process(world.launcher.pid).children(recursive=True)
    world.launcher.terminate()
    assert world.launcher.wait(timeout=200) == 0, world.log.read_text()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
