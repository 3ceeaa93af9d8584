"""Publication to a fleet of small servers that really load the published file, and compute the canary with a policy of their own."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import Depends, FastAPI
from prometheus_client import CollectorRegistry
from safetensors.torch import load_file
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from services.contracts.messages import LoadedWeights, LoadWeights, Member, Role
from services.contracts.spec import KvPolicy, RunSpec, Weights
from services.contracts.topics import RunKeys
from services.contracts.transports import BroadcastSource, layout
from services.runtime.bus import Bus
from services.runtime.codec import decode
from services.runtime.fleet import Fleet
from services.runtime.metrics import TrainerMetrics
from services.runtime.process import serving
from services.runtime.web import Problem, base_app, bearer
from tests.integration.conftest import CLUSTER_TOKEN, free_port
from tests.unit.tiny_policy import tiny_policy
from trainer.batching import Trajectory, pack
from trainer.policy import Policy
from trainer.publisher import Publisher
from trainer.weights import FileTransport, NamedWeights, Transport, TransportFailed, make_transport


@dataclass
class StubServer:
    """A rollout server that does with its weights what `fault` says."""

    name: str
    fault: str = ""
    started_at: float = 1.0
    held: int | None = None
    fenced: int = 0
    asked: list[LoadWeights] = field(default_factory=list)
    port: int = field(default_factory=free_port)

    def app(self) -> FastAPI:
        app = base_app(title="stub", description="", registry=CollectorRegistry(), ready=lambda: None)
        secured = [Depends(bearer(CLUSTER_TOKEN))]
        app.post("/v1/weights", dependencies=secured)(self.load)
        app.post("/v1/runs/{run_id}/fence", dependencies=secured)(self.fence)
        return app

    def load(self, request: LoadWeights) -> Any:
        self.asked.append(request)
        match self.fault:
            case "refuses":
                raise Problem(502, "Weights not loaded", "out of memory")
            case "hangs":
                time.sleep(1.0)
            case "another format":
                return {"ok": True}
        self.held = request.version
        canary = canary_of(load_file(request.source["path"]), request) if "path" in request.source else list(request.expected)
        match self.fault:
            case "other weights":
                canary = [value + 0.5 for value in canary]
            case "no canary":
                canary = []
            case "not a number":
                canary[3] = math.nan
            case "another version":
                return LoadedWeights(version=request.version - 1, stall_seconds=0.0, load_seconds=0.0, canary_logprobs=tuple(canary))
        return LoadedWeights(version=request.version, stall_seconds=0.25, load_seconds=0.5, canary_logprobs=tuple(canary))

    def fence(self, run_id: str) -> dict[str, str]:
        assert run_id == "r"
        self.fenced += 1
        self.held = None
        return {}

    def member(self) -> Member:
        return Member(
            member_id=self.name, role=Role.ROLLOUT, url=f"http://127.0.0.1:{self.port}", pid=1, host="h", run_id="r", version=self.held,
            started_at=self.started_at,
        )  # fmt: skip


def canary_of(weights: dict[str, torch.Tensor], request: LoadWeights) -> list[float]:
    policy = tiny_policy(seed=99)
    policy.model.load_state_dict(weights, strict=False)
    first, *rest = request.canary
    with torch.no_grad():
        return policy.forward(pack([Trajectory([first], rest, [0.0] * len(rest), [0] * len(rest), 0.0)])[0], temperature=1.0)[0].tolist()


@dataclass
class Stage:
    """A publisher and its fleet."""

    publisher: Publisher
    policy: Policy
    fleet: Fleet
    stack: contextlib.ExitStack

    def start(self, *servers: StubServer) -> None:
        for server in servers:
            self.stack.enter_context(serving(server.app(), host="127.0.0.1", port=server.port))
        self.beat(*servers)

    def beat(self, *servers: StubServer) -> None:
        for server in servers:
            self.fleet.beat(server.member())

    def prepare(self, version: int) -> None:
        """A version with weights of its own."""
        with torch.no_grad():
            for parameter in self.policy.model.parameters():
                parameter.add_(0.01)
        self.publisher.prepare(version, KvPolicy.KEEP)

    @property
    def stored(self) -> LoadWeights:
        return decode(LoadWeights, self.fleet.bus.redis.get(RunKeys("r").weights))


@contextlib.contextmanager
def staged(bus: Bus, transport: Transport, *, timeout: float = 10.0, tolerance: float | None = None, token: str = CLUSTER_TOKEN) -> Iterator[Stage]:
    policy, spec = tiny_policy(), RunSpec(weights=Weights(timeout=timeout, canary_tolerance=tolerance))
    publisher = Publisher(bus, "r", spec, policy=policy, transport=transport, cluster_token=token, metrics=TrainerMetrics(CollectorRegistry()))
    with contextlib.ExitStack() as stack:
        yield Stage(publisher, policy, Fleet(bus), stack)
        publisher.close()


@pytest.fixture
def stage(bus: Bus, tmp_path: Path) -> Iterator[Stage]:
    with staged(bus, FileTransport(tmp_path / "weights")) as stage:
        yield stage


def test_a_version_reaches_every_server_and_each_proves_it(stage: Stage) -> None:
    one, two = StubServer("one"), StubServer("two")
    stage.start(one, two)
    stage.fleet.beat(StubServer("of another run").member().model_copy(update={"run_id": "s"}))
    for version in (0, 1):
        stage.prepare(version)
        publication = stage.publisher.deliver()
        assert (publication.version, sorted(publication.confirmed), publication.fenced) == (version, ["one", "two"], {})
        assert (one.held, two.held) == (version, version)
        assert publication.canary < 1e-5
        assert (publication.stall_seconds, publication.prepare_seconds > 0, publication.deliver_seconds > 0) == (0.25, True, True)
    first, second = one.asked
    assert (second.run_id, second.transport, second.kv_policy, len(second.canary)) == ("r", "shm", KvPolicy.KEEP, 16)
    assert first.canary == second.canary
    assert first.expected != second.expected
    assert stage.stored == second, "what a late server loads is what the others were sent"
    assert stage.publisher.admit_late() == []
    assert len(one.asked) == 2


def test_weights_that_are_not_all_taken_are_closed_before_the_error_is_judged(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else ranks that are out of step would be taken for ranks in step."""
    closed = []

    def weights(_: torch.dtype) -> Iterator[tuple[str, Any]]:
        try:
            yield "one", "no tensor"
        finally:
            closed.append(True)

    monkeypatch.setattr(stage.policy, "weights", weights)
    with pytest.raises(AttributeError, match="detach") as error:
        stage.prepare(0)
    assert closed == [True], error


