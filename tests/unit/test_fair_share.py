"""Fair shares: no thread idle while there is work, nobody far ahead, nobody starved, whatever jobs cost and whenever they come."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from reward_server.fair_share import FairShare

LONGEST = 10.0
SECONDS = st.floats(0.001, LONGEST)


@dataclass
class Threads:
    """Threads that take time, without taking any: jobs of tenants that always have more, or that arrive and leave."""

    count: int
    share: FairShare = field(default_factory=FairShare)
    now: float = 0.0
    served: Counter[str] = field(default_factory=Counter)
    """Seconds of the jobs that have begun, by tenant."""
    began: Counter[str] = field(default_factory=Counter)
    _busy: list[tuple[float, int, str, float, float]] = field(default_factory=list)
    _number: int = 0

    @property
    def free(self) -> int:
        return self.count - len(self._busy)

    def start(self, tenant: str, seconds: float) -> None:
        self._number += 1
        self.served[tenant] += seconds
        self.began[tenant] += 1
        heapq.heappush(self._busy, (self.now + seconds, self._number, tenant, self.share.begin(tenant), seconds))

    def next_end(self) -> None:
        self.now, _, tenant, expected, seconds = heapq.heappop(self._busy)
        self.share.end(tenant, expected=expected, seconds=seconds)


def race(threads: Threads, costs: dict[str, Sequence[float]], jobs: int) -> list[Counter[str]]:
    """All tenants have work all the time; the seconds served after each choice."""
    for tenant in costs:
        threads.share.arrive(tenant)
    history = []
    for _ in range(jobs):
        while not threads.free:
            threads.next_end()
        tenant = threads.share.order(costs)[0]
        threads.start(tenant, costs[tenant][threads.began[tenant] % len(costs[tenant])])
        history.append(threads.served.copy())
    return history


@given(
    st.integers(1, 8),
    st.lists(st.lists(SECONDS, min_size=1, max_size=5), min_size=2, max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_nobody_who_always_has_work_gets_far_ahead_of_another(count: int, costs: list[list[float]]) -> None:
    named = {f"t{i}": each for i, each in enumerate(costs)}
    for served in race(Threads(count), named, jobs=300):
        got = [served[tenant] for tenant in named]
        assert max(got) - min(got) <= (2 * count + 1) * LONGEST


@given(st.integers(1, 8), st.lists(st.lists(SECONDS, min_size=1, max_size=5), min_size=2, max_size=5))
@settings(max_examples=100, deadline=None)
def test_nobody_waits_for_ever(count: int, costs: list[list[float]]) -> None:
    """Between two jobs of a tenant the others are served no more than the bound allows."""
    named = {f"t{i}": each for i, each in enumerate(costs)}
    at_last: Counter[str] = Counter()
    before: Counter[str] = Counter()
    for served in race(Threads(count), named, jobs=300):
        for tenant in named:
            if served[tenant] != before[tenant]:
                at_last[tenant] = sum(served.values())
            assert sum(served.values()) - at_last[tenant] <= len(named) * (4 * count + 2) * LONGEST
        before = served


@given(st.sets(st.text(max_size=3)), st.lists(st.tuples(st.text(max_size=3), SECONDS), max_size=20))
def test_the_order_is_of_exactly_those_that_were_asked_for(tenants: set[str], past: list[tuple[str, float]]) -> None:
    """So no thread is idle while anybody has work."""
    share = FairShare()
    for tenant, seconds in past:
        share.arrive(tenant)
        share.end(tenant, expected=share.begin(tenant), seconds=seconds)
    assert sorted(share.order(tenants)) == sorted(tenants)


def test_a_slow_run_and_a_fast_one_get_equal_time_and_not_equal_turns() -> None:
    threads = Threads(4)
    race(threads, {"slow": [1.0], "fast": [0.01]}, jobs=5_000)
    assert threads.began["fast"] > 50 * threads.began["slow"]
    assert abs(threads.served["slow"] - threads.served["fast"]) < 10


def test_ten_times_the_tenants_of_another_kind_leave_each_its_share() -> None:
    threads = Threads(4)
    race(threads, {f"t{i}": [0.5, 1.5] for i in range(11)}, jobs=1_100)
    assert max(threads.served.values()) - min(threads.served.values()) < 10


def test_who_had_no_work_has_saved_nothing_up() -> None:
    share = FairShare()
    share.arrive("busy")
    for _ in range(100):
        share.end("busy", expected=share.begin("busy"), seconds=1.0)
    share.arrive("late")
    turns = Counter[str]()
    for _ in range(20):
        tenant = share.order(["busy", "late"])[0]
        turns[tenant] += 1
        share.end(tenant, expected=share.begin(tenant), seconds=1.0)
    assert turns["busy"] >= 9


def test_a_tenant_is_charged_at_the_start_what_its_jobs_took_of_late() -> None:
    """Else it would take every thread before its first job ends."""
    share = FairShare()
    for tenant in ("slow", "fast"):
        share.arrive(tenant)
        share.end(tenant, expected=share.begin(tenant), seconds=10.0 if tenant == "slow" else 0.001)
    share.arrive("slow")
    turns = []
    for _ in range(8):
        turns.append(share.order(["slow", "fast"])[0])
        share.begin(turns[-1])
    assert turns.count("fast") >= 7


def test_those_that_have_ended_are_forgotten() -> None:
    share = FairShare()
    for tenant in ("a", "b"):
        share.arrive(tenant)
        share.end(tenant, expected=share.begin(tenant), seconds=5.0)
    share.keep({"b"})
    assert share.expects("a") < share.expects("b") == 5.0
    share.end("a", expected=1.0, seconds=2.0)  # a job that was still in service
    assert share.order(["b", "a"]) == ["a", "b"]
