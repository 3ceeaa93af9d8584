"""The rollout engine on real vLLM, and what it makes of weights that come over the real transports. One engine serves all tests but the last.

References are transformers' log-probabilities in float32 on the same weights; both sides are float32, so they agree to 1e-5.
"""

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import cloudpickle
import psutil
import pytest
import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rollout_server.engine import EngineDied, RequestAborted, Sampled, SamplingRequest, VllmEngine, WeightLoadFailed, where_it_runs
from services.contracts.messages import FinishReason, LoadedWeights, LoadWeights
from services.contracts.spec import KvPolicy, Model
from trainer.weights import BroadcastTransport, FileTransport, GlooGroup, TransportFailed, named_weights

pytestmark = pytest.mark.vllm

VOCABULARY, EOS, CONTEXT, SLOTS = 300, 2, 256, 12
CANARY = tuple(range(40, 72))
TEXTS = [[5, 6, 7, 8, 9, 10, 11, 12], [299, 20, 150, 40, 33], list(range(100, 190))]
EXACT = 1e-5
SERVER = "server-1"


def make_model(folder: Path, seed: int) -> Qwen2ForCausalLM:
    """Tied embeddings, and a vocabulary that vLLM pads; weights wide enough that what is attended to matters."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=0.12, **shape, **ids)
    )
    model.eval().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t1", eos_token=f"t{EOS}", pad_token="t0").save_pretrained(folder)
    return model


def reference(model: Qwen2ForCausalLM, tokens: Sequence[int], temperature: float = 1.0, top_p: float = 1.0) -> list[float]:
    """log p(tokens[i + 1] | tokens[: i + 1]) of transformers, after temperature and nucleus."""
    with torch.no_grad():
        logits_T_V = model(torch.tensor([list(tokens)])).logits[0, :-1] / temperature
    p_T_V, order_T_V = logits_T_V.softmax(-1).sort(-1, descending=True)
    outside_T_V = torch.zeros_like(logits_T_V, dtype=torch.bool).scatter(1, order_T_V, p_T_V.cumsum(-1) - p_T_V > top_p)
    logp_T_V = logits_T_V.masked_fill(outside_T_V, -torch.inf).log_softmax(-1)
    return logp_T_V.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@dataclass
class Bench:
    """One warm engine with its event loop in a thread, two models of one shape, and the trainer's ends of both transports."""

    engine: VllmEngine
    portal: BlockingPortal
    folder: Path
    a: Qwen2ForCausalLM
    b: Qwen2ForCausalLM
    files: FileTransport
    sockets: BroadcastTransport
    versions: Iterator[int] = field(default_factory=lambda: count(1))

    def request(self, transport: str, source: dict[str, Any], kv_policy: KvPolicy = KvPolicy.RECOMPUTE, version: int | None = None) -> LoadWeights:
        version = next(self.versions) if version is None else version
        return LoadWeights(run_id="r", version=version, transport=transport, kv_policy=kv_policy, canary=CANARY, source=source)

    def load(self, request: LoadWeights) -> LoadedWeights:
        return self.portal.call(self.engine.load, request)

    def publish(self, model: torch.nn.Module, *, transport: str = "shm", kv_policy: KvPolicy = KvPolicy.RECOMPUTE) -> LoadedWeights:
        """What the trainer does: prepare, address, then POST and send at the same time."""
        version = next(self.versions)
        sender = {"shm": self.files, "gloo": self.sockets}[transport]
        sender.prepare(version, named_weights(model, torch.float32))
        loading = self.portal.start_task_soon(self.engine.load, self.request(transport, sender.sources([SERVER])[SERVER], kv_policy, version))
        sender.send()
        return loading.result(60)

    def score(self, tokens: Sequence[int]) -> list[float]:
        return self.portal.call(self.engine.score, tokens)

    def sample(self, *requests: SamplingRequest) -> list[Sampled]:
        return [sampling.result(60) for sampling in self.begin(*requests)]

    def begin(self, *requests: SamplingRequest) -> list["Future[Sampled]"]:
        return [self.portal.start_task_soon(self.engine.sample, request) for request in requests]

    def in_worker(self, function: Callable[[Any], None]) -> None:
        """Run `function` on vLLM's worker: to break something there."""
        self.portal.call(self.engine._llm.collective_rpc, function)


