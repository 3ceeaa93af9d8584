"""A world in which the staleness rules are driven: servers, stragglers, deaths, scoring delays, and live changes of the window, in simulated time."""

import random
from dataclasses import dataclass, field

from services.contracts.spec import Order
from services.contracts.staleness import Floor, GroupView, capacity, may_load, take


class BrokenPromise(AssertionError):
    """A window was broken, a deadline missed, a group lost, or the run stands still."""


@dataclass
class SimulatedGroup:
    index: int
    work: float
    max_lag: int
    versions: list[int] = field(default_factory=list)
    """Versions that sampled its tokens, in order."""
    ends: float = 0.0
    visible: float | None = None
    """When its score reaches the trainer."""


@dataclass
class World:
    seed: int
    versions: int = 40
    exact: bool = False
    """Always {k,k}, no deaths, no changes."""

    def __post_init__(self) -> None:
        self.rnd = r = random.Random(self.seed)
        self.min_lag = r.randint(0, 4)
        self.max_lag = self.min_lag + (0 if self.exact else r.randint(0, 4))
        self.order = r.choice(list(Order))
        self.batch, self.servers = r.randint(1, 6), r.randint(1, 8)
        self.straggle, self.die = r.choice([0, 0.05, 0.15]), 0 if self.exact else r.choice([0, 0.05])
        self.train_time, self.score_time = r.uniform(0.1, 6), r.choice([0, 0.3, 2])
        self.changes = set() if self.exact else set(r.sample(range(1, 35), r.choice([0, 0, 1, 3, 6])))
        self.floor = Floor(((0, self.min_lag),))
        self.queued: list[SimulatedGroup] = []
        self.running: list[SimulatedGroup] = []
        self.scoring: list[SimulatedGroup] = []
        self.trained: list[tuple[int, SimulatedGroup]] = []
        self.version, self.now, self.issued = 0, 0.0, 0

    def outstanding(self) -> list[SimulatedGroup]:
        return self.queued + self.running + self.scoring

    def view(self, group: SimulatedGroup) -> GroupView:
        seen = group.visible is not None and group.visible <= self.now
        return GroupView(
            index=group.index,
            max_lag=group.max_lag,
            start=group.versions[0] if group.versions else None,
            newest=group.versions[-1] if seen else None,
        )

    def views(self) -> list[GroupView]:
        return [self.view(g) for g in self.outstanding()]

    def issue(self) -> None:
        for _ in range(capacity(max_lag=self.max_lag, batch=self.batch, outstanding=len(self.outstanding()))):
            self.issue_new()

    def issue_new(self) -> None:
        work = self.rnd.expovariate(1) * (10 if self.rnd.random() < self.straggle else 1) + 0.01
        self.queued.append(SimulatedGroup(self.issued, work, self.max_lag))
        self.issued += 1

    def start(self) -> None:
        while self.queued and len(self.running) < self.servers:
            group = self.queued.pop(0)
            group.versions, group.ends = [self.version], self.now + group.work
            self.running.append(group)

    def finish(self) -> None:
        for group in [g for g in self.running if g.ends <= self.now]:
            self.running.remove(group)
            if self.rnd.random() < self.die:  # its server died: somebody else starts it again
                group.versions = []
                self.queued.insert(0, group)
            else:
                group.visible = self.now + self.score_time * self.rnd.random()
                self.scoring.append(group)

    def gone(self) -> int:
        """Groups that were given up and not issued again."""
        return 0

    def train(self, indices: list[int]) -> None:
        for group in [g for g in self.scoring if g.index in indices]:
            lags = [self.version - v for v in group.versions]
            if min(lags) < self.floor(self.version) or max(lags) > group.max_lag:
                raise BrokenPromise(f"lags {lags} outside the window at version {self.version}")
            self.scoring.remove(group)
            self.trained.append((self.version, group))

    def change_window(self) -> None:
        self.min_lag = self.rnd.randint(0, 4)
        self.max_lag = self.min_lag + self.rnd.randint(0, 4)
        self.order = self.rnd.choice(list(Order))
        self.floor = Floor((*self.floor.changes, (self.version, self.min_lag)))

    def run(self) -> "World":
        state, trained_at = "wait", 0.0
        self.issue()
        self.start()
        while self.version < self.versions:
            if state == "wait":
                chosen = take(self.views(), version=self.version, batch=self.batch, floor=self.floor, order=self.order)
                if chosen is not None:
                    if len(set(chosen)) != self.batch:
                        raise BrokenPromise(f"{len(chosen)} groups in a batch of {self.batch}")
                    self.train(chosen)
                    state, trained_at = "train", self.now + self.train_time * self.rnd.uniform(0.5, 1.5)
                    continue
            if state == "publish" and may_load(
                self.views(), loading=self.version + 1, batch=self.batch, min_lag=self.min_lag, floor=self.floor, order=self.order
            ):
                self.version, state = self.version + 1, "wait"
                for group in self.running:
                    group.versions.append(self.version)
                if self.version in self.changes:
                    self.change_window()
                self.issue()
                self.start()
                continue
            times = [g.ends for g in self.running] + [g.visible for g in self.scoring if g.visible is not None and g.visible > self.now]
            if state == "train":
                times.append(trained_at)
            if not times:
                raise BrokenPromise(f"deadlock in state {state} at version {self.version}")
            self.now = min(times)
            if state == "train" and self.now >= trained_at:
                state = "publish"
            self.finish()
            self.start()
        if self.issued != len(self.trained) + len(self.outstanding()) + self.gone():
            raise BrokenPromise("a group was lost")
        return self


class LossyWorld(World):
    """Groups are given up too, others are issued in their place at once, in the middle of a version, and some are replayed under their old index."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lose = self.rnd.choice([0.02, 0.1, 0.3])
        self.letters: list[SimulatedGroup] = []

    def issue(self) -> None:
        in_step = sum(version == self.version for version, _ in self.trained)
        for _ in range(capacity(max_lag=self.max_lag, batch=self.batch, outstanding=len(self.outstanding()) + in_step)):
            if self.letters and self.rnd.random() < 0.5:
                again = self.letters.pop(0)
                self.queued.append(SimulatedGroup(again.index, again.work, self.max_lag))
            else:
                self.issue_new()

    def finish(self) -> None:
        for group in [g for g in self.running if g.ends <= self.now]:
            if self.rnd.random() < self.lose:
                self.running.remove(group)
                self.letters.append(group)
        super().finish()
        self.issue()

    def gone(self) -> int:
        return len(self.letters)