def test_the_record_for_late_servers_is_stored_before_servers_are_asked(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    server, stored, load = StubServer("one"), list[LoadWeights](), StubServer.load

    def look_and_load(self: StubServer, request: LoadWeights) -> Any:
        stored.append(stage.stored)
        return load(self, request)

    monkeypatch.setattr(StubServer, "load", look_and_load)
    stage.start(server)
    for version in (0, 1):
        stage.prepare(version)
        assert stage.publisher.deliver().confirmed == ["one"]
    assert stored == server.asked
    assert [request.version for request in stored] == [0, 1]


def test_what_is_trained_after_prepare_is_not_published(stage: Stage) -> None:
    stage.start(StubServer("one"))
    stage.prepare(0)
    wanted = stage.policy.model.state_dict()["model.norm.weight"].clone()
    with torch.no_grad():
        for parameter in stage.policy.model.parameters():
            parameter.add_(0.5)
    publication = stage.publisher.deliver()
    assert publication.confirmed == ["one"]
    assert torch.equal(load_file(stage.stored.source["path"])["model.norm.weight"], wanted)


def test_a_version_is_prepared_before_it_is_delivered(stage: Stage) -> None:
    for deliver in (stage.publisher.deliver, stage.publisher.admit_late):
        with pytest.raises(RuntimeError, match="prepare a version"):
            deliver()


def test_a_server_that_fails_at_every_version_is_told_of_once_until_it_has_loaded_one(stage: Stage) -> None:
    good, bad = StubServer("good"), StubServer("bad", "refuses")
    stage.start(good, bad)
    told = []
    for version in range(6):
        bad.fault = "" if version == 3 else "refuses"
        stage.prepare(version)
        stage.beat(good, bad)
        publication = stage.publisher.deliver()
        assert sorted(publication.confirmed) == (["bad", "good"] if version == 3 else ["good"])
        told.append(list(publication.fenced))
    assert told == [["bad"], [], [], [], ["bad"], []]


def test_the_tolerance_is_that_of_the_spec(bus: Bus, tmp_path: Path) -> None:
    with staged(bus, FileTransport(tmp_path / "weights"), tolerance=0.6) as stage:
        stage.start(StubServer("one", "other weights"))
        stage.prepare(0)
        publication = stage.publisher.deliver()
        assert (publication.confirmed, publication.fenced) == (["one"], {})
        assert publication.canary == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("fault", "reason", "label"),
    [
        ("refuses", "HTTP 502: .*out of memory", "load"),
        ("another format", "validation error", "load"),
        ("another version", "it answers that it holds version 2, not 3", "load"),
        ("other weights", "its canary is 0.5 nats off, more than 0.001", "canary"),
        ("no canary", "its canary is inf nats off", "canary"),
        ("not a number", "", "load"),
    ],
)
def test_a_server_that_fails_is_named_and_the_others_go_on(stage: Stage, fault: str, reason: str, label: str) -> None:
    good, bad = StubServer("good"), StubServer("bad", fault)
    stage.start(good, bad)
    stage.prepare(3)
    publication = stage.publisher.deliver()
    assert publication.confirmed == ["good"]
    assert publication.fenced.keys() == {"bad"}
    assert pytest.importorskip("re").search(reason, publication.fenced["bad"])
    assert bad.fenced == (label == "canary"), "it is told only where it believes that it holds the version"
    assert stage.publisher.metrics.fenced.labels(label)._value.get() == 1


