"""Dead letters: what could not be processed, to be looked at and replayed."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query

from services.contracts.messages import DeadLetter
from services.contracts.states import TERMINAL
from services.contracts.topics import Log, evaluation_id, parent_of, set_of
from services.contracts.views import DeadLettersView, DeadLetterView, ReplayView
from services.control_plane.api.deps import WithDeps, WithRun, problems
from services.runtime.bus import Entry
from services.runtime.ledger import Ledger
from services.runtime.web import Problem

router = APIRouter(tags=["dead letters"])


@router.get("/dead-letters", response_model=DeadLettersView, summary="What could not be processed, newest first", responses=problems(404))
def dead_letters(
    deps: WithDeps,
    run: Annotated[str | None, Query(description="Only those of this run; default: of all runs, the newest run first")] = None,
    limit: Annotated[int, Query(ge=1, le=1_000, description="Letters at most")] = 100,
) -> DeadLettersView:
    letters: list[DeadLetterView] = []
    for run_id in [run] if run is not None else reversed(deps.store.ids()):
        found = deps.store.get(run_id)
        ledgers = [found.run_id, *(evaluation_id(found.run_id, one.name) for one in found.spec.evaluation.sets)]
        of_run = [letter_view(entry) for ledger in ledgers for entry in deps.bus.range(ledger, Log.DEAD, count=limit, newest_first=True)]
        letters += sorted(of_run, key=lambda letter: letter.at, reverse=True)[: limit - len(letters)]
        if len(letters) == limit:
            break
    return DeadLettersView(letters=letters)


@router.post(
    "/dead-letters/{run_id}/{letter}/replay", status_code=202, response_model=ReplayView, summary="Generate a dead-lettered group again",
    responses=problems(404, 409),
)  # fmt: skip
def replay(
    run: WithRun, deps: WithDeps, letter: Annotated[str, Path(pattern=r"^\d{1,20}-\d{1,20}$", description="Id of the dead letter")]
) -> ReplayView:
    """It is issued as soon as the staleness window admits it, under the window in force then."""
    if run.state in TERMINAL:
        raise Problem(409, "The run has ended", f"run {run.run_id} is {run.state}: nothing can be replayed")
    entries = deps.bus.range(run.run_id, Log.DEAD, start=letter, end=letter)
    if not entries:
        raise Problem(404, "No such dead letter", f"run {run.run_id} has no dead letter {letter}: it may have been replayed already")
    group = entries[0].message(DeadLetter).group
    if group is None:
        raise Problem(409, "Not replayable", "the entry could not be read, so it is not known which group it was")
    if not Ledger(deps.bus, run.run_id).replay(letter):
        raise Problem(409, "Not replayable", f"dead letter {letter} was replayed meanwhile, or the run has ended")
    deps.store.lifecycle(run.run_id).event("dead_letter_replayed", f"Group {group.index} will be generated again", version=run.version)
    return ReplayView(run_id=run.run_id, letter=letter, index=group.index)


def letter_view(entry: Entry) -> DeadLetterView:
    letter = entry.message(DeadLetter)
    group, parent = letter.group, parent_of(letter.run_id)
    return DeadLetterView(
        id=entry.id, run_id=parent or letter.run_id, evaluation=set_of(letter.run_id), stream=letter.stream, reason=letter.reason, at=letter.at,
        index=group.index if group else None, prompt_id=group.prompt_id if group else None, prompt=group.prompt if group else None,
        replayable=group is not None and parent is None, raw=letter.raw.decode("utf-8", "backslashreplace"),
    )  # fmt: skip
