"""Events of a run: as a list, or as server-sent events that go on for as long as the run does."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from services.contracts.messages import RunEvent
from services.contracts.topics import Log
from services.contracts.views import EventsView, EventView
from services.control_plane.api.deps import Deps, WithDeps, WithRun, problems
from services.control_plane.api.sse import message
from services.control_plane.store import Run
from services.runtime.bus import Entry, StoreAway

router = APIRouter(tags=["runs"])

BLOCK_MS = 1_000
"""Longest wait for an event before the run's state is looked at."""
HEARTBEAT_SECONDS = 10.0
"""A comment is sent after so much silence: proxies close what is silent for long."""
AWAY_SECONDS = 0.5
ID = r"^\d{1,20}(-\d{1,20})?$"
END = "end"
"""Name of the event that says that the run has ended and no more will come."""


def place(
    after: Annotated[str | None, Query(pattern=ID, description="Id of the last event known; the header Last-Event-ID goes before it")] = None,
    last_event_id: Annotated[str | None, Header(pattern=ID, description="As a browser's EventSource sends it when it connects again")] = None,
) -> str:
    return last_event_id or after or "0"


@router.get(
    "/runs/{run_id}/events", response_class=Response, summary="What happened to the run",
    responses={
        200: {
            "description": "Server-sent events with an EventView as data, and `end` when the run has ended; for `Accept: application/json` a list",
            "content": {
                "text/event-stream": {"schema": {"type": "string"}},
                "application/json": {"schema": {"$ref": "#/components/schemas/EventsView"}},
            },
        },
        **problems(404),
    },
)  # fmt: skip
async def events(
    request: Request,
    run: WithRun,
    deps: WithDeps,
    after: Annotated[str, Depends(place)],
    limit: Annotated[int, Query(ge=1, le=10_000, description="Events at most, of a list")] = 1_000,
) -> Response:
    if "application/json" in request.headers.get("accept", "") and "text/event-stream" not in request.headers.get("accept", ""):
        entries = await run_in_threadpool(deps.bus.range, run.run_id, Log.EVENTS, start=f"({after}", count=limit)
        return JSONResponse(EventsView(run_id=run.run_id, events=[event_view(entry) for entry in entries]).model_dump(mode="json"))
    return StreamingResponse(
        follow(deps, run, after=after), media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )


async def follow(deps: Deps, run: Run, *, after: str) -> AsyncIterator[bytes]:
    """Events as they come, a comment after each silence, and `end` once the run has ended and all has been told. Holds no thread."""
    yield format_sse_event(comment=f"events of {run.run_id}")
    spoke = time.monotonic()
    while not deps.shutdown.asked:
        try:
            ended = await deps.tail.ended(run.run_id)  # before the reading: what came with the end is read then
            entries = await deps.tail.read(run.run_id, after=after, block_ms=BLOCK_MS)
        except StoreAway as error:
            yield format_sse_event(comment=str(error))
            await anyio.sleep(AWAY_SECONDS)
            continue
        for entry in entries:
            yield message(event_view(entry).model_dump_json(), id=entry.id)
            after, spoke = entry.id, time.monotonic()
        if not entries and ended:
            yield message("{}", event=END)
            return
        if time.monotonic() - spoke >= HEARTBEAT_SECONDS:
            yield format_sse_event(comment="still here")
            spoke = time.monotonic()


def event_view(entry: Entry) -> EventView:
    event = entry.message(RunEvent)
    return EventView(
        id=entry.id, run_id=event.run_id, event=event.event, text=event.text, severity=event.severity, version=event.version,
        at=event.at, data=event.data,
    )  # fmt: skip