def test_a_server_that_is_gone_or_hangs_is_no_more_than_a_time_out(bus: Bus, tmp_path: Path) -> None:
    with staged(bus, FileTransport(tmp_path / "weights"), timeout=0.3) as stage:
        good, gone, hanging = StubServer("good"), StubServer("gone"), StubServer("hanging", "hangs")
        stage.start(good, hanging)
        stage.beat(gone)
        stage.prepare(0)
        began = time.monotonic()
        publication = stage.publisher.deliver()
        assert time.monotonic() - began < 1.0
        assert publication.confirmed == ["good"]
        assert publication.fenced.keys() == {"gone", "hanging"}
        assert "timed out" in publication.fenced["hanging"]
        assert "refused" in publication.fenced["gone"].lower()


def test_a_server_that_failed_is_told_of_once_and_admitted_when_it_is_well(stage: Stage) -> None:
    good, bad = StubServer("good"), StubServer("bad", "other weights")
    stage.start(good, bad)
    stage.prepare(0)
    assert stage.publisher.deliver().fenced.keys() == {"bad"}
    stage.beat(good, bad)
    for _ in range(3):
        assert stage.publisher.admit_late() == []
    assert bad.fenced == 4
    assert stage.publisher.metrics.fenced.labels("canary")._value.get() == 1, "told once, not with every try"
    bad.fault = ""
    assert stage.publisher.admit_late() == ["bad"]
    assert stage.publisher.admit_late() == []
    assert len(good.asked) == 1, "who holds the version is left alone"


def test_a_server_that_comes_late_gets_the_current_version(stage: Stage) -> None:
    stage.prepare(0)
    assert stage.publisher.deliver().confirmed == []
    late, self_made = StubServer("late"), StubServer("self-made", held=0)
    stage.start(late, self_made)
    assert stage.publisher.admit_late() == ["late", "self-made"]
    assert (late.held, len(late.asked), len(self_made.asked)) == (0, 1, 0), "one has loaded, and checked, the stored copy by itself"
    assert stage.publisher.admit_late() == []
    stage.prepare(1)
    assert sorted(stage.publisher.deliver().confirmed) == ["late", "self-made"]


