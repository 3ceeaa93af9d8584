"""The order of prompts: a seeded permutation for every epoch, computed at one index, with nothing stored. And which prompts of a source are drawn."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

ROUNDS = 6
"""Feistel rounds. Four make a permutation pseudo-random for large blocks; the halves of a small data set have few bits, so a little more mixing."""


def shuffled_index(n: int, *, size: int, seed: int) -> int:
    """Place in [0, size) of issue index n >= 0: in each epoch n // size every place comes once.

    A Feistel network permutes [0, 4^b) for the least b >= 1 with 4^b >= size, again and again until the value lies below `size` (cycle walking):
    fewer than four times on average. It costs microseconds and no memory whatever the size, and is the same on every platform and library version.
    """
    epoch, value = divmod(n, size)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = f"{seed}:{epoch}".encode()
    while True:
        left, right = value >> half, value & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (_mix(key, turn, right) & mask)
        value = left << half | right
        if value < size:
            return value


def drawn(many: int | None, *, of: int, seed: int) -> Sequence[int]:
    """`many` places in [0, of), drawn by the seed, in rising order; all of them where it is None or there are fewer."""
    return range(of) if many is None or many >= of else sorted(random.Random(seed).sample(range(of), many))


def _mix(key: bytes, turn: int, value: int) -> int:
    digest = hashlib.blake2b(turn.to_bytes(1, "little") + value.to_bytes(8, "little"), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "little")
