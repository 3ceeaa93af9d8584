"""What the two ends of a weight transport must agree on: the content of `LoadWeights.source`, the layout of the bytes, the keys of the handshake.

    transport   source            the bytes travel
    shm         FileSource        in a safetensors file, in shared memory or on shared storage
    gloo, nccl  BroadcastSource   as one flat buffer, broadcast in chunks by the trainer (rank 0) to one rank a server

Before each broadcast the ends shake hands through the trainer's key-value store, so that a server that refuses, or a trainer that gives up, is known
to all before anyone enters a collective. Round r, rank k:

    server writes  r/ready/k   the group that it is in already, "" if none     (or r/refused/k: the reason)
    trainer writes r/go        `join NAME`: be in the group NAME, then receive  (or `stop REASON`)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

from pydantic import BaseModel, ConfigDict, Field

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element, by torch's name of the type."""

ALIGNMENT = 16
"""Tensors begin at multiples of it in the flat buffer, so that each can be viewed in its own type."""


class _Source(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TensorSpec(_Source):
    name: str
    """As in a Hugging Face checkpoint."""
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


class FileSource(_Source):
    path: str
    """A safetensors file whose metadata's `version` is the version published."""


class BroadcastSource(_Source):
    host: str
    port: int
    """Where the trainer's key-value store listens."""
    round: str
    """Prefix of this handshake's keys."""
    rank: int = Field(ge=1)
    """The server's rank; the trainer is 0."""
    world: int = Field(ge=2)
    timeout: float = Field(gt=0)
    """Seconds for each wait: for the go, for the group, for each chunk."""
    chunk_bytes: int = Field(gt=0)
    """One collective moves at most this much."""
    tensors: tuple[TensorSpec, ...]
    """In the order of the flat buffer."""

    @property
    def go_key(self) -> str:
        return f"{self.round}/go"

    @property
    def ready_key(self) -> str:
        return f"{self.round}/ready/{self.rank}"

    @property
    def refused_key(self) -> str:
        return f"{self.round}/refused/{self.rank}"


def layout(tensors: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """Offset of each tensor in the flat buffer, and the buffer's size, in bytes."""
    ends = list(accumulate((-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in tensors), initial=0))
    return ends[:-1], ends[-1]
