"""What every process serves: /healthz, /readyz and /metrics; bearer tokens; errors as RFC 9457 problem documents; a bound on request bodies."""

import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from services.contracts.views import FieldProblem, ProblemDocument
from services.runtime.bus import StoreAway

log = logging.getLogger(__name__)
PROBLEM_JSON = "application/problem+json"
MAX_BODY = 4 * 1024 * 1024


class Problem(Exception):
    """Answer the request with this problem document."""

    def __init__(self, status: int, title: str, detail: str = "", *, errors: list[FieldProblem] | None = None) -> None:
        super().__init__(detail or title)
        self.document = ProblemDocument(title=title, status=status, detail=detail, errors=errors or [])


def field_problems(errors: list[Any]) -> list[FieldProblem]:
    """Pydantic's errors as the fields that were wrong."""
    found = []
    for error in errors:
        name = ".".join(str(part) for part in error["loc"] if part != "body")
        message = str(error["msg"]).removeprefix("Value error, ")
        given = error.get("input")
        shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool)) and len(repr(given)) < 80 else ""
        found.append(FieldProblem(field=name or "(whole)", problem=f"{message}{shown}"))
    return found


def problem_response(problem: Problem) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if problem.document.status == 401 else None
    return JSONResponse(problem.document.model_dump(), status_code=problem.document.status, media_type=PROBLEM_JSON, headers=headers)


def bearer(token: str) -> Callable[..., None]:
    """A dependency that lets in only requests with this token."""
    scheme = HTTPBearer(auto_error=False, description="The token in the file that OFFBEAT_TOKEN_FILE names")

    def check(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)]) -> None:
        if credentials is None:
            raise Problem(401, "No token", "send the header 'Authorization: Bearer TOKEN'")
        if not hmac.compare_digest(credentials.credentials.encode(), token.encode()):
            raise Problem(401, "Wrong token", "the token is not this service's: see the file that OFFBEAT_TOKEN_FILE names")

    return check


class BodyLimit:
    """Answers 413 to a request whose body is longer than `limit` bytes, whatever its headers say."""

    def __init__(self, app: Any, *, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limit:
                problem = Problem(413, "Body too large", f"a request body may have at most {self.limit} bytes")
                await problem_response(problem)(scope, receive, send)
                return
        sent = False

        async def replay() -> Any:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)


def base_app(
    *, title: str, description: str, registry: CollectorRegistry, ready: Callable[[], str | None], version: str = "0.1.0", max_body: int = MAX_BODY
) -> FastAPI:
    """An application with the routes that every process has. `ready` says what is still missing, or None."""
    app = FastAPI(title=title, description=description, version=version, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, limit=max_body)

    @app.exception_handler(Problem)
    async def _problem(_: Request, problem: Problem) -> Response:
        return problem_response(problem)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        return problem_response(Problem(422, "Invalid request", "some fields are not as they should be", errors=field_problems(list(error.errors()))))

    @app.exception_handler(StarletteHTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        return problem_response(Problem(error.status_code, str(error.detail)))

    @app.exception_handler(StoreAway)
    async def _away(_: Request, error: StoreAway) -> Response:
        return problem_response(Problem(503, "Redis is away", str(error)))

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error, extra={"path": request.url.path})
        return problem_response(Problem(500, "Internal error", "the log of this process has the details"))

    @app.get("/healthz", tags=["process"], summary="Does the process live?", response_model=dict[str, str])
    def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", tags=["process"], summary="Can it work?", response_model=dict[str, str], responses={503: {"model": ProblemDocument}})
    def readyz() -> dict[str, str]:
        missing = ready()
        if missing is not None:
            raise Problem(503, "Not ready", missing)
        return {"status": "ready"}

    @app.get("/metrics", tags=["process"], summary="Prometheus metrics", response_class=Response)
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app
