"""What the processes of the fleet log: as a list, or as a stream that goes on. A run has no log of its own: it is a part of this one."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Annotated

import anyio
import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from services.contracts.messages import LogLevel, LogLine, Role
from services.contracts.topics import CHILD
from services.contracts.views import LogsView, LogView
from services.control_plane.api.deps import Deps, WithDeps, problems
from services.control_plane.api.events import AWAY_SECONDS, BLOCK_MS, HEARTBEAT_SECONDS, ID, place
from services.control_plane.api.sse import message
from services.runtime.bus import Bus, Entry, StoreAway
from services.runtime.codec import Undecodable

router = APIRouter(tags=["fleet"])

SCAN = 1_000
"""Lines looked at together."""
COUNT = 200
"""Lines sent together."""
FROM = {level: frozenset(one.value.encode() for one in tuple(LogLevel)[place:]) for place, level in enumerate(LogLevel)}
"""Each level with those above it, as they are stored."""


@dataclass(frozen=True)
class Filter:
    """Which lines are wanted; None lets all pass."""

    run: str | None
    role: Role | None
    member: str | None
    level: LogLevel
    text: str | None

    def wants(self, entry: Entry) -> LogView | None:
        """The line, if it is wanted. One that this release cannot read is passed over: another one may have written it."""
        field = entry.fields
        if field.get(b"level") not in FROM[self.level]:
            return None
        if self.role is not None and field.get(b"role") != self.role.value.encode():
            return None
        if self.member is not None and field.get(b"member") != self.member.encode():
            return None
        if self.run is not None and field.get(b"run", b"").partition(CHILD.encode())[0] != self.run.encode():
            return None
        try:
            line = log_view(entry)
        except Undecodable:
            return None
        return line if self.text is None or self.text.casefold() in _words(line).casefold() else None


def wanted(
    deps: WithDeps,
    run: Annotated[str | None, Query(max_length=200, description="Only lines that name this run, or an evaluation set of it")] = None,
    role: Annotated[Role | None, Query(description="Only of processes of this kind")] = None,
    member: Annotated[str | None, Query(max_length=200, description="Only of the process with this fleet id")] = None,
    level: Annotated[LogLevel, Query(description="Only lines of this level and above")] = LogLevel.DEBUG,
    text: Annotated[str | None, Query(max_length=200, description="Only lines in which this occurs, in whatever case")] = None,
) -> Filter:
    if run is not None:
        deps.store.get(run)
    return Filter(run, role, member, level, text or None)


@router.get(
    "/logs", response_class=Response, summary="What the processes log",
    responses={
        200: {
            "description": "Server-sent events `logs` (a list of LogView, oldest first): the newest lines, or those after `after`, then what comes;"
            " for `Accept: application/json` a LogsView",
            "content": {
                "text/event-stream": {"schema": {"type": "string"}},
                "application/json": {"schema": {"$ref": "#/components/schemas/LogsView"}},
            },
        },
        **problems(404),
    },
)  # fmt: skip
async def logs(
    request: Request,
    deps: WithDeps,
    filter_: Annotated[Filter, Depends(wanted)],
    after: Annotated[str, Depends(place)],
    cursor: Annotated[str | None, Query(pattern=ID, description="`next` of the page before, of a list")] = None,
    limit: Annotated[int, Query(ge=1, le=1_000, description="Lines at most; of a stream, those of before")] = 200,
) -> Response:
    """About 20,000 lines of all processes are kept. A stream has no end."""
    if "application/json" in request.headers.get("accept", "") and "text/event-stream" not in request.headers.get("accept", ""):
        lines, next_ = await run_in_threadpool(newest, deps.bus, filter_, after=after, cursor=cursor, limit=limit)
        return JSONResponse(LogsView(lines=lines, next=next_).model_dump(mode="json"))
    return StreamingResponse(
        follow(deps, filter_, after=after, limit=limit),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


def newest(bus: Bus, filter_: Filter, *, after: str, cursor: str | None, limit: int) -> tuple[list[LogView], str | None]:
    """Up to `limit` lines between `after` and `cursor`, newest first, and the cursor of those before them. Raises StoreAway."""
    found: list[LogView] = []
    for entry in _backwards(bus, after=after, before=cursor):
        if (line := filter_.wants(entry)) is not None:
            if len(found) == limit:
                return found, found[-1].id
            found.append(line)
    return found, None


def _backwards(bus: Bus, *, after: str, before: str | None) -> Iterator[Entry]:
    """Entries between two ids, which are not among them, newest first."""
    while entries := bus.logs(before="+" if before is None else f"({before}", after=f"({after}", count=SCAN):
        yield from entries
        if len(entries) < SCAN:
            return
        before = entries[-1].id


async def follow(deps: Deps, filter_: Filter, *, after: str, limit: int) -> AsyncIterator[bytes]:
    """The newest lines, unless a reader tells where it left off; then lines as they come, a comment after each silence. Holds no thread."""
    yield format_sse_event(comment="logs")
    spoke, started = time.monotonic(), after != "0"
    while not deps.shutdown.asked:
        try:
            if not started:
                last = await run_in_threadpool(deps.bus.logs, count=1)  # before the reading: what comes meanwhile is read after it
                after = last[0].id if last else after
                known, _ = await run_in_threadpool(newest, deps.bus, filter_, after="0", cursor=None, limit=limit)
                lines = [line for line in reversed(known) if _order(line.id) <= _order(after)]
                started = True
            else:
                entries = await deps.tail.read_logs_of_fleet(after=after, block_ms=BLOCK_MS, count=COUNT)
                after = entries[-1].id if entries else after
                lines = [line for entry in entries if (line := filter_.wants(entry)) is not None]
        except StoreAway as error:
            yield format_sse_event(comment=str(error))
            await anyio.sleep(AWAY_SECONDS)
            continue
        for i in range(0, len(lines), COUNT):
            rows = [line.model_dump(mode="json") for line in lines[i : i + COUNT]]
            yield message(msgspec.json.encode(rows).decode(), event="logs", id=rows[-1]["id"])
            spoke = time.monotonic()
        if time.monotonic() - spoke >= HEARTBEAT_SECONDS:
            yield format_sse_event(comment="still here")
            spoke = time.monotonic()


def log_view(entry: Entry) -> LogView:
    """Raises Undecodable."""
    line = entry.message(LogLine)
    return LogView(
        id=entry.id, at=line.at, level=line.level, logger=line.logger, role=line.role, member=line.member, host=line.host, pid=line.pid,
        run_id=line.run_id, version=line.version, text=line.text, traceback=line.traceback, data=line.data,
    )  # fmt: skip


def _words(line: LogView) -> str:
    """All of a line that is looked through."""
    data = " ".join(f"{name}={value}" for name, value in line.data.items())
    return "\n".join((line.text, line.logger, line.member, line.run_id or "", data, line.traceback or ""))


def _order(entry_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in entry_id.split("-"))
