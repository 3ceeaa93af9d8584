"""The public API, `/v1`: every route behind the bearer token, every error a problem document, every request measured. And the page, at `/`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client import CollectorRegistry, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.contracts.spec import KNOBS, RunSpec
from services.contracts.states import IllegalMove
from services.contracts.study import StudySpec
from services.contracts.views import EventsView, LogsView
from services.control_plane.api import dead_letters, evaluations, events, fleet, live, logs, prompts, replay, runs, studies, validate, verdicts
from services.control_plane.api.deps import Deps
from services.control_plane.studies import StudyEnded, UnknownStudy
from services.runtime.bus import StoreRefuses
from services.runtime.lifecycle import UnknownRun
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.web import Problem, base_app, bearer, problem_response
from services.ui.site import add_page

DESCRIPTION = """Asynchronous reinforcement learning with verifiable rewards: submit runs, steer them while they go on, and read what they measured.

Every error is an RFC 9457 problem document that names the fields that were wrong and what is allowed."""

ANSWERS: tuple[tuple[type[Exception], int, str], ...] = (
    (UnknownRun, 404, "Unknown run"),
    (UnknownStudy, 404, "Unknown study"),
    (IllegalMove, 409, "Not possible now"),
    (StudyEnded, 409, "Not possible now"),
    (StoreRefuses, 503, "Redis refuses"),
)
"""What routes raise, with the status and title of the answer."""


def create_app(deps: Deps, *, token: str, registry: CollectorRegistry, metrics: ControlPlaneMetrics, ready: Callable[[], str | None]) -> FastAPI:
    app = base_app(title="Offbeat", description=DESCRIPTION, registry=registry, ready=ready)
    app.state.deps = deps
    app.separate_input_output_schemas = False  # one RunSpec for what is sent and what is answered
    app.add_middleware(Measured, histogram=metrics.requests)
    for kind, status, title in ANSWERS:
        app.add_exception_handler(kind, _as_problem(status, title))
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(bearer(token))])
    for module in (runs, replay, studies, verdicts, evaluations, prompts, live, events, dead_letters, fleet, logs, validate):
        v1.include_router(module.router)
    app.include_router(v1)
    add_page(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


class Measured:
    """Observes the time to each answer's start: of a stream of events that is the time until it flows."""

    def __init__(self, app: ASGIApp, *, histogram: Histogram) -> None:
        self.app, self.histogram = app, histogram

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")  # a path as it came would make a label for each run
                self.histogram.labels(scope["method"], route, str(message["status"])).observe(time.monotonic() - began)
            await send(message)

        await self.app(scope, receive, observed)


def _as_problem(status: int, title: str) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(_: Request, error: Exception) -> Response:
        return problem_response(Problem(status, title, str(error)))

    return answer


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's schema with what it cannot know: bodies that are read as JSON or TOML, and the answer of a stream."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, separate_input_output_schemas=False
        )
        parts = schema["components"]["schemas"]
        for model in (RunSpec, StudySpec, EventsView, LogsView):
            tree = model.model_json_schema(ref_template="#/components/schemas/{model}")
            parts.update(tree.pop("$defs", {}))
            parts[model.__name__] = tree
        parts["Knobs"] = {
            "type": "object",
            "minProperties": 1,
            "description": f"Values of knobs, nested or by dotted name. Knobs: {', '.join(sorted(KNOBS))}",
            "properties": {name: {} for name in sorted(KNOBS)},
            "example": {"staleness": {"max_lag": 4}, "clip.high": 0.28},
        }
        parts["Overrides"] = {
            "type": "object",
            "description": "Fields of a run spec, nested or by dotted name",
            "example": {"clip": {"high": 0.4}, "entropy.method": "bonus"},
        }
        app.openapi_schema = schema
    return app.openapi_schema
