"""The life of a run: its states and the moves between them."""

from __future__ import annotations

from enum import StrEnum


class RunState(StrEnum):
    QUEUED = "queued"
    """Waits for a trainer and a rollout server."""
    STARTING = "starting"
    """Has its fleet; models are being loaded, or a lost trainer is being replaced."""
    RUNNING = "running"
    """Versions are being published."""
    PAUSED = "paused"
    """Checkpointed and off the fleet; its groups are kept."""
    COMPLETED = "completed"
    """Published all its versions."""
    FAILED = "failed"
    """Stopped by an error, which `reason` tells; may be resumed from its last checkpoint."""
    CANCELLED = "cancelled"
    """Stopped for good by a user."""


class Action(StrEnum):
    ASSIGN = "assign"
    START = "start"
    PAUSE = "pause"
    RESUME = "resume"
    LOSE_TRAINER = "lose_trainer"
    COMPLETE = "complete"
    FAIL = "fail"
    CANCEL = "cancel"


S, A = RunState, Action
TRANSITIONS: dict[tuple[RunState, Action], RunState] = {
    (S.QUEUED, A.ASSIGN): S.STARTING,
    (S.QUEUED, A.PAUSE): S.PAUSED,
    (S.QUEUED, A.FAIL): S.FAILED,
    (S.QUEUED, A.CANCEL): S.CANCELLED,
    (S.STARTING, A.START): S.RUNNING,
    (S.STARTING, A.PAUSE): S.PAUSED,
    (S.STARTING, A.LOSE_TRAINER): S.QUEUED,
    (S.STARTING, A.FAIL): S.FAILED,
    (S.STARTING, A.CANCEL): S.CANCELLED,
    (S.RUNNING, A.PAUSE): S.PAUSED,
    (S.RUNNING, A.LOSE_TRAINER): S.QUEUED,
    (S.RUNNING, A.COMPLETE): S.COMPLETED,
    (S.RUNNING, A.FAIL): S.FAILED,
    (S.RUNNING, A.CANCEL): S.CANCELLED,
    (S.PAUSED, A.RESUME): S.QUEUED,
    (S.PAUSED, A.CANCEL): S.CANCELLED,
    (S.FAILED, A.RESUME): S.QUEUED,
    (S.FAILED, A.CANCEL): S.CANCELLED,
}
TERMINAL = frozenset({S.COMPLETED, S.CANCELLED})
ON_FLEET = frozenset({S.STARTING, S.RUNNING})
WANTS_TRAINER = ON_FLEET | {S.QUEUED}
"""States in which a run has a trainer or waits for one."""


class IllegalMove(ValueError):
    """The action is not possible in the run's state."""


def next_state(state: RunState, action: Action) -> RunState:
    """State after `action`. Raises IllegalMove, which names the actions that are possible."""
    if (state, action) not in TRANSITIONS:
        possible = sorted(a for s, a in TRANSITIONS if s is state)
        raise IllegalMove(f"a {state} run cannot {action}; possible: {', '.join(possible) or 'nothing'}")
    return TRANSITIONS[state, action]
