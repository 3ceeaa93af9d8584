"""The local stack: Redis, the control plane, rollout servers, reward servers and trainers on one machine, under one supervisor.

Everything that it keeps is in its home (`.offbeat`): state.json (pids, ports, addresses), the two tokens, Redis's folder and logs/.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
from pydantic import BaseModel, ConfigDict, Field

from services.local.redis_server import RedisServer
from services.local.supervisor import (
    ProcessInfo,
    ProcessSpec,
    ProcessState,
    http_probe,
    is_alive,
    kill_leftovers,
    rotate,
    send_signal,
)

DEFAULT_HOME = Path(".offbeat")
BUSY = 75
"""Exit status of a supervisor that found its home taken (EX_TEMPFAIL)."""
HOPELESS_RESTARTS = 4
"""`up` gives up on a process that ended so often without ever being ready; the supervisor does not."""
SUPERVISOR_LOG = "supervisor.log"


class StackError(RuntimeError):
    """The stack did not come up or go down; says which process, and where its log is."""


class Programs(BaseModel):
    """What is run for each role."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    control_plane: tuple[str, ...] = (sys.executable, "-m", "services.control_plane")
    rollout: tuple[str, ...] = (sys.executable, "-m", "rollout_server")
    reward: tuple[str, ...] = (sys.executable, "-m", "reward_server")
    trainer: tuple[str, ...] = (sys.executable, "-m", "trainer")


class StackSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    rollouts: int = Field(1, ge=0)
    rewards: int = Field(1, ge=0)
    trainers: int = Field(1, ge=0)
    data: Path = Path("runs")
    """Folder of runs: checkpoints, snapshots, reports."""
    log_level: str = "INFO"
    api_port: int | None = Field(None, ge=1, le=65535)
    """Port of the API; default: a free one."""
    owner: int | None = None
    """Pid of the process that calls `up`, if the stack is to end with it, however that one ends."""
    programs: Programs = Programs()


