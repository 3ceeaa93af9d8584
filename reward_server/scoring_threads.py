"""The threads in which completions are judged, those of the stream and those of HTTP requests alike.

    consumes     jobs, each of a tenant: a run, or HTTP
    produces     their results, as futures
    waits for    jobs
    unblocked by whoever submits one

A thread mostly waits, for a judge's worker or for the sandbox, which bound the work that is done at once. Which job is next is `FairShare`'s choice.
What HTTP may have waiting is bounded here; the stream's worker takes no more groups than keep the threads busy.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from reward_server.fair_share import FairShare

T = TypeVar("T")
LONGEST_RETRY = 30
"""Seconds after which a refused request may at the latest be tried again."""


class Overloaded(Exception):
    """As many jobs wait as may; `retry_after` is in whole seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} completions wait to be judged: try again in {retry_after} s")
        self.retry_after = retry_after


class ScoringThreads:
    """Works on jobs until it is closed. Safe to use from several threads."""

    def __init__(self, threads: int, *, most_waiting: int = 1024) -> None:
        self.threads, self._most_waiting = threads, most_waiting
        self._share = FairShare()
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = {}
        self._serving: Counter[str] = Counter()
        self._closed = False
        self._workers = [threading.Thread(target=self._work, name=f"score-{i}", daemon=True) for i in range(threads)]
        for worker in self._workers:
            worker.start()

    def submit(self, tenant: str, jobs: Sequence[Callable[[], T]], *, first: bool = False) -> list[Future[T]]:
        """Have the jobs done, before the tenant's other ones if `first`."""
        with self._changed:
            return self._put(tenant, jobs, first=first)

    def offer(self, tenant: str, jobs: Sequence[Callable[[], T]]) -> list[Future[T]]:
        """The same, within the bound of what may wait. A tenant that has nothing waiting is never refused. Raises Overloaded."""
        with self._changed:
            waiting = len(self._waiting.get(tenant, ()))
            if waiting and waiting + len(jobs) > self._most_waiting:
                seconds = waiting * self._share.expects(tenant) / self.threads
                raise Overloaded(waiting, min(LONGEST_RETRY, max(1, math.ceil(seconds))))
            return self._put(tenant, jobs, first=False)

    def order(self, tenants: Iterable[str]) -> list[str]:
        """These tenants, who is to be served first coming first."""
        with self._changed:
            return self._share.order(tenants)

    def keep(self, tenants: Collection[str]) -> None:
        """Tenants that are none of these, and have no jobs here, are forgotten."""
        with self._changed:
            self._share.keep({*tenants, *self._waiting, *self._serving})

    def waiting(self, tenant: str | None = None) -> int:
        """Jobs of this tenant, or of all, that are not yet begun."""
        with self._changed:
            return len(self._waiting.get(tenant, ())) if tenant is not None else sum(map(len, self._waiting.values()))

    def close(self, *, seconds: float = 5.0) -> None:
        """What waits is cancelled. Waits so long for what has begun; it ends with the process."""
        with self._changed:
            self._closed = True
            left = [future for queue in self._waiting.values() for future, _ in queue]
            self._waiting.clear()
            self._changed.notify_all()
        for future in left:
            future.cancel()
        deadline = time.monotonic() + seconds
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))

    def _put(self, tenant: str, jobs: Sequence[Callable[[], T]], *, first: bool) -> list[Future[T]]:
        made: list[tuple[Future[T], Callable[[], T]]] = [(Future(), job) for job in jobs]
        if self._closed:
            for future, _ in made:
                future.cancel()
        elif made:
            if tenant not in self._waiting and not self._serving[tenant]:
                self._share.arrive(tenant)
            queue = self._waiting.setdefault(tenant, deque())
            if first:
                queue.extendleft(reversed(made))
            else:
                queue.extend(made)
            self._changed.notify(len(made))
        return [future for future, _ in made]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                tenant = self._share.order(self._waiting)[0]
                future, job = self._waiting[tenant].popleft()
                if not self._waiting[tenant]:
                    del self._waiting[tenant]
                self._serving[tenant] += 1
                expected = self._share.begin(tenant)
            began = time.monotonic()
            if future.set_running_or_notify_cancel():
                try:
                    result = job()
                except Exception as error:  # who waits for the future learns of it
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            del future, job  # an idle thread keeps nothing alive
            with self._changed:
                self._share.end(tenant, expected=expected, seconds=time.monotonic() - began)
                self._serving[tenant] -= 1
                if not self._serving[tenant]:
                    del self._serving[tenant]
