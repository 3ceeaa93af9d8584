"""What the routes need, and the bodies and problems that they share."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import Depends, Request

from services.contracts.views import RunView
from services.control_plane.checks import CheckRewards, refuse_not_finite
from services.control_plane.store import EventTail, Run, RunStore
from services.runtime.bus import Bus
from services.runtime.fleet import Fleet
from services.runtime.process import Shutdown
from services.runtime.web import PROBLEM_JSON, Problem


@dataclass(frozen=True)
class Deps:
    """Made by the process, used by every route."""

    bus: Bus
    """With a short patience: while Redis is away a request is answered 503 instead of waiting."""
    store: RunStore
    fleet: Fleet
    tail: EventTail
    check_rewards: CheckRewards
    data: Path
    """Folder of checkpoints, snapshots and reports."""
    shutdown: Shutdown


def deps_of(request: Request) -> Deps:
    return request.app.state.deps


def run_of(run_id: str, request: Request) -> Run:
    """The run that the path names. UnknownRun is answered 404."""
    return deps_of(request).store.get(run_id)


async def body_tree(request: Request) -> dict[str, Any]:
    """The body as a tree: JSON, or TOML where the content type says so."""
    media = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    raw = await request.body()
    if media in ("application/toml", "text/toml", "text/x-toml"):
        tree = _toml(raw)
    elif media == "application/json" or media.endswith("+json"):
        tree = _json(raw)
    else:
        raise Problem(415, "Unsupported content type", f"{media!r} is not understood: send application/json or application/toml")
    if not isinstance(tree, dict):
        raise Problem(422, "Not an object", f"the body must be an object with fields, not {type(tree).__name__}")
    refuse_not_finite(tree)
    return tree


WithDeps = Annotated[Deps, Depends(deps_of)]
WithRun = Annotated[Run, Depends(run_of)]
Tree = Annotated[dict[str, Any], Depends(body_tree)]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for OpenAPI: those that every route has, and these."""
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in sorted({401, 413, 422, 500, 503, *statuses})}


def body_of(schema: str) -> dict[str, Any]:
    """OpenAPI of a body that `body_tree` reads; `schema` names a component."""
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}},
                "application/toml": {"schema": {"type": "string", "description": "The same fields as TOML"}},
            },
        }
    }


def run_view(run: Run) -> RunView:
    return RunView(
        run_id=run.run_id, name=run.name, state=run.state, reason=run.reason, created_at=run.created_at, started_at=run.started_at,
        ended_at=run.ended_at, version=run.version, versions=run.spec.versions, trainer=run.trainer, spec=run.spec,
    )  # fmt: skip


def _json(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, "Not JSON", f"the body cannot be read as JSON: {error}") from error


def _toml(raw: bytes) -> Any:
    try:
        return tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError, and the limit on an integer's digits
        raise Problem(400, "Not TOML", f"the body cannot be read as TOML: {error}") from error
