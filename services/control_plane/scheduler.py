"""The scheduler: gives queued runs a trainer and rollout servers, takes them back, and notices trainers that are gone.

    consumes    run states, heartbeats
    produces    assignments
    waits for   a free trainer and a free rollout server
    unblocked by a run that ends or is paused, a process that joins

`plan` decides, as a pure function of the runs and the fleet; `Scheduler` applies what it says. Every step of that may be the last before a crash: the
next tick finds what is missing and does it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.contracts.messages import Member, Role, Severity
from services.contracts.states import ON_FLEET, TERMINAL, WANTS_TRAINER, Action, IllegalMove, RunState
from services.control_plane.store import Run, RunStore
from services.runtime.bus import StoreAway
from services.runtime.fleet import BEAT_SECONDS, Fleet
from services.runtime.ledger import Ledger
from services.runtime.metrics import ControlPlaneMetrics

log = logging.getLogger(__name__)

TICK_SECONDS = 0.2
SETTLE_SECONDS = 3 * BEAT_SECONDS
"""After Redis was away nobody is declared dead for so long: heartbeats have expired meanwhile and need a moment to come again."""
KEEPS_SERVERS = WANTS_TRAINER
"""States in which a run keeps the rollout servers that it has: one whose trainer was lost goes on with them."""


@dataclass(frozen=True)
class Plan:
    """What is to be done, in this order."""

    lost: tuple[str, ...] = ()
    """Runs whose trainer is gone."""
    release: tuple[str, ...] = ()
    """Members to be taken off their run."""
    starts: tuple[tuple[str, str], ...] = ()
    """Runs with the trainer that each gets."""
    assign: tuple[tuple[str, str], ...] = ()
    """Members with the run that each is to work for."""


def plan(runs: Sequence[Run], members: Sequence[Member], assigned: Mapping[str, str], *, settled: bool = True) -> Plan:
    """Who is to work for which run.

    `runs` are oldest first, `assigned` is run id by member id, and `settled` says whether absence may be taken for death.
    Queued runs are served in order of age; a replay needs a trainer and no server. Each other one that gets a trainer starts with its share of the
    free rollout servers; later ones go to the run on the fleet with the fewest. A trainer that takes one run only is given no other, and that run
    takes it before one that takes any.
    """
    alive = {member.member_id: member for member in members}
    by_id = {run.run_id: run for run in runs}
    lost = tuple(r.run_id for r in runs if r.state in ON_FLEET and r.trainer not in alive) if settled else ()

    def stays(member_id: str, run_id: str) -> bool:
        run, member = by_id.get(run_id), alive.get(member_id)
        if run is None:
            return False
        if member is not None and member.role is Role.TRAINER:
            return run.state in ON_FLEET and run.trainer == member_id
        return run.state in KEEPS_SERVERS

    release = tuple(sorted(member_id for member_id, run_id in assigned.items() if not stays(member_id, run_id)))
    kept = {member_id: run_id for member_id, run_id in assigned.items() if member_id not in release}
    assign: dict[str, str] = {}
    for run in runs:  # an assignment that was never made, or was forgotten while Redis was away
        if run.state in ON_FLEET and run.trainer in alive and kept.get(run.trainer) != run.run_id:
            assign[run.trainer] = run.run_id
    for member in members:
        if member.role is Role.ROLLOUT and member.member_id not in assigned and member.run_id in by_id and stays(member.member_id, member.run_id):
            assign[member.member_id] = member.run_id
    taken = kept | assign

    free = [m for m in members if m.member_id not in taken and m.member_id not in release and m.run_id is None]
    trainers = [m for m in free if m.role is Role.TRAINER and m.ready]
    servers = [m.member_id for m in free if m.role is Role.ROLLOUT]
    has = Counter(run_id for member_id, run_id in taken.items() if member_id in alive and alive[member_id].role is Role.ROLLOUT)
    letting_go = {m.run_id for m in members if m.role is Role.TRAINER}  # two trainers must never hold one run
    starts: list[tuple[str, str]] = []
    on_fleet = [r.run_id for r in runs if r.state in ON_FLEET and r.run_id not in lost and r.generates]
    unserved = len(servers) - sum(not has[run_id] for run_id in on_fleet)
    for run in runs:
        fit = sorted((m for m in trainers if m.only_run in (None, run.run_id)), key=lambda m: m.only_run is None)
        if run.state is not RunState.QUEUED or run.run_id in letting_go or not fit:
            continue
        if run.generates and not has[run.run_id]:
            if unserved < 1:
                continue
            unserved -= 1
        starts.append((run.run_id, fit[0].member_id))
        trainers.remove(fit[0])
    going = on_fleet + [run_id for run_id, _ in starts if by_id[run_id].generates]
    for server in servers if going else ():
        run_id = min(going, key=lambda r: has[r])  # of equals the one that runs already, or else the oldest
        assign[server] = run_id
        has[run_id] += 1
    assign |= {trainer: run_id for run_id, trainer in starts}
    return Plan(lost=lost, release=tuple(m for m in release if m not in assign), starts=tuple(starts), assign=tuple(sorted(assign.items())))


@dataclass
class Scheduler:
    """Applies `plan` again and again. One thread calls `tick`."""

    store: RunStore
    fleet: Fleet
    metrics: ControlPlaneMetrics
    settle: float = SETTLE_SECONDS
    _steady_since: float = field(default_factory=time.monotonic)
    _last_tick: float = field(default_factory=time.monotonic)
    _known: dict[str, dict[str, float]] = field(default_factory=dict)
    """By run: its members with the time at which each process started, as seen by the last tick."""

    def tick(self) -> float:
        """Look at runs and fleet once, and do what follows; seconds to wait before the next tick."""
        away = self.store.bus.away_seconds
        try:
            runs, members, assigned = self.store.open_runs(), self.fleet.members(), self.fleet.assignments()
        except StoreAway:
            self._steady_since = time.monotonic()
            raise
        now = time.monotonic()
        if self.store.bus.away_seconds > away or now - self._last_tick > self.settle:  # Redis was away, or this thread was asleep
            self._steady_since = now
        self._last_tick = now
        self._measure(runs, members)
        settled = now - self._steady_since >= self.settle
        if settled:
            self._tell(runs, members, assigned)
        self._apply(plan(runs, members, assigned, settled=settled), {run.run_id: run for run in runs})
        for run in runs:
            if run.state in TERMINAL:
                Ledger(self.store.bus, run.run_id).close()
                self.store.deactivate(run.run_id)
        return TICK_SECONDS

    def _apply(self, todo: Plan, runs: Mapping[str, Run]) -> None:
        for run_id in todo.lost:
            self._move(run_id, Action.LOSE_TRAINER, f"{runs[run_id].trainer} gives no sign of life")
        for member_id in todo.release:
            self.fleet.release(member_id)
        refused = set()
        for run_id, trainer in todo.starts:
            self.store.activate(run_id)
            servers = [m for m, r in todo.assign if r == run_id and m != trainer]
            if not self._move(run_id, Action.ASSIGN, f"trainer {trainer}, rollout servers {', '.join(servers) or 'as before'}", trainer=trainer):
                refused.add(run_id)
        for member_id, run_id in todo.assign:
            if run_id not in refused:
                self.fleet.assign(member_id, run_id)

    def _move(self, run_id: str, action: Action, reason: str, *, trainer: str | None = None) -> bool:
        """False when the run has moved on since it was looked at: the next tick sees how."""
        try:
            self.store.lifecycle(run_id).move(action, reason, trainer=trainer)
        except IllegalMove as error:
            log.info("the run has moved on", extra={"run": run_id, "error": str(error)})
            return False
        return True

    def _tell(self, runs: Sequence[Run], members: Sequence[Member], assigned: Mapping[str, str]) -> None:
        """Events for servers that joined a run or were lost to it, and for a trainer that was started again under its name."""
        alive = {member.member_id: member for member in members}
        now_known: dict[str, dict[str, float]] = {}
        for run in runs:
            if run.state not in KEEPS_SERVERS:
                continue
            here = {m: alive[m].started_at for m, run_id in assigned.items() if run_id == run.run_id and m in alive}
            now_known[run.run_id] = here
            before = self._known.get(run.run_id)
            if not before:  # its first fleet is told with its assignment; after a start of the control plane nothing is news
                continue
            lifecycle = self.store.lifecycle(run.run_id)
            for member_id, started_at in before.items():
                if member_id not in alive and member_id != run.trainer:
                    lifecycle.event("server_lost", f"Rollout server {member_id} gives no sign of life", Severity.WARNING, run.version)
                elif here.get(member_id, started_at) != started_at:
                    event = "trainer_restarted" if alive[member_id].role is Role.TRAINER else "server_restarted"
                    lifecycle.event(event, f"{member_id} was started again", Severity.WARNING, run.version)
            for member_id in here.keys() - before.keys():
                if alive[member_id].role is Role.ROLLOUT:
                    lifecycle.event("server_joined", f"Rollout server {member_id} joined", version=run.version)
        self._known = now_known

    def _measure(self, runs: Sequence[Run], members: Sequence[Member]) -> None:
        states = Counter(run.state for run in runs)
        for state in RunState:
            if state not in TERMINAL:
                self.metrics.runs.labels(state.value).set(states[state])
        roles = Counter(member.role for member in members)
        for role in Role:
            self.metrics.members.labels(role.value).set(roles[role])
        going = [run for run in runs if run.state in ON_FLEET]
        self.metrics.info.show((), {_info(run): 1.0 for run in going})
        for gauge in (self.metrics.evaluation, self.metrics.evaluation_version):
            gauge.keep({run.run_id for run in going})


def _info(run: Run) -> tuple[str, ...]:
    """The labels of `offbeat_run_info`; study and arm are empty for a run of no study."""
    labels = run.spec.labels
    return run.run_id, run.name, labels.get("study", ""), labels.get("arm", ""), str(run.spec.seed)
