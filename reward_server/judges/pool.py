"""Pools of killable worker processes, one for each judge, so that a bomb in one verifier never delays another.

Consumes requests from any number of threads; produces the judge's value, or Unjudged. Waits for an idle worker; unblocked by a decision, which takes
at most the judge's time, after which the kernel kills the worker and another is forked.

A request that is not decided at once is moved out of the way: its worker steps back, and another takes its place among those that serve. So bombs
delay ordinary requests by little, until there are more of them than may be slow at once.
"""

from __future__ import annotations

import json
import threading
import time
from functools import lru_cache
from typing import NamedTuple

from pydantic import JsonValue

from reward_server.judges.workers import ALARMS, WALL, Template, TemplateDied, Worker
from reward_server.turns import Turns
from reward_server.verifiers import VERIFIERS
from reward_server.verifiers.verdict import Unjudged
from services.contracts.messages import Outcome

MEMORY_BYTES = 512 << 20
"""What a worker may hold; its address space is bounded at twice this."""
RECYCLE = 2_000
"""Requests after which a worker is replaced: computer algebra keeps caches."""
CACHED = 20_000
"""Decisions kept, the newest used."""
CACHED_LENGTH = 4_096
"""Characters of the longest request that is kept: a full cache stays under 100 MB."""
LONGEST_REQUEST = 8 << 20
"""Characters of the longest request that a worker is given."""
SLOW_SECONDS = 0.05
"""A request that is not decided after so long is looked at, and is slow when it then takes as much again of the processor: on a busy machine ordinary
ones may wait for that long, and more workers would only make them wait longer. Ordinary ones take a few milliseconds."""
LOOK_SECONDS = 0.02
"""Between looks."""
SLOW_WORKERS = 4
"""Slow requests that may be worked on, for each worker of the pool."""
GRACE_SECONDS = 1.0
"""Time beyond the judge's own after which a worker that the kernel did not kill is killed from here."""


WHERE = "judge"
"""What an error of these processes has as its cause."""
LATE = tuple(-alarm for alarm in ALARMS)
"""Exit codes of workers that ran out of time."""


class PoolStats(NamedTuple):
    """Counts since the pool was made."""

    forks: int
    """Workers started."""
    timeouts: int
    deaths: int
    """Workers that died of something else while they worked."""
    cache_hits: int
    cache_misses: int


