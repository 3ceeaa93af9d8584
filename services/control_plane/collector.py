"""The collector: makes one record of all groups of an evaluation.

    consumes    scored, of evaluation sets
    produces    evaluations
    waits for   all groups that were issued for a version to be scored, or given up
    unblocked by reward servers

The groups lie on the stream, claimed by nobody, until the record of all of them is made, in one move with their end: whoever dies before leaves
everything as it was, and after it there is nothing left to do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from services.contracts.messages import Completion, DeadLetter, EvaluationRecord, FinishReason, ScoredGroup, Severity
from services.contracts.topics import Log, Work, evaluation_id, parent_of
from services.control_plane.store import Run, RunStore
from services.evaluation.results import Answer, PromptResult, evaluate
from services.runtime.bus import Entry, StoreAway
from services.runtime.codec import Undecodable
from services.runtime.evaluations import EvaluationLedger, Round
from services.runtime.ledger import Place
from services.runtime.metrics import ControlPlaneMetrics

log = logging.getLogger(__name__)

TICK_SECONDS = 0.1


class MixedVersions(RuntimeError):
    """A token is not of the version that was evaluated: weights were loaded before all was generated."""


@dataclass
class Collector:
    """Records the evaluations of all runs. One thread calls `tick`."""

    store: RunStore
    metrics: ControlPlaneMetrics

    def tick(self) -> float:
        """Record what is complete; seconds to wait before the next tick."""
        for child in sorted(self.store.active()):
            if (parent := parent_of(child)) is None:
                continue
            try:
                self._collect(EvaluationLedger(self.store.bus, child), parent)
            except StoreAway:
                raise
            except Exception:  # one set's boundary: the others are recorded; it is tried again with the next tick
                log.exception("an evaluation set could not be collected", extra={"run": child})
        return TICK_SECONDS

    def _collect(self, ledger: EvaluationLedger, parent: str) -> None:
        for round_ in ledger.rounds():
            if not _complete(ledger, round_):
                return  # records are made in the order of versions
            self._record(self.store.get(parent), ledger, round_)

    def _record(self, run: Run, ledger: EvaluationLedger, round_: Round) -> None:
        entries, groups = self._scored(ledger, round_)
        one = next(one for one in run.spec.evaluation.sets if evaluation_id(run.run_id, one.name) == ledger.run_id)
        failure, values = "", dict[str, float]()
        try:
            _of_one_version(groups, round_.version)
            values = evaluate([_result(group) for group in groups], correct_at=run.spec.shaping.correct_at)
        except StoreAway:
            raise
        except Exception as error:  # one evaluation's boundary: it is recorded without values, or the run would wait for it for ever
            log.exception("an evaluation failed", extra={"run": ledger.run_id, "version": round_.version})
            failure = f"{type(error).__name__}: {error}"
        record = EvaluationRecord(
            run_id=run.run_id, name=one.name, domain=one.domain, version=round_.version, prompts=len(groups), samples=one.samples,
            temperature=one.temperature, top_p=one.top_p, max_tokens=one.max_tokens or run.spec.sampling.max_tokens, values=values,
        )  # fmt: skip
        if ledger.record(round_, record, entries):
            self.metrics.evaluation.show((run.run_id, one.name), {(one.domain, name): value for name, value in values.items()})
            self.metrics.evaluation_version.show((run.run_id, one.name), {(): round_.version})
            self._tell(run, ledger, record, missing=round_.count - len(groups), failure=failure)

    def _scored(self, ledger: EvaluationLedger, round_: Round) -> tuple[list[Entry], list[ScoredGroup]]:
        """The groups of a round in the order of their prompts, and what holds them; what cannot be read goes to the dead letters."""
        there = [entry for entry in self.store.bus.range(ledger.run_id, Work.SCORED) if entry.index is None or entry.index in round_.indices]
        entries, groups = [], []
        for entry in sorted(there, key=lambda entry: entry.index or 0):
            try:
                groups.append(entry.message(ScoredGroup))
                entries.append(entry)
            except Undecodable as error:
                log.error("dead-lettered", extra={"entry": entry.id, "reason": str(error)})
                ledger.give_up(entry, Work.SCORED, str(error), group=None)
        return entries, groups

    def _tell(self, run: Run, ledger: EvaluationLedger, record: EvaluationRecord, *, missing: int, failure: str) -> None:
        """An event for each thing that is not as it should be."""
        lifecycle, where = self.store.lifecycle(run.run_id), f"of version {record.version} on {record.name}"
        if failure:
            lifecycle.event("evaluation_failed", f"The evaluation {where} has no values: {failure}", Severity.ERROR, record.version)
        if missing:
            letters = self.store.bus.range(ledger.run_id, Log.DEAD, count=1, newest_first=True)
            reason = letters[0].message(DeadLetter).reason if letters else "their entries are gone"
            text = f"The evaluation {where} lacks {missing} of its prompts: {reason}"
            lifecycle.event("evaluation_incomplete", text, Severity.WARNING, record.version, {"missing": missing})
        if not (counts := ledger.conservation()).holds:
            log.error("groups are not all accounted for", extra={"run": ledger.run_id, "counts": str(counts)})
            text = f"Groups of the evaluation set {record.name} are not all accounted for: {counts}"
            lifecycle.event("conservation_broken", text, Severity.ERROR, record.version)


def _complete(ledger: EvaluationLedger, round_: Round) -> bool:
    """Have all groups of the round been issued, and all that were not given up been scored?"""
    issued = ledger.conservation().issued
    return issued >= round_.indices.stop and all(row.place is Place.SCORED for row in ledger.rows() if row.index in round_.indices)


def _of_one_version(groups: Sequence[ScoredGroup], version: int) -> None:
    found = {span.version for group in groups for done in group.completed.completions for span in done.spans}
    if found - {version}:
        raise MixedVersions(f"tokens of the versions {sorted(found)}")


def _result(scored: ScoredGroup) -> PromptResult:
    answers = tuple(_answer(done, reward) for done, reward in zip(scored.completed.completions, scored.rewards, strict=True))
    return PromptResult(prompt_id=scored.group.prompt_id, answers=answers)


def _answer(done: Completion, reward: float) -> Answer:
    truncated = done.finish is FinishReason.LENGTH
    tokens = done.token_ids if truncated else done.token_ids[:-1]
    return Answer(tokens=tuple(tokens), text=done.text, reward=reward, logps=tuple(done.logprob_values), truncated=truncated)
