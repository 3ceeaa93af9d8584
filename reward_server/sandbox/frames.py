"""Texts on a stream socket: four bytes of length, then the text. Standard library only."""

from __future__ import annotations

import os
import struct

_read, _write = os.read, os.write  # bound here: the job's code may put others into `os`
LENGTH = struct.Struct("=I")
LONGEST = 64 << 20
"""Bytes of a request. Replies are bounded by the job's `output_bytes`."""


def framed(text: str) -> bytes:
    """Raises ValueError when it is too long."""
    body = text.encode("ascii")
    if len(body) > LONGEST:
        raise ValueError(f"more than {LONGEST} bytes for a job")
    return LENGTH.pack(len(body)) + body


def read_frame(descriptor: int) -> str | None:
    """Blocks; None at the end of the stream."""
    head = _exactly(descriptor, LENGTH.size)
    if head is None:
        return None
    body = _exactly(descriptor, LENGTH.unpack(head)[0])
    return None if body is None else body.decode("ascii")


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[_write(descriptor, view) :]


def _exactly(descriptor: int, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        more = _read(descriptor, min(size - len(data), 1 << 20))
        if not more:
            return None
        data += more
    return bytes(data)