@contextmanager
def environment() -> Iterator[None]:
    """The environment as it was, afterwards: an engine sets variables that other tests' processes should not see."""
    before = dict(os.environ)
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # lets `in_worker` send functions
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("engine")
    a, b = make_model(folder / "a", 0), make_model(folder / "b", 1)
    with environment(), start_blocking_portal() as portal:
        engine = VllmEngine(Model(path=str(folder / "a"), max_model_len=CONTEXT), max_num_seqs=SLOTS, load_timeout=20.0)
        portal.call(engine.start)
        sockets = BroadcastTransport("gloo", host="127.0.0.1", timeout=20.0, join=GlooGroup, device=torch.device("cpu"))
        with pytest.raises(RuntimeError, match="no version of the weights is loaded"):
            portal.call(engine.sample, ask())
        try:
            yield Bench(engine, portal, folder, a, b, FileTransport(folder / "shm"), sockets)
        finally:
            portal.call(engine.stop)


def ask(prompt: Sequence[int] = (5, 6, 7), *, seed: int = 0, temperature: float = 1.0, top_p: float = 1.0, max_tokens: int = 24) -> SamplingRequest:
    return SamplingRequest(uuid4().hex, list(prompt), seed, temperature, top_p, max_tokens)


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_after_every_load_the_engine_computes_what_transformers_does_on_the_new_weights(bench: Bench, transport: str) -> None:
    seen = []
    for model, other in ((bench.a, bench.b), (bench.b, bench.a), (bench.a, bench.b)):
        answer = bench.publish(model, transport=transport)
        assert answer.version == bench.engine.version
        assert distance(answer.canary_logprobs, reference(model, CANARY)) < EXACT
        for text in TEXTS:
            assert distance(bench.score(text), reference(model, text)) < EXACT
            assert distance(bench.score(text), reference(other, text)) > 0.1
        seen.append([bench.score(text) for text in TEXTS])
    assert seen[2] == seen[0]


def test_transports_can_change_from_one_version_to_the_next(bench: Bench) -> None:
    for transport, model in (("gloo", bench.b), ("shm", bench.a), ("gloo", bench.b)):
        assert distance(bench.publish(model, transport=transport).canary_logprobs, reference(model, CANARY)) < EXACT


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.7, 0.8)])
def test_logprobs_are_those_of_the_distribution_sampled_from(bench: Bench, temperature: float, top_p: float) -> None:
    bench.publish(bench.a)
    for sampled in bench.sample(*(ask(seed=seed, temperature=temperature, top_p=top_p) for seed in range(8))):
        expected = reference(bench.a, [5, 6, 7, *sampled.tokens], temperature, top_p)[2:]
        assert distance(sampled.logprobs, expected) < EXACT


def test_a_seed_gives_the_same_tokens_whatever_else_runs(bench: Bench) -> None:
    bench.publish(bench.a)
    together = bench.sample(*(ask(seed=seed) for seed in range(8)))
    alone = [bench.sample(ask(seed=seed))[0] for seed in range(8)]
    assert [s.tokens for s in together] == [s.tokens for s in alone]
    assert len({tuple(s.tokens) for s in together}) == 8


def test_more_prompt_tokens_than_one_step_takes_are_sampled_with_their_seeds(bench: Bench) -> None:
    bench.publish(bench.a)
    long = [ask(prompt=[5 + (7 * i + j) % 290 for j in range(230)], seed=i, max_tokens=4) for i in range(SLOTS)]
    together = bench.sample(*long)
    alone = [bench.sample(replace(request, request_id=uuid4().hex))[0] for request in long]
    assert [s.tokens for s in together] == [s.tokens for s in alone]


def test_answers_end_with_eos_or_at_the_limit(bench: Bench) -> None:
    bench.publish(bench.a)
    answers = bench.sample(*(ask(seed=seed, max_tokens=100) for seed in range(24)))
    assert {s.finish for s in answers} == {FinishReason.STOP, FinishReason.LENGTH}
    for sampled in answers:
        assert len(sampled.logprobs) == len(sampled.tokens)
        assert EOS not in sampled.tokens[:-1]
        if sampled.finish is FinishReason.STOP:
            assert sampled.tokens[-1] == EOS
        else:
            assert len(sampled.tokens) == 100
            assert sampled.tokens[-1] != EOS


