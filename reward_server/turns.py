"""What a few threads lend each other, in the order in which they ask for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Things of which each is with one thread at a time, or idle. Safe to use from several threads.

    Who has waited longest is next: `queue.Queue` and semaphores give to whoever comes by at the right moment, so that on a busy server
    one in a hundred waits for a hundred others.
    """

    def __init__(self, things: Iterable[T]) -> None:
        self._lock = threading.Lock()
        self._idle = list(things)
        self._waiting: deque[SimpleQueue[T]] = deque()

    def take(self) -> T:
        """The thing that was given back last; waits where none is idle."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
            place: SimpleQueue[T] = SimpleQueue()
            self._waiting.append(place)
        return place.get()

    def give(self, thing: T) -> None:
        """Never waits."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().put(thing)
            else:
                self._idle.append(thing)
