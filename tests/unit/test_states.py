"""The table of states: what any sequence of actions may do to a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.states import ON_FLEET, TERMINAL, Action, IllegalMove, RunState, next_state


@given(st.lists(st.sampled_from(list(Action)), max_size=40))
def test_any_sequence_of_actions_keeps_to_the_life_of_a_run(actions: list[Action]) -> None:
    state, assigned, started = RunState.QUEUED, False, False
    for action in actions:
        try:
            after = next_state(state, action)
        except IllegalMove:
            continue
        assert state not in TERMINAL, "nothing follows the end"
        assigned = action is Action.ASSIGN or (assigned and after in ON_FLEET)
        started = action is Action.START or (started and after is RunState.RUNNING)
        assert (after in ON_FLEET) == assigned, "a run is on the fleet from its assignment until it leaves"
        assert (after is RunState.RUNNING) == started
        state = after


@given(st.lists(st.sampled_from(list(Action)), max_size=20))
def test_a_user_can_end_every_run_that_has_not_ended(actions: list[Action]) -> None:
    state = RunState.QUEUED
    for action in actions:
        try:
            state = next_state(state, action)
        except IllegalMove:
            continue
    if state not in TERMINAL:
        assert next_state(state, Action.CANCEL) is RunState.CANCELLED


def test_only_stopped_runs_can_be_resumed() -> None:
    resumable = {s for s in RunState if _possible(s, Action.RESUME)}
    assert resumable == {RunState.PAUSED, RunState.FAILED}


def test_a_refused_move_says_what_is_possible() -> None:
    with pytest.raises(IllegalMove, match=r"a queued run cannot start; possible: assign, cancel, fail, pause"):
        next_state(RunState.QUEUED, Action.START)
    with pytest.raises(IllegalMove, match=r"a completed run cannot resume; possible: nothing"):
        next_state(RunState.COMPLETED, Action.RESUME)


def _possible(state: RunState, action: Action) -> bool:
    try:
        next_state(state, action)
    except IllegalMove:
        return False
    return True
