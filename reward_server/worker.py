"""The reward worker: turns completions of every active run into rewards.

    consumes    completions of all active runs, and entries that a dead server held
    produces    scored
    waits for   completions, room among the threads
    unblocked by rollout servers, completions that are done

A group's completions are judged side by side; the last one publishes the group. Taken is no more than keeps the threads busy, and one group of each
run that has none in hand, so that there always is a choice among runs. `FairShare` makes it, here among streams and in the threads among completions.
An evaluation set counts to its run, and goes before that run's training groups.

A group in which a verifier failed is tried again, elsewhere where there is another server, and dead-lettered after `max_attempts` tries: a failure is
never a reward of 0.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from functools import partial

from reward_server.rubric import Rubric
from reward_server.scoring import Scoring
from services.contracts.messages import CompletionGroup, Role, Score, ScoredGroup
from services.contracts.spec import RunSpec
from services.contracts.topics import ACTIVE, Work, parent_of, run_of
from services.runtime.bus import Bus, Entry
from services.runtime.codec import Undecodable
from services.runtime.fleet import Fleet
from services.runtime.ledger import Ledger, NotOurs
from services.runtime.process import IdleClock, Shutdown

log = logging.getLogger(__name__)

CLAIM_MS = 200
BUSY_CLAIM_MS = 20
"""The same while completions are being judged: a run that was left out of the claim may meanwhile be let in."""
HOUSEKEEPING_SECONDS = 1.0
"""Between looks at the set of runs, signs of life for what is in hand, and looks for what the dead left behind."""
RECLAIM_MS = 5_000
"""A group whose server has given no sign of life for so long is another server's."""
ELSEWHERE_MS = 3_000
"""For so long a server leaves a group that it could not score to the others, if there are any."""
DRAIN_SECONDS = 8.0
"""Time for what is in hand when the process ends; what is not done by then is handed back."""


@dataclass(eq=False)
class Group:
    """A group in hand."""

    run_id: str
    entry: Entry
    done: CompletionGroup
    spec: RunSpec
    rubric: Rubric
    began: float
    scores: list[Score | None]
    lock: threading.Lock = field(default_factory=threading.Lock)
    given_up: bool = False
    """Handed back: what is not begun need not be."""
    finished: bool = False

    @property
    def left(self) -> int:
        """Completions that are not judged yet."""
        return self.scores.count(None)


