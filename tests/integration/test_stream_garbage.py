"""Garbage of every kind on every stream, while workers carry groups from issue to batch: it is put aside with its reason, and the run goes on."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from reward_server import worker as reward_module
from reward_server.judges.pool import JudgePools
from reward_server.scoring import Scoring
from reward_server.scoring_threads import ScoringThreads
from reward_server.verifiers.verdict import Tools
from reward_server.worker import RewardWorker
from rollout_server import worker as rollout_module
from rollout_server.scripted_engine import ScriptedEngine
from rollout_server.worker import RolloutWorker
from services.contracts.messages import CompletionGroup, DeadLetter, LoadWeights, Message, PromptGroup, ScoredGroup
from services.contracts.spec import KvPolicy, Order, RunSpec
from services.contracts.staleness import Floor
from services.contracts.topics import Log, Work
from services.runtime.bus import Bus
from services.runtime.codec import encode
from services.runtime.ledger import Ledger
from services.runtime.metrics import RewardMetrics, RolloutMetrics, TrainerMetrics
from services.runtime.process import IdleClock, Shutdown
from services.runtime.tokenizer import PromptTokenizer
from tests.integration.real_store import TRAINER, open_run
from tests.unit.sample_messages import completed, prompt_group, scored, step_record
from trainer.feed import Feed

SPEC = RunSpec(group_size=2)
MODELS: dict[Work, type[Message]] = {Work.PROMPTS: PromptGroup, Work.COMPLETIONS: CompletionGroup, Work.SCORED: ScoredGroup}
UNKNOWN = 1_000_000
"""A number that no group has."""


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("garbage was executed",)


def garbage(topic: Work) -> dict[str, dict[str, Any]]:
    """Fields of an entry, by what is wrong with it."""
    group = prompt_group(UNKNOWN)
    messages = {Work.PROMPTS: group, Work.COMPLETIONS: completed(group), Work.SCORED: scored(completed(group))}
    whole, tree = encode(messages[topic]), messages[topic].model_dump()
    needed = next(name for name, field in MODELS[topic].model_fields.items() if field.is_required())
    another = next(message for work, message in messages.items() if work is not topic)
    return {
        "no data": {"index": 3},
        "nothing": {"data": b""},
        "noise": {"data": random.Random(0).randbytes(3000)},
        "text": {"data": '{"run_id": "r"}'},
        "a pickle": {"data": pickle.dumps(Bomb())},
        "cut off": {"index": UNKNOWN, "data": whole[:-7]},
        "too long": {"index": UNKNOWN, "data": whole + b"\x00"},
        "nested too deep": {"data": b"\x91" * 100_000},
        "another message": {"index": UNKNOWN, "data": encode(another)},
        "another schema": {"index": UNKNOWN, "data": msgspec.msgpack.encode(tree | {"schema_version": 2})},
        "a field too many": {"index": UNKNOWN, "data": msgspec.msgpack.encode(tree | {"more": 1})},
        "a field too few": {"index": UNKNOWN, "data": msgspec.msgpack.encode({k: v for k, v in tree.items() if k != needed})},
        "numbers that are none": {"index": "9" * 5000, "seq": "x", "data": b"\xc0"},
        "names that are no text": {b"\xff\xfe": b"\xff"},
    }


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rollout_module, reward_module):
        monkeypatch.setattr(module, "CLAIM_MS", 20)
        monkeypatch.setattr(module, "RECLAIM_MS", 60_000)
    monkeypatch.setattr(rollout_module, "TOUCH_SECONDS", 0.02)
    monkeypatch.setattr(reward_module, "HOUSEKEEPING_SECONDS", 0.05)


@pytest.fixture
def ledger(bus: Bus) -> Ledger:
    ledger = open_run(bus, spec=SPEC)
    ledger.announce(0, trainer=TRAINER)
    bus.redis.set(ledger.keys.weights, encode(LoadWeights(run_id="r", version=0, transport="shm", kv_policy=KvPolicy.KEEP)))
    return ledger


@contextlib.contextmanager
def reward_server(bus: Bus) -> Iterator[None]:
    shutdown, pools, threads = Shutdown(), JudgePools(), ScoringThreads(2)
    scoring = Scoring(Tools(ask=pools.ask), threads, RewardMetrics(CollectorRegistry()))
    worker = RewardWorker(bus, scoring=scoring, member="reward-0", idle=IdleClock())
    thread = threading.Thread(target=worker.run, args=(shutdown,), daemon=True)
    thread.start()
    yield
    assert thread.is_alive(), "it has died of garbage"
    shutdown.ask()
    thread.join(10)
    threads.close()
    pools.close()


@contextlib.asynccontextmanager
async def rollout_server(bus: Bus, folder: Path) -> AsyncIterator[None]:
    worker = RolloutWorker(
        bus, "r", SPEC, engine=ScriptedEngine(), tokenizer=PromptTokenizer(folder), member="rollout-0", max_sequences=8,
        metrics=RolloutMetrics(CollectorRegistry()), idle=IdleClock(),
    )  # fmt: skip
    task = asyncio.create_task(worker.serve())
    yield
    assert not task.done(), "it has died of garbage"
    worker.stop()
    await task


def letters(ledger: Ledger) -> list[DeadLetter]:
    return [entry.message(DeadLetter) for entry in ledger.bus.range("r", Log.DEAD)]


def test_a_run_goes_on_through_garbage_on_all_its_streams(bus: Bus, ledger: Ledger, model_folder: Path) -> None:
    feed = Feed(bus, ledger, trainer=TRAINER, metrics=TrainerMetrics(CollectorRegistry()))
    kinds = list(garbage(Work.PROMPTS))
    trained: list[int] = []

    def throw(number: int) -> None:
        for topic in Work:
            bus.redis.xadd(ledger.keys.stream(topic), garbage(topic)[kinds[number]])

    def step(version: int) -> bool:
        feed.pull(block_ms=20)
        batch = feed.take(version, batch=2, floor=Floor(((0, 0),)), order=Order.READY)
        if batch is None:
            return False
        ledger.commit(batch.plan, step_record(version, batch.plan.indices), [], trainer=TRAINER, keep_samples=0)
        bus.redis.set(ledger.keys.weights, encode(LoadWeights(run_id="r", version=version + 1, transport="shm", kv_policy=KvPolicy.KEEP)))
        trained.extend(batch.plan.indices)
        return True

    async def body() -> None:
        async with asyncio.timeout(20), rollout_server(bus, model_folder):
            for version in range(len(kinds)):
                throw(version)
                for index in (2 * version, 2 * version + 1):
                    assert ledger.issue(prompt_group(index, max_tokens=16))
                while not await asyncio.to_thread(step, version):
                    assert ledger.conservation().holds
            while len(await asyncio.to_thread(letters, ledger)) < 3 * len(kinds):
                await asyncio.to_thread(feed.pull, block_ms=20)

    with reward_server(bus):
        asyncio.run(body())
    assert sorted(trained) == list(range(2 * len(kinds)))
    found = letters(ledger)
    assert Counter(letter.stream for letter in found) == {topic.value: len(kinds) for topic in Work}
    assert all(letter.group is None for letter in found)
    for letter in found:
        name = MODELS[Work(letter.stream)].__name__
        assert letter.reason.startswith((f"not a valid {name}: ", f"not a MessagePack {name}: ", "an entry without data: ")), letter.reason
        assert len(letter.reason) <= 2000
        assert len(letter.raw) <= 4096
    counts = ledger.conservation()
    assert (counts.issued, counts.consumed, counts.dead, counts.outstanding, counts.holds) == (2 * len(kinds), 2 * len(kinds), 0, 0, True)
    assert int(bus.redis.hget(ledger.keys.info, "unreadable")) == 3 * len(kinds)
    assert [bus.redis.xlen(ledger.keys.stream(topic)) for topic in Work] == [0, 0, 2 * len(kinds)], "nothing is left but what no checkpoint has yet"


def test_weights_in_the_store_that_cannot_be_read_are_waited_out(bus: Bus, ledger: Ledger, model_folder: Path) -> None:
    good = bus.redis.get(ledger.keys.weights)
    bus.redis.set(ledger.keys.weights, b"\xff of another release")
    ledger.issue(prompt_group(0))

    async def body() -> None:
        async with asyncio.timeout(10), rollout_server(bus, model_folder):
            await asyncio.sleep(0.1)
            assert ledger.conservation().queued == 1
            bus.redis.set(ledger.keys.weights, good)
            while not ledger.conservation().generated:
                await asyncio.sleep(0.02)

    asyncio.run(body())


@pytest.mark.parametrize("topic", list(Work))
@pytest.mark.parametrize("kind", list(garbage(Work.PROMPTS)))
def test_garbage_has_a_reason_that_says_what_it_was(bus: Bus, ledger: Ledger, topic: Work, kind: str) -> None:
    expected = {
        "no data": "an entry without data: fields ['index']",
        "nothing": "not a MessagePack {}: Input data was truncated",
        "text": "not a MessagePack {}: MessagePack data is malformed: trailing characters",
        "cut off": "not a MessagePack {}: Input data was truncated",
        "too long": "not a MessagePack {}: MessagePack data is malformed: trailing characters",
        "nested too deep": "not a MessagePack {}: maximum recursion depth exceeded",
        "another schema": "not a valid {}: schema_version: Input should be less than or equal to 1",
        "a field too many": "not a valid {}: more: Extra inputs are not permitted",
        "a field too few": "Field required",
        "numbers that are none": "not a valid {}: message: Input should be a valid dictionary",
        "names that are no text": "an entry without data: fields ['\ufffd\ufffd']",
    }.get(kind, "not a ")
    bus.redis.xadd(ledger.keys.stream(topic), garbage(topic)[kind])
    (entry,) = bus.range("r", topic)
    with pytest.raises(ValueError, match=r".") as caught:
        entry.message(MODELS[topic])
    assert expected.format(MODELS[topic].__name__) in str(caught.value)