@pytest.mark.parametrize("kv_policy", list(KvPolicy))
def test_requests_go_on_over_a_load(bench: Bench, kv_policy: KvPolicy) -> None:
    old = bench.publish(bench.a).version
    prompt = [5, 6, 7, 8]
    running = bench.begin(*(ask(prompt, seed=seed, max_tokens=CONTEXT - len(prompt)) for seed in range(SLOTS)))
    time.sleep(0.15)
    new = bench.publish(bench.b, kv_policy=kv_policy).version
    crossed = [s for s in (sampling.result(60) for sampling in running) if len(s.spans) == 2 and s.spans[1].end - s.spans[1].start > 10]
    assert len(crossed) >= 3
    for sampled in crossed:
        before, after = sampled.spans
        assert (before.version, before.start, after.version, after.end) == (old, 0, new, len(sampled.tokens))
        assert before.end == after.start > 0
        of_a, of_b = (reference(model, [*prompt, *sampled.tokens])[len(prompt) - 1 :] for model in (bench.a, bench.b))
        assert distance(sampled.logprobs[: before.end], of_a[: before.end]) < EXACT
        stale = distance(sampled.logprobs[after.start :], of_b[after.start :])
        assert stale < EXACT if kv_policy is KvPolicy.RECOMPUTE else stale > 0.01


def test_a_prompt_never_finds_the_keys_and_values_of_other_weights(bench: Bench) -> None:
    prompt = TEXTS[2]  # longer than a block of the prefix cache
    for model in (bench.a, bench.b, bench.a):
        bench.publish(model, kv_policy=KvPolicy.KEEP)
        for seed in range(2):  # the second finds the first's blocks
            sampled = bench.sample(ask(prompt, seed=seed))[0]
            assert distance(sampled.logprobs, reference(model, [*prompt, *sampled.tokens])[len(prompt) - 1 :]) < EXACT


def test_generation_stands_still_only_briefly(bench: Bench) -> None:
    """The figures the project promises on two cores: stall below 100 ms, publication below 250 ms, in the median, with requests running."""
    bench.publish(bench.a)
    stalls, totals = [], []
    for model in (bench.b, bench.a, bench.b, bench.a, bench.b):
        running = bench.begin(*(ask(seed=seed, max_tokens=60) for seed in range(SLOTS)))
        time.sleep(0.05)
        began = time.perf_counter()
        stalls.append(bench.publish(model).stall_seconds)
        totals.append(time.perf_counter() - began)
        for sampling in running:
            sampling.result(60)
    assert 0 < statistics.median(stalls) < 0.1
    assert statistics.median(totals) < 0.25


def test_the_canary_does_not_wait_for_running_requests(bench: Bench) -> None:
    bench.publish(bench.a)
    candidates = [ask([9], seed=seed, max_tokens=120) for seed in range(4 * SLOTS)]
    long = [request for request, answer in zip(candidates, bench.sample(*candidates), strict=True) if len(answer.tokens) == 120]
    assert len(long) > SLOTS + 1
    running = bench.begin(*long)
    time.sleep(0.05)
    bench.score(CANARY)
    assert not any(sampling.done() for sampling in running)
    for sampling in running:
        sampling.result(60)


def test_a_load_is_finished_when_its_caller_goes_away(bench: Bench) -> None:
    bench.publish(bench.a)
    bench.files.prepare(version := next(bench.versions), named_weights(bench.b, torch.float32))
    request = bench.request("shm", bench.files.stored or {}, version=version)

    async def give_up() -> None:
        loading = asyncio.create_task(bench.engine.load(request))
        await asyncio.sleep(0)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        async with asyncio.timeout(10):
            while bench.engine.version != version:
                await asyncio.sleep(0.01)

    bench.portal.call(give_up)
    assert distance(bench.score(CANARY), reference(bench.b, CANARY)) < EXACT


