"""The life of one run in the store: its state, moved by compare-and-set along `contracts.states`, and its events. A move is one script."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pydantic import JsonValue

from services.contracts.messages import RunEvent, Severity
from services.contracts.states import TERMINAL, Action, RunState, next_state
from services.contracts.topics import RETENTION, Log, RunKeys
from services.runtime.bus import Bus
from services.runtime.codec import encode
from services.runtime.ledger import NotOurs


class UnknownRun(LookupError):
    """No run has this id."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"run {run_id!r} is not known: `GET /v1/runs` lists those that are")


@dataclass(frozen=True)
class Told:
    """How a move is told to people."""

    event: str
    text: str
    severity: Severity = Severity.INFO


MOVES: dict[Action, Told] = {
    Action.ASSIGN: Told("run_assigned", "Assigned to its fleet"),
    Action.START: Told("run_started", "Running"),
    Action.PAUSE: Told("run_paused", "Paused"),
    Action.RESUME: Told("run_resumed", "Queued again, to go on from its last checkpoint"),
    Action.LOSE_TRAINER: Told("trainer_lost", "The trainer is gone; queued for another one", Severity.WARNING),
    Action.COMPLETE: Told("run_completed", "Completed"),
    Action.FAIL: Told("run_failed", "Failed", Severity.ERROR),
    Action.CANCEL: Told("run_cancelled", "Cancelled"),
}


class RunLifecycle:
    """State and events of one run. Used by the control plane and by the run's trainer."""

    def __init__(self, bus: Bus, run_id: str) -> None:
        self.bus, self.run_id, self.keys = bus, run_id, RunKeys(run_id)

    def state(self) -> RunState:
        """Raises UnknownRun."""
        raw = self.bus.call(lambda: self.bus.redis.hget(self.keys.info, "state"))
        if raw is None:
            raise UnknownRun(self.run_id)
        return RunState(raw.decode())

    def move(self, action: Action, reason: str = "", *, holder: str | None = None, trainer: str | None = None) -> RunState:
        """Apply `action`; the state that follows. `reason` is kept with the state and told in the event.

        A trainer passes its fleet id as `holder`: NotOurs is raised when the run is no longer its own. The scheduler passes the new `trainer`.
        Raises IllegalMove, UnknownRun.
        """
        while True:
            raw = self.bus.call(lambda: self.bus.redis.hmget(self.keys.info, "state", "version"))
            if raw[0] is None:
                raise UnknownRun(self.run_id)
            before = RunState(raw[0].decode())
            after = next_state(before, action)
            told = MOVES[action]
            severity = Severity.WARNING if action is Action.PAUSE and reason else told.severity  # a pause with a reason is nobody's wish
            event = RunEvent(
                run_id=self.run_id, event=told.event, text=f"{told.text}: {reason}" if reason else told.text, severity=severity,
                version=None if raw[1] is None else int(raw[1]), data={"from": before.value, "to": after.value},
            )  # fmt: skip
            answer = self.bus.script(
                _MOVE,
                [self.keys.info, self.keys.stream(Log.EVENTS), self.keys.seq(Log.EVENTS)],
                [before, after, reason, holder or "", encode(event), RETENTION[Log.EVENTS], time.time(), *_stamps(action, after, trainer)],
            )
            if answer < 0:
                raise NotOurs(f"run {self.run_id} is no longer {holder}'s")
            if answer:
                return after

    def event(
        self, event: str, text: str, severity: Severity = Severity.INFO, version: int | None = None, data: dict[str, JsonValue] | None = None
    ) -> None:
        """Tell of something that happened to the run."""
        message = RunEvent(run_id=self.run_id, event=event, text=text, severity=severity, version=version, data=data or {})
        self.bus.append(self.run_id, Log.EVENTS, message)


def _stamps(action: Action, after: RunState, trainer: str | None) -> list[str]:
    """What the script does beside the state: (time field to set if unset, time field to set, trainer to set, fields to delete)."""
    first = "started_at" if action is Action.START else ""
    ended = "ended_at" if after in TERMINAL or after is RunState.FAILED else ""
    forgotten = ["ended_at"] if action is Action.RESUME else []
    # A trainer that was lost, or is busy while its run is cancelled, must not commit any more: the ledger's scripts compare this field.
    forgotten += ["trainer"] if action in (Action.LOSE_TRAINER, Action.CANCEL) else []
    return [first, ended, trainer or "", *forgotten]


_MOVE = """
local info = KEYS[1]
if redis.call('HGET', info, 'state') ~= ARGV[1] then return 0 end
if ARGV[4] ~= '' and redis.call('HGET', info, 'trainer') ~= ARGV[4] then return -1 end
redis.call('HSET', info, 'state', ARGV[2], 'reason', ARGV[3])
if ARGV[8] ~= '' then redis.call('HSETNX', info, ARGV[8], ARGV[7]) end
if ARGV[9] ~= '' then redis.call('HSET', info, ARGV[9], ARGV[7]) end
if ARGV[10] ~= '' then redis.call('HSET', info, 'trainer', ARGV[10]) end
for i = 11, #ARGV do redis.call('HDEL', info, ARGV[i]) end
if ARGV[2] == 'queued' then redis.call('HINCRBY', info, 'requeued', 1) end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[6], '*', 'seq', redis.call('INCR', KEYS[3]), 'data', ARGV[5])
return 1
"""
