"""The trainer's end of the weight transports: a model's weights become a file in shared memory, or a broadcast to the rollout servers.

How a version is published (the HTTP calls are the publisher's):

    transport.prepare(version, named_weights(model, dtype))       the weights are copied: training may go on
    sources = transport.sources(servers)                          LoadWeights.source of each server
    POST LoadWeights to each server | transport.send() in a thread, at the same time
    each server's answer says whether it holds the version        a failed send: sources(the servers that are left), POST and send again

The servers' end is `rollout_server.weights`; what both agree on is in `services.contracts.transports`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import torch
from safetensors.torch import save_file
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, Store, TCPStore

from services.contracts.transports import BroadcastSource, FileSource, TensorSpec, layout

NamedWeights = Iterable[tuple[str, torch.Tensor]]
GatheredWeights = Generator[tuple[str, torch.Tensor], None, None]
"""To be closed by who does not take them all: where several ranks gather them, all must learn that it goes no further."""

KEPT_FILES = 2
"""A server that was told of version v may open its file while v + 1 is written, never later: v + 2 waits for all servers to hold v + 1."""

POLL_SECONDS = 0.002

CHUNK_BYTES = 64 << 20
"""One collective moves at most this much: what a server needs on its device to receive, and how soon a cancelled broadcast ends."""


class TransportFailed(RuntimeError):
    """The weights could not be sent; the text says what failed."""

    def __init__(self, text: str, *, broken_by: Iterable[str] = ()) -> None:
        super().__init__(text)
        self.broken_by = frozenset(broken_by)
        """Servers that are known to be the reason."""


class Transport(Protocol):
    """One publication at a time; no method but `cancel` may run beside another."""

    name: str

    def prepare(self, version: int, weights: NamedWeights) -> None:
        """Copy the weights to where they are sent from. When it returns, the caller may change them."""

    def sources(self, servers: Sequence[str]) -> dict[str, dict[str, Any]]:
        """`LoadWeights.source` for each of the servers (by fleet id) that the next `send` is for."""

    def send(self) -> None:
        """Blocks until the weights are sent, and has a time-out. Raises TransportFailed: some servers may hold the version then, and others not."""

    def cancel(self, reason: str) -> None:
        """Make a `send` that is going on in another thread fail soon: a server that it waits for has said that it will not load."""

    @property
    def stored(self) -> dict[str, Any] | None:
        """Source from which a late or restarted server can load the version at any time without a `send`; None if there is no such copy."""

    def close(self) -> None:
        """Give back memory, sockets and files."""


def named_weights(model: torch.nn.Module, dtype: torch.dtype) -> GatheredWeights:
    """The model's weights under their checkpoint names, in the serving type. A tied tensor comes once, by its first name (so no `lm_head.weight`)."""
    first_names = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first_names
    for name, tensor in model.state_dict().items():
        if name not in tied:
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a sharded tensor is gathered, on all ranks
            yield name, whole.to(dtype) if whole.is_floating_point() else whole


def make_transport(name: str, *, directory: Path, host: str, timeout: float) -> Transport:
    """The transport of that name. `directory` is for files; `host` is the trainer's address as the servers see it; `timeout` is in seconds."""
    match name:
        case "shm":
            return FileTransport(directory)
        case "gloo":
            return BroadcastTransport("gloo", host=host, timeout=timeout, join=GlooGroup, device=torch.device("cpu"))
        case "nccl":
            return BroadcastTransport("nccl", host=host, timeout=timeout, join=NcclGroup, device=torch.device("cuda", torch.cuda.current_device()))
    raise ValueError(f"no weight transport is called {name!r}: use shm, gloo or nccl")


