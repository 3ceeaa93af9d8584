"""Real Redis servers of both kinds, a run that is open on one, and a bus whose replies get lost."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from services.contracts.spec import RunSpec
from services.contracts.topics import ACTIVE, RunKeys
from services.local.redis_server import RedisServer, find_program
from services.runtime.bus import Bus, Entry
from services.runtime.ledger import Ledger
from tests.integration.conftest import OwnRedis, free_port

T = TypeVar("T")
KINDS = ("embedded", "redis-server")
TRAINER = "trainer-0"


@contextlib.contextmanager
def started(kind: str, folder: Path) -> Iterator[OwnRedis]:
    """The embedded server, or the `redis-server` that this machine may have."""
    program = find_program() if kind == "embedded" else shutil.which(kind)
    if program is None:
        pytest.skip(f"there is no {kind} in PATH")
    server = RedisServer(Path(program), folder, free_port(), secrets.token_urlsafe(16))
    server.prepare()
    own = OwnRedis(server)
    own.start()
    try:
        yield own
    finally:
        own.stop()


def kill(own: OwnRedis) -> None:
    """As the machine's power would."""
    assert own.process is not None
    own.process.send_signal(signal.SIGKILL)
    own.process.wait(timeout=10)
    own.process = None


def open_run(bus: Bus, run_id: str = "r", spec: RunSpec | None = None, *, trainer: str = TRAINER, state: str = "running") -> Ledger:
    """A run on the fleet, without a version."""
    keys = RunKeys(run_id)
    bus.redis.hset(keys.info, mapping={"spec": (spec or RunSpec()).model_dump_json(), "state": state, "trainer": trainer})
    bus.open_work(run_id)
    bus.redis.sadd(ACTIVE, run_id)
    return Ledger(bus, run_id)


class LossyBus(Bus):
    """Where the reply to a move or a claim is lost, it was made all the same, and is made again."""

    lose_next = False

    def script(self, *args: Any) -> Any:
        return self._again(lambda: super(LossyBus, self).script(*args))

    def claim(self, *args: Any, **kwargs: Any) -> list[Entry]:
        return self._again(lambda: super(LossyBus, self).claim(*args, **kwargs))

    def reclaim(self, *args: Any, **kwargs: Any) -> list[Entry]:
        return self._again(lambda: super(LossyBus, self).reclaim(*args, **kwargs))

    def _again(self, do: Callable[[], T]) -> T:
        if self.lose_next:
            self.lose_next = False
            do()
        return do()