def broken_files(bench: Bench, version: int) -> dict[str, tuple[Path, str]]:
    """File that must be refused and words of the refusal, by name."""
    good = {name: tensor.contiguous() for name, tensor in named_weights(bench.b, torch.float32)}
    norm = "model.norm.weight"

    def written(name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> Path:
        save_file(tensors, path := bench.folder / f"{name}.safetensors", metadata)
        return path

    right = {"version": str(version)}
    whole = written("whole", good, right).read_bytes()
    (cut := bench.folder / "cut.safetensors").write_bytes(whole[:-100])
    (garbage := bench.folder / "garbage.safetensors").write_bytes(b"\xff" * 4096)
    return {
        "absent": (bench.folder / "absent.safetensors", "No such file"),
        "garbage": (garbage, "header"),
        "cut": (cut, "incomplete|not fully covered|Incomplete"),
        "shape": (written("shape", good | {norm: torch.ones(65)}, right), r"model.norm.weight float32\[65\] should be .* float32\[64\]"),
        "dtype": (written("dtype", {n: t.bfloat16() for n, t in good.items()}, right), r"bfloat16\[.*should be .*float32\[.*and \d+ more"),
        "missing": (written("missing", {n: t for n, t in good.items() if n != norm}, right), "model.norm.weight is missing"),
        "unknown": (written("unknown", good | {"lm_head.weight": torch.ones(300, 64)}, right), "lm_head.weight is unknown"),
        "stale": (written("stale", good, {"version": "0"}), f"holds version 0, not {version}"),
        "unlabelled": (written("unlabelled", good, None), f"holds version None, not {version}"),
    }


def test_what_is_not_the_version_is_refused_and_the_one_before_serves_on(bench: Bench) -> None:
    version = bench.publish(bench.a).version
    before = [bench.score(text) for text in TEXTS]
    drawn = bench.sample(ask(seed=7))[0]
    refused = {
        name: (bench.request("shm", {"path": str(path)}, version=10_000), words) for name, (path, words) in broken_files(bench, 10_000).items()
    }
    refused["no path"] = (bench.request("shm", {}), "does not fit the transport shm")
    refused["no transport"] = (bench.request("pigeon", {}), "no weight transport is called 'pigeon'")
    refused["long canary"] = (bench.request("shm", {}).model_copy(update={"canary": (5,) * CONTEXT}), "a canary of 256 tokens does not fit")
    for name, (request, words) in refused.items():
        with pytest.raises(WeightLoadFailed, match=words):
            bench.load(request)
        assert bench.engine.version == version, name
        assert [bench.score(text) for text in TEXTS] == before, name
    assert bench.sample(ask(seed=7))[0].tokens == drawn.tokens
    assert bench.sample(ask(seed=7))[0].spans[0].version == version


def test_a_load_that_fails_half_way_is_undone(bench: Bench) -> None:
    version = bench.publish(bench.a).version
    before = [bench.score(text) for text in TEXTS]

    def break_loading(worker: Any) -> None:
        model = worker.model_runner.get_model()
        whole_load = model.load_weights

        def half_load(weights: Any) -> Any:
            def half() -> Iterator[tuple[str, torch.Tensor]]:
                for number, named in enumerate(weights):
                    if number == 11:  # in the second half of the tensors, inside a layer
                        raise MemoryError("no room")
                    yield named

            model.load_weights = whole_load  # once
            return whole_load(half())

        model.load_weights = half_load

    bench.in_worker(break_loading)
    running = bench.begin(ask(seed=3, max_tokens=100))
    with pytest.raises(WeightLoadFailed, match="no room"):
        bench.publish(bench.b)
    assert {span.version for span in running[0].result(60).spans} == {version}
    assert bench.engine.version == version
    assert [bench.score(text) for text in TEXTS] == before
    assert distance(bench.publish(bench.b).canary_logprobs, reference(bench.b, CANARY)) < EXACT


DYING_TRAINER = """
import json, os, sys, torch
from safetensors.torch import load_file
from trainer.weights import BroadcastTransport, GlooGroup

class Dying(GlooGroup):
    sent = 0

    def broadcast(self, chunk):
        if self.sent == 2:
            os._exit(9)
        super().broadcast(chunk)
        self.sent += 1

transport = BroadcastTransport("gloo", host="127.0.0.1", timeout=20.0, join=Dying, device=torch.device("cpu"), chunk_bytes=4096)
transport.prepare(99, load_file(sys.argv[1]).items())
print(json.dumps(transport.sources(["s"])["s"]), flush=True)
transport.send()
"""


def test_a_trainer_that_dies_in_the_middle_leaves_the_version_before(bench: Bench) -> None:
    version = bench.publish(bench.a).version
    before = [bench.score(text) for text in TEXTS]
    command = [sys.executable, "-c", DYING_TRAINER, str(bench.folder / "b" / "model.safetensors")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        source = json.loads(trainer.stdout.readline())
        began = time.monotonic()
        with pytest.raises(WeightLoadFailed, match="gloo was refused"):
            bench.load(bench.request("gloo", source))
        assert time.monotonic() - began < 10  # the closed socket says so, long before the time-out
        assert trainer.wait(10) == 9
    assert bench.engine.version == version
    assert [bench.score(text) for text in TEXTS] == before
    assert distance(bench.publish(bench.b, transport="gloo").canary_logprobs, reference(bench.b, CANARY)) < EXACT


def test_a_server_that_refuses_ends_the_broadcast_with_its_reason(bench: Bench) -> None:
    version = bench.publish(bench.a, transport="gloo").version
    bench.sockets.prepare(next(bench.versions), [("w", torch.ones(3))])
    loading = bench.portal.start_task_soon(bench.engine.load, bench.request("gloo", bench.sockets.sources([SERVER])[SERVER]))
    began = time.monotonic()
    with pytest.raises(TransportFailed, match=rf"{SERVER} refused: these are not weights of the model served: .* is missing"):
        bench.sockets.send()
    assert time.monotonic() - began < 5
    with pytest.raises(WeightLoadFailed, match="is missing"):
        loading.result(60)
    assert bench.engine.version == version
    assert bench.publish(bench.b, transport="gloo").version == bench.engine.version


def second_server(bench: Bench) -> Callable[[dict[str, Any]], dict[str, torch.Tensor]]:
    """The server's end of a broadcast without an engine behind it: another member of the group."""
    from rollout_server.weights import ReceiverState, receive_broadcast
    from services.contracts.transports import BroadcastSource

    config = SimpleNamespace(hf_text_config=SimpleNamespace(tie_word_embeddings=True), dtype=torch.float32, model=str(bench.folder / "a"))
    state = ReceiverState(torch.nn.Module(), config, torch.device("cpu"))
    return lambda source: receive_broadcast(BroadcastSource.model_validate(source), transport="gloo", state=state)


def test_one_broadcast_reaches_several_servers_and_goes_on_without_one_that_is_lost(bench: Bench) -> None:
    receive = second_server(bench)
    saved = {name: load_file(bench.folder / name / "model.safetensors") for name in ("a", "b")}
    for name, model in (("a", bench.a), ("b", bench.b)):  # the second time in the same group
        bench.sockets.prepare(version := next(bench.versions), named_weights(model, torch.float32))
        sources = bench.sockets.sources([SERVER, "server-2"])
        loading = bench.portal.start_task_soon(bench.engine.load, bench.request("gloo", sources[SERVER], version=version))
        with_other = bench.portal.start_task_soon(asyncio.to_thread, receive, sources["server-2"])
        bench.sockets.send()
        assert distance(loading.result(60).canary_logprobs, reference(model, CANARY)) < EXACT
        received = with_other.result(60)
        assert set(received) == set(saved[name])
        assert all(torch.equal(received[n], tensor) for n, tensor in saved[name].items())

    bench.sockets.prepare(version := next(bench.versions), named_weights(bench.a, torch.float32))
    sources = bench.sockets.sources([SERVER, "server-2"])
    loading = bench.portal.start_task_soon(bench.engine.load, bench.request("gloo", sources[SERVER], version=version))
    bench.portal.start_task_soon(asyncio.to_thread, time.sleep, 0.2).result(60)
    bench.sockets.cancel("server-2 refused the connection")
    with pytest.raises(TransportFailed, match="server-2 refused the connection"):
        bench.sockets.send()
    with pytest.raises(WeightLoadFailed, match="called the publication off: server-2 refused the connection"):
        loading.result(60)
    again = bench.portal.start_task_soon(bench.engine.load, bench.request("gloo", bench.sockets.sources([SERVER])[SERVER], version=version))
    bench.sockets.send()
    assert distance(again.result(60).canary_logprobs, reference(bench.a, CANARY)) < EXACT


def test_on_a_card_that_a_trainer_has_nearly_filled_vllm_starts_with_the_cache_that_it_is_told() -> None:
    from vllm.config import CacheConfig
    from vllm.v1.worker.utils import request_memory

    card: Any = SimpleNamespace(total_memory=80 << 30, free_memory=20 << 30, device_="cuda:0")
    alone, beside_others = (where_it_runs(on_gpu=True, max_model_len=CONTEXT, kv_cache_bytes=size) for size in (None, 8 << 30))
    request_memory(card, CacheConfig(**beside_others))
    with pytest.raises(ValueError, match="Free memory on device"):
        request_memory(card, CacheConfig(**alone))


def test_requests_that_do_not_fit_are_refused(bench: Bench) -> None:
    bench.publish(bench.a)
    for bad in (ask([]), ask([5] * CONTEXT), ask([5] * 10, max_tokens=CONTEXT - 9)):
        with pytest.raises(ValueError, match="not exceed max_model_len=256"):
            bench.sample(bad)
    assert len(bench.sample(ask([5] * (CONTEXT - 4), max_tokens=4))[0].tokens) <= 4


def test_an_aborted_request_says_so_and_others_go_on(bench: Bench) -> None:
    bench.publish(bench.a)
    victim, other = ask([9], seed=1, max_tokens=250), ask([9], seed=1, max_tokens=20)
    running = bench.begin(victim, other)
    time.sleep(0.02)
    bench.portal.call(bench.engine.abort, [victim.request_id])
    with pytest.raises(RequestAborted):
        running[0].result(60)
    assert bench.sample(replace(other, request_id="again"))[0].tokens == running[1].result(60).tokens


def test_two_engines_in_one_group_and_the_end_of_one_that_is_stuck_and_one_that_is_torn(tmp_path: Path) -> None:
    a, b = make_model(tmp_path / "a", 0), make_model(tmp_path / "b", 1)
    names = ["one", "two"]
    with environment(), start_blocking_portal() as portal:
        engines = {name: VllmEngine(Model(path=str(tmp_path / "a"), max_model_len=CONTEXT), max_num_seqs=4, load_timeout=5.0) for name in names}
        for engine in engines.values():
            portal.call(engine.start)
        sockets = BroadcastTransport("gloo", host="127.0.0.1", timeout=5.0, join=GlooGroup, device=torch.device("cpu"))
        for version, model in enumerate((a, b, a)):
            sockets.prepare(version, named_weights(model, torch.float32))
            loads = [
                portal.start_task_soon(
                    engines[name].load,
                    LoadWeights(run_id="r", version=version, transport="gloo", kv_policy=KvPolicy.KEEP, canary=CANARY, source=source),
                )
                for name, source in sockets.sources(names).items()
            ]
            sockets.send()
            for loading in loads:
                assert distance(loading.result(60).canary_logprobs, reference(model, CANARY)) < EXACT

        def lose(worker: Any) -> None:
            def no_load(weights: Any) -> None:
                raise MemoryError("no room")

            worker.model_runner.get_model().load_weights = no_load

        files = FileTransport(tmp_path / "shm")
        files.prepare(3, named_weights(b, torch.float32))
        third = LoadWeights(run_id="r", version=3, transport="shm", kv_policy=KvPolicy.RECOMPUTE, source=files.stored or {})

        def hang(worker: Any) -> None:
            worker.model_runner.get_model().load_weights = lambda weights: time.sleep(60)

        stuck = engines["one"]
        portal.call(stuck._llm.collective_rpc, hang)
        running = portal.start_task_soon(stuck.sample, ask([9], seed=1, max_tokens=250))
        began = time.monotonic()
        with pytest.raises(EngineDied, match="was not put into the model in 5 s"):
            portal.call(stuck.load, third)
        assert time.monotonic() - began < 20
        with pytest.raises(RequestAborted):
            running.result(10)
        with pytest.raises(EngineDied):
            portal.call(stuck.sample, ask())

        torn = engines["two"]
        portal.call(torn._llm.collective_rpc, lose)
        with pytest.raises(EngineDied, match="nor the one before be restored"):
            portal.call(torn.load, third)
        with pytest.raises(EngineDied):
            portal.call(torn.load, third)


KILLED_SERVER = """
import asyncio, os, signal, sys
from multiprocessing import active_children
from pathlib import Path

from rollout_server.engine import VllmEngine
from services.contracts.spec import Model

async def main():
    await VllmEngine(Model(path=sys.argv[1], max_model_len=64), max_num_seqs=2).start()
    Path(sys.argv[2]).write_text(" ".join(str(child.pid) for child in active_children()))
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_the_engine_process_does_not_outlive_a_server_that_is_killed(tmp_path: Path) -> None:
    make_model(tmp_path / "a", 0)
    (script := tmp_path / "server.py").write_text(KILLED_SERVER)  # a file, as the engine's process imports its parent's main module
    pids = tmp_path / "pids"
    server = subprocess.run([sys.executable, str(script), str(tmp_path / "a"), str(pids)], stdout=subprocess.DEVNULL, timeout=200)
    assert server.returncode == -signal.SIGKILL
    engine = int(pids.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(engine) and time.monotonic() < deadline:
        time.sleep(0.05)
    outlived = psutil.pid_exists(engine)
    if outlived:
        os.kill(engine, signal.SIGKILL)
    assert not outlived