class FileTransport:
    """A safetensors file that servers load from: written under another name, then renamed, so a server sees it whole or not at all.

    The newest files are kept: a server maps the file when it opens it, and so may be loading from one while it is deleted.
    """

    name = "shm"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path: Path | None = None
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        for leftover in directory.glob("*.tmp"):  # of a trainer killed while it wrote
            leftover.unlink()

    def prepare(self, version: int, weights: NamedWeights) -> None:
        path = self._directory / f"weights-{version}.safetensors"
        unfinished = path.with_suffix(".tmp")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
        try:
            unfinished.touch(mode=0o600)
            save_file(tensors, unfinished, metadata={"version": str(version)})
            unfinished.chmod(0o600)  # save_file may replace the file that was touched
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)
        self._path = path
        for old in self._files()[:-KEPT_FILES]:
            old.unlink()

    def sources(self, servers: Sequence[str]) -> dict[str, dict[str, Any]]:
        stored = self.stored
        if stored is None:
            raise RuntimeError("prepare a version before asking for its sources")
        return dict.fromkeys(servers, stored)

    def send(self) -> None:
        """Nothing to do: the servers read the file."""

    def cancel(self, reason: str) -> None:
        """Nothing to cancel."""

    @property
    def stored(self) -> dict[str, Any] | None:
        return FileSource(path=str(self._path)).model_dump(mode="json") if self._path else None

    def close(self) -> None:
        for path in self._files():
            path.unlink()
        self._path = None
        with contextlib.suppress(OSError):  # not empty, or gone
            self._directory.rmdir()

    def _files(self) -> list[Path]:
        """Oldest first. By time of writing: a run that is resumed publishes an older version again."""
        return sorted(self._directory.glob("weights-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


class Group(Protocol):
    """A communicator of the trainer (rank 0) and the servers."""

    def broadcast(self, chunk: torch.Tensor) -> None: ...

    def abort(self) -> None:
        """End it, from any thread; a broadcast that is going on fails."""


class GlooGroup:
    """Sockets between host memories."""

    def __init__(self, store: Store, world: int, host: str, timeout: float, device: torch.device) -> None:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
        options._timeout = timedelta(seconds=timeout)
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]  # the default is whatever the host's own name resolves to
        self._group = ProcessGroupGloo(store, 0, world, options)

    def broadcast(self, chunk: torch.Tensor) -> None:
        self._group.broadcast([chunk], BroadcastOptions()).wait()  # type: ignore[attr-defined]

    def abort(self) -> None:
        self._group.abort()


class NcclGroup:
    """Between GPUs, with vLLM's communicator at both ends. NCCL has no time-outs of its own: completion is polled for, and a late group aborted."""

    def __init__(self, store: Store, world: int, host: str, timeout: float, device: torch.device) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup
        from vllm.utils.nccl import unpinned_nccl_env

        torch.cuda.set_device(device)  # this is not the main thread
        with unpinned_nccl_env():
            self._communicator = PyNcclCommunicator(StatelessProcessGroup(rank=0, world_size=world, store=store), device=device)
        if self._communicator.disabled:
            raise RuntimeError("vLLM found no NCCL library: install the CUDA build of vLLM in the trainer's environment")
        self._stream = torch.cuda.Stream(device)
        self._timeout = timeout

    def broadcast(self, chunk: torch.Tensor) -> None:
        self._communicator.broadcast(chunk, src=0, stream=self._stream)
        deadline = time.monotonic() + self._timeout
        while not self._stream.query():
            if time.monotonic() > deadline:
                raise TimeoutError(f"a broadcast of {chunk.numel()} bytes did not end in {self._timeout:g} s")
            time.sleep(POLL_SECONDS / 10)

    def abort(self) -> None:
        self._communicator.destroy()


class BroadcastTransport:
    """One flat buffer, broadcast to all servers at once by a torch.distributed group that lives from one publication to the next.

    The group is made anew when the servers are others than before, when one of them has lost it (it was restarted), and after any failure.
    """

    def __init__(
        self,
        name: str,
        *,
        host: str,
        timeout: float,
        join: Callable[[Store, int, str, float, torch.device], Group],
        device: torch.device,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.name = name
        self._host = host
        self._timeout = timeout
        self._join = join
        self._device = device
        self._chunk_bytes = chunk_bytes
        self._tensors: tuple[TensorSpec, ...] = ()
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._peers: dict[str, BroadcastSource] = {}
        self._round = 0
        self._group: Group | None = None
        self._group_name = ""
        self._members: tuple[str, ...] = ()
        self._cancelled: str | None = None
        self._broken_by: set[str] = set()
        self._lock = threading.Lock()
        listener = socket.create_server((host, 0))  # bound to one address: the store knows no passwords
        self._port = listener.getsockname()[1]
        wait = timedelta(seconds=timeout)
        self._store = TCPStore(host, self._port, is_master=True, timeout=wait, wait_for_workers=False, master_listen_fd=listener.detach())

    def prepare(self, version: int, weights: NamedWeights) -> None:
        named = [(name, tensor.detach()) for name, tensor in weights]
        self._tensors = tuple(TensorSpec(name=name, dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape)) for name, t in named)
        offsets, size = layout(self._tensors)
        if self._buffer.numel() != size:
            self._buffer = torch.zeros(size, dtype=torch.uint8, device=self._device)
        for spec, offset, (_, tensor) in zip(self._tensors, offsets, named, strict=True):
            self._buffer[offset : offset + spec.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def sources(self, servers: Sequence[str]) -> dict[str, dict[str, Any]]:
        if not self._tensors:
            raise RuntimeError("prepare a version before asking for its sources")
        self._cancelled, self._broken_by = None, set()
        self._round += 1
        self._peers = {
            server: BroadcastSource(
                host=self._host,
                port=self._port,
                round=f"round{self._round}",
                rank=rank,
                world=len(servers) + 1,
                timeout=self._timeout,
                chunk_bytes=self._chunk_bytes,
                tensors=self._tensors,
            )
            for rank, server in enumerate(servers, 1)
        }
        return {server: source.model_dump(mode="json") for server, source in self._peers.items()}

    def send(self) -> None:
        if not self._peers:
            return
        go = next(iter(self._peers.values())).go_key
        try:
            self._wait_until_ready()
            members = tuple(self._peers)
            inside = {self._store.get(peer.ready_key).decode() for peer in self._peers.values()}
            if self._group is None or self._members != members or inside != {self._group_name}:
                self._leave_group()
                self._group_name, self._members = f"group-{uuid4().hex}", members
                self._store.set(go, f"join {self._group_name}")
                self._enter(self._join(PrefixStore(self._group_name, self._store), len(members) + 1, self._host, self._timeout, self._device))
            else:
                self._store.set(go, f"join {self._group_name}")
            assert self._group is not None
            for chunk in self._buffer.split(self._chunk_bytes):
                self._raise_if_cancelled()
                self._group.broadcast(chunk)
        except (RuntimeError, TimeoutError) as error:  # torch raises RuntimeError for all that goes wrong in a store or a group
            self._leave_group()
            reason = self._cancelled or str(error)
            self._store.set(go, f"stop {reason}")
            raise TransportFailed(f"{self.name} broadcast to {', '.join(self._peers)} failed: {reason}", broken_by=self._broken_by) from error

    def cancel(self, reason: str) -> None:
        with self._lock:
            self._cancelled = reason
            if self._group is not None:
                self._group.abort()

    @property
    def stored(self) -> dict[str, Any] | None:
        return None

    def close(self) -> None:
        self._leave_group()
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._tensors = ()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._timeout
        waiting = set(self._peers)
        while waiting:
            self._raise_if_cancelled()
            for server in sorted(waiting):
                peer = self._peers[server]
                if self._store.check([peer.refused_key]):
                    self._broken_by = {server}
                    raise RuntimeError(f"{server} refused: {self._store.get(peer.refused_key).decode()}")
                if self._store.check([peer.ready_key]):
                    waiting.remove(server)
            if waiting and time.monotonic() > deadline:
                self._broken_by = waiting
                raise TimeoutError(f"{', '.join(sorted(waiting))} did not get ready in {self._timeout:g} s")
            time.sleep(POLL_SECONDS)

    def _raise_if_cancelled(self) -> None:
        if self._cancelled is not None:
            raise RuntimeError(self._cancelled)

    def _enter(self, group: Group) -> None:
        with self._lock:
            self._group = group

    def _leave_group(self) -> None:
        with self._lock:
            if self._group is not None:
                self._group.abort()
            self._group = None
            self._group_name = ""
