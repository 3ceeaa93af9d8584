"""Dynamic sampling in the trainer's feed: which groups go, how many, and that a trainer which starts again goes on with it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from services.contracts.messages import ScoredGroup
from services.contracts.spec import RunSpec
from services.contracts.staleness import Floor
from services.runtime.bus import Entry
from services.runtime.codec import encode
from services.runtime.ledger import Plan
from services.runtime.metrics import TrainerMetrics
from tests.unit.sample_messages import completed, prompt_group, scored
from trainer.feed import Feed
from trainer.session import Session

EQUAL, DIFFERENT = (1.0, 1.0), (1.0, 0.0)


class FakeLedger:
    """A ledger that lets every group go but those that are in a batch."""

    run_id = "r"

    def __init__(self, plans: dict[int, Plan] | None = None) -> None:
        self._plans, self.skipped = plans or {}, list[int]()

    def plans(self) -> dict[int, Plan]:
        return self._plans

    def skip(self, index: int, entry_id: str, *, trainer: str) -> bool:
        if any(index in plan.indices for plan in self._plans.values()):
            return False
        self.skipped.append(index)
        return True


class FakeBus:
    """A stream of scored groups, each given once."""

    def __init__(self) -> None:
        self.waiting: list[Entry] = []

    def put(self, index: int, rewards: Sequence[float], *, version: int = 0) -> None:
        group: ScoredGroup = scored(completed(prompt_group(index), versions=(version,) * 3), rewards)
        self.waiting.append(Entry("offbeat:run:{r}:scored", f"{index}-0", {b"seq": b"%d" % index, b"index": b"%d" % index, b"data": encode(group)}))

    def claim(self, *_: Any, **__: Any) -> list[Entry]:
        given, self.waiting = self.waiting, []
        return given

    def own(self, *_: Any, **__: Any) -> list[Entry]:
        return []


def feed_of(bus: FakeBus, ledger: FakeLedger) -> Feed:
    return Feed(bus, ledger, trainer="t", metrics=TrainerMetrics(CollectorRegistry()))  # type: ignore[arg-type]


def spec_of(*, min_lag: int = 0, limit: int = 10, **changes: Any) -> RunSpec:
    shaping = {"skip_zero_signal": True, "skip_limit": limit} | changes
    return RunSpec.model_validate({"batch_groups": 2, "group_size": 2, "staleness": {"min_lag": min_lag, "max_lag": 2}, "shaping": shaping})


@pytest.mark.parametrize("late", [False, True])
def test_groups_without_signal_go_and_are_counted_whether_they_came_before_or_after(late: bool) -> None:
    bus, ledger = FakeBus(), FakeLedger()
    feed = feed_of(bus, ledger)
    for index, rewards in enumerate((EQUAL, DIFFERENT, EQUAL, (0.0, 0.0))):
        bus.put(index, rewards)
    if not late:
        feed.pull(block_ms=None)
    feed.admit(spec_of(), 0)
    feed.pull(block_ms=None)
    assert ledger.skipped == [0, 2, 3]
    assert feed.skipped.as_values() == {"skipped_groups": 3.0, "skipped_reward_mean": pytest.approx(2 / 3), "skipped_tokens": 3 * 2 * 3.0}


def test_without_it_none_goes() -> None:
    bus, ledger = FakeBus(), FakeLedger()
    feed = feed_of(bus, ledger)
    feed.admit(spec_of(skip_zero_signal=False), 0)
    bus.put(0, EQUAL)
    feed.pull(block_ms=None)
    assert ledger.skipped == []
    assert feed.skipped.as_values() == {}


def test_past_the_limit_groups_are_trained_on_as_they_are_until_the_next_version() -> None:
    bus, ledger = FakeBus(), FakeLedger()
    feed = feed_of(bus, ledger)
    feed.admit(spec_of(limit=1), 0)
    for index in range(5):
        bus.put(index, EQUAL)
    feed.pull(block_ms=None)
    assert ledger.skipped == [0, 1], "one batch's worth of two groups"
    feed.admit(spec_of(limit=1), 1)
    assert ledger.skipped == [0, 1, 2, 3]


def test_where_a_least_lag_is_asked_for_only_groups_of_the_version_held_go() -> None:
    bus, ledger = FakeBus(), FakeLedger()
    feed = feed_of(bus, ledger)
    feed.admit(spec_of(min_lag=1), 3)
    bus.put(0, EQUAL, version=2)
    bus.put(1, EQUAL, version=3)
    feed.pull(block_ms=None)
    assert ledger.skipped == [1], "no other group of version 2 could be made in its place"


def test_a_trainer_that_starts_again_on_a_planned_batch_skips_what_comes_in_meanwhile() -> None:
    """Else a group that the trainer before would have let go is trained on, and with an exact window the run is another one."""
    bus, ledger = FakeBus(), FakeLedger({3: Plan(indices=(0, 1), entry_ids=("0-0", "1-0"))})
    session = Session.__new__(Session)
    session.feed = feed_of(bus, ledger)
    session.control = SimpleNamespace(prompts=9)  # type: ignore[assignment]
    session.floor_at = lambda version: Floor(((0, 1),))  # type: ignore[method-assign]
    bus.put(0, EQUAL, version=2)
    bus.put(1, DIFFERENT, version=2)
    batch = session.next_batch(3, spec_of(min_lag=1))
    assert batch.plan.indices == (0, 1)
    bus.put(2, EQUAL, version=3)
    session.feed.pull(block_ms=None)
    assert ledger.skipped == [2], "and what is planned stays"
