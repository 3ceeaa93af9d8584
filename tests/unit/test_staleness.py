"""The staleness rules: by hand-computed cases, and by what they promise in a simulated world, which rules with a condition left out must break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contracts import staleness
from services.contracts.spec import KnobChange, Order, RunSpec, Staleness
from services.contracts.staleness import Floor, GroupView, capacity, floor_of, may_load, release, schedulable, take
from tests.unit import staleness_world
from tests.unit.staleness_world import BrokenPromise, LossyWorld, World

SEEDS = st.integers(0, 2**40)
NO_FLOOR = Floor(((0, 0),))


# -- what the rules promise -----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_every_window_is_kept_without_a_standstill_or_a_lost_group(seed: int) -> None:
    world = World(seed).run()
    assert len(world.trained) == world.versions * world.batch
    assert len({group.index for _, group in world.trained}) == len(world.trained), "no group is trained on twice"


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_the_same_holds_where_groups_are_given_up_and_replayed(seed: int) -> None:
    world = LossyWorld(seed).run()
    assert len(world.trained) == world.versions * world.batch


@settings(max_examples=80, deadline=None)
@given(SEEDS)
def test_an_exact_window_gives_every_token_exactly_that_lag(seed: int) -> None:
    world = World(seed, exact=True).run()
    for version, group in world.trained:
        assert {version - v for v in group.versions} == {min(world.min_lag, version)}, "lag k cannot exist before version k"


def test_the_world_has_everything_that_may_go_wrong() -> None:
    worlds = [LossyWorld(seed).run() for seed in range(40)]
    assert any(world.changes for world in worlds)
    assert {world.order for world in worlds} == set(Order)
    assert any(world.die for world in worlds)
    assert any(world.straggle for world in worlds)
    assert sum(world.gone() for world in worlds) > 0
    lags = {version - v for world in worlds for version, group in world.trained for v in group.versions}
    assert lags >= set(range(7))


# -- the rules with a condition left out ----------------------------------------------------------------------------------------------


def without_the_waiting_groups(*args: Any, min_lag: int, **rest: Any) -> bool:
    return may_load(*args, min_lag=0, **rest)


def unscheduled(rule: Callable[..., Any]) -> Callable[..., Any]:
    def mutant(*args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(staleness, "schedulable", lambda *_, **__: True)
            return rule(*args, **kwargs)

    return mutant


def one_batch_too_many(*, max_lag: int, batch: int, outstanding: int) -> int:
    return capacity(max_lag=max_lag, batch=batch, outstanding=outstanding) + batch


class JumpingFloor(Floor):
    def __call__(self, version: int) -> int:
        return next((target for at, target in reversed(self.changes) if at <= version), 0)


MUTANTS = {
    "may_load without the groups that must wait": ("may_load", without_the_waiting_groups),
    "may_load without a schedule": ("may_load", unscheduled(may_load)),
    "take without a schedule": ("take", unscheduled(take)),
    "a floor that jumps": ("Floor", JumpingFloor),
    "a batch more than the capacity": ("capacity", one_batch_too_many),
}


@pytest.mark.parametrize(("name", "mutant"), MUTANTS.values(), ids=MUTANTS)
def test_a_condition_left_out_breaks_the_promise(name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staleness_world, name, mutant)

    def run_worlds() -> None:
        for seed in range(500):
            World(seed).run()

    with pytest.raises(BrokenPromise):
        run_worlds()


# -- hand-computed cases --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "floors"),
    [
        (((0, 0),), [0, 0, 0, 0, 0, 0]),
        (((0, 2),), [0, 1, 2, 2, 2, 2]),  # lag 2 cannot exist before version 2
        (((0, 0), (2, 3)), [0, 0, 0, 1, 2, 3]),  # raised: one a version
        (((0, 3), (4, 1)), [0, 1, 2, 3, 1, 1]),  # lowered: at once
        (((0, 2), (3, 4)), [0, 1, 2, 2, 2, 2]),  # raised from 2: no higher before as many versions have passed since the change
        (((0, 1), (2, 3), (4, 0), (5, 2)), [0, 1, 1, 1, 0, 0]),
        (((0, 0), (1, 2), (1, 0)), [0, 0, 0, 0, 0, 0]),  # turned back within the version
    ],
)
def test_floor(changes: tuple[tuple[int, int], ...], floors: list[int]) -> None:
    assert [Floor(changes)(version) for version in range(6)] == floors


def test_the_floor_of_a_run_follows_its_knobs() -> None:
    spec = RunSpec(staleness=Staleness(min_lag=1, max_lag=3))
    turned = [
        KnobChange(version=4, values={"learning_rate": 0.1}),
        KnobChange(version=5, values={"staleness.min_lag": 0, "staleness.max_lag": 2}),
    ]
    assert floor_of(spec, turned) == Floor(((0, 1), (5, 0)))


@pytest.mark.parametrize(
    ("max_lag", "outstanding", "admitted"), [(0, 0, 4), (0, 4, 0), (2, 0, 12), (2, 7, 5), (1, 20, 0)]
)  # fmt: skip
def test_capacity_of_batches_of_4(max_lag: int, outstanding: int, admitted: int) -> None:
    assert capacity(max_lag=max_lag, batch=4, outstanding=outstanding) == admitted


@pytest.mark.parametrize(
    ("newest", "floor", "first", "version"),
    [
        (3, lambda v: 0, 3, 3),
        (3, lambda v: 0, 5, 5),  # not before `first`
        (5, lambda v: 0, 3, 5),  # tokens of a version that is still being loaded
        (3, lambda v: 2, 3, 5),
        (0, Floor(((0, 2),)), 0, 0),  # at version 0 the floor is still 0
        (1, Floor(((0, 2),)), 1, 3),  # 1 - 1 < 1, 2 - 2 < 1, 3 - 2 = 1
    ],
)
def test_release(newest: int, floor: Callable[[int], int], first: int, version: int) -> None:
    assert release(newest, floor, first) == version


@pytest.mark.parametrize(
    ("windows", "batch", "possible"),
    [
        ([], 1, True),
        ([(0, 0), (0, 0)], 1, False),  # two that are both due at once
        ([(0, 0), (0, 0)], 2, True),
        ([(0, 1), (0, 0)], 1, True),  # the earlier deadline first
        ([(0, 2), (0, 2), (0, 2)], 1, True),
        ([(0, 2), (0, 2), (0, 2), (0, 2)], 1, False),
        ([(2, 2), (0, 2), (0, 2)], 1, True),
        ([(2, 2), (0, 2), (2, 2)], 1, False),
        ([(5, 5), (0, 0)], 1, True),  # a gap with nothing to do
        ([(1, 0)], 1, False),  # released after its deadline
    ],
)
def test_schedulable(windows: list[tuple[int, int]], batch: int, possible: bool) -> None:
    assert schedulable(windows, batch=batch, first=0) is possible


def test_deadlines_before_the_first_version_cannot_be_met() -> None:
    assert schedulable([(0, 3)], batch=1, first=3)
    assert not schedulable([(0, 3)], batch=1, first=4)


def queued(index: int, max_lag: int) -> GroupView:
    return GroupView(index, max_lag=max_lag)


def running(index: int, max_lag: int, start: int) -> GroupView:
    return GroupView(index, max_lag=max_lag, start=start)


def done(index: int, max_lag: int, start: int, newest: int | None = None) -> GroupView:
    return GroupView(index, max_lag=max_lag, start=start, newest=start if newest is None else newest)


@pytest.mark.parametrize(
    ("groups", "version", "batch", "floor", "order", "taken"),
    [
        ([done(0, 0, 0), running(1, 0, 0)], 0, 2, 0, Order.READY, None),  # not enough are finished
        ([done(0, 0, 0), done(1, 0, 0)], 0, 2, 0, Order.READY, [0, 1]),
        ([done(0, 3, 2), done(1, 3, 1), done(2, 3, 2)], 2, 2, 0, Order.READY, [1, 0]),  # the earliest deadline first, then the lowest index
        ([done(0, 2, 3), done(1, 2, 1, 2)], 3, 1, 1, Order.READY, [1]),  # group 0 is younger than the floor allows
        ([done(0, 2, 3), running(1, 2, 1)], 3, 1, 1, Order.READY, None),
        ([done(0, 2, 2), running(1, 0, 2)], 2, 1, 0, Order.READY, None),  # group 1 is due now: taking 0 would miss its deadline
        ([done(0, 2, 2), running(1, 1, 2)], 2, 1, 0, Order.READY, [0]),
        ([running(0, 2, 0), done(1, 2, 0)], 0, 1, 0, Order.READY, [1]),
        ([running(0, 2, 0), done(1, 2, 0)], 0, 1, 0, Order.FIFO, None),  # nobody overtakes
        ([done(1, 2, 0), done(0, 2, 0)], 0, 1, 0, Order.FIFO, [0]),
        ([done(0, 2, 0)], 0, 2, 0, Order.FIFO, None),  # a batch is never short
        ([done(0, 3, 1), done(1, 0, 1)], 1, 1, 0, Order.FIFO, [1]),  # issue order would miss a deadline: the earliest deadline goes first
    ],
)
def test_take(groups: list[GroupView], version: int, batch: int, floor: int, order: Order, taken: list[int] | None) -> None:
    assert take(groups, version=version, batch=batch, floor=lambda _: floor, order=order) == taken


@pytest.mark.parametrize(
    ("groups", "loading", "batch", "min_lag", "order", "may"),
    [
        ([], 1, 4, 0, Order.READY, True),
        ([running(0, 0, 0)], 1, 1, 0, Order.READY, False),  # {0,0}: a group started under 0 may be trained on at 0 only
        ([queued(0, 0)], 1, 1, 0, Order.READY, False),  # and one that nobody has started may start under 0 in this moment
        ([running(0, 1, 0)], 1, 1, 0, Order.READY, True),
        ([running(0, 1, 0), running(1, 1, 0)], 1, 1, 0, Order.READY, False),  # both are due at 1
        ([running(0, 1, 0), running(1, 2, 0)], 1, 1, 0, Order.READY, True),
        ([done(0, 2, 0), running(1, 2, 0)], 1, 1, 1, Order.READY, True),
        ([running(0, 2, 0), running(1, 2, 0)], 1, 1, 1, Order.READY, False),  # nothing that could be trained on at version 1 with a lag of 1
        ([running(0, 3, 0), done(1, 3, 0)], 1, 1, 1, Order.READY, True),
        ([running(0, 3, 0), done(1, 3, 0)], 1, 1, 1, Order.FIFO, False),  # it is the wrong one that is finished
        ([done(0, 3, 0), running(1, 3, 0)], 1, 1, 1, Order.FIFO, True),
    ],
)
def test_may_load(groups: list[GroupView], loading: int, batch: int, min_lag: int, order: Order, may: bool) -> None:
    floor = Floor(((0, min_lag),))
    assert may_load(groups, loading=loading, batch=batch, min_lag=min_lag, floor=floor, order=order) is may


def test_synchronous_training_is_the_window_0_0() -> None:
    """All of a batch is finished and taken, then the next version is loaded, then the next batch is issued."""
    assert capacity(max_lag=0, batch=2, outstanding=2) == 0
    batch = [done(0, 0, 0), done(1, 0, 0)]
    assert not may_load(batch, loading=1, batch=2, min_lag=0, floor=NO_FLOOR, order=Order.READY)
    assert take(batch, version=0, batch=2, floor=NO_FLOOR, order=Order.READY) == [0, 1]
    assert may_load([], loading=1, batch=2, min_lag=0, floor=NO_FLOOR, order=Order.READY)
