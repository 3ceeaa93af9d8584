"""Following a run: what is new of it is asked for twice a second and given to a view, until the run has ended or is paused."""

from __future__ import annotations

import time

from services.cli.live import View, Watched, waiting_for
from services.cli.session import Code, Failure
from services.client import Client, Unreachable
from services.contracts.states import RunState
from services.studies.display import duration

POLL_S = 0.5
PATIENCE_S = 60.0
"""How long the API may be away: the control plane may be on its way back."""
BACKLOG = 10
"""Events of before that are shown when following begins."""
MOVING = frozenset({RunState.QUEUED, RunState.STARTING, RunState.RUNNING})


def follow(client: Client, run_id: str, view: View) -> Watched:
    """Show the run until it moves no more. Raises Failure when the API stays away."""
    watched = Watched(client.run(run_id))
    after_event: str | None = None
    away_since: float | None = None
    while True:
        try:
            run = client.run(run_id)  # before its steps, so that an ended run is shown with all of them
            first = watched.steps[-1].version + 1 if watched.steps else 0
            watched.steps += client.steps(run_id, first=first).steps
            events = list(client.events(run_id, after=after_event))
            if after_event is None and len(events) > BACKLOG:
                view.note(f"{len(events) - BACKLOG} earlier events are not shown")
                events = events[-BACKLOG:]
            for event in events:
                after_event = event.id
                view.event(event)
            watched.conservation = client.conservation(run_id)
            watched.run = run
            watched.waiting = waiting_for(run, client.fleet().members, watched.steps)
            away_since = None
        except Unreachable as error:
            if away_since is None:
                away_since = time.monotonic()
                view.note(f"{error}; trying again for {duration(PATIENCE_S)}")
            if time.monotonic() - away_since > PATIENCE_S:
                raise Failure(f"the API has not answered for {duration(PATIENCE_S)}", code=Code.NO_STACK) from error
        view.update(watched)
        if watched.run.state not in MOVING:
            return watched
        time.sleep(POLL_S)