class RewardWorker:
    """Scores groups until it is asked to end."""

    def __init__(self, bus: Bus, *, scoring: Scoring, member: str, idle: IdleClock) -> None:
        self.bus, self.scoring, self.member, self.idle = bus, scoring, member, idle
        self.metrics = scoring.metrics
        self._fleet = Fleet(bus)
        self._rubrics: dict[str, tuple[RunSpec, Rubric]] = {}
        self._held: dict[tuple[str, str], Group] = {}
        self._changed = threading.Event()
        """A completion is judged, or a group done."""
        self._runs: list[str] = []
        self._alone = True
        self._kept_at = 0.0

    def run(self, shutdown: Shutdown) -> None:
        while not shutdown.asked:
            self._forget_done()
            if time.monotonic() - self._kept_at > HOUSEKEEPING_SECONDS:
                for run_id, entry in self._keep():
                    self._take(run_id, entry)
            if not self._runs:
                with self.idle.waiting():
                    shutdown.wait(0.1)
                continue
            self._changed.clear()
            runs = self._with_room()
            if not runs:
                self._changed.wait(CLAIM_MS / 1000)
                continue
            if not self._held:
                self.idle.begin()
            next_one = self.bus.claim_next(runs, Work.COMPLETIONS, self.member)
            found = [next_one] if next_one else self.bus.claim(runs, Work.COMPLETIONS, self.member, count=1, block_ms=self._patience_ms)
            for entry in found:
                self._take(run_of(entry.stream), entry)
        self._drain()

    @property
    def _patience_ms(self) -> int:
        return min(CLAIM_MS, BUSY_CLAIM_MS) if self._held else CLAIM_MS

    def _with_room(self) -> list[str]:
        """The streams from which a group may be taken, who is to be served first coming first."""
        busy = sum(group.left for group in self._held.values()) >= self.scoring.threads.threads
        holding = {tenant_of(group.run_id) for group in self._held.values()} if busy else set()
        streams: dict[str, list[str]] = {}
        for run_id in self._runs:
            streams.setdefault(tenant_of(run_id), []).append(run_id)
        order = self.scoring.threads.order(tenant for tenant in streams if tenant not in holding)
        return [run_id for tenant in order for run_id in sorted(streams[tenant], key=lambda one: (parent_of(one) is None, one))]

    def _take(self, run_id: str, entry: Entry) -> None:
        """Have a group scored; what cannot be read is put aside."""
        self.idle.end()
        ledger = Ledger(self.bus, run_id)
        try:
            done = entry.message(CompletionGroup)
            spec, rubric = self._rubric(ledger)
        except (Undecodable, NotOurs) as error:
            self._give_up(ledger, entry, str(error), None)
            return
        except ValueError as error:  # verifiers or options that do not exist, in a run that was submitted while no reward server could check them
            self._give_up(ledger, entry, f"no rubric can be made: {error}", done)
            return
        began = time.time()
        self.metrics.wait.observe(max(0.0, began - done.finished_at))
        group = Group(run_id, entry, done, spec, rubric, began, [None] * len(done.completions))
        self._held[run_id, entry.id] = group
        jobs = [partial(self._judge, group, place) for place in range(len(done.completions))]
        self.scoring.threads.submit(tenant_of(run_id), jobs, first=parent_of(run_id) is not None)

    def _judge(self, group: Group, place: int) -> None:
        """One completion; the last one of the group publishes it."""
        if group.given_up:
            return
        try:
            completion, asked = group.done.completions[place], group.done.group
            score = self.scoring.judge(group.rubric, completion.text, prompt=asked.prompt, answer=asked.answer)
            with group.lock:
                group.scores[place] = score
                last = not group.left
            if last:
                self._publish(group)
        except Exception as fault:  # of ours, not the completion's
            log.exception("scoring failed", extra={"run": group.run_id, "entry": group.entry.id})
            self._faulty(group, fault)
        finally:
            self._changed.set()

    def _publish(self, group: Group) -> None:
        ledger, scores = Ledger(self.bus, group.run_id), tuple(score for score in group.scores if score is not None)
        failed = [part for score in scores if score.reward is None for part in score.parts if part.score is None]
        if failed:
            self._failed(ledger, group, f"{failed[0].verifier}: {failed[0].said}: {failed[0].detail}")
        else:
            accepted = ledger.score(group.entry, ScoredGroup(completed=group.done, scores=scores, server=self.member))
            if not accepted:
                self.bus.acknowledge(group.run_id, Work.COMPLETIONS, [group.entry.id])
            self.metrics.groups.labels("scored" if accepted else "superseded").inc()
            self.metrics.seconds.observe(time.time() - group.began)
        group.finished = True

    def _faulty(self, group: Group, fault: Exception) -> None:
        """Has the group tried again as after a verifier's failure: what always fails must not come again for ever."""
        with group.lock:
            known, group.given_up = group.given_up, True
        if known:
            return
        try:
            self._failed(Ledger(self.bus, group.run_id), group, f"a fault of the reward server: {type(fault).__name__}: {ascii(str(fault))[:200]}")
        finally:
            group.finished = True  # not acknowledged: where even this failed, it comes again when its time is up

    def _failed(self, ledger: Ledger, group: Group, reason: str) -> None:
        self.metrics.groups.labels("failed").inc()
        if self.bus.deliveries(ledger.run_id, Work.COMPLETIONS, group.entry.id) >= group.spec.max_attempts:
            self._give_up(ledger, group.entry, f"could not be scored in {group.spec.max_attempts} tries: {reason}", group.done)
        else:
            told = {"run": ledger.run_id, "index": group.done.group.index, "reason": reason}
            log.warning("a group could not be scored and will be tried again", extra=told)
            group.finished = True  # before it can come back
            self.bus.hand_back(ledger.run_id, Work.COMPLETIONS, self.member, [group.entry.id])

    def _give_up(self, ledger: Ledger, entry: Entry, reason: str, done: CompletionGroup | None) -> None:
        log.error("dead-lettered", extra={"run": ledger.run_id, "entry": entry.id, "reason": reason})
        if ledger.give_up(entry, Work.COMPLETIONS, reason, group=done.group if done else None):
            self.metrics.dead_letters.labels(Work.COMPLETIONS.value).inc()

    def _rubric(self, ledger: Ledger) -> tuple[RunSpec, Rubric]:
        if ledger.run_id not in self._rubrics:
            spec = ledger.spec()
            self._rubrics[ledger.run_id] = (spec, self.scoring.rubric(spec.rewards, least=spec.reward_least, most=spec.reward_most))
        return self._rubrics[ledger.run_id]

    def _forget_done(self) -> None:
        self._held = {key: group for key, group in self._held.items() if not group.finished}

    def _touch(self) -> None:
        """Signs of life for what is in hand."""
        for run_id, entry_id in self._held:
            self.bus.touch(run_id, Work.COMPLETIONS, self.member, [entry_id])

    def _keep(self) -> list[tuple[str, Entry]]:
        """Signs of life for what is in hand; the entries that the dead left behind."""
        self._kept_at = time.monotonic()
        self._runs = sorted(raw.decode() for raw in self.bus.call(lambda: self.bus.redis.smembers(ACTIVE)))
        self._rubrics = {run_id: rubric for run_id, rubric in self._rubrics.items() if run_id in self._runs}
        self._alone = not any(member.ready and member.member_id != self.member for member in self._fleet.members(role=Role.REWARD))
        threads = self.scoring.threads
        threads.keep({tenant_of(run_id) for run_id in self._runs})
        self._touch()
        found: list[tuple[str, Entry]] = []
        room = max(1, threads.threads - sum(group.left for group in self._held.values()))
        for run_id in self._runs:
            entries = self.bus.reclaim(
                run_id, Work.COMPLETIONS, self.member, idle_ms=RECLAIM_MS, count=max(1, room - len(found)),
                own_after_ms=0 if self._alone else ELSEWHERE_MS,
            )  # fmt: skip
            self._forget_done()  # what has just been handed back is no longer in hand
            found += [(run_id, entry) for entry in entries if (run_id, entry.id) not in self._held]
        return found

    def _drain(self) -> None:
        """Ends what is in hand; what takes too long is handed back, for another server to have at once."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._held and time.monotonic() < deadline:
            self._changed.clear()
            self._touch()
            self._forget_done()
            if self._held:
                self._changed.wait(min(1.0, deadline - time.monotonic()))
        for group in self._held.values():
            group.given_up = True
            self.bus.hand_back(group.run_id, Work.COMPLETIONS, self.member, [group.entry.id])


def tenant_of(run_id: str) -> str:
    """Whose share of the threads a run's, or an evaluation set's, completions take."""
    return parent_of(run_id) or run_id
