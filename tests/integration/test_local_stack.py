"""The local stack with the real Redis or Valkey and small web servers in place of the other programs."""

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from services.local import stack, supervisor
from services.local.redis_server import RedisServer, find_program
from services.local.stack import Programs, StackInfo, StackSettings

STUB = """
import http.server, os, pathlib, signal, sys
member = os.environ["OFFBEAT_MEMBER"]
def end(*_):
    with open(os.path.join(os.environ["OFFBEAT_DATA"], "ended"), "a") as file:
        file.write(member + "\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, end)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()
print({name: value for name, value in os.environ.items() if name.startswith(("OFFBEAT_", "OMP_"))}, flush=True)
http.server.ThreadingHTTPServer((os.environ["OFFBEAT_HOST"], int(os.environ["OFFBEAT_PORT"])), Answer).serve_forever()
"""
SERVER = (sys.executable, "-S", "-c", STUB)
DIES = (sys.executable, "-S", "-c", "import sys; sys.exit('no such model')")


def settings(home: Path, **changes: object) -> StackSettings:
    programs = Programs(control_plane=SERVER, rollout=SERVER, reward=SERVER, trainer=SERVER)
    return StackSettings(data=home.parent / "runs", programs=programs).model_copy(update=changes)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    stack.down(tmp_path / "home", timeout_s=20)


def client(info: StackInfo) -> redis.Redis:
    return redis.Redis.from_url(info.redis_url, decode_responses=True)