class WorkerPool:
    """Workers of one judge. Processes are started when first needed, and replaced when they die."""

    def __init__(self, judge: str, *, workers: int = 2, memory_bytes: int = MEMORY_BYTES, recycle: int = RECYCLE) -> None:
        definition = VERIFIERS[judge].judge
        assert definition is not None, f"the verifier {judge} has no judge"
        self._judge = judge
        self._seconds, self._patience = definition.seconds, definition.patience
        self._memory_bytes = memory_bytes
        self._recycle = recycle
        self._slots: Turns[Worker | None] = Turns([None] * workers)  # None: a slot whose worker is not started
        self._count = workers
        self._slow = threading.Semaphore(SLOW_WORKERS * workers)
        self._lock = threading.Lock()
        self._template: Template | None = None
        self._closed = False
        self._forks = self._timeouts = self._deaths = 0
        self._cached = lru_cache(CACHED)(self._decide)  # what raises is not kept: a time-out may be the machine's fault

    def ask(self, request: JsonValue) -> JsonValue:
        """The judge's value. Raises Unjudged."""
        text = json.dumps(request)
        if len(text) > LONGEST_REQUEST:
            raise Unjudged(Outcome.LIMIT, f"the entry and the answer take more than {LONGEST_REQUEST} characters", cause="input")
        return self._cached(text) if len(text) <= CACHED_LENGTH else self._decide(text)

    def start(self) -> None:
        """Starts the template now, so that the first request does not wait for it. Raises Unjudged."""
        try:
            self._warm_template()
        except (TemplateDied, OSError) as gone:
            raise Unjudged(Outcome.ERROR, f"the workers of {self._judge} cannot be started: {gone}", cause=WHERE) from gone

    def stats(self) -> PoolStats:
        info = self._cached.cache_info()
        return PoolStats(self._forks, self._timeouts, self._deaths, info.hits, info.misses)

    def close(self) -> None:
        """Waits for the requests that are being worked on, and ends all processes. Later requests are refused."""
        self._closed = True
        for worker in [self._slots.take() for _ in range(self._count)]:
            if worker:
                worker.end()
        for _ in range(SLOW_WORKERS * self._count):
            self._slow.acquire()
        for _ in range(self._count):
            self._slots.give(None)  # wakes who still waits for a worker
        with self._lock:
            if self._template:
                self._template.close()
            self._template = None

    def _decide(self, request: str) -> JsonValue:
        for _ in range(2):  # a worker may be killed for what another process did: one more try
            reply = self._once(request.encode())
            if reply is not None:
                outcome, value = json.loads(reply)
                if outcome != Outcome.OK:
                    raise Unjudged(Outcome(outcome), str(value), cause="memory" if outcome == Outcome.LIMIT else WHERE)
                return value
        raise Unjudged(Outcome.ERROR, "the worker died twice", cause=WHERE)

    def _once(self, request: bytes) -> bytes | None:
        """One worker's reply; None when it died on the request. Raises Unjudged when it ran out of time, or no worker can be had."""
        worker: Worker | None = self._slots.take()
        keep: Worker | None = None
        slow = False
        try:
            worker = self._live(worker)
            try:
                worker.ask(request)
                deadline = time.monotonic() + WALL * self._seconds + GRACE_SECONDS
                slow_after = max(SLOW_SECONDS, self._patience)
                reply = worker.reply(slow_after)
                before = worker.processor_seconds() if reply is None else 0.0
                while reply is None and not slow and time.monotonic() < deadline:
                    reply = worker.reply(LOOK_SECONDS)
                    if reply is None and worker.processor_seconds() - before >= slow_after:
                        slow = self._slow.acquire(blocking=False)
                if reply is None and slow:
                    worker.step_back()
                    self._slots.give(None)  # another worker's, from now on
                    reply = worker.reply(max(0.0, deadline - time.monotonic()))
            except (EOFError, OSError):
                if worker.end() in LATE:
                    raise self._late() from None
                with self._lock:
                    self._deaths += 1
                return None
            if reply is None:
                worker.end()
                raise self._late()
            if slow or worker.served >= self._recycle or b'"limit"' in reply[:16]:
                worker.end()
            else:
                keep = worker
            return reply
        finally:
            if slow:
                self._slow.release()
            else:
                self._slots.give(keep)

    def _live(self, worker: Worker | None) -> Worker:
        if worker and not self._closed and worker.alive():
            return worker
        if worker:
            worker.end()
        if self._closed:
            raise Unjudged(Outcome.ERROR, "the reward server is stopping", cause=WHERE)
        try:
            template = self._warm_template()
            try:
                worker = template.fork()
            except TemplateDied:
                worker = self._warm_template(instead_of=template).fork()
        except (TemplateDied, OSError) as gone:
            raise Unjudged(Outcome.ERROR, f"the workers of {self._judge} cannot be started: {gone}", cause=WHERE) from gone
        with self._lock:
            self._forks += 1
        return worker

    def _warm_template(self, *, instead_of: Template | None = None) -> Template:
        with self._lock:
            if self._template and self._template is instead_of:
                self._template.close()
                self._template = None
            if self._template is None:
                self._template = Template(self._judge, seconds=self._seconds, memory_bytes=self._memory_bytes)
            return self._template

    def _late(self) -> Unjudged:
        with self._lock:
            self._timeouts += 1
        return Unjudged(Outcome.TIMEOUT, f"not judged within {self._seconds:g} s of the processor's time")


class JudgePools:
    """The pool of each judge, made when it is first asked. Its `ask` is what verifiers are given."""

    def __init__(self, *, workers: int = 2) -> None:
        self._workers = workers
        self._lock = threading.Lock()
        self._pools: dict[str, WorkerPool] = {}
        self._closed = False

    def ask(self, judge: str, request: JsonValue) -> JsonValue:
        """The judge's value. Raises Unjudged."""
        return self._pool(judge).ask(request)

    def start(self, verifier: str) -> None:
        """Starts what the verifier of this name needs, if anything, before its first request. Raises Unjudged."""
        if VERIFIERS[verifier].judge:
            self._pool(verifier).start()

    def stats(self) -> dict[str, PoolStats]:
        """Counts by judge."""
        with self._lock:
            return {name: pool.stats() for name, pool in self._pools.items()}

    def close(self) -> None:
        with self._lock:
            self._closed = True
            pools = list(self._pools.values())
        for pool in pools:
            pool.close()

    def _pool(self, judge: str) -> WorkerPool:
        with self._lock:
            if self._closed:
                raise Unjudged(Outcome.ERROR, "the reward server is stopping", cause=WHERE)
            if judge not in self._pools:
                self._pools[judge] = WorkerPool(judge, workers=self._workers)
            return self._pools[judge]
