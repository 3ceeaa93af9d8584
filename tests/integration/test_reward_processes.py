"""Real reward server processes over one stream: killed, drained, and none of a group's rewards lost or counted twice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from prometheus_client import CollectorRegistry
from pydantic import JsonValue

from services.contracts.messages import CompletionGroup, PromptGroup, ScoredGroup
from services.contracts.spec import Order, RunSpec, Verifier
from services.contracts.staleness import Floor
from services.contracts.topics import Work
from services.local.reward_alone import reward_alone
from services.runtime.bus import Bus
from services.runtime.ledger import Ledger
from services.runtime.metrics import TrainerMetrics
from tests.integration.conftest import CLUSTER_TOKEN, free_port, wait_until
from tests.integration.real_store import TRAINER, open_run
from tests.unit.sample_messages import completion, prompt_group, step_record
from trainer.feed import Feed

SPEC = RunSpec(group_size=4, rewards=(Verifier(name="math"), Verifier(name="format", weight=0.5, options={"boxed": True})))
CODE = RunSpec(group_size=4, rewards=(Verifier(name="code", options={"extract": "all"}),))
READY_SECONDS = 120.0
BOMB = r"9^{9^{9^{9}}}"
KINDS = {
    "template": ("judges.template", 0), "worker": ("judges.template", 1),
    "guardian": ("sandbox.zygote", 0), "zygote": ("sandbox.zygote", 1), "job": ("sandbox.zygote", 2),
}  # fmt: skip
"""A reward server's processes: the module of its child, and how far below that they are."""


@dataclass
class Process:
    popen: subprocess.Popen[bytes]
    url: str
    token: str = CLUSTER_TOKEN

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.token}"}, trust_env=False, timeout=60)

    def ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/readyz", trust_env=False, timeout=5).status_code == 200
        return False

    def parts(self, kind: str) -> list[psutil.Process]:
        """Its living processes of this kind."""
        module, below = KINDS[kind]
        found = [one for one in psutil.Process(self.popen.pid).children() if module in " ".join(one.cmdline())]
        for _ in range(below):
            found = [child for one in found for child in one.children()]
        return [one for one in found if one.status() != psutil.STATUS_ZOMBIE]

    def end(self, number: signal.Signals, seconds: float = 60) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(seconds)