def wait_for(condition: Callable[[], bool], *, within_s: float = 15.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def supervisors_of(home: Path) -> list[int]:
    """Pids of the supervisors that were started for this home, known to `status` or not."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "services.local" in command and str(home) in command:
            found.append(process.pid)
    return found


def alive(info: StackInfo) -> list[str]:
    return [name for name, process in info.processes.items() if supervisor.is_alive(process.pid, process.start_ticks)]


def test_stack_comes_up_with_its_settings_keeps_redis_data_and_goes_down_in_order(home: Path) -> None:
    shown: list[StackInfo] = []
    info = stack.up(home, settings(home, rollouts=2), timeout_s=30, progress=shown.append)

    assert info.ready
    assert list(info.processes) == ["redis", "control-plane", "rollout-0", "rollout-1", "reward-0", "trainer-0"]
    assert not shown[0].ready
    assert shown[-1] == info == stack.status(home)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.iterdir() if path.is_file() and path.name != "lock"} == dict.fromkeys(
        ("state.json", "token", "cluster-token", "redis-password"), 0o600
    )
    assert stat.S_IMODE((home / "redis" / "server.conf").stat().st_mode) == 0o600
    environment = (home / "logs" / "rollout-1.log").read_text()
    for name, value in {
        "OFFBEAT_REDIS_URL": info.redis_url,
        "OFFBEAT_HOST": "127.0.0.1",
        "OFFBEAT_PORT": str(info.processes["rollout-1"].port),
        "OFFBEAT_TOKEN_FILE": str(info.token_file),
        "OFFBEAT_CLUSTER_TOKEN_FILE": str(info.cluster_token_file),
        "OFFBEAT_DATA": str(info.data),
        "OFFBEAT_MEMBER": "rollout-1",
        "OFFBEAT_LOG_LEVEL": "INFO",
        "OMP_NUM_THREADS": "1",
    }.items():
        assert repr(name) + ": " + repr(value) in environment

    client(info).set("kept", "yes")
    assert stack.down(home)
    assert alive(info) == []
    ended = (info.data / "ended").read_text().split()
    assert [name.rpartition("-")[0] for name in ended] == ["trainer", "rollout", "rollout", "reward", "control"]
    assert stack.status(home) is None
    assert not stack.down(home)

    again = stack.up(home, settings(home, rollouts=0, rewards=0, trainers=0), timeout_s=30)
    assert client(again).get("kept") == "yes"
    assert again.token_file.read_text() == info.token_file.read_text()


def test_redis_refuses_who_has_no_password_and_listens_on_this_machine_only(home: Path) -> None:
    info = stack.up(home, settings(home, rollouts=0, rewards=0, trainers=0), timeout_s=30)
    port = info.processes["redis"].port
    assert port is not None
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=port, retry=Retry(NoBackoff(), 0)).ping()
    assert client(info).config_get("bind") == {"bind": "127.0.0.1"}


def test_killed_redis_comes_back_at_the_same_address_with_its_data(home: Path) -> None:
    info = stack.up(home, settings(home, rollouts=0, rewards=0, trainers=0), timeout_s=30)
    group = client(info)
    group.xadd("work", {"n": "1"})
    group.xgroup_create("work", "workers", id="0")
    group.xreadgroup("workers", "w", {"work": ">"})
    pid = info.processes["redis"].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)

    def is_back() -> bool:
        now = stack.status(home)
        return now is not None and now.ready and now.processes["redis"].restarts == 1

    wait_for(is_back)
    assert client(info).xpending("work", "workers")["pending"] == 1


def test_second_up_finds_the_first(home: Path) -> None:
    first = stack.up(home, settings(home), timeout_s=30)
    assert stack.up(home, settings(home, rollouts=3), timeout_s=30) == first


def test_two_ups_at_once_make_one_stack_and_leave_no_second_supervisor(home: Path) -> None:
    code = (
        "import sys, pathlib; from services.local import stack\n"
        "print(stack.up(pathlib.Path(sys.argv[1]), stack.StackSettings.model_validate_json(sys.argv[2])).pid)"
    )
    arguments = [sys.executable, "-c", code, str(home), settings(home).model_dump_json()]
    with contextlib.ExitStack() as opened:
        callers = [opened.enter_context(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)) for _ in range(2)]
        pids = {caller.communicate(timeout=60)[0].strip() for caller in callers}
    info = stack.status(home)
    assert info is not None
    assert pids == {str(info.pid)}
    assert supervisors_of(home) == [info.pid]
    stack.down(home)
    assert supervisors_of(home) == []


def test_up_that_is_interrupted_before_the_supervisors_first_word_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stack.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stack.up(home, settings(home))
    assert supervisors_of(home) == []


def test_children_end_with_a_killed_supervisor_and_the_next_up_starts_anew(home: Path) -> None:
    info = stack.up(home, settings(home), timeout_s=30)
    assert len(alive(info)) == 5
    os.kill(info.pid, signal.SIGKILL)
    wait_for(lambda: alive(info) == [])
    assert stack.status(home) is None
    fresh = stack.up(home, settings(home), timeout_s=30)
    assert fresh.pid != info.pid
    assert len(alive(fresh)) == 5


def test_leftovers_of_a_supervisor_that_is_gone_are_killed_and_strangers_are_not(home: Path) -> None:
    info = stack.up(home, settings(home, rollouts=0, rewards=0, trainers=0), timeout_s=30)
    stack.down(home)
    with (
        subprocess.Popen(["sleep", "300"], start_new_session=True) as leftover,
        subprocess.Popen(["sleep", "300"], start_new_session=True) as stranger,
    ):
        ticks = supervisor.start_ticks(leftover.pid)
        processes = {
            "rollout-0": info.processes["redis"].model_copy(update={"name": "rollout-0", "pid": leftover.pid, "start_ticks": ticks}),
            "reward-0": info.processes["redis"].model_copy(update={"name": "reward-0", "pid": stranger.pid, "start_ticks": 1}),
        }
        stack.write_state(info.model_copy(update={"processes": processes}))
        stack.up(home, settings(home, rollouts=0, rewards=0, trainers=0), timeout_s=30)
        assert leftover.wait(timeout=5) == -signal.SIGKILL
        assert stranger.poll() is None
        stranger.kill()


def test_stack_ends_with_its_owner(home: Path) -> None:
    code = (
        "import os, sys, pathlib; from services.local import stack\n"
        "settings = stack.StackSettings.model_validate_json(sys.argv[2]).model_copy(update={'owner': os.getpid()})\n"
        "stack.up(pathlib.Path(sys.argv[1]), settings); os.kill(os.getpid(), 9)"
    )
    owner = subprocess.run([sys.executable, "-c", code, str(home), settings(home).model_dump_json()], timeout=60)
    assert owner.returncode == -signal.SIGKILL
    info = stack.read_state(home)
    wait_for(lambda: stack.status(home) is None)
    assert info is None or alive(info) == []


def test_up_gives_up_on_a_program_that_cannot_start_and_shows_its_last_words(home: Path) -> None:
    broken = settings(home).programs.model_copy(update={"rollout": DIES})
    with pytest.raises(stack.StackError, match=r"(?s)rollout-0 has ended \d+ times, last with status 1:.*no such model"):
        stack.up(home, settings(home, programs=broken), timeout_s=60)
    assert stack.status(home) is not None
    assert stack.down(home)


def test_up_names_what_is_not_ready_in_time(home: Path) -> None:
    silent = settings(home).programs.model_copy(update={"trainer": ("sleep", "300")})
    with pytest.raises(stack.StackError, match=r"not ready after 3 s: trainer-0 \(starting, log: .*trainer-0.log\)"):
        stack.up(home, settings(home, programs=silent), timeout_s=3)


def test_supervisor_that_cannot_start_says_why(home: Path) -> None:
    home.mkdir()
    (home / "redis").write_text("a file where Redis's folder is to be")
    with pytest.raises(stack.StackError, match="File exists"):
        stack.up(home, settings(home), timeout_s=30)


def test_redis_is_not_ready_with_another_password_nor_where_nothing_listens(home: Path) -> None:
    info = stack.up(home, settings(home, rollouts=0, rewards=0, trainers=0), timeout_s=30)
    port = info.processes["redis"].port
    assert port is not None
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        ours, wrong, nobody = (
            RedisServer(find_program(), home / "redis", at, password)
            for at, password in (
                (port, (home / "redis-password").read_text().strip()),
                (port, "wrong"),
                (unused.getsockname()[1], "any"),
            )
        )
        assert [asyncio.run(server.answers()) for server in (ours, wrong, nobody)] == [True, False, False]
