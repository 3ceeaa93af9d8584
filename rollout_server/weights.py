"""The rollout server's end of the weight transports: a vLLM worker extension that receives a version beside the running engine and puts it in between
two steps.

    stage     a thread in the worker reads or receives the whole version into host memory, checked against the model's own checkpoint first; the
              engine goes on generating, and no collective ever runs on its thread
    commit    one call between two engine steps replaces the weights; if it fails half-way, the version before is put back from the copy kept of it

So whatever goes wrong (a file that is missing, cut short or of other shapes; a trainer that dies in the middle), the old weights serve on, whole. The
price is host memory for two versions while one is staged.

vLLM has a registry of transfer engines, but one of them is fixed when the server starts, and its calls receive on the thread that serves; here a
server takes whatever transport the run in progress uses. Of vLLM are used: layerwise reloading, which repacks weights as the kernels want them, and
its NCCL communicator.
"""

from __future__ import annotations

import atexit
import gc
import logging
import multiprocessing.connection
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, Store, TCPStore
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from services.contracts.messages import LoadWeights
from services.contracts.transports import BroadcastSource, FileSource, TensorSpec, layout


def _end_with_parent() -> None:
    """The engine's process would outlive a rollout server that is killed, with its memory, its GPU and half-done requests."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()

# Spares the engine's process a last garbage collection of all that vLLM made, which takes four seconds.
atexit.register(gc.freeze)

# It warns at every load of modules that have nothing of their own to load: rotary embeddings, tied heads.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)

SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FIRST_LOOK_SECONDS = 0.005
"""For which the engine stands still so that a version that is staged in no time needs no second call."""
EXAMPLES = 3
"""How many of the tensors that are wrong an error names."""


class WeightReceiver:
    """What the engine calls on its worker, through `collective_rpc`. vLLM mixes it into its worker class, so it has no __init__."""

    vllm_config: Any
    model_config: Any
    model_runner: Any
    device: torch.device

    def stage_weights(self, request: dict[str, Any]) -> dict[str, str]:
        """Begin to stage a version (a LoadWeights as a dict); what was staged before is given up. Answers as `staged_weights` does.

        A small version is staged before the first question, each of which would wait for an engine step.
        """
        state = self._offbeat
        if state.staging is not None and state.staging.thread.is_alive():
            state.leave_group(state.group_name)  # makes its thread fail
        state.staging = Staging(state, LoadWeights.model_validate(request))
        state.staging.thread.join(FIRST_LOOK_SECONDS)
        return self.staged_weights()

    def staged_weights(self) -> dict[str, str]:
        """{"state": "working" | "ready" | "failed", "error": its text}."""
        staging = self._offbeat.staging
        if staging is None:
            return {"state": "failed", "error": "nothing was staged"}
        if staging.error is not None:
            return {"state": "failed", "error": staging.error}
        return {"state": "working" if staging.thread.is_alive() else "ready", "error": ""}

    def commit_weights(self) -> None:
        """Put the staged weights into the model, or raise; ask `weights_are_whole` then."""
        state = self._offbeat
        assert state.staging is not None
        tensors, state.staging = state.staging.tensors, None
        state.whole = False
        with set_current_vllm_config(self.vllm_config):
            try:
                replace_weights(state.model, self.model_config, tensors)
            except BaseException:
                finalize_layerwise_reload(state.model, self.model_config)  # forget what was half loaded
                if state.served:
                    replace_weights(state.model, self.model_config, state.served)
                    state.whole = True
                raise
        state.served, state.whole = tensors, True

    def weights_are_whole(self) -> bool:
        """Whether the model holds one version: False after a commit that failed and could not be undone."""
        return self._offbeat.whole

    @cached_property
    def _offbeat(self) -> ReceiverState:
        return ReceiverState(self.model_runner.get_model(), self.model_config, self.device)


class ReceiverState:
    """What the worker remembers from one version to the next."""

    def __init__(self, model: torch.nn.Module, model_config: Any, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.tied = bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))
        self.dtype = str(model_config.dtype).removeprefix("torch.")
        self.model_path: str = model_config.model
        self.served: Mapping[str, torch.Tensor] = {}
        """The version that the model holds, in host memory; none before the first."""
        self.whole = True
        self.staging: Staging | None = None
        self.group: Group | None = None
        self.group_name = ""
        self._lock = threading.Lock()

    @cached_property
    def expected(self) -> dict[str, TensorSpec]:
        return expected_tensors(self.model_path, dtype=self.dtype, tied=self.tied)

    def enter_group(self, name: str, group: Group) -> None:
        with self._lock:
            self.group, self.group_name = group, name

    def leave_group(self, name: str) -> None:
        """End the group if it is still the one of that name: a staging thread that was given up must not end its successor's."""
        with self._lock:
            if self.group is not None and self.group_name == name:
                self.group.abort()
                self.group, self.group_name = None, ""