@pytest.fixture
def start(redis_url: str, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts reward servers, which end with the test."""
    token_file, started = tmp_path / "token", list[Process]()
    token_file.write_text(CLUSTER_TOKEN)

    def start(name: str, *arguments: str, **settings: Any) -> Process:
        port = free_port()
        env = {
            **os.environ, "OFFBEAT_REDIS_URL": redis_url, "OFFBEAT_PORT": str(port), "OFFBEAT_CLUSTER_TOKEN_FILE": str(token_file),
            "OFFBEAT_MEMBER": name, "OMP_NUM_THREADS": "1", **{f"OFFBEAT_{key.upper()}": str(value) for key, value in settings.items()},
        }  # fmt: skip
        with open(tmp_path / f"{name}.log", "ab") as log:
            popen = subprocess.Popen([sys.executable, "-m", "reward_server", *arguments], env=env, stdout=log, stderr=subprocess.STDOUT)
        started.append(Process(popen, f"http://127.0.0.1:{port}"))
        return started[-1]

    yield start
    for process in started:
        process.end(signal.SIGKILL)


def generate(ledger: Ledger, index: int, texts: list[str], answer: JsonValue = None) -> CompletionGroup:
    answer = f"x+{index}" if answer is None else answer
    ledger.issue(prompt_group(index, run_id=ledger.run_id, group_size=len(texts), answer=answer, max_lag=1000))
    (entry,) = [entry for entry in ledger.bus.range(ledger.run_id, Work.PROMPTS) if entry.index == index]
    attempt = ledger.start(index, held=0, max_attempts=5)
    assert isinstance(attempt, int)
    done = CompletionGroup(
        group=entry.message(PromptGroup), completions=tuple(completion(text=text) for text in texts), server="s", attempt=attempt, started_at=1.0
    )
    assert ledger.finish(entry, done)
    return done


def texts_of(index: int) -> list[str]:
    """Right by text, right by computer algebra, wrong, and no answer."""
    return [rf"\boxed{{x+{index}}}", rf"\boxed{{{index}+x}}", rf"\boxed{{x+{index}+1}}", "none"]


REWARDS = [1.5, 1.5, 0.5, 0.0]


def scored(ledger: Ledger) -> dict[int, list[float]]:
    groups = [entry.message(ScoredGroup) for entry in ledger.bus.range(ledger.run_id, Work.SCORED)]
    assert len({group.group.index for group in groups}) == len(groups), "no group twice"
    return {group.group.index: group.rewards for group in groups}


def functions_of(index: int) -> list[str]:
    """Right, right after a while, wrong, and failing."""
    return [
        f"def f(x): return x + {index}", f"import time\ntime.sleep(0.05)\ndef f(x): return {index} + x", f"def f(x): return x + {index} + 1",
        "def f(x): raise ValueError(x)",
    ]  # fmt: skip


def record_of(index: int) -> JsonValue:
    return {"function": "f", "calls": [{"args": [x], "expected": x + index} for x in (1, 5, -7)]}


def a_run(bus: Bus, spec: RunSpec = SPEC) -> Ledger:
    ledger = open_run(bus, "r", spec)
    ledger.announce(0, trainer=TRAINER)
    return ledger


def train(ledger: Ledger, batches: int, batch: int, got: list[ScoredGroup]) -> None:
    """As a trainer does: takes what is scored in batches, and counts it as consumed."""
    feed = Feed(ledger.bus, ledger, trainer=TRAINER, metrics=TrainerMetrics(CollectorRegistry()))
    for version in range(batches):
        while (taken := feed.take(version, batch=batch, floor=Floor(((0, 0),)), order=Order.READY)) is None:
            feed.pull(block_ms=100)
        got += taken.groups
        ledger.commit(taken.plan, step_record(version, taken.plan.indices), [], trainer=TRAINER, keep_samples=0)
        feed.checkpointed(version + 1)


class Faults(NamedTuple):
    """A run, and what is killed under it."""

    spec: RunSpec
    texts: Callable[[int], list[str]]
    answer: Callable[[int], JsonValue]
    rewards: list[float]
    kinds: tuple[str, ...]


FAULTS = {
    "math": Faults(SPEC, texts_of, lambda index: f"x+{index}", REWARDS, ("worker", "template") * 3),
    "code": Faults(CODE, functions_of, record_of, [1.0, 1.0, 0.0, 0.0], ("job", "job", "zygote", "job", "guardian") * 2),
}


@pytest.mark.parametrize("verifier", FAULTS)
def test_every_group_is_trained_on_once_whatever_is_killed(bus: Bus, start: Callable[..., Process], verifier: str) -> None:
    """Parts of two servers are killed under load, then one of the servers, which comes back under its name; every group reaches the trainer once."""
    faults, batches, batch, draw = FAULTS[verifier], 25, 8, random.Random(0)
    ledger, groups = a_run(bus, faults.spec), batches * batch
    for index in range(groups):
        generate(ledger, index, faults.texts(index), faults.answer(index))
    servers = [start(name, reward_threads=2, reward_workers=1) for name in ("one", "two")]
    trained: list[ScoredGroup] = []
    training = threading.Thread(target=train, args=(ledger, batches, batch, trained), daemon=True)
    training.start()

    def scored_so_far() -> int:
        counts = ledger.conservation()
        return counts.scored + counts.taken + counts.consumed

    def after(more: int) -> None:
        so_far = scored_so_far()
        wait_until(lambda: scored_so_far() >= so_far + more, seconds=READY_SECONDS)

    wait_until(lambda: all(server.ready() for server in servers), seconds=READY_SECONDS)
    for kind in faults.kinds:
        after(5)
        with contextlib.suppress(psutil.NoSuchProcess):  # a job may end by itself
            draw.choice(wait_until(lambda kind=kind: draw.choice(servers).parts(kind), seconds=READY_SECONDS)).kill()
    wait_until(lambda: bus.own("r", Work.COMPLETIONS, "one"), seconds=READY_SECONDS)
    servers[0].end(signal.SIGKILL)
    after(5)
    assert scored_so_far() < groups, "there is no load left"
    start("one", reward_threads=2, reward_workers=1)
    training.join(READY_SECONDS)
    assert {group.group.index: group.rewards for group in trained} == dict.fromkeys(range(groups), faults.rewards)
    assert len(trained) == groups, "a group was trained on twice"
    counts = ledger.conservation()
    assert (counts.consumed, counts.dead, counts.outstanding, counts.holds) == (groups, 0, 0, True)
    assert bus.range("r", Work.COMPLETIONS) == []


def test_no_process_of_a_killed_server_is_left_behind(bus: Bus, start: Callable[..., Process]) -> None:
    ledger = a_run(bus)
    generate(ledger, 0, texts_of(0))
    server = start("reward-0")
    wait_until(lambda: 0 in scored(ledger), seconds=READY_SECONDS)
    children = psutil.Process(server.popen.pid).children(recursive=True)
    assert children
    server.end(signal.SIGKILL)
    wait_until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children), seconds=30)


def test_a_server_that_is_asked_to_end_answers_what_it_has_and_says_so_first(bus: Bus, start: Callable[..., Process]) -> None:
    ledger = a_run(bus)
    server = start("reward-0")
    wait_until(server.ready, seconds=READY_SECONDS)
    generate(ledger, 0, texts_of(0))
    wait_until(lambda: 0 in scored(ledger), seconds=READY_SECONDS)
    generate(ledger, 1, [rf"\boxed{{{BOMB}}}"] * 2)
    body = {"rewards": [{"name": "math"}], "completion": rf"\boxed{{{BOMB}+1}}", "answer": "7"}
    answers: list[httpx.Response] = []

    def ask() -> None:
        with server.http as http:
            answers.append(http.post("/v1/score", json=body))

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.3)
    server.popen.send_signal(signal.SIGTERM)
    with contextlib.suppress(httpx.TransportError):  # it may be gone by now on a quick machine
        assert httpx.get(f"{server.url}/readyz", trust_env=False, timeout=5).status_code == 503
    assert server.popen.wait(60) == 0
    asking.join(60)
    assert (answers[0].status_code, answers[0].json()["outcome"]) == (200, "timeout")
    assert (ledger.conservation().generated, ledger.conservation().holds) == (1, True)
    (entry,) = bus.reclaim("r", Work.COMPLETIONS, "another", idle_ms=60_000, count=5)
    assert entry.index == 1, "it could not be scored here and waits for another server"


def test_a_server_without_a_bus_serves_http_alone(tmp_path: Path) -> None:
    with (
        reward_alone() as (url, token),
        httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=60) as http,
    ):
        body = {"rewards": [{"name": "math"}], "completion": r"\boxed{x+1}", "answer": "1+x"}
        assert http.post("/v1/score", json=body).json()["reward"] == 1.0
        assert "offbeat_reward_verifications_total" in http.get("/metrics").text
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/healthz", trust_env=False)