class StackInfo(BaseModel):
    """What runs, and where: the content of state.json, which only its owner may read, as it holds the password of Redis."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    home: Path
    pid: int
    """Pid of the supervisor."""
    start_ticks: int
    api_url: str
    redis_url: str
    token_file: Path
    cluster_token_file: Path
    data: Path
    processes: dict[str, ProcessInfo]

    @property
    def ready(self) -> bool:
        return bool(self.processes) and all(process.state is ProcessState.READY for process in self.processes.values())

    @property
    def not_ready(self) -> list[ProcessInfo]:
        return [process for process in self.processes.values() if process.state is not ProcessState.READY]


def names(settings: StackSettings) -> list[str]:
    """Names of the processes, which are their ids in the fleet too."""
    fleet = (("rollout", settings.rollouts), ("reward", settings.rewards), ("trainer", settings.trainers))
    return ["redis", "control-plane", *(f"{role}-{i}" for role, count in fleet for i in range(count))]


def compose(
    home: Path, settings: StackSettings, *, redis: RedisServer, ports: Mapping[str, int], data: Path, client: httpx.AsyncClient
) -> list[ProcessSpec]:
    """What the supervisor is to run. Stages: Redis first and last; the trainer ends before those that it takes its groups from."""
    programs = settings.programs
    roles = {  # program, stage, seconds of grace
        "control-plane": (programs.control_plane, 1, 15.0),
        "reward": (programs.reward, 2, 15.0),
        "rollout": (programs.rollout, 3, 20.0),
        "trainer": (programs.trainer, 4, 60.0),  # writes a checkpoint
    }
    logs = home / "logs"
    specs = [ProcessSpec("redis", redis.argv, redis.answers, logs / "redis.log", stage=0, grace_s=30.0, port=redis.port, url=redis.url)]
    for name in names(settings)[1:]:
        program, stage, grace_s = roles[name if name in roles else name.rpartition("-")[0]]
        url = f"http://127.0.0.1:{ports[name]}"
        env = {
            "OFFBEAT_REDIS_URL": redis.url,
            "OFFBEAT_HOST": "127.0.0.1",
            "OFFBEAT_PORT": str(ports[name]),
            "OFFBEAT_TOKEN_FILE": str(home / "token"),
            "OFFBEAT_CLUSTER_TOKEN_FILE": str(home / "cluster-token"),
            "OFFBEAT_DATA": str(data),
            "OFFBEAT_MEMBER": name,
            "OFFBEAT_LOG_LEVEL": settings.log_level,
            "OMP_NUM_THREADS": "1",
        }
        probe = http_probe(client, f"{url}/readyz")
        specs.append(ProcessSpec(name, program, probe, logs / f"{name}.log", env=env, stage=stage, grace_s=grace_s, port=ports[name], url=url))
    return specs


def up(
    home: Path = DEFAULT_HOME,
    settings: StackSettings | None = None,
    *,
    timeout_s: float = 300.0,
    progress: Callable[[StackInfo], None] | None = None,
) -> StackInfo:
    """Start the stack, or find it running (with the settings that it was started with), and wait until all of it is ready.

    `progress` is called with each change of state. Raises StackError; what was started then goes on, for `down` to end.
    """
    home = home.resolve()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    supervisor: subprocess.Popen[bytes] | None = None
    shown = None
    try:
        while time.monotonic() < deadline:
            info = status(home)
            if info is None:
                if supervisor is not None and supervisor.poll() not in (None, BUSY):
                    raise StackError(f"the supervisor ended with status {supervisor.returncode}:\n{_tail(home / 'logs' / SUPERVISOR_LOG)}")
                if supervisor is None or supervisor.returncode == BUSY:
                    supervisor = _start_supervisor(home, settings or StackSettings())
            elif info != shown:
                shown = info
                if progress is not None:
                    progress(info)
                if info.ready:
                    return info
                _raise_if_hopeless(info)
            time.sleep(0.05)
    finally:  # one that lost the home to another, or has not come to its first word, would be out of the reach of `down`
        known = status(home)
        if supervisor is not None and (known is None or known.pid != supervisor.pid):
            supervisor.terminate()
            supervisor.wait()
    waiting = ", ".join(f"{process.name} ({process.state}, log: {process.log})" for process in shown.not_ready) if shown else "the supervisor"
    raise StackError(f"not ready after {timeout_s:g} s: {waiting}")


def down(home: Path = DEFAULT_HOME, *, timeout_s: float = 180.0) -> bool:
    """End the stack in order and wait until it is gone; what outlives `timeout_s`, or a supervisor that was killed, is killed.

    False when nothing was running.
    """
    home = home.resolve()
    info = read_state(home)
    if info is None:
        return False
    running = send_signal(info.pid, info.start_ticks, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while is_alive(info.pid, info.start_ticks) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = read_state(home)
    if left is None or left.pid != info.pid:
        return running
    return bool(clean_up(home)) or running


def status(home: Path = DEFAULT_HOME) -> StackInfo | None:
    """What runs in this home; None when no supervisor does."""
    info = read_state(home.resolve())
    return info if info is not None and is_alive(info.pid, info.start_ticks) else None


def read_state(home: Path) -> StackInfo | None:
    """The state as it was written last, by a supervisor that may be gone."""
    try:
        return StackInfo.model_validate_json((home / "state.json").read_bytes())
    except FileNotFoundError:
        return None


def write_state(info: StackInfo) -> None:
    path = info.home / "state.json"
    fresh = path.with_suffix(".new")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(info.model_dump_json(indent=1))
    fresh.replace(path)


def clean_up(home: Path) -> list[str]:
    """Kill what a supervisor that ended without order left behind, itself included, and forget its state. Returns the names of what was killed."""
    info = read_state(home)
    if info is None:
        return []
    supervisor = ProcessInfo(name="supervisor", pid=info.pid, start_ticks=info.start_ticks, log=home / "logs" / SUPERVISOR_LOG)
    killed = kill_leftovers([supervisor, *info.processes.values()])
    (home / "state.json").unlink(missing_ok=True)
    return killed


def _start_supervisor(home: Path, settings: StackSettings) -> subprocess.Popen[bytes]:
    log = home / "logs" / SUPERVISOR_LOG
    rotate(log)
    with open(log, "ab") as output:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "services.local", "--home", str(home), "--settings", settings.model_dump_json()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal is the caller's to handle
        )
    threading.Thread(target=supervisor.wait, daemon=True).start()  # a caller that stays would else keep it as a zombie when it ends
    return supervisor


def _raise_if_hopeless(info: StackInfo) -> None:
    for process in info.not_ready:
        if process.state is ProcessState.BACKING_OFF and process.restarts >= HOPELESS_RESTARTS:
            raise StackError(f"{process.name} has ended {process.restarts} times, last with status {process.last_exit}:\n{_tail(process.log)}")


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join([*log.read_text(errors="replace").splitlines()[-lines:], f"(the whole log: {log})"])
