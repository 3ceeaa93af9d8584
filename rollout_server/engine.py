"""vLLM, kept behind one protocol: tokens in, tokens with log-probabilities and versions out, weights replaced while requests run.

The engine belongs to this process (its core is a child, reached over a socket file): vLLM's HTTP server does not run, so nobody but this server can
reach its control calls. vLLM is imported when the engine starts, here and in `rollout_server.weights`, and nowhere else.

How a version is loaded:

    stage      the worker reads or receives it and checks it, in a thread               generation goes on
    pause      at a token boundary; running requests keep their place                   generation stands still: `stall_seconds`
    commit     weights replaced in one call between two steps, version label set
    resume
    canary     log-probabilities of a fixed text under the new weights                  generation goes on
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from services.contracts.messages import FinishReason, LoadedWeights, LoadWeights, VersionSpan
from services.contracts.spec import KvPolicy, Model

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # allows the executor without worker processes: one of those spins a core
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default binds every server on the machine to core 0
    "OMP_NUM_THREADS": "1",  # two threads on two busy cores are up to ten times slower than one
    "TORCH_COMPILE_DISABLE": "1",  # half a minute at start, nothing gained afterwards
}
CPU_ARGUMENTS = {
    "distributed_executor_backend": "uni",
    "enforce_eager": True,
    "block_size": 32,
    # A prompt that is prefilled in parts has its draw of each part undone by winding back its generator, which one on CPU cannot. With seeds,
    # the engine dies as soon as more tokens wait for a prefill than fit one step, such as all running ones after a load.
    "enable_chunked_prefill": False,
}
SHARED_CARD = {"gpu_memory_utilization": 0.01}
"""For a KV cache of a size that is given. vLLM takes that size then, but still refuses to start where less than this share of the card is free: with
its default of 0.92, beside anyone else."""
CPU_STEP_TOKENS = 2048
"""Of one engine step; a whole prompt with what has been completed of it must fit."""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}

FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.002, 0.05
"""How often the worker is asked whether a version is staged: at first, and in the end. Each question is a call between two engine steps."""


class WeightLoadFailed(RuntimeError):
    """A version could not be loaded; the text says what failed. The version before serves on, whole."""


class EngineDied(RuntimeError):
    """The engine's process is gone: this server must be restarted."""


class RequestAborted(RuntimeError):
    """The request was aborted before it was finished."""


@dataclass(frozen=True)
class SamplingRequest:
    request_id: str
    prompt: list[int]
    seed: int
    temperature: float
    top_p: float
    max_tokens: int


@dataclass(frozen=True)
class Sampled:
    tokens: list[int]
    """End-of-sequence token included."""
    logprobs: list[float]
    """Of each token, in nats, under the distribution that it was drawn from: after temperature and top-p."""
    spans: tuple[VersionSpan, ...]
    finish: FinishReason