def test_a_server_that_was_started_again_is_not_taken_for_the_one_before(stage: Stage) -> None:
    server = StubServer("one")
    stage.start(server)
    stage.prepare(0)
    stage.publisher.deliver()
    server.started_at, server.held = 2.0, None
    stage.beat(server)
    assert stage.publisher.admit_late() == ["one"]
    assert (server.held, len(server.asked)) == (0, 2)


def test_a_server_that_is_fenced_is_not_taken_at_its_word(stage: Stage) -> None:
    server = StubServer("one", "other weights")
    stage.start(server)
    stage.prepare(0)
    stage.publisher.deliver()
    stage.fleet.beat(server.member().model_copy(update={"version": 0}))  # sent between its load and its fence
    assert stage.publisher.admit_late() == []
    server.fault = ""
    assert stage.publisher.admit_late() == ["one"]
    assert server.held == 0


def test_a_server_that_does_not_give_up_its_weights_is_said_to(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fence(self: StubServer, run_id: str) -> dict[str, str]:
        raise Problem(409, "Not serving this run")

    monkeypatch.setattr(StubServer, "fence", fence)
    stage.start(StubServer("one", "other weights"))
    stage.prepare(0)
    assert "409" in stage.publisher.deliver().fenced["one"]


def test_a_wrong_token_loads_nothing(bus: Bus, tmp_path: Path) -> None:
    with staged(bus, FileTransport(tmp_path / "weights"), token="wrong") as stage:
        server = StubServer("one")
        stage.start(server)
        stage.prepare(0)
        assert "HTTP 401" in stage.publisher.deliver().fenced["one"]
        assert server.asked == []


# -- a transport to which all servers must come together ------------------------------------------------------------------------------


class Collective:
    """Its `send` ends when every server has been asked, and fails when one of them is cancelled."""

    name = "together"
    stored = None

    def __init__(self) -> None:
        self.rounds: list[list[str]] = []
        self.servers: dict[str, StubServer] = {}
        self.cancelled = threading.Event()

    def prepare(self, version: int, weights: NamedWeights) -> None:
        list(weights)

    def sources(self, servers: Sequence[str]) -> dict[str, dict[str, Any]]:
        self.rounds.append(list(servers))
        self.cancelled.clear()
        return {server: {"rank": rank} for rank, server in enumerate(servers, 1)}

    def send(self) -> None:
        deadline = time.monotonic() + 5
        while not all(len(self.servers[name].asked) >= sum(name in names for names in self.rounds) for name in self.rounds[-1]):
            if self.cancelled.is_set() or time.monotonic() > deadline:
                raise TransportFailed("not all came")
            time.sleep(0.005)
        if self.cancelled.wait(0.1):
            raise TransportFailed("one has left")

    def cancel(self, reason: str) -> None:
        self.cancelled.set()

    def close(self) -> None: ...


@pytest.fixture
def together(bus: Bus) -> Iterator[Stage]:
    with staged(bus, Collective()) as stage:
        yield stage


def test_files_of_a_trainer_before_are_no_record_of_what_is_sent_otherwise(together: Stage) -> None:
    together.fleet.bus.redis.set(RunKeys("r").weights, b"of a trainer by shared memory")
    together.prepare(0)
    together.publisher.deliver()
    assert together.fleet.bus.redis.get(RunKeys("r").weights) is None


def test_all_servers_are_asked_at_the_same_time_however_many_they_are(together: Stage) -> None:
    transport = together.publisher.transport
    assert isinstance(transport, Collective)
    door = StubServer("door")
    together.start(door)
    together.fleet.leave("door")
    for n in range(24):  # through one door
        member = door.member().model_copy(update={"member_id": f"s{n:02}"})
        together.fleet.beat(member)
        transport.servers[member.member_id] = door
    together.prepare(0)
    began = time.monotonic()
    publication = together.publisher.deliver()
    assert len(publication.confirmed) == 24
    assert time.monotonic() - began < 4
    assert [source.source["rank"] for source in sorted(door.asked, key=lambda asked: asked.source["rank"])] == list(range(1, 25))


def test_a_collective_that_one_server_broke_is_made_again_with_the_others(together: Stage) -> None:
    transport = together.publisher.transport
    assert isinstance(transport, Collective)
    servers = [StubServer("one"), StubServer("three"), StubServer("two", "refuses")]
    transport.servers = {server.name: server for server in servers}
    together.start(*servers)
    together.prepare(0)
    publication = together.publisher.deliver()
    assert (sorted(publication.confirmed), publication.fenced.keys()) == (["one", "three"], {"two"})
    assert transport.rounds[0] == ["one", "three", "two"]
    assert together.fleet.bus.redis.get(RunKeys("r").weights) is None, "there is nothing in the store that a late server could load"


# -- a real broadcast -----------------------------------------------------------------------------------------------------------------


@dataclass
class Receiver(StubServer):
    """The other end of a broadcast; each time in a group of its own."""

    def load(self, request: LoadWeights) -> Any:
        if self.fault == "refuses":
            return super().load(request)
        self.asked.append(request)
        source = BroadcastSource.model_validate(request.source)
        wait = timedelta(seconds=source.timeout)
        store = TCPStore(source.host, source.port, is_master=False, timeout=wait, wait_for_workers=False)
        if self.fault == "other shapes":
            store.set(source.refused_key, "lm_head is unknown")
            time.sleep(0.05)  # an engine looks now and then whether the version has come
            raise Problem(502, "Weights not loaded", "lm_head is unknown")
        store.set(source.ready_key, "")
        store.wait([source.go_key], wait)
        verb, _, detail = store.get(source.go_key).decode().partition(" ")
        if verb != "join":
            raise Problem(502, "Weights not loaded", f"the trainer called the publication off: {detail}")
        options = ProcessGroupGloo._Options()
        options._timeout = wait
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        group = ProcessGroupGloo(PrefixStore(detail, store), source.rank, source.world, options)
        offsets, size = layout(source.tensors)
        buffer = torch.empty(size, dtype=torch.uint8)
        for chunk in buffer.split(source.chunk_bytes):
            group.broadcast([chunk], BroadcastOptions()).wait()
        pieces = zip(source.tensors, offsets, strict=True)
        weights = {t.name: buffer[at : at + t.nbytes].view(getattr(torch, t.dtype)).view(t.shape) for t, at in pieces}
        self.held = request.version
        canary = canary_of(weights, request)
        return LoadedWeights(version=request.version, stall_seconds=0.25, load_seconds=0.5, canary_logprobs=tuple(canary))


@pytest.fixture
def broadcast(bus: Bus, tmp_path: Path) -> Iterator[Stage]:
    with staged(bus, make_transport("gloo", directory=tmp_path, host="127.0.0.1", timeout=5.0)) as stage:
        yield stage


def test_a_broadcast_reaches_all_servers_and_a_late_one(broadcast: Stage) -> None:
    servers = [Receiver("one"), Receiver("two")]
    broadcast.start(*servers)
    broadcast.prepare(0)
    publication = broadcast.publisher.deliver()
    assert (sorted(publication.confirmed), publication.fenced) == (["one", "two"], {})
    late = Receiver("late")
    broadcast.start(late)
    assert broadcast.publisher.admit_late() == ["late"]
    assert [server.held for server in (*servers, late)] == [0, 0, 0]
    assert publication.canary < 1e-5


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("other shapes", "lm_head is unknown"),
        ("refuses", "out of memory"),
        ("gone", "refused"),
    ],
)
def test_a_broadcast_that_one_server_breaks_is_made_again_with_the_others(broadcast: Stage, fault: str, reason: str) -> None:
    one, bad, two = Receiver("one"), Receiver("bad", fault), Receiver("two")
    broadcast.start(one, two, *([] if fault == "gone" else [bad]))
    broadcast.beat(bad)
    broadcast.prepare(0)
    publication = broadcast.publisher.deliver()
    assert (sorted(publication.confirmed), list(publication.fenced)) == (["one", "two"], ["bad"])
    assert reason in publication.fenced["bad"]
    assert [server.held for server in (one, bad, two)] == [0, None, 0]
