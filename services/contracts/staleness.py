"""Staleness: when a group may be issued, trained on, and when new weights may be loaded, so that every trained token keeps its window.

Versions are counted by publication. A group is trained on in the step that starts at version v; the lag of each of its tokens is v minus the
version that sampled it. Nothing is dropped: the rules keep, at every moment, a schedule in which each outstanding group meets its window.

    capacity    groups that may be issued at v:  (max_lag + 1) * B - outstanding
    floor(v)    the least lag in force: lag k cannot exist before version k, so a raised bound is reached by one a version, a lowered one at once
    window      a group may be trained on from its release, the first v with v - floor(v) >= its newest token's version, to its deadline,
                its oldest token's version + the max_lag under which it was issued
    take        at v, the B finished groups with the earliest deadlines among the released, if what is left stays schedulable from v + 1
                (fifo: the next B in issue order)
    may_load    servers may load u when min_lag * B groups are finished (fifo: the next ones in issue order), and all outstanding groups
                stay schedulable with those being generated carrying tokens of u

All functions are pure. What is not known yet is taken at its worst: a group that nobody has started may start under the current version and end
under the one being loaded. That costs no progress, since servers go on generating while a load waits.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from services.contracts.spec import KnobChange, Order, RunSpec

Window = tuple[int, int]
"""Release and deadline: the first and the last version at which a group may be trained on."""


@dataclass(frozen=True)
class GroupView:
    """What the rules need to know of an outstanding group."""

    index: int
    """Place in issue order."""
    max_lag: int
    """Upper bound under which it was issued."""
    start: int | None = None
    """Version of its oldest token; None while nobody has started it."""
    newest: int | None = None
    """Version of its newest token; None until it is finished."""

    @property
    def finished(self) -> bool:
        return self.newest is not None


@dataclass(frozen=True)
class Floor:
    """Least lag in force at each version, from the history of `min_lag`: (version of the change, new value), oldest first."""

    changes: tuple[tuple[int, int], ...]

    def __call__(self, version: int) -> int:
        floor = 0
        for i, (at, target) in enumerate(self.changes):
            if at > version:
                break
            before = floor
            until = min(version, self.changes[i + 1][0]) if i + 1 < len(self.changes) else version
            floor = min(target, max(before, until - at))
        return floor


def floor_of(spec: RunSpec, changes: Sequence[KnobChange]) -> Floor:
    """The floor of a run, from its spec and the changes of its knobs."""
    history = [(0, spec.staleness.min_lag)]
    history += [(c.version, int(str(c.values["staleness.min_lag"]))) for c in changes if "staleness.min_lag" in c.values]
    return Floor(tuple(history))


def capacity(*, max_lag: int, batch: int, outstanding: int) -> int:
    """Groups that may be issued now."""
    return max(0, (max_lag + 1) * batch - outstanding)


def release(newest: int, floor: Callable[[int], int], first: int) -> int:
    """First version from `first` on at which tokens of version `newest` have the lag that the floor asks for."""
    version = max(first, newest)
    while version - floor(version) < newest:
        version += 1
    return version


def schedulable(windows: Iterable[Window], *, batch: int, first: int) -> bool:
    """Can groups with these windows all be trained on in time, `batch` a version from `first` on? Earliest deadline first finds a way, if any."""
    pending = sorted(windows)
    heap: list[int] = []
    i, version = 0, first
    while i < len(pending) or heap:
        if not heap:
            version = max(version, pending[i][0])
        while i < len(pending) and pending[i][0] <= version:
            heapq.heappush(heap, pending[i][1])
            i += 1
        for _ in range(min(batch, len(heap))):
            if heapq.heappop(heap) < version:
                return False
        version += 1
    return True


def window(group: GroupView, *, version: int, newest: int, floor: Callable[[int], int], first: int) -> Window:
    """Window of `group` as far as known at `version`, counted from `first` on; `newest` is the newest version that an unfinished one may carry."""
    start = group.start if group.start is not None else version
    return release(group.newest if group.newest is not None else newest, floor, first), start + group.max_lag


def take(groups: Sequence[GroupView], *, version: int, batch: int, floor: Callable[[int], int], order: Order) -> list[int] | None:
    """Indices of the groups to train on at `version`, of all that are `outstanding`; None while there is no batch that keeps the rest schedulable."""

    def at(group: GroupView, first: int) -> Window:
        return window(group, version=version, newest=version, floor=floor, first=first)

    in_order = sorted(groups, key=lambda g: g.index)
    if order is Order.FIFO and _fifo_holds(in_order, version=version, batch=batch, floor=floor):
        head = in_order[:batch]
        return [g.index for g in head] if len(head) == batch and all(g.finished for g in head) else None
    released = [g for g in in_order if g.finished and at(g, version)[0] <= version]
    if len(released) < batch:
        return None
    chosen = sorted(released, key=lambda g: (at(g, version)[1], g.index))[:batch]
    taken = {g.index for g in chosen}
    left = [at(g, version + 1) for g in groups if g.index not in taken]
    return [g.index for g in chosen] if schedulable(left, batch=batch, first=version + 1) else None


def may_load(groups: Sequence[GroupView], *, loading: int, batch: int, min_lag: int, floor: Callable[[int], int], order: Order) -> bool:
    """May rollout servers load version `loading`, given the groups still outstanding after the batch that made it?"""
    need = min_lag * batch
    next_ones = sorted(groups, key=lambda g: g.index)[:need] if order is Order.FIFO else groups
    waiting = sum(g.finished for g in next_ones) >= need
    windows = [window(g, version=loading - 1, newest=loading, floor=floor, first=loading) for g in groups]
    return waiting and schedulable(windows, batch=batch, first=loading)


def _fifo_holds(in_order: Sequence[GroupView], *, version: int, batch: int, floor: Callable[[int], int]) -> bool:
    """Does every group meet its window when batches are taken in issue order?

    Not so for some versions after `order` was changed: till then the earliest deadlines go first.
    """
    for place, group in enumerate(in_order):
        slot = version + place // batch
        first, last = window(group, version=version, newest=version, floor=floor, first=version)
        if not first <= slot <= last:
            return False
    return True
