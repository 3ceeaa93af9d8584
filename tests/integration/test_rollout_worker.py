"""The rollout worker with a scripted engine on a real store: every group is completed once, whoever dies, falls behind or is asked to end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from rollout_server import worker as worker_module
from rollout_server.app import create_app
from rollout_server.engine import EngineDied, Sampled, SamplingRequest, WeightLoadFailed
from rollout_server.scripted_engine import ScriptedEngine, scripted_logprob, scripted_tokens
from rollout_server.worker import NotServing, RolloutWorker
from services.contracts.messages import CompletionGroup, DeadLetter, LoadWeights
from services.contracts.spec import KvPolicy, RunSpec
from services.contracts.topics import Log, Work
from services.runtime.bus import Bus
from services.runtime.codec import encode
from services.runtime.ledger import Ledger, Place
from services.runtime.metrics import RolloutMetrics
from services.runtime.process import IdleClock
from services.runtime.tokenizer import PromptTokenizer
from tests.integration.conftest import CLUSTER_TOKEN
from tests.integration.real_store import TRAINER, open_run
from tests.unit.sample_messages import prompt_group

SPEC = RunSpec(group_size=2, max_attempts=3)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "CLAIM_MS", 20)
    monkeypatch.setattr(worker_module, "TOUCH_SECONDS", 0.05)
    monkeypatch.setattr(worker_module, "RECLAIM_MS", 60_000)
    monkeypatch.setattr(worker_module, "DRAIN_SECONDS", 0.2)


@pytest.fixture
def ledger(bus: Bus) -> Ledger:
    ledger = open_run(bus, spec=SPEC)
    ledger.announce(0, trainer=TRAINER)
    store(ledger, 0)
    return ledger


def request(version: int, **fields: Any) -> LoadWeights:
    """As the trainer sends it: with what it expects of the canary."""
    canary = (5, 6, 7)
    values = {
        "transport": "shm", "kv_policy": KvPolicy.RECOMPUTE, "canary": canary, "tolerance": 1e-3,
        "expected": tuple(scripted_logprob(version, token) for token in canary[1:]),
    } | fields  # fmt: skip
    return LoadWeights.model_validate({"run_id": "r", "version": version} | values)


def store(ledger: Ledger, version: int, **fields: Any) -> None:
    """The copy from which a server loads by itself."""
    ledger.bus.redis.set(ledger.keys.weights, encode(request(version, **fields)))


class WatchedEngine(ScriptedEngine):
    """Counts what runs at once, and fails as it is told to."""

    def __init__(self, *, token_seconds: float = 0.0) -> None:
        super().__init__(token_seconds=token_seconds)
        self.most_at_once = 0
        self.errors: list[BaseException] = []
        """One for each of the next calls."""

    async def sample(self, request: SamplingRequest) -> Sampled:
        if self.errors:
            raise self.errors.pop(0)
        watch = asyncio.create_task(super().sample(request))
        await asyncio.sleep(0)
        self.most_at_once = max(self.most_at_once, len(self.running))
        return await watch


@dataclass
class Serving:
    worker: RolloutWorker
    engine: WatchedEngine
    task: asyncio.Task[None]

    async def stop(self) -> None:
        self.worker.stop()
        await self.task


@contextlib.asynccontextmanager
async def serving(
    ledger: Ledger, folder: Path, *, name: str = "rollout-0", engine: WatchedEngine | None = None, max_sequences: int = 8
) -> AsyncIterator[Serving]:
    engine = engine or WatchedEngine()
    await engine.start()
    worker = RolloutWorker(
        ledger.bus, "r", SPEC, engine=engine, tokenizer=PromptTokenizer(folder), member=name, max_sequences=max_sequences,
        metrics=RolloutMetrics(CollectorRegistry()), idle=IdleClock(),
    )  # fmt: skip
    task = asyncio.create_task(worker.serve())
    try:
        yield Serving(worker, engine, task)
    finally:
        worker.stop()
        await asyncio.wait([task], timeout=5)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, EngineDied):
            await task


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(body, 20))


async def until(holds: Callable[[], Any], *, seconds: float = 8.0) -> None:
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(holds):
            await asyncio.sleep(0.01)


def done(ledger: Ledger) -> dict[int, CompletionGroup]:
    """What is on the stream of completions, by index."""
    groups = [entry.message(CompletionGroup) for entry in ledger.bus.range("r", Work.COMPLETIONS)]
    assert len({group.group.index for group in groups}) == len(groups), "no group twice"
    return {group.group.index: group for group in groups}


def completed(ledger: Ledger, *indices: int) -> Callable[[], bool]:
    return lambda: done(ledger).keys() >= set(indices)


def places(ledger: Ledger) -> dict[int, Place]:
    return {row.index: row.place for row in ledger.rows()}


def letters(ledger: Ledger) -> list[DeadLetter]:
    return [entry.message(DeadLetter) for entry in ledger.bus.range("r", Log.DEAD)]


def slow_group(index: int, **fields: Any) -> Any:
    """A group each of whose completions has ten tokens or more."""
    seed = next(s for s in range(0, 10_000) if all(len(scripted_tokens(_sampling(s + g))) >= 10 for g in range(2)))
    return prompt_group(index, seed=seed, max_tokens=16, **fields)


def _sampling(seed: int) -> SamplingRequest:
    return SamplingRequest(request_id="", prompt=[7, 5], seed=seed, temperature=1.0, top_p=1.0, max_tokens=16)


# -- work -----------------------------------------------------------------------------------------------------------------------------


def test_a_group_is_completed_with_a_seed_for_each_of_its_samples(ledger: Ledger, model_folder: Path) -> None:
    group = prompt_group(0, seed=40, max_tokens=16, group_size=3)
    ledger.issue(group)

    async def body() -> None:
        async with serving(ledger, model_folder) as here:
            await until(completed(ledger, 0))
            assert here.worker.version == 0
            assert here.worker.metrics.groups.labels("published")._value.get() == 1

    run(body())
    result = done(ledger)[0]
    assert (result.group, result.server, result.attempt) == (group, "rollout-0", 1)
    expected = [scripted_tokens(_sampling(40 + g)) for g in range(3)]
    assert [c.token_ids for c in result.completions] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1
    for completion, tokens in zip(result.completions, expected, strict=True):
        assert completion.logprob_values == pytest.approx([scripted_logprob(0, token) for token in tokens], abs=1e-6)
        assert completion.versions == [0] * len(tokens)
        assert completion.text == PromptTokenizer(model_folder).decode(tokens)
    assert result.started_at <= result.finished_at
    assert ledger.bus.range("r", Work.PROMPTS) == []
    assert ledger.conservation().generated == 1


def test_two_servers_share_the_work(ledger: Ledger, model_folder: Path) -> None:
    for index in range(24):
        ledger.issue(slow_group(index))

    async def body() -> None:
        async with (
            serving(ledger, model_folder, name="a", engine=WatchedEngine(token_seconds=0.002)),
            serving(ledger, model_folder, name="b", engine=WatchedEngine(token_seconds=0.002)),
        ):
            await until(completed(ledger, *range(24)))

    run(body())
    assert {group.server for group in done(ledger).values()} == {"a", "b"}
    assert {group.attempt for group in done(ledger).values()} == {1}
    assert ledger.conservation().holds


@pytest.mark.parametrize(("max_sequences", "most"), [(8, 8), (5, 4), (2, 2)])
def test_a_server_takes_no_more_than_it_has_room_for(ledger: Ledger, model_folder: Path, max_sequences: int, most: int) -> None:
    for index in range(12):
        ledger.issue(slow_group(index))

    async def body() -> None:
        async with serving(ledger, model_folder, engine=WatchedEngine(token_seconds=0.001), max_sequences=max_sequences) as here:
            await until(completed(ledger, *range(12)))
            assert here.engine.most_at_once == most

    run(body())


def test_a_group_that_is_larger_than_the_room_is_served_alone(ledger: Ledger, model_folder: Path) -> None:
    """The knob `group_size` was turned up beyond what the server generates at once."""
    for index in range(3):
        ledger.issue(slow_group(index, group_size=6))

    async def body() -> None:
        async with serving(ledger, model_folder, engine=WatchedEngine(token_seconds=0.001), max_sequences=4) as here:
            await until(completed(ledger, 0, 1, 2))
            assert here.engine.most_at_once <= 12, "the size is known only when a group has been read"

    run(body())


def test_idle_time_is_what_is_spent_without_work(ledger: Ledger, model_folder: Path) -> None:
    async def body() -> None:
        async with serving(ledger, model_folder, engine=WatchedEngine(token_seconds=0.05)) as here:
            await until(lambda: here.worker.idle.total > 0.1)
            ledger.issue(slow_group(0))
            await until(lambda: here.engine.running)
            before = here.worker.idle.total
            await until(completed(ledger, 0))
            assert here.worker.idle.total - before < 0.4, "ten tokens took at least 0.5 s"

    run(body())


# -- weights --------------------------------------------------------------------------------------------------------------------------


def test_a_server_loads_the_stored_copy_before_it_starts_anything(ledger: Ledger, model_folder: Path) -> None:
    ledger.bus.redis.delete(ledger.keys.weights)
    ledger.announce(4, trainer=TRAINER)
    ledger.issue(prompt_group(0))

    async def body() -> None:
        async with serving(ledger, model_folder) as here:
            await asyncio.sleep(0.15)
            assert (here.worker.version, places(ledger)) == (None, {0: Place.QUEUED})
            store(ledger, 4)
            await until(completed(ledger, 0))

    run(body())
    assert done(ledger)[0].start_version == 4


@pytest.mark.parametrize("expected", [(-9.0, -9.0), (float("nan"), -1.0), (-1.0,)])
def test_a_stored_copy_that_does_not_pass_the_canary_is_not_served(ledger: Ledger, model_folder: Path, expected: tuple[float, ...]) -> None:
    store(ledger, 0, expected=expected)
    ledger.issue(prompt_group(0))

    async def body() -> None:
        async with serving(ledger, model_folder) as here:
            await until(lambda: here.worker.metrics.loads.labels("ok")._value.get() == 1)
            await asyncio.sleep(0.1)
            assert (here.worker.version, places(ledger)) == (None, {0: Place.QUEUED})
            store(ledger, 0)
            await until(completed(ledger, 0))

    run(body())


def test_weights_that_come_between_two_tokens_show_in_the_versions(ledger: Ledger, model_folder: Path) -> None:
    ledger.issue(slow_group(0))

    async def body() -> None:
        async with serving(ledger, model_folder, engine=WatchedEngine(token_seconds=0.01)) as here:
            await until(lambda: len(here.engine.running) == 2)
            await asyncio.sleep(0.03)
            ledger.loading(1, trainer=TRAINER)
            loaded = await here.worker.load(request(1))
            assert (loaded.version, here.worker.version) == (1, 1)
            assert loaded.difference(request(1).expected) == 0.0
            await until(completed(ledger, 0))

    run(body())
    result = done(ledger)[0]
    assert (result.start_version, result.newest_version) == (0, 1)
    assert all([span.version for span in c.spans] == [0, 1] for c in result.completions)


def test_a_load_that_fails_leaves_the_version_before(ledger: Ledger, model_folder: Path) -> None:
    ledger.issue(prompt_group(0))

    async def body() -> None:
        async with serving(ledger, model_folder) as here:
            await until(lambda: here.worker.version == 0)
            here.engine.fail_next_load = "no space"
            with pytest.raises(WeightLoadFailed, match="no space"):
                await here.worker.load(request(1))
            with pytest.raises(NotServing, match="rollout-0 serves run r, not s"):
                await here.worker.load(request(1, run_id="s"))
            assert here.worker.version == 0
            assert here.worker.metrics.loads.labels("failed")._value.get() == 1
            await until(completed(ledger, 0))

    run(body())


def test_a_server_that_fell_behind_catches_up_from_the_store(ledger: Ledger, model_folder: Path) -> None:
    async def body() -> None:
        async with serving(ledger, model_folder) as here:
            await until(lambda: here.worker.version == 0)
            store(ledger, 3)
            ledger.announce(3, trainer=TRAINER)
            ledger.issue(prompt_group(0))
            await until(completed(ledger, 0))
            assert here.worker.version == 3

    run(body())
    assert (done(ledger)[0].start_version, done(ledger)[0].attempt) == (3, 1), "to be refused costs no attempt"


def test_a_server_that_fell_behind_leaves_the_work_to_others_until_it_is_sent_the_weights(ledger: Ledger, model_folder: Path) -> None:
    """Where weights travel by broadcast, there is no copy in the store."""

    async def body() -> None:
        async with serving(ledger, model_folder) as here:
            await until(lambda: here.worker.version == 0)
            ledger.bus.redis.delete(ledger.keys.weights)
            ledger.announce(1, trainer=TRAINER)
            ledger.issue(prompt_group(0))
            await until(lambda: here.worker.version is None)
            await asyncio.sleep(0.1)  # the claim that was under way ends
            for index in range(1, 5):
                ledger.issue(prompt_group(index))
            await asyncio.sleep(0.15)
            left = await asyncio.to_thread(ledger.bus.claim, ["r"], Work.PROMPTS, "other", count=9, block_ms=None)
            assert [entry.index for entry in left] == [1, 2, 3, 4], "it claims nothing that it could not start"
            await asyncio.to_thread(ledger.bus.hand_back, "r", Work.PROMPTS, "other", [entry.id for entry in left])
            await here.worker.load(request(1))
            await until(completed(ledger, *range(5)))

    run(body())
    assert {group.start_version for group in done(ledger).values()} == {1}


def test_a_fenced_server_gives_up_weights_and_groups_and_joins_anew(ledger: Ledger, model_folder: Path) -> None:
    ledger.issue(slow_group(0))

    async def body() -> None:
        async with serving(ledger, model_folder) as here:
            here.engine.held = True
            await until(lambda: len(here.engine.running) == 2)
            store(ledger, 0, expected=(-9.0, -9.0))  # it still has what it was fenced for
            await here.worker.fence()
            assert here.worker.version is None
            await until(lambda: not here.engine.running)
            here.engine.held = False
            (row,) = ledger.rows()
            assert (row.place, row.attempt) == (Place.RUNNING, 1)
            entries = await asyncio.to_thread(ledger.bus.reclaim, "r", Work.PROMPTS, "other", idle_ms=60_000, count=5)
            assert [entry.index for entry in entries] == [0], "anybody may take it at once"
            await asyncio.to_thread(ledger.bus.hand_back, "r", Work.PROMPTS, "other", [entries[0].id])
            store(ledger, 0)
            await until(completed(ledger, 0))

    run(body())
    assert done(ledger)[0].attempt == 2


# -- death and drain ------------------------------------------------------------------------------------------------------------------


def test_the_groups_of_a_dead_server_are_taken_over(ledger: Ledger, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "RECLAIM_MS", 200)
    for index in range(3):
        ledger.issue(prompt_group(index))
    assert len(ledger.bus.claim(["r"], Work.PROMPTS, "dead", count=2, block_ms=None)) == 2
    ledger.start(0, held=0, max_attempts=3)

    async def body() -> None:
        async with serving(ledger, model_folder):
            await until(completed(ledger, 0, 1))

    run(body())
    assert [done(ledger)[i].attempt for i in range(3)] == [2, 1, 1]


def test_a_group_that_takes_long_is_not_taken_from_a_server_that_lives(ledger: Ledger, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "RECLAIM_MS", 800)
    ledger.issue(slow_group(0))

    async def body() -> None:
        async with serving(ledger, model_folder, name="slow") as slow:
            slow.engine.held = True
            await until(lambda: slow.engine.running)
            async with serving(ledger, model_folder, name="other") as other:
                await until(lambda: other.worker.version == 0)
                await asyncio.sleep(1.2)  # longer than the time after which the dead are inherited from
                assert not other.engine.running
                slow.engine.held = False
                await until(completed(ledger, 0))

    run(body())
    assert (done(ledger)[0].server, done(ledger)[0].attempt) == ("slow", 1)


def test_an_attempt_that_was_superseded_is_thrown_away(ledger: Ledger, model_folder: Path) -> None:
    ledger.issue(slow_group(0))

    async def body() -> None:
        async with serving(ledger, model_folder) as here:
            here.engine.held = True
            await until(lambda: here.engine.running)
            assert ledger.start(0, held=0, max_attempts=3) == 2
            here.engine.held = False
            await until(lambda: here.worker.metrics.groups.labels("superseded")._value.get() == 1)

    run(body())
    assert (done(ledger), places(ledger)) == ({}, {0: Place.RUNNING})


def test_a_server_that_is_asked_to_end_ends_what_is_nearly_done(ledger: Ledger, model_folder: Path) -> None:
    for index in range(6):
        ledger.issue(slow_group(index))

    async def body() -> None:
        async with serving(ledger, model_folder, engine=WatchedEngine(token_seconds=0.005), max_sequences=4) as here:
            await until(lambda: len(here.engine.running) == 4)
            await here.stop()
            assert not here.engine.running

    run(body())
    assert 2 <= len(done(ledger)) <= 4
    assert {entry.index for entry in ledger.bus.range("r", Work.PROMPTS)} == set(range(6)) - done(ledger).keys()


def test_a_server_that_is_asked_to_end_hands_back_what_would_take_long(ledger: Ledger, model_folder: Path) -> None:
    ledger.issue(slow_group(0))

    async def body() -> None:
        async with serving(ledger, model_folder, name="ending") as ending:
            ending.engine.held = True
            await until(lambda: ending.engine.running)
            await ending.stop()
            assert not ending.engine.running
        async with serving(ledger, model_folder, name="other"):
            await until(completed(ledger, 0))  # long before the dead are inherited from

    run(body())
    assert done(ledger)[0].server == "other"


def test_a_run_that_ends_in_the_middle_of_a_group_is_no_error(ledger: Ledger, model_folder: Path) -> None:
    ledger.issue(slow_group(0))

    async def body() -> None:
        async with serving(ledger, model_folder) as here:
            here.engine.held = True
            await until(lambda: here.engine.running)
            ledger.bus.redis.hset(ledger.keys.info, "state", "cancelled")
            ledger.close()
            await asyncio.sleep(0.15)  # signs of life for an entry that is gone
            assert not here.task.done()
            await here.stop()
            assert here.task.exception() is None

    run(body())
    assert ledger.conservation().cancelled == 1


# -- failure --------------------------------------------------------------------------------------------------------------------------


def test_garbage_is_put_aside_and_the_work_goes_on(ledger: Ledger, model_folder: Path) -> None:
    stream = ledger.keys.stream(Work.PROMPTS)
    ledger.bus.redis.xadd(stream, {"data": b"\xffgarbage"})
    ledger.bus.redis.xadd(stream, {"index": 99, "data": b"\x91" * 100_000})
    ledger.bus.redis.xadd(stream, {"what": "is this"})
    ledger.issue(prompt_group(0))

    async def body() -> None:
        async with serving(ledger, model_folder) as here:
            await until(completed(ledger, 0))
            await until(lambda: len(letters(ledger)) == 3)
            assert here.worker.metrics.dead_letters.labels("prompts")._value.get() == 3

    run(body())
    assert sorted(letter.reason.split(":")[0] for letter in letters(ledger)) == [
        "an entry without data", "not a MessagePack PromptGroup", "not a MessagePack PromptGroup"
    ]  # fmt: skip
    assert ledger.bus.range("r", Work.PROMPTS) == []
    counts = ledger.conservation()
    assert (counts.dead, counts.holds) == (0, True)


def test_a_group_that_failed_is_tried_again_and_its_other_samples_are_stopped(ledger: Ledger, model_folder: Path) -> None:
    ledger.issue(slow_group(0))

    async def body() -> None:
        engine = WatchedEngine()
        engine.errors, engine.held = [RuntimeError("out of cache")], True
        async with serving(ledger, model_folder, engine=engine) as here:
            await until(lambda: here.worker.metrics.groups.labels("failed")._value.get() == 1)
            await until(lambda: not any(request_id.startswith("r:0:1:") for request_id in engine.running))
            engine.held = False
            await until(completed(ledger, 0))

    run(body())
    assert done(ledger)[0].attempt == 2
    assert letters(ledger) == []


def test_a_group_that_fails_every_time_becomes_a_dead_letter_that_can_be_replayed(ledger: Ledger, model_folder: Path) -> None:
    ledger.issue(prompt_group(0))

    async def body() -> None:
        engine = WatchedEngine()
        engine.errors = [ValueError("the prompt is too long")] * 2 * SPEC.max_attempts
        async with serving(ledger, model_folder, engine=engine):
            await until(lambda: letters(ledger))

    run(body())
    (letter,) = letters(ledger)
    assert (letter.stream, letter.reason, letter.group) == ("prompts", "generation failed: the prompt is too long", prompt_group(0))
    assert (ledger.conservation().dead, places(ledger), ledger.bus.range("r", Work.PROMPTS)) == (1, {}, [])


def test_a_group_whose_every_server_died_is_given_up_in_the_end(ledger: Ledger, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "RECLAIM_MS", 100)
    ledger.issue(prompt_group(0))
    ledger.bus.claim(["r"], Work.PROMPTS, "dead", count=1, block_ms=None)
    assert [ledger.start(0, held=0, max_attempts=3) for _ in range(3)] == [1, 2, 3]

    async def body() -> None:
        async with serving(ledger, model_folder):
            await until(lambda: letters(ledger))

    run(body())
    assert letters(ledger)[0].reason == "given up after 3 attempts, the last of which never ended"


def test_an_engine_that_died_takes_the_server_with_it_and_no_group(ledger: Ledger, model_folder: Path) -> None:
    for index in range(3):
        ledger.issue(slow_group(index))

    async def body() -> None:
        engine = WatchedEngine(token_seconds=0.01)
        engine.errors = [EngineDied("the engine's process is gone")] * 6
        async with serving(ledger, model_folder, name="broken", engine=engine) as broken:
            with pytest.raises(EngineDied, match="the engine's process is gone"):
                await broken.task
        assert letters(ledger) == []
        async with serving(ledger, model_folder, name="other"):
            await until(completed(ledger, 0, 1, 2))  # they were handed back: nobody waits for a sign of life

    run(body())
    assert {group.server for group in done(ledger).values()} == {"other"}


def test_an_engine_that_died_of_a_load_takes_the_server_with_it(ledger: Ledger, model_folder: Path) -> None:
    class Fragile(WatchedEngine):
        async def load(self, request: LoadWeights) -> Any:
            raise EngineDied("stuck with who knows what weights")

    async def body() -> None:
        async with serving(ledger, model_folder, engine=Fragile()) as broken:
            with pytest.raises(EngineDied, match="who knows what"):
                await asyncio.wait_for(broken.task, 5)

    run(body())


# -- routes ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Process:
    loop: asyncio.AbstractEventLoop
    worker: RolloutWorker | None = None

    def ready(self) -> str | None:
        return None if self.worker else "waits for a run"


def test_weights_come_over_http_for_the_run_that_is_served_and_from_the_fleet_only(ledger: Ledger, model_folder: Path) -> None:
    headers = {"Authorization": f"Bearer {CLUSTER_TOKEN}"}

    async def body() -> None:
        process = Process(asyncio.get_running_loop())
        app = create_app(process, cluster_token=CLUSTER_TOKEN, registry=CollectorRegistry(), load_timeout=0.3)

        def post(path: str, body: LoadWeights | None = None, *, headers: dict[str, str] = headers) -> tuple[int, Any]:
            with TestClient(app) as http:
                answer = http.post(path, json=body.model_dump(mode="json") if body else None, headers=headers)
                return answer.status_code, answer.json()

        async def posted(*args: Any, **kwargs: Any) -> tuple[int, Any]:
            return await asyncio.to_thread(post, *args, **kwargs)

        assert (await posted("/v1/weights", request(0)))[1]["detail"] == "this server serves no run, not r"
        async with serving(ledger, model_folder) as here:
            process.worker = here.worker
            await until(lambda: here.worker.version == 0)
            assert (await posted("/v1/weights", request(1), headers={}))[0] == 401
            assert (await posted("/v1/runs/r/fence", headers={"Authorization": "Bearer wrong"}))[0] == 401
            assert here.worker.version == 0
            status, answer = await posted("/v1/weights", request(1))
            assert (status, answer["version"], answer["canary_logprobs"]) == (200, 1, list(request(1).expected))
            assert await posted("/v1/weights", request(2, run_id="s")) == (
                409,
                {"type": "about:blank", "title": "Not serving this run", "status": 409, "detail": "this server serves r, not s", "errors": []},
            )
            here.engine.fail_next_load = "the file is cut off"
            status, answer = await posted("/v1/weights", request(2))
            assert (status, answer["title"], answer["detail"]) == (502, "Weights not loaded", "the file is cut off")
            ledger.bus.redis.delete(ledger.keys.weights)
            assert await posted("/v1/runs/r/fence") == (200, {"status": "fenced"})
            assert here.worker.version is None
            async with here.worker._loading:
                status, answer = await posted("/v1/weights", request(2))
            assert (status, answer["title"]) == (504, "Weights not loaded in time")

    run(body())
