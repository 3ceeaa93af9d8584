"""The supervisor, with small stub processes."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.local import supervisor
from services.local.redis_server import keep_secret, parse_version
from services.local.supervisor import Policy, ProcessInfo, ProcessSpec, ProcessState, Supervisor, delay_s

QUICK = Policy(first_delay_s=0.02, longest_delay_s=0.1, healthy_s=0.3, probe_starting_s=0.02, probe_ready_s=0.05)
STUB = """
import os, signal, sys, time
name, folder = sys.argv[1:3]
def end(*_):
    open(f"{folder}/ended", "a").write(f"{name}\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else end)
print("life of", name, flush=True)
open(f"{folder}/{name}.pid", "w").write(str(os.getpid()))
if "dies" in sys.argv:
    sys.exit(3)
while True:
    time.sleep(0.02)
"""


def stub(folder: Path, name: str, *behaviour: str, stage: int = 0, grace_s: float = 5.0) -> ProcessSpec:
    async def has_started() -> bool:
        return lives(folder / f"{name}.pid")

    argv = (sys.executable, "-S", "-c", STUB, name, str(folder), *behaviour)
    return ProcessSpec(name, argv, has_started, folder / "logs" / f"{name}.log", stage=stage, grace_s=grace_s)


def lives(pid_file: Path) -> bool:
    text = pid_file.read_text() if pid_file.exists() else ""
    return text != "" and supervisor.start_ticks(int(text)) is not None


class Watched:
    """Runs a supervisor in a test and remembers each state that it showed."""

    def __init__(self, specs: list[ProcessSpec]) -> None:
        self.history: list[dict[str, ProcessInfo]] = []
        self.end = asyncio.Event()
        self.task = asyncio.create_task(Supervisor(specs, changed=self.history.append, policy=QUICK).run(self.end))

    async def until(self, name: str, *, state: ProcessState, restarts: int = 0) -> ProcessInfo:
        async with asyncio.timeout(10):
            while True:
                info = self.history[-1].get(name) if self.history else None
                if info is not None and info.state is state and info.restarts >= restarts:
                    return info
                assert not self.task.done(), self.task
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self.end.set()
        async with asyncio.timeout(10):
            await self.task


def test_pause_between_restarts_doubles_up_to_its_bound() -> None:
    assert [delay_s(n, Policy()) for n in (1, 2, 3, 6, 7, 50)] == [0.5, 1.0, 2.0, 16.0, 30.0, 30.0]


def test_killed_process_is_started_again_with_another_pid_and_its_exit_is_shown(tmp_path: Path) -> None:
    async def scenario() -> None:
        watched = Watched([stub(tmp_path, "a")])
        first = await watched.until("a", state=ProcessState.READY)
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
        second = await watched.until("a", state=ProcessState.READY, restarts=1)
        assert second.pid not in (None, first.pid)
        assert (second.restarts, second.last_exit) == (1, -signal.SIGKILL)
        await watched.stop()
        assert not supervisor.is_alive(second.pid, second.start_ticks)

    asyncio.run(scenario())
    assert (tmp_path / "logs" / "a.log").read_text() == "life of a\n" * 2


def test_process_that_ends_at_once_is_tried_again_and_again_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> ProcessInfo:
        watched = Watched([stub(tmp_path, "a", "dies")])
        info = await watched.until("a", state=ProcessState.BACKING_OFF, restarts=4)
        await watched.stop()
        return info

    assert asyncio.run(scenario()).last_exit == 3
    pauses = [record.args[2] for record in caplog.records if "starting it again" in record.msg and isinstance(record.args, tuple)]
    assert pauses[:4] == [0.02, 0.04, 0.08, 0.1]


def test_healthy_while_forgives_earlier_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        watched = Watched([stub(tmp_path, "a")])
        for life, lived_s in enumerate((0.0, 0.0, 0.5)):
            info = await watched.until("a", state=ProcessState.READY, restarts=life)
            await asyncio.sleep(lived_s)
            assert info.pid is not None
            os.kill(info.pid, signal.SIGKILL)
        await watched.until("a", state=ProcessState.READY, restarts=3)
        await watched.stop()

    asyncio.run(scenario())
    pauses = [record.args[2] for record in caplog.records if "starting it again" in record.msg and isinstance(record.args, tuple)]
    assert pauses == [0.02, 0.04, 0.02]


def test_others_start_only_when_the_first_stage_is_ready_and_end_before_it(tmp_path: Path) -> None:
    async def scenario() -> list[dict[str, ProcessInfo]]:
        watched = Watched([stub(tmp_path, "first", stage=0), stub(tmp_path, "middle", stage=1), stub(tmp_path, "last", stage=2)])
        for name in ("middle", "last"):
            await watched.until(name, state=ProcessState.READY)
        await watched.stop()
        return watched.history

    history = asyncio.run(scenario())
    assert all(shown["middle"].pid is None for shown in history if shown["first"].state is ProcessState.STARTING)
    assert (tmp_path / "ended").read_text().split() == ["last", "middle", "first"]
    assert {info.state for info in history[-1].values()} == {ProcessState.ENDED}


def test_process_deaf_to_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    async def scenario() -> tuple[ProcessInfo, float]:
        watched = Watched([stub(tmp_path, "a", "deaf", grace_s=0.3)])
        info = await watched.until("a", state=ProcessState.READY)
        asked_at = time.monotonic()
        await watched.stop()
        return info, time.monotonic() - asked_at

    info, took_s = asyncio.run(scenario())
    assert not supervisor.is_alive(info.pid, info.start_ticks)
    assert 0.3 <= took_s < 3.0


def test_program_that_is_not_there_is_reported_like_any_other_end(tmp_path: Path) -> None:
    async def never() -> bool:
        return False

    async def scenario() -> ProcessInfo:
        watched = Watched([ProcessSpec("a", ("/nonexistent/program",), never, tmp_path / "a.log")])
        info = await watched.until("a", state=ProcessState.BACKING_OFF, restarts=2)
        await watched.stop()
        return info

    assert asyncio.run(scenario()).last_exit == 127
    assert "/nonexistent/program" in (tmp_path / "a.log").read_text()


def test_process_that_stops_answering_is_shown_as_not_ready_and_left_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        watched = Watched([stub(tmp_path, "a")])
        before = await watched.until("a", state=ProcessState.READY)
        (tmp_path / "a.pid").rename(tmp_path / "hidden")
        after = await watched.until("a", state=ProcessState.UNREADY)
        assert (after.pid, after.restarts) == (before.pid, 0)
        (tmp_path / "hidden").rename(tmp_path / "a.pid")
        await watched.until("a", state=ProcessState.READY)
        await watched.stop()

    asyncio.run(scenario())


def test_children_of_a_process_end_with_it(tmp_path: Path) -> None:
    argv = ("bash", "-c", f"sleep 300 & echo $! > {tmp_path}/a.pid; wait")

    async def has_started() -> bool:
        return lives(tmp_path / "a.pid")

    async def scenario() -> None:
        watched = Watched([ProcessSpec("a", argv, has_started, tmp_path / "a.log")])
        info = await watched.until("a", state=ProcessState.READY)
        grandchild = int((tmp_path / "a.pid").read_text())
        ticks = supervisor.start_ticks(grandchild)
        assert supervisor.is_alive(grandchild, ticks)
        assert info.pid is not None
        os.kill(info.pid, signal.SIGKILL)
        await watched.until("a", state=ProcessState.READY, restarts=1)
        assert not supervisor.is_alive(grandchild, ticks)
        await watched.stop()

    asyncio.run(scenario())


def test_leftover_is_killed_only_when_its_start_time_matches_too(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "300"], start_new_session=True) as process:
        ticks = supervisor.start_ticks(process.pid)
        assert ticks is not None
        stranger = ProcessInfo(name="stranger", pid=process.pid, start_ticks=ticks + 1, log=tmp_path / "log")
        assert supervisor.kill_leftovers([stranger]) == []
        assert not supervisor.send_signal(process.pid, ticks + 1, signal.SIGKILL)
        assert process.poll() is None
        assert supervisor.kill_leftovers([stranger.model_copy(update={"start_ticks": ticks})]) == ["stranger"]
        assert process.wait() == -signal.SIGKILL


def test_free_ports_differ_and_lie_below_those_of_outgoing_connections() -> None:
    ports = supervisor.free_ports(20)
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len(set(ports)) == 20
    assert max(ports) < lowest


def test_logs_rotate_by_size_and_the_oldest_goes(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    for life in range(5):
        log.write_text(str(life) * 10)
        supervisor.rotate(log, limit=10, kept=2)
        assert not log.exists()
    assert {path.name: path.read_text()[0] for path in tmp_path.iterdir()} == {"a.log.1": "4", "a.log.2": "3"}
    log.write_text("short")
    supervisor.rotate(log, limit=10, kept=2)
    assert log.read_text() == "short"


def test_secret_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    secret = keep_secret(tmp_path / "token")
    assert len(secret) >= 40
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert keep_secret(tmp_path / "token") == secret
    assert keep_secret(tmp_path / "other") != secret


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64 build=1", (7, 0)),
        ("Valkey server v=9.1.2 sha=0", (9, 1)),
        ("Redis server v=6.2.14 sha=0", (6, 2)),
        ("?", (0, 0)),
    ],
)
def test_server_version_is_read_from_what_the_program_prints(text: str, version: tuple[int, int]) -> None:
    assert parse_version(text) == version
