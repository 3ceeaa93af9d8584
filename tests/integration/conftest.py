"""Real parts for the tests of this folder: Redis or Valkey with a password, a fleet that only beats, a model's folder, and the API over HTTP."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from services.client import Client
from services.contracts.messages import Member, Role
from services.contracts.spec import RunSpec
from services.control_plane.api.deps import Deps
from services.control_plane.app import create_app
from services.control_plane.checks import AskRewardServer
from services.control_plane.store import EventTail, RunStore
from services.local.redis_server import RedisServer, find_program
from services.runtime.bus import Bus
from services.runtime.fleet import Fleet
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.process import Shutdown, serving

TOKEN, CLUSTER_TOKEN = "t" * 32, "c" * 32


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(holds: Callable[[], Any], *, seconds: float = 10.0) -> Any:
    """The first true answer of `holds`."""
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {holds}"
        time.sleep(0.02)
    return answer


@dataclass
class OwnRedis:
    """A server that a test may end and start again; its data outlive it."""

    server: RedisServer
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self.server.url

    def start(self) -> None:
        self.process = subprocess.Popen(self.server.argv, stdout=subprocess.DEVNULL)
        client = redis.Redis.from_url(self.url)

        def answers() -> bool:
            with contextlib.suppress(redis.ConnectionError):
                return bool(client.ping())
            return False

        wait_until(answers)
        client.close()

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=10)
            self.process = None


def new_redis(folder: Path) -> OwnRedis:
    server = RedisServer(find_program(), folder, free_port(), secrets.token_urlsafe(16))
    server.prepare()
    return OwnRedis(server)


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRedis]:
    own = new_redis(tmp_path_factory.mktemp("redis"))
    own.start()
    yield own
    own.stop()


@pytest.fixture
def redis_url(shared_redis: OwnRedis) -> str:
    """An empty store."""
    with redis.Redis.from_url(shared_redis.url) as client:
        client.flushall()
    return shared_redis.url


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    """A server of the test's own, not yet started."""
    own = new_redis(tmp_path / "own-redis")
    yield own
    own.stop()


@pytest.fixture
def bus(redis_url: str) -> Iterator[Bus]:
    bus = Bus(redis_url, patience=5.0)
    yield bus
    bus.close()


@pytest.fixture
def store(bus: Bus) -> RunStore:
    return RunStore(bus)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the control plane reads of a model: its configuration, and a tokenizer that has one token a byte."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {token: i for i, token in enumerate(("<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 0}))
    return folder


@pytest.fixture
def spec_tree(model_folder: Path) -> dict[str, Any]:
    """A spec that is accepted: 6 versions of 4 groups."""
    return {
        "name": "test", "seed": 7, "versions": 6, "batch_groups": 4, "group_size": 2, "model": {"path": str(model_folder)},
        "staleness": {"min_lag": 0, "max_lag": 1},
    }  # fmt: skip


@pytest.fixture
def spec(spec_tree: dict[str, Any]) -> RunSpec:
    return RunSpec.model_validate(spec_tree)


@dataclass
class Stubs:
    """Members of the fleet that beat when they are told to, and do nothing else."""

    fleet: Fleet
    members: dict[str, Member] = field(default_factory=dict)

    def beat(self, member_id: str, role: Role, **fields: Any) -> str | None:
        """The run that the member is assigned to."""
        before = self.members.get(member_id)
        started = {"started_at": before.started_at if before else time.time()}
        member = Member(member_id=member_id, role=role, **{"url": "http://127.0.0.1:1", "pid": 1, "host": "stub", "ready": True, **started, **fields})
        self.members[member_id] = member
        return self.fleet.beat(member)

    def work(self) -> None:
        """Every member beats, and works for the run that it is assigned to."""
        assigned = self.fleet.assignments()
        for member in list(self.members.values()):
            self.beat(member.member_id, member.role, run_id=assigned.get(member.member_id), url=member.url)

    def die(self, member_id: str) -> None:
        """As if its last heartbeat had expired."""
        self.members.pop(member_id)
        self.fleet.bus.redis.delete(f"offbeat:fleet:member:{member_id}")


@pytest.fixture
def stubs(bus: Bus) -> Stubs:
    return Stubs(Fleet(bus))


@dataclass(frozen=True)
class Api:
    """The API, served over HTTP, without the loops that schedule and dispatch."""

    url: str
    client: Client
    http: httpx.Client
    """With the token, for what the client would not send."""
    data: Path


@contextlib.contextmanager
def serve_api(redis_url: str, data: Path, *, port: int | None = None) -> Iterator[Api]:
    port, registry, shutdown = port or free_port(), CollectorRegistry(), Shutdown()
    bus = Bus(redis_url, patience=0.3)
    fleet = Fleet(bus)
    deps = Deps(
        bus=bus, store=RunStore(bus), fleet=fleet, tail=EventTail(redis_url), check_rewards=AskRewardServer(fleet, cluster_token=CLUSTER_TOKEN),
        data=data, shutdown=shutdown,
    )  # fmt: skip
    app = create_app(deps, token=TOKEN, registry=registry, metrics=ControlPlaneMetrics(registry), ready=lambda: None)
    url = f"http://127.0.0.1:{port}"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with (
        serving(app, host="127.0.0.1", port=port),
        Client(url, TOKEN) as client,
        httpx.Client(base_url=url, headers=headers, trust_env=False) as http,
    ):
        yield Api(url, client, http, data)
        shutdown.ask()


@pytest.fixture
def api(redis_url: str, tmp_path: Path) -> Iterator[Api]:
    with serve_api(redis_url, tmp_path) as api:
        yield api
