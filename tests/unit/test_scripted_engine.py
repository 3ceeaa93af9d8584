import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest

from rollout_server.engine import RequestAborted, Sampled, SamplingRequest, WeightLoadFailed
from rollout_server.scripted_engine import EOS, ScriptedEngine, scripted_logprob, scripted_tokens
from services.contracts.messages import FinishReason, LoadWeights, VersionSpan
from services.contracts.spec import KvPolicy

REQUEST = SamplingRequest(request_id="a", prompt=[5, 6], seed=1, temperature=1.0, top_p=1.0, max_tokens=16)
LONG = next(request for seed in range(1000) if len(scripted_tokens(request := replace(REQUEST, seed=seed))) == 12)


def load(version: int, canary: tuple[int, ...] = ()) -> LoadWeights:
    return LoadWeights(run_id="r", version=version, transport="shm", kv_policy=KvPolicy.RECOMPUTE, canary=canary)


async def loaded(version: int) -> ScriptedEngine:
    engine = ScriptedEngine()
    await engine.start()
    await engine.load(load(version))
    return engine


async def begun(engine: ScriptedEngine, request: SamplingRequest, tokens: int) -> asyncio.Task[Sampled]:
    """`request`, held after `tokens` tokens: each token takes one turn of the loop."""
    sampling = asyncio.create_task(engine.sample(request))
    for _ in range(tokens + 1):
        await asyncio.sleep(0)
    engine.held = True
    await asyncio.sleep(0.005)
    return sampling


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(body, 5))


def test_answers_follow_from_seed_and_prompt() -> None:
    async def body() -> None:
        engine = await loaded(0)
        first = await engine.sample(REQUEST)
        assert await engine.sample(replace(REQUEST, request_id="b")) == first
        assert (await engine.sample(replace(REQUEST, seed=2))).tokens != first.tokens
        assert (await engine.sample(replace(REQUEST, prompt=[5, 7]))).tokens != first.tokens

    run(body())


def test_an_answer_ends_with_eos_unless_it_is_cut_off() -> None:
    async def body() -> None:
        engine = await loaded(0)
        whole = await engine.sample(LONG)
        assert (whole.finish, whole.tokens[-1], len(whole.tokens)) == (FinishReason.STOP, EOS, 12)
        cut = await engine.sample(replace(LONG, max_tokens=5))
        assert (cut.finish, cut.tokens) == (FinishReason.LENGTH, whole.tokens[:5])

    run(body())


def test_a_load_in_the_middle_splits_the_spans() -> None:
    async def body() -> None:
        engine = await loaded(3)
        sampling = await begun(engine, LONG, 4)
        await engine.load(load(4))
        engine.held = False
        sampled = await sampling
        old, new = sampled.spans
        assert old.version == 3
        assert old.start == 0
        assert 0 < old.end < 12
        assert new == VersionSpan(version=4, start=old.end, end=12)
        assert sampled.logprobs == [scripted_logprob(3 if place < old.end else 4, token) for place, token in enumerate(sampled.tokens)]

    run(body())


def test_sampling_needs_a_version() -> None:
    async def body() -> None:
        engine = ScriptedEngine()
        with pytest.raises(RuntimeError, match="no version"):
            await engine.sample(REQUEST)

    run(body())


def test_a_failed_load_leaves_the_version() -> None:
    async def body() -> None:
        engine = await loaded(1)
        engine.fail_next_load = "disk gone"
        with pytest.raises(WeightLoadFailed, match="disk gone"):
            await engine.load(load(2))
        assert engine.version == 1
        assert (await engine.load(load(2, canary=(5, 6, 7)))).canary_logprobs == (scripted_logprob(2, 6), scripted_logprob(2, 7))
        assert engine.version == 2

    run(body())


def test_aborted_and_stopped_requests_say_so() -> None:
    async def body() -> None:
        engine = await loaded(1)
        first = await begun(engine, LONG, 2)
        await engine.abort(["a", "unknown"])
        with pytest.raises(RequestAborted):
            await first
        second = await begun(engine, LONG, 2)
        await engine.stop()
        with pytest.raises(RequestAborted):
            await second
        assert engine.running == set()

    run(body())
