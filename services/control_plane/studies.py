"""The study store over Redis: studies by id and by age, and the runs of each by arm and seed.

The id of a run follows from the study's id, the arm and the seed, and a run of an id is made once: so whatever crashes in between, whoever goes on
with the study makes exactly the runs that are missing.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from functools import lru_cache

from services.contracts.states import TERMINAL, Action, IllegalMove, RunState
from services.contracts.study import StudySpec
from services.contracts.topics import IDEMPOTENCY, STUDIES, StudyKeys
from services.control_plane.store import IDEMPOTENCY_SECONDS, KeyTaken, Run, RunStore, digest, new_run_id

ID_TAKEN = -1
"""Answer of the script that creates a study when another one of that second has the same random digits."""


class UnknownStudy(LookupError):
    """No study has this id."""

    def __init__(self, study_id: str) -> None:
        super().__init__(f"study {study_id!r} is not known: `GET /v1/studies` lists those that are")


class StudyEnded(ValueError):
    """The study was cancelled for good."""


@dataclass(frozen=True)
class Study:
    """A study, as the store has it."""

    study_id: str
    spec_json: bytes
    name: str
    created_at: float
    cancelled_at: float | None

    @property
    def spec(self) -> StudySpec:
        return _parsed(self.spec_json)

    def run_id(self, arm: str, seed: int) -> str:
        return StudyKeys(self.study_id).run_id(arm, seed)


class StudyStore:
    """All studies."""

    def __init__(self, runs: RunStore) -> None:
        self._runs, self._bus = runs, runs.bus

    def create(self, spec: StudySpec, *, idempotency_key: str | None = None) -> tuple[Study, bool]:
        """The study, still without runs, and whether it is new: a key that was used before with the same spec gives the study that it made.
        Raises KeyTaken."""
        text = spec.model_dump_json()
        while True:
            study_id = new_run_id(spec.name)
            made, found = self._bus.script(
                _CREATE,
                [StudyKeys(study_id).info, STUDIES, f"{IDEMPOTENCY}:{digest(idempotency_key or '')}"],
                [study_id, digest(text) if idempotency_key else "", IDEMPOTENCY_SECONDS, time.time(), text, spec.name],
            )
            if made == ID_TAKEN:
                continue
            if not found:
                raise KeyTaken("this idempotency key was used for another spec: send a new key with a new spec")
            return self.get(found.decode()), bool(made)

    def get(self, study_id: str) -> Study:
        """Raises UnknownStudy."""
        fields = self._bus.call(lambda: self._bus.redis.hmget(StudyKeys(study_id).info, ["spec", "name", "created_at", "cancelled_at"]))
        spec_json, name, created_at, cancelled_at = fields
        if spec_json is None:
            raise UnknownStudy(study_id)
        return Study(study_id, spec_json, name.decode(), float(created_at), float(cancelled_at) if cancelled_at else None)

    def ids(self) -> list[str]:
        """All studies, newest first."""
        return [raw.decode() for raw in self._bus.call(lambda: self._bus.redis.zrevrange(STUDIES, 0, -1))]

    def runs(self, study: Study) -> dict[tuple[str, int], Run]:
        """The runs that have been made, by arm and seed."""
        cells = {study.run_id(arm, seed): (arm, seed) for arm, seed in study.spec.cells()}
        return {cells[run.run_id]: run for run in self._runs.several(list(cells))}

    def make_runs(self, study: Study) -> None:
        """Queue every run of the study that there is not yet, seed by seed; stops when the study is cancelled meanwhile."""
        if study.cancelled_at is not None:
            return
        there = self.runs(study).keys()
        for arm, seed in study.spec.cells():
            if (arm, seed) not in there:
                self._runs.create_as(study.run_id(arm, seed), study.spec.run(arm, seed))
                if self.get(study.study_id).cancelled_at is not None:
                    self.cancel(study)  # this run came after the cancellation had looked
                    return

    def pause(self, study: Study) -> None:
        """Pause every run that goes on or waits; those that wait first, so that none of them starts meanwhile."""
        self._move(study, Action.PAUSE, [RunState.QUEUED, RunState.STARTING, RunState.RUNNING])

    def resume(self, study: Study) -> None:
        """Go on with every run that is paused or has failed, and make those that are missing. Raises StudyEnded."""
        if study.cancelled_at is not None:
            raise StudyEnded(f"study {study.study_id} was cancelled: submit it again for new runs")
        self._move(study, Action.RESUME, [RunState.PAUSED, RunState.FAILED])
        self.make_runs(study)

    def cancel(self, study: Study) -> None:
        """End every run for good, and make no more."""
        self._bus.call(lambda: self._bus.redis.hsetnx(StudyKeys(study.study_id).info, "cancelled_at", time.time()))
        self._move(study, Action.CANCEL, [state for state in RunState if state not in TERMINAL])

    def _move(self, study: Study, action: Action, states: list[RunState]) -> None:
        runs = sorted(self.runs(study).values(), key=lambda run: states.index(run.state) if run.state in states else len(states))
        for run in runs:
            if run.state in states:
                with contextlib.suppress(IllegalMove):  # it has moved on by itself since
                    self._runs.lifecycle(run.run_id).move(action)


@lru_cache(maxsize=32)
def _parsed(spec_json: bytes) -> StudySpec:
    """A study is asked for again and again while it is followed."""
    return StudySpec.model_validate_json(spec_json)


_CREATE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return {-1, false} end
if ARGV[2] ~= '' then
  local known = redis.call('GET', KEYS[3])
  if known then
    local digest, study_id = string.match(known, '(%x+) (.*)')
    if digest ~= ARGV[2] then return {0, false} end
    return {0, study_id}
  end
  redis.call('SET', KEYS[3], ARGV[2] .. ' ' .. ARGV[1], 'EX', ARGV[3])
end
redis.call('HSET', KEYS[1], 'spec', ARGV[5], 'name', ARGV[6], 'created_at', ARGV[4])
redis.call('ZADD', KEYS[2], ARGV[4], ARGV[1])
return {1, ARGV[1]}
"""
