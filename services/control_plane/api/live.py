"""A run as it goes on: its steps, evaluations, events and state as one stream, from the first on or from where a reader left off."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from typing import Annotated

import anyio
import msgspec
from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from services.contracts.messages import EvaluationRecord, StepRecord
from services.contracts.states import TERMINAL
from services.contracts.topics import Log
from services.contracts.views import LiveState, LiveStep
from services.control_plane.api.deps import Deps, WithDeps, WithRun, problems
from services.control_plane.api.evaluations import evaluation_view
from services.control_plane.api.events import AWAY_SECONDS, BLOCK_MS, END, HEARTBEAT_SECONDS, event_view
from services.control_plane.api.sse import message
from services.control_plane.store import Run
from services.runtime.bus import Entry, StoreAway
from services.runtime.web import Problem

router = APIRouter(tags=["runs"])

LOGS = (Log.STEPS, Log.EVALUATIONS, Log.EVENTS)
"""What is followed; a place in the stream is the ids of the last entry of each, in this order."""
COUNT = 200
"""Entries of a log sent together."""
KEYS_MOST = 200
PLACE = r"^\d{1,20}(-\d{1,20})?(_\d{1,20}(-\d{1,20})?){2}$"
START = "_".join("0" for _ in LOGS)


@router.get(
    "/runs/{run_id}/live", response_class=Response, summary="Steps, evaluations, events and state of a run as they come",
    responses={
        200: {
            "description": "Server-sent events: `steps` (a list of LiveStep), `evaluations` (of EvaluationView), `events` (of EventView), `state`"
            " (a LiveState, when it changes), and `end` when the run has ended",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **problems(404),
    },
)  # fmt: skip
def live(
    run: WithRun,
    deps: WithDeps,
    keys: Annotated[str | None, Query(max_length=8_000, description="Only these measurements of a step, with commas between; default: all")] = None,
    after: Annotated[str, Query(pattern=PLACE, description="Id of the last message known; default: all from the first on")] = START,
) -> Response:
    """What was recorded comes first, in lists of up to 200; then each step as it is made."""
    wanted = None if keys is None else tuple(dict.fromkeys(key for key in keys.split(",") if key))
    if wanted is not None and len(wanted) > KEYS_MOST:
        raise Problem(422, "Too many keys", f"at most {KEYS_MOST} measurements can be named; leave `keys` out for all")
    return StreamingResponse(
        watch(deps, run, wanted, dict(zip(LOGS, after.split("_"), strict=True))),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def watch(deps: Deps, run: Run, keys: tuple[str, ...] | None, places: dict[Log, str]) -> AsyncIterator[bytes]:
    """All of the run's records after `places`, then what comes. Holds no thread while it waits."""
    spoke, told = time.monotonic(), None
    yield format_sse_event(comment=f"run {run.run_id}")
    while not deps.shutdown.asked:
        try:
            standing = await deps.tail.standing(run.run_id)  # before the reading: what came with the end is read then
            entries = await deps.tail.read_logs(run.run_id, after=places, block_ms=BLOCK_MS, count=COUNT)
        except StoreAway as error:
            yield format_sse_event(comment=str(error))
            await anyio.sleep(AWAY_SECONDS)
            continue
        for log in LOGS:
            if found := [entry for of, entry in entries if of is log]:
                places[log] = found[-1].id
                rows = await run_in_threadpool(_rows, log, found, keys)  # two hundred records take tens of milliseconds
                yield message(rows, event=log.value, id="_".join(places[one] for one in LOGS))
                spoke = time.monotonic()
        ended = standing is None or standing[0] in TERMINAL
        if standing is not None and standing != told:
            told, spoke = standing, time.monotonic()
            state, version, reason = standing
            yield message(LiveState(state=state, version=version, reason=reason).model_dump_json(), event="state")
        if not entries and ended:
            yield message("{}", event=END)
            return
        if time.monotonic() - spoke >= HEARTBEAT_SECONDS:
            yield format_sse_event(comment="still here")
            spoke = time.monotonic()


def _rows(log: Log, entries: list[Entry], keys: tuple[str, ...] | None) -> str:
    if log is Log.STEPS:
        views = [live_step(entry.message(StepRecord), keys).model_dump(mode="json") for entry in entries]
    elif log is Log.EVALUATIONS:
        views = [evaluation_view(entry.message(EvaluationRecord)).model_dump(mode="json") for entry in entries]
    else:
        views = [event_view(entry).model_dump(mode="json") for entry in entries]
    return msgspec.json.encode(views).decode()


def live_step(record: StepRecord, keys: tuple[str, ...] | None) -> LiveStep:
    values = record.values if keys is None else {key: record.values[key] for key in keys if key in record.values}
    finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return LiveStep(version=record.version, at=record.at, values=finite, lags=record.lags, window=record.window)
