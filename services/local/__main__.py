"""`python -m services.local --home H`: the supervisor of a local stack; `services.local.stack.up` starts it."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TextIO

from services.local import redis_server, stack
from services.local.supervisor import ProcessInfo, Supervisor, free_ports, probe_client, start_ticks
from services.runtime import logs

log = logging.getLogger("services.local")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.local", description="Run a local stack until SIGTERM or SIGINT.")
    parser.add_argument("--home", type=Path, default=stack.DEFAULT_HOME, help="folder of the stack's state, logs and Redis data")
    parser.add_argument("--settings", default="{}", help="StackSettings as JSON")
    arguments = parser.parse_args()
    settings = stack.StackSettings.model_validate_json(arguments.settings)
    home = arguments.home.resolve()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    logs.set_up(role="supervisor", member="supervisor", level=settings.log_level)
    with open(home / "lock", "a") as lock:
        if not take(lock):
            log.warning("%s is in use by another supervisor", home)
            return stack.BUSY
        for name in stack.clean_up(home):
            log.warning("killed %s, left over from a supervisor that ended without order", name)
        asyncio.run(supervise(home, settings))
        (home / "state.json").unlink(missing_ok=True)
    return 0


def take(lock: TextIO) -> bool:
    """Take the home's lock, which lives as long as this process. False when another has it: to wait would start a stack after that one's `down`."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def supervise(home: Path, settings: stack.StackSettings) -> None:
    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end.set)

    for secret in ("token", "cluster-token"):
        redis_server.keep_secret(home / secret)
    names = stack.names(settings)
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    if settings.api_port is not None:
        ports["control-plane"] = settings.api_port
    password = redis_server.keep_secret(home / "redis-password")
    redis = redis_server.RedisServer(redis_server.find_program(), home / "redis", ports["redis"], password)
    redis.prepare()
    data = settings.data.resolve()
    data.mkdir(parents=True, exist_ok=True)
    own_ticks = start_ticks(os.getpid())
    assert own_ticks is not None

    def record(processes: dict[str, ProcessInfo]) -> None:
        info = stack.StackInfo(
            home=home,
            pid=os.getpid(),
            start_ticks=own_ticks,
            api_url=f"http://127.0.0.1:{ports['control-plane']}",
            redis_url=redis.url,
            token_file=home / "token",
            cluster_token_file=home / "cluster-token",
            data=data,
            processes=processes,
        )
        try:
            stack.write_state(info)
        except OSError as error:  # a full disk must not end what runs
            log.error("the state cannot be written: %s", error)

    async with probe_client() as client:
        supervisor = Supervisor(stack.compose(home, settings, redis=redis, ports=ports, data=data, client=client), changed=record)
        watch = asyncio.create_task(end_with_owner(settings.owner, end))
        await supervisor.run(end)
        watch.cancel()


async def end_with_owner(owner: int | None, end: asyncio.Event) -> None:
    """Set `end` when the process that started this one is gone: a child of an ended process is given another parent."""
    while owner is not None and os.getppid() == owner:
        await asyncio.sleep(0.5)
    if owner is not None:
        log.warning("the owner of the stack, pid %d, is gone: ending", owner)
        end.set()


if __name__ == "__main__":
    sys.exit(main())
