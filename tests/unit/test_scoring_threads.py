"""Threads that are shared fairly and have a bounded queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from functools import partial

import pytest

from reward_server.scoring_threads import LONGEST_RETRY, Overloaded, ScoringThreads


@pytest.fixture
def threads() -> Iterator[ScoringThreads]:
    threads = ScoringThreads(2, most_waiting=4)
    yield threads
    threads.close()


def blocked(threads: ScoringThreads) -> threading.Event:
    """Every thread waits for this; set it to let them go."""
    gate, inside = threading.Event(), threading.Semaphore(0)

    def job() -> None:
        inside.release()
        gate.wait(30)

    threads.submit("gate", [job] * threads.threads)
    for _ in range(threads.threads):
        assert inside.acquire(timeout=30)
    return gate


def test_results_come_in_order_and_errors_to_who_waits(threads: ScoringThreads) -> None:
    futures = threads.submit("a", [partial(int, "7"), partial(int, "seven"), partial(int, "9")])
    assert [futures[0].result(30), futures[2].result(30)] == [7, 9]
    with pytest.raises(ValueError, match="seven"):
        futures[1].result(30)


def test_jobs_run_side_by_side_and_no_more_than_there_are_threads(threads: ScoringThreads) -> None:
    meet = threading.Barrier(2, timeout=30)
    running, most, lock = 0, 0, threading.Lock()

    def job() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        meet.wait()
        with lock:
            running -= 1

    for future in threads.submit("a", [job] * 8):
        future.result(30)
    assert most == 2


def test_what_is_offered_is_bounded_and_what_is_refused_is_told_when_to_come_again(threads: ScoringThreads) -> None:
    gate = blocked(threads)
    first = threads.offer("http", [partial(int, "1")] * 3)
    with pytest.raises(Overloaded, match="3 completions wait") as refused:
        threads.offer("http", [partial(int, "1")] * 2)
    assert 1 <= refused.value.retry_after <= LONGEST_RETRY
    assert (threads.waiting("http"), threads.waiting()) == (3, 3)
    second = threads.offer("http", [partial(int, "1")])
    gate.set()
    wait([*first, *second], timeout=30)
    assert threads.waiting() == 0
    assert len(threads.offer("http", [partial(int, "1")] * 100)) == 100, "one that nothing waits for may be larger than the bound"


def test_a_tenant_with_many_jobs_does_not_hold_up_one_with_few(threads: ScoringThreads) -> None:
    gate, done = blocked(threads), []
    many = threads.submit("many", [partial(done.append, "many")] * 50)
    few = threads.submit("few", [partial(done.append, "few")] * 5)
    gate.set()
    wait([*many, *few], timeout=30)
    assert max(i for i, name in enumerate(done) if name == "few") < 25


def test_first_jobs_go_before_the_tenants_others(threads: ScoringThreads) -> None:
    gate, done = blocked(threads), []
    futures = threads.submit("run", [partial(done.append, "training")] * 10)
    futures += threads.submit("run", [partial(done.append, "evaluation")] * 3, first=True)
    gate.set()
    wait(futures, timeout=30)
    assert done[:2] == ["evaluation"] * 2
    assert max(i for i, name in enumerate(done) if name == "evaluation") <= 4


def test_closing_cancels_what_waits_and_ends_what_has_begun() -> None:
    threads = ScoringThreads(2)
    gate = blocked(threads)
    (waiting,) = threads.submit("a", [partial(int, "1")])
    threading.Timer(0.1, gate.set).start()
    began = time.monotonic()
    threads.close(seconds=30)
    assert time.monotonic() - began < 20
    with pytest.raises(CancelledError):
        waiting.result(0)
    (late,) = threads.submit("a", [partial(int, "1")])
    assert late.cancelled()
    assert not any(worker.is_alive() for worker in threads._workers)
