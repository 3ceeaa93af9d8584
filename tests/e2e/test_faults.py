"""What a run survives: any process killed, all of them killed, garbage on the streams, a full disk.

Nothing is lost, and nothing is trained on twice.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from services.client import Client
from services.contracts.states import RunState
from services.contracts.topics import RunKeys, Work
from services.local.stack import StackSettings, down, up
from services.runtime.bus import Bus

from .conftest import ROOT, Stack, start

BATCH, SIZE = 8, 4


def assert_nothing_was_lost(stack: Stack, run_id: str, versions: int) -> None:
    stack.finish(run_id, seconds=240)
    assert_kept(stack, run_id, versions)
    assert stack.client.conservation(run_id).consumed == versions * BATCH


def assert_kept(stack: Stack, run_id: str, versions: int) -> None:
    """The first `versions` steps: each once, each group once, every token in the window; and all groups accounted for."""
    assert [step.version for step in stack.steps(run_id)][:versions] == list(range(versions))
    samples = [s for s in stack.samples(run_id) if s.trained_version < versions]
    assert len(samples) == versions * BATCH
    assert len({s.index for s in samples}) == len(samples), "a group was trained on twice"
    for sample in samples:
        for completion in sample.completions:
            assert 0 <= min(completion.lags) <= max(completion.lags) <= sample.max_lag
    assert stack.client.conservation(run_id).holds


@pytest.mark.parametrize("name", ["trainer-0", "reward-0", "control-plane", "redis", "rollout-0"])
def test_a_killed_process_costs_nothing_but_time(stack: Stack, name: str) -> None:
    versions = 30
    run_id = stack.submit(name=f"kill-{name}", versions=versions, batch_groups=BATCH, group_size=SIZE, checkpoint={"every": 7})
    stack.reach(run_id, random.Random(name).randrange(3, 15))
    process = stack.info.processes[name]
    assert process.pid is not None
    family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    stack.kill(name)
    stack.ready()
    assert_nothing_was_lost(stack, run_id, versions)
    assert not [pid for pid in family if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_a_trainer_killed_in_the_middle_of_a_publication(stack: Stack) -> None:
    versions = 20
    run_id = stack.submit(name="kill-publication", versions=versions, batch_groups=BATCH, group_size=SIZE, checkpoint={"every": 6})
    stack.reach(run_id, 4)
    bus = Bus(stack.info.redis_url)
    deadline = time.monotonic() + 60
    while bus.redis.hget(RunKeys(run_id).info, "loading") is None:
        assert time.monotonic() < deadline
    stack.kill("trainer-0")
    stack.ready()
    assert_nothing_was_lost(stack, run_id, versions)


def test_garbage_on_the_streams_is_dead_lettered_and_the_run_goes_on(stack: Stack) -> None:
    versions = 12
    run_id = stack.submit(name="garbage", versions=versions, batch_groups=BATCH, group_size=SIZE)
    stack.reach(run_id, 2)
    bus = Bus(stack.info.redis_url)
    for topic in Work:
        bus.redis.xadd(RunKeys(run_id).stream(topic), {"data": b"\xff not a message", "seq": "x"})
        bus.redis.xadd(RunKeys(run_id).stream(topic), {"nothing": "here"})
    assert_nothing_was_lost(stack, run_id, versions)
    letters = stack.client.dead_letters(run_id).letters
    assert sorted(letter.stream for letter in letters) == sorted([topic.value for topic in Work] * 2)
    assert all("not a MessagePack" in letter.reason or "without data" in letter.reason for letter in letters)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("a small file system can be mounted by root only")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_pauses_the_run_and_loses_nothing(stack: Stack, small_disk: Path) -> None:
    versions = 12
    checkpoints = stack.info.data
    run_id = stack.submit(name="full-disk", versions=versions, batch_groups=BATCH, group_size=SIZE, checkpoint={"every": 5})
    folder = checkpoints / run_id
    folder.symlink_to(small_disk, target_is_directory=True)
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(b"\0" * 65536)
    stack.wait(run_id, lambda run: run.state is RunState.PAUSED)
    assert "No space left" in stack.client.run(run_id).reason
    assert stack.client.conservation(run_id).holds
    filler.unlink()
    stack.client.resume(run_id)
    assert_nothing_was_lost(stack, run_id, versions)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of its own, with two rollout servers."""
    home = tmp_path_factory.mktemp("pair") / "home"
    try:
        yield start(home, rollouts=2)
    finally:
        down(home)


def test_a_lost_rollout_server_is_replaced_by_the_other_and_joins_again(pair: Stack) -> None:
    run_id = pair.submit(name="pair", versions=3000, batch_groups=BATCH, group_size=SIZE, staleness={"max_lag": 4}, record={"samples": 3000 * BATCH})
    pair.reach(run_id, 3)

    def served_by(name: str, *, since: int) -> bool:
        newest = pair.client.run(run_id).version or 0
        return any(s.server == name for s in pair.client.samples(run_id, first=max(since, newest - 3), limit=50).samples)

    pair.wait(run_id, lambda _: served_by("rollout-0", since=0) and served_by("rollout-1", since=0))
    pair.kill("rollout-1")
    killed_at = pair.client.run(run_id).version or 0
    pair.reach(run_id, killed_at + 10)  # the other one goes on alone, with the groups that were lost
    pair.ready()
    pair.wait(run_id, lambda _: served_by("rollout-1", since=killed_at + 10))
    joined_at = pair.client.run(run_id).version or 0
    pair.client.cancel(run_id)
    pair.wait(run_id, lambda run: run.state is RunState.CANCELLED and pair.client.conservation(run_id).outstanding == 0)
    assert_kept(pair, run_id, min(joined_at, 300))


def test_all_killed_at_once_and_brought_up_again(pair: Stack) -> None:
    versions = 25
    run_id = pair.submit(name="all", versions=versions, batch_groups=BATCH, group_size=SIZE, checkpoint={"every": 6})
    base = {"model": {"path": str(ROOT / "deploy/models/tiny"), "max_model_len": 64}, "batch_groups": BATCH, "group_size": SIZE}
    study = pair.client.submit_study(
        {"name": "killed", "seeds": [7], "budget": {"updates": 3}, "base": base, "arms": [{"name": "a"}, {"name": "b", "set": {"clip.off": True}}]}
    )
    pair.reach(run_id, 9)
    before = [step.values["reward_mean"] for step in pair.steps(run_id)]
    info = pair.info
    killed = [psutil.Process(pid) for pid in [info.pid, *(p.pid for p in info.processes.values() if p.pid is not None)]]
    for process in killed:
        process.kill()
    psutil.wait_procs(killed, timeout=20)
    up(pair.home, StackSettings(data=info.data, rollouts=2), timeout_s=180)
    pair.client = Client.local(pair.home)
    made = {run.run_id for run in study.runs}
    assert {run.run_id for run in pair.client.resume_study(study.study_id).runs} == made, "nothing of the study is made twice"
    assert_nothing_was_lost(pair, run_id, versions)
    for of_study in made:
        assert of_study is not None
        assert_nothing_was_lost(pair, of_study, 3)
    assert [step.values["reward_mean"] for step in pair.steps(run_id)][: len(before)] == before
