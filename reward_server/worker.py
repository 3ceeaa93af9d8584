"""The reward worker: turns completions of every active run into rewards.

    consumes    completions of all active runs, and entries that a dead server held
    produces    scored
    waits for   completions
    unblocked by rollout servers

A group in which a verifier failed is tried again, here or elsewhere, and dead-lettered after `max_attempts` tries: a failure is never a reward of 0.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

from reward_server.judges.pool import JudgePools
from reward_server.rubric import Rubric
from services.contracts.messages import CompletionGroup, Score, ScoredGroup
from services.contracts.spec import RunSpec
from services.contracts.topics import ACTIVE, Work, run_of
from services.runtime.bus import Bus, Entry
from services.runtime.codec import Undecodable
from services.runtime.ledger import Ledger, NotOurs
from services.runtime.metrics import RewardMetrics
from services.runtime.process import IdleClock, Shutdown

log = logging.getLogger(__name__)

CLAIM_MS = 200
HOUSEKEEPING_SECONDS = 1.0
"""Between looks at the set of runs, signs of life for what is in hand, and looks for what the dead left behind."""
RECLAIM_MS = 5_000
"""A group whose server has given no sign of life for so long is another server's."""


class RewardWorker:
    """Scores groups in a bounded number of threads until it is asked to end."""

    def __init__(self, bus: Bus, *, pools: JudgePools, member: str, threads: int, metrics: RewardMetrics, idle: IdleClock) -> None:
        self.bus, self.pools, self.member, self.threads, self.metrics, self.idle = bus, pools, member, threads, metrics, idle
        self._rubrics: dict[str, tuple[RunSpec, Rubric]] = {}
        self._held: dict[Future[None], tuple[str, Entry]] = {}
        self._runs: list[str] = []
        self._kept_at = 0.0

    def run(self, shutdown: Shutdown) -> None:
        with ThreadPoolExecutor(self.threads, thread_name_prefix="score") as executor:
            while not shutdown.asked:
                self._forget_done()
                if time.monotonic() - self._kept_at > HOUSEKEEPING_SECONDS:
                    for run_id, entry in self._keep():
                        self._submit(executor, run_id, entry)
                room = self.threads - len(self._held)
                if room < 1:
                    wait(self._held, timeout=CLAIM_MS / 1000, return_when="FIRST_COMPLETED")
                    continue
                if not self._runs:
                    with self.idle.waiting():
                        shutdown.wait(0.1)
                    continue
                block = CLAIM_MS if not self._held else 5
                if not self._held:
                    self.idle.begin()
                entries = self.bus.claim(self._runs, Work.COMPLETIONS, self.member, count=room, block_ms=block)
                for entry in entries:
                    self._submit(executor, run_of(entry.stream), entry)
            wait(self._held, timeout=10)  # drain: a group takes milliseconds, a bomb its time limit

    def score(self, run_id: str, entry: Entry) -> None:
        """One group, from its entry to its rewards on the stream."""
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
        scores = tuple(rubric.score(c.text, prompt=done.group.prompt, answer=done.group.answer) for c in done.completions)
        self._count(scores)
        failed = [part for score in scores if score.reward is None for part in score.parts if part.score is None]
        if failed:
            self._failed(ledger, entry, done, spec, f"{failed[0].verifier}: {failed[0].outcome}: {failed[0].detail}")
            return
        accepted = ledger.score(entry, ScoredGroup(completed=done, scores=scores, server=self.member))
        if not accepted:
            self.bus.acknowledge(run_id, Work.COMPLETIONS, [entry.id])
        self.metrics.groups.labels("scored" if accepted else "superseded").inc()
        self.metrics.seconds.observe(time.time() - began)

    def _failed(self, ledger: Ledger, entry: Entry, done: CompletionGroup, spec: RunSpec, reason: str) -> None:
        self.metrics.groups.labels("failed").inc()
        if self.bus.deliveries(ledger.run_id, Work.COMPLETIONS, entry.id) >= spec.max_attempts:
            self._give_up(ledger, entry, f"could not be scored in {spec.max_attempts} tries: {reason}", done)
        else:
            log.warning("a group could not be scored and will be tried again", extra={"index": done.group.index, "reason": reason})
            self.bus.hand_back(ledger.run_id, Work.COMPLETIONS, self.member, [entry.id])

    def _give_up(self, ledger: Ledger, entry: Entry, reason: str, done: CompletionGroup | None) -> None:
        log.error("dead-lettered", extra={"entry": entry.id, "reason": reason})
        if ledger.give_up(entry, Work.COMPLETIONS, reason, group=done.group if done else None):
            self.metrics.dead_letters.labels(Work.COMPLETIONS.value).inc()

    def _count(self, scores: tuple[Score, ...]) -> None:
        for score in scores:
            for part in score.parts:
                self.metrics.verifications.labels(part.verifier, part.outcome.value).inc()

    def _rubric(self, ledger: Ledger) -> tuple[RunSpec, Rubric]:
        if ledger.run_id not in self._rubrics:
            spec = ledger.spec()
            self._rubrics[ledger.run_id] = (spec, Rubric(spec.rewards, self.pools.ask))
        return self._rubrics[ledger.run_id]

    def _submit(self, executor: ThreadPoolExecutor, run_id: str, entry: Entry) -> None:
        self.idle.end()
        self._held[executor.submit(self.score, run_id, entry)] = (run_id, entry)

    def _forget_done(self) -> None:
        for future in [f for f in self._held if f.done()]:
            _, entry = self._held.pop(future)
            error = future.exception()
            if error is not None:  # a fault of ours: the entry is not acknowledged, and so comes again
                log.error("scoring failed", exc_info=error, extra={"entry": entry.id})

    def _keep(self) -> list[tuple[str, Entry]]:
        """Signs of life for what is in hand; the entries that the dead left behind."""
        self._kept_at = time.monotonic()
        self._runs = sorted(raw.decode() for raw in self.bus.call(lambda: self.bus.redis.smembers(ACTIVE)))
        self._rubrics = {run_id: rubric for run_id, rubric in self._rubrics.items() if run_id in self._runs}
        for run_id, entry in self._held.values():
            self.bus.touch(run_id, Work.COMPLETIONS, self.member, [entry.id])
        held = {(run_id, entry.id) for run_id, entry in self._held.values()}
        found: list[tuple[str, Entry]] = []
        for run_id in self._runs:
            for entry in self.bus.reclaim(run_id, Work.COMPLETIONS, self.member, idle_ms=RECLAIM_MS, count=self.threads):
                if (run_id, entry.id) not in held:
                    found.append((run_id, entry))
        return found