class Engine(Protocol):
    @property
    def version(self) -> int | None:
        """Version of the weights that are served; None until one was loaded."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def sample(self, request: SamplingRequest) -> Sampled:
        """Complete a prompt. Raises RequestAborted, EngineDied, or ValueError for a request that the model cannot take."""

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """Log-probability, in nats at temperature 1, of each of tokens[1:] given those before it."""

    async def load(self, request: LoadWeights) -> LoadedWeights:
        """Replace the weights while requests run. Raises WeightLoadFailed, or EngineDied when no version was left whole. Once begun it is finished,
        also when the caller is cancelled."""

    async def abort(self, request_ids: Iterable[str]) -> None: ...


class VllmEngine:
    """One vLLM engine on this host's GPU, or on its CPU.

    Prefix caching is on, as the G samples of a group share their prompt, and safe over updates: requests carry a cache salt that is new with every
    load, and none is passed on while one goes on. So the prompt of a request that begins after a load never finds keys and values of the weights
    before, not even under the policy `keep`, where the cache is not cleared, nor when a version number comes again in another run.
    """

    def __init__(
        self, model: Model, *, seed: int = 0, max_num_seqs: int = 128, kv_cache_bytes: int | None = None, load_timeout: float = 120.0
    ) -> None:
        """`max_num_seqs` requests run at once, more wait. `kv_cache_bytes`: default on CPU, room for all of them; on a GPU, vLLM's own.
        `load_timeout` bounds, in seconds, each of staging and replacing."""
        self._model = model
        self._seed = seed
        self._max_num_seqs = max_num_seqs
        self._kv_cache_bytes = kv_cache_bytes
        self._load_timeout = load_timeout
        self._version: int | None = None
        self._cache_salt = uuid4().hex
        self._llm: Any = None
        self._loading = asyncio.Lock()
        self._slots = asyncio.Semaphore(max_num_seqs)
        self._running: set[str] = set()
        self._open = asyncio.Event()
        self._open.set()

    @property
    def version(self) -> int | None:
        return self._version

    async def start(self) -> None:
        await asyncio.to_thread(self._build)
        await self.score([0] * 8)  # the first request of all is slow

    async def stop(self) -> None:
        """Ends the engine; what is being sampled ends with RequestAborted."""
        if self._llm is not None:
            llm, self._llm, self._version = self._llm, None, None
            await llm.abort(list(self._running))
            llm.output_handler.cancel()  # or it reports the end of the engine's process as an error
            await asyncio.to_thread(llm.shutdown)
            del llm
            gc.collect()  # its __del__ fails in an interpreter that is ending

    async def sample(self, request: SamplingRequest) -> Sampled:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        room = self._model.max_model_len - len(request.prompt)
        if not request.prompt or request.max_tokens > room:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and max_tokens={request.max_tokens} do not fit: the prompt may not be empty, and both "
                f"together not exceed max_model_len={self._model.max_model_len}"
            )
        params = SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=request.max_tokens,
            seed=request.seed,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async with self._slots:
            if self._version is None and self._llm is not None:
                raise RuntimeError("no version of the weights is loaded: load one before sampling")
            output = (await self._run(request.prompt, params, request.request_id)).outputs[0]
        if output.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise RequestAborted(f"request {request.request_id} ended with {output.finish_reason!r}")
        tokens = list(output.token_ids)
        return Sampled(
            tokens=tokens,
            logprobs=[step[token].logprob for token, step in zip(tokens, output.logprobs, strict=True)],
            spans=tuple(VersionSpan(version=int(span.version), start=span.start, end=span.end) for span in output.weight_versions),
            finish=FinishReason(output.finish_reason),
        )

    async def score(self, tokens: Sequence[int]) -> list[float]:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        output = await self._run(list(tokens), params, f"score-{uuid4().hex}")  # in the slot that `sample` leaves free, so it waits for no completion
        return [step[token].logprob for token, step in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]

    async def load(self, request: LoadWeights) -> LoadedWeights:
        return await asyncio.shield(asyncio.create_task(self._load(request)))

    async def abort(self, request_ids: Iterable[str]) -> None:
        await self._llm.abort(list(request_ids))

    async def _load(self, request: LoadWeights) -> LoadedWeights:
        from vllm.v1.engine.exceptions import EngineDeadError

        if len(request.canary) >= self._model.max_model_len:
            raise WeightLoadFailed(f"a canary of {len(request.canary)} tokens does not fit max_model_len={self._model.max_model_len}")
        async with self._loading:
            if self._llm is None:
                raise EngineDied("the engine is not running")
            started = time.perf_counter()
            try:
                await self._stage(request)
                stall = await self._swap(request)
                loaded = time.perf_counter()
                canary = await self.score(request.canary) if len(request.canary) > 1 else []
            except EngineDeadError as error:
                raise EngineDied("the vLLM engine's process died while it loaded weights") from error
        return LoadedWeights(version=request.version, stall_seconds=stall, load_seconds=loaded - started, canary_logprobs=tuple(canary))

    async def _stage(self, request: LoadWeights) -> None:
        """Have the worker get hold of the version beside the running engine."""
        name = f"version {request.version} over {request.transport}"
        try:
            async with asyncio.timeout(self._load_timeout):
                (status,) = await self._llm.collective_rpc("stage_weights", args=(request.model_dump(mode="json"),))
                pause = FIRST_POLL_SECONDS
                while status["state"] == "working":
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LAST_POLL_SECONDS)
                    (status,) = await self._llm.collective_rpc("staged_weights")
        except TimeoutError as error:
            raise WeightLoadFailed(f"{name} did not arrive in {self._load_timeout:g} s") from error
        if status["state"] == "failed":
            raise WeightLoadFailed(f"{name} was refused: {status['error']}")

    async def _swap(self, request: LoadWeights) -> float:
        """Replace the weights between two steps. Seconds for which generation stood still."""
        core = self._llm.engine_core
        paused = time.perf_counter()
        self._open.clear()
        try:
            async with asyncio.timeout(self._load_timeout):
                try:
                    # AsyncLLM.pause_generation makes this call and then sleeps 20 ms, only so that outputs reach their readers first.
                    await core.pause_scheduler_async(mode="keep", clear_cache=request.kv_policy is KvPolicy.RECOMPUTE)
                    await self._commit(request)
                    await self._llm.update_weight_version(str(request.version))
                    self._version, self._cache_salt = request.version, uuid4().hex
                except Exception:  # not CancelledError, by which the time-out ends this: then there is nobody to resume
                    if self._llm is not None:
                        await self._llm.resume_generation()
                    raise
                await self._llm.resume_generation()
        except TimeoutError as error:
            await self.stop()  # it is stuck with who knows what weights: not a token more may come from it
            raise EngineDied(f"version {request.version} was not put into the model in {self._load_timeout:g} s") from error
        finally:
            self._open.set()
        return time.perf_counter() - paused

    async def _commit(self, request: LoadWeights) -> None:
        try:
            await self._llm.collective_rpc("commit_weights")
        except Exception as error:  # vLLM answers a worker's error of any class with a bare Exception that holds its text
            if self._version is not None and not (await self._llm.collective_rpc("weights_are_whole"))[0]:
                await self.stop()  # requests that run must not go on with parts of two versions
                raise EngineDied(f"version {request.version} could not be put into the model, nor the one before be restored: {error}") from error
            raise WeightLoadFailed(f"version {request.version} could not be put into the model: {error}") from error

    async def _run(self, prompt: list[int], params: SamplingParams, request_id: str) -> RequestOutput:
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        await self._open.wait()
        if self._llm is None:
            raise EngineDied("the engine is not running")
        final = None
        self._running.add(request_id)
        try:
            async for output in self._llm.generate(tokens_input(prompt, cache_salt=self._cache_salt), params, request_id):
                final = output
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineDied("the vLLM engine failed") from error
        finally:
            self._running.discard(request_id)
        assert final is not None
        return final

    def _build(self) -> None:
        import torch

        on_gpu = torch.cuda.is_available()
        _set_defaults(ENVIRONMENT if on_gpu else ENVIRONMENT | CPU_ENVIRONMENT)
        preload = os.environ.get("LD_PRELOAD")
        if not on_gpu:
            _preload_openmp()

        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        args = AsyncEngineArgs(
            model=self._model.path,
            dtype=self._model.dtype,
            max_model_len=self._model.max_model_len,
            max_num_seqs=self._max_num_seqs + 1,  # one more than `sample` uses: for `score`
            seed=self._seed,
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            kv_cache_memory_bytes=self._kv_cache_bytes if self._kv_cache_bytes or on_gpu else self._room_for_all(),
            worker_extension_cls="rollout_server.weights.WeightReceiver",
            disable_log_stats=False,  # shown by rollout_server/engine_metrics.py
            **where_it_runs(on_gpu=on_gpu, max_model_len=self._model.max_model_len, kv_cache_bytes=self._kv_cache_bytes),
        )
        try:
            self._llm = AsyncLLM.from_engine_args(args)
        finally:
            _restore("LD_PRELOAD", preload)  # meant for the engine's process, which has it; not for others that this one starts

    def _room_for_all(self) -> int:
        """Bytes of KV cache with which no request is ever put off: keys and values of all layers for `max_num_seqs` + 1 sequences of full length."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self._model.path).get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * heads * size * (4 if self._model.dtype == "float32" else 2)
        blocks = -(-self._model.max_model_len // 32) + 1
        return per_token * 32 * blocks * (self._max_num_seqs + 1)


def where_it_runs(*, on_gpu: bool, max_model_len: int, kv_cache_bytes: int | None) -> dict[str, Any]:
    """Arguments of vLLM's engine that depend on what it runs on. `kv_cache_bytes`: None where vLLM is to take most of the card."""
    if not on_gpu:
        return CPU_ARGUMENTS | {"max_num_batched_tokens": max(CPU_STEP_TOKENS, max_model_len)}
    return {} if kv_cache_bytes is None else dict(SHARED_CARD)


def _set_defaults(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _preload_openmp() -> None:
    """Intel's OpenMP runtime, which comes with the CPU build of vLLM, for the engine's process: faster than the one that torch brings."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    if library.exists():
        os.environ["LD_PRELOAD"] = ":".join(filter(None, (os.environ.get("LD_PRELOAD"), str(library))))