class Staging:
    """One version on its way in. The thread either fills `tensors` or sets `error`."""

    def __init__(self, state: ReceiverState, request: LoadWeights) -> None:
        self.tensors: Mapping[str, torch.Tensor] = {}
        self.error: str | None = None
        self._state = state
        self._request = request
        self.thread = threading.Thread(target=self._run, name=f"stage-{request.version}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.tensors = self._receive()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError is what torch's stores and groups raise
            self.error = f"{type(error).__name__}: {error}"

    def _receive(self) -> Mapping[str, torch.Tensor]:
        request, state = self._request, self._state
        try:
            match request.transport:
                case "shm":
                    return read_file(FileSource.model_validate(request.source), version=request.version, expected=state.expected)
                case "gloo" | "nccl" as transport:
                    return receive_broadcast(BroadcastSource.model_validate(request.source), transport=transport, state=state)
        except ValidationError as error:
            raise ValueError(f"the source does not fit the transport {request.transport}: {error}") from error
        raise ValueError(f"no weight transport is called {request.transport!r}")


def replace_weights(model: Any, model_config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load checkpoint tensors into a model that serves. `load_weights` alone cannot: kernels keep repacked copies; on CPU the originals are empty."""
    with torch.no_grad():
        initialize_layerwise_reload(model)
        model.load_weights(tensors.items())
        finalize_layerwise_reload(model, model_config)
        if current_platform.is_cpu():
            repack_tied_head(model)


def repack_tied_head(model: torch.nn.Module) -> None:
    """vLLM 0.32 on CPU: a tied output head has a repacked copy of the embedding of its own. As no checkpoint tensor is loaded into the head, no
    reload repacks it, and logits would go on using the old embedding, silently."""
    heads = [module for module in model.modules() if isinstance(module, ParallelLMHead)]
    embeddings = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)]
    for head in heads:
        for embedding in embeddings:
            if head.weight is embedding.weight:
                head.quant_method.process_weights_after_loading(head)


def expected_tensors(model_path: str, *, dtype: str, tied: bool) -> dict[str, TensorSpec]:
    """What a version must consist of: the tensors of the checkpoint that the engine was started with, in the serving type. A copy of the embedding
    that some checkpoints of tied models hold as `lm_head.weight` is not among them."""
    folder = Path(model_path)
    if not folder.is_dir():
        folder = Path(snapshot_download(model_path, local_files_only=True, allow_patterns=["*.safetensors"]))
    expected: dict[str, TensorSpec] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                expected[name] = TensorSpec(name=name, dtype=dtype, shape=tuple(file.get_slice(name).get_shape()))
    if tied:
        expected.pop("lm_head.weight", None)
    if not expected:
        raise ValueError(f"{folder} holds no safetensors files, so there is nothing to check new weights against")
    return expected


def check(received: Iterable[TensorSpec], expected: Mapping[str, TensorSpec]) -> None:
    """Raises ValueError that names the first tensors that are missing, unknown, or of another shape or type."""
    got = {tensor.name: tensor for tensor in received}
    wrong = [f"{name} is missing" for name in expected if name not in got]
    wrong += [f"{name} is unknown" for name in got if name not in expected]
    wrong += [f"{tensor} should be {expected[name]}" for name, tensor in got.items() if name in expected and tensor != expected[name]]
    if wrong:
        more = f" and {len(wrong) - EXAMPLES} more" if len(wrong) > EXAMPLES else ""
        raise ValueError(f"these are not weights of the model served: {'; '.join(wrong[:EXAMPLES])}{more}")


def read_file(source: FileSource, *, version: int, expected: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """Map a safetensors file. Its reader checks header and length; the version in its metadata, names, shapes and types are checked here."""
    with safe_open(source.path, framework="pt") as file:
        written = (file.metadata() or {}).get("version")
        if written != str(version):
            raise ValueError(f"{source.path} holds version {written}, not {version}")
        names = list(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        check(
            (
                TensorSpec(name=name, dtype=SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()), shape=tuple(part.get_shape()))
                for name, part in slices.items()
            ),
            expected,
        )
        return {name: file.get_tensor(name) for name in names}


def receive_broadcast(source: BroadcastSource, *, transport: str, state: ReceiverState) -> dict[str, torch.Tensor]:
    """Shake hands, join the trainer's group if this is a new one, receive the flat buffer into host memory."""
    wait = timedelta(seconds=source.timeout)
    store = TCPStore(source.host, source.port, is_master=False, timeout=wait, wait_for_workers=False)
    try:
        check(source.tensors, state.expected)
    except ValueError as error:
        store.set(source.refused_key, str(error))
        raise
    store.set(source.ready_key, state.group_name)
    store.wait([source.go_key], wait)
    verb, _, detail = store.get(source.go_key).decode().partition(" ")
    if verb != "join":
        state.leave_group(state.group_name)
        raise RuntimeError(f"the trainer called the publication off: {detail}")
    offsets, size = layout(source.tensors)
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=state.device.type == "cuda")
    group = state.group
    try:
        if group is None or detail != state.group_name:
            state.leave_group(state.group_name)
            group = GROUPS[transport](PrefixStore(detail, store), source, state.device)
            state.enter_group(detail, group)
        for chunk in buffer.split(source.chunk_bytes):
            group.receive(chunk)
    except RuntimeError:
        state.leave_group(detail)
        raise
    return {
        t.name: buffer[offset : offset + t.nbytes].view(getattr(torch, t.dtype)).view(t.shape)
        for t, offset in zip(source.tensors, offsets, strict=True)
    }


class Group(Protocol):
    """A communicator of the trainer (rank 0) and the servers."""

    def receive(self, chunk: torch.Tensor) -> None:
        """Fill this piece of host memory with what the trainer broadcasts. Raises RuntimeError when it is not all there in time."""

    def abort(self) -> None:
        """End it, from any thread; a broadcast that is going on fails."""


class GlooGroup:
    """Sockets between host memories."""

    def __init__(self, store: Store, source: BroadcastSource, device: torch.device) -> None:
        with socket.create_connection((source.host, source.port), timeout=source.timeout) as probe:
            own_address = probe.getsockname()[0]  # the interface that leads to the trainer
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
        options._timeout = timedelta(seconds=source.timeout)
        options._devices = [ProcessGroupGloo.create_device(hostname=own_address)]
        self._group = ProcessGroupGloo(store, source.rank, source.world, options)

    def receive(self, chunk: torch.Tensor) -> None:
        self._group.broadcast([chunk], BroadcastOptions()).wait()  # type: ignore[attr-defined]

    def abort(self) -> None:
        self._group.abort()


class NcclGroup:
    """Between GPUs, with vLLM's communicator at both ends. It has a stream of its own, so that the engine's kernels do not wait for it; what was
    received goes to pinned host memory, as the device has no room for two versions beside the KV cache."""

    def __init__(self, store: Store, source: BroadcastSource, device: torch.device) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup
        from vllm.utils.nccl import unpinned_nccl_env

        torch.cuda.set_device(device)  # this is not the main thread
        peers = StatelessProcessGroup(rank=source.rank, world_size=source.world, store=store)
        with unpinned_nccl_env():
            self._communicator = PyNcclCommunicator(peers, device=device)
        if self._communicator.disabled:
            raise RuntimeError("vLLM found no NCCL library")
        self._stream = torch.cuda.Stream(device)
        self._landing = torch.empty(source.chunk_bytes, dtype=torch.uint8, device=device)
        self._timeout = source.timeout

    def receive(self, chunk: torch.Tensor) -> None:
        landing = self._landing[: chunk.numel()]
        with torch.cuda.stream(self._stream):
            self._communicator.broadcast(landing, src=0, stream=self._stream)
            chunk.copy_(landing, non_blocking=True)
        deadline = time.monotonic() + self._timeout
        while not self._stream.query():
            if time.monotonic() > deadline:
                raise RuntimeError(f"a broadcast of {chunk.numel()} bytes did not end in {self._timeout:g} s")
            time.sleep(0.0002)

    def abort(self) -> None:
        self._communicator.destroy()


GROUPS: dict[str, Callable[[Store, BroadcastSource, torch.device], Group]] = {"gloo": GlooGroup, "nccl": NcclGroup}
