"""What every process serves: bearer tokens, problem documents, and a bound on bodies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, Counter
from pydantic import BaseModel, Field

from services.contracts.views import FieldProblem
from services.runtime.bus import StoreAway
from services.runtime.web import PROBLEM_JSON, Problem, base_app, bearer

TOKEN = "t" * 20


class Body(BaseModel):
    count: int = Field(ge=1)
    names: list[str] = []


def application() -> FastAPI:
    registry = CollectorRegistry()
    Counter("offbeat_seen", "Things seen", registry=registry).inc(3)
    app = base_app(title="t", description="d", registry=registry, ready=lambda: None, max_body=1000)

    @app.post("/secured", dependencies=[Depends(bearer(TOKEN))])
    def secured(body: Body) -> int:
        return body.count

    @app.get("/fails/{how}")
    def fails(how: str) -> None:
        match how:
            case "problem":
                raise Problem(409, "Not possible", "pause it first", errors=[FieldProblem(field="state", problem="is running")])
            case "away":
                raise StoreAway("Redis is away: connection refused")
            case "bug":
                raise RuntimeError("the password is hunter2")

    return app


@pytest.fixture
def http() -> Iterator[TestClient]:
    with TestClient(application(), raise_server_exceptions=False, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        yield client


def problem(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["content-type"] == PROBLEM_JSON
    document = answer.json()
    assert document.keys() == {"type", "title", "status", "detail", "errors"}
    assert (document["type"], document["status"]) == ("about:blank", status)
    return document


def test_every_process_has_metrics(http: TestClient) -> None:
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert "offbeat_seen_total 3.0" in answer.text


def test_a_request_with_the_token_is_let_in(http: TestClient) -> None:
    assert http.post("/secured", json={"count": 4}).json() == 4


@pytest.mark.parametrize(
    ("header", "title"),
    [
        (None, "No token"),
        ("", "No token"),
        (f"Basic {TOKEN}", "No token"),
        ("Bearer", "No token"),
        (f"Bearer {TOKEN}x", "Wrong token"),
        (f"Bearer {TOKEN[:-1]}", "Wrong token"),
        ("Bearer \u00fcmlaut".encode("latin-1"), "Wrong token"),
    ],
)
def test_a_request_without_the_token_is_not(header: str | bytes | None, title: str) -> None:
    with TestClient(application()) as http:
        answer = http.post("/secured", json={"count": 4}, headers={} if header is None else {"Authorization": header})
    document = problem(answer, 401)
    assert document["title"] == title
    assert answer.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in answer.text


def test_the_wrong_fields_are_named_with_what_they_were(http: TestClient) -> None:
    document = problem(http.post("/secured", json={"count": 0, "names": [1]}), 422)
    assert document["title"] == "Invalid request"
    assert document["errors"] == [
        {"field": "count", "problem": "Input should be greater than or equal to 1 (got 0)"},
        {"field": "names.0", "problem": "Input should be a valid string (got 1)"},
    ]


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b"null", b"\xff\xfe", b"\x00"])
def test_a_body_that_cannot_be_read_is_a_problem(http: TestClient, body: bytes) -> None:
    answer = http.post("/secured", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    problem(answer, answer.status_code)


def test_long_input_is_not_sent_back(http: TestClient) -> None:
    (error,) = problem(http.post("/secured", json={"count": "x" * 500}), 422)["errors"]
    assert "xx" not in error["problem"]


def test_errors_are_problem_documents(http: TestClient) -> None:
    assert problem(http.get("/nowhere"), 404)["title"] == "Not Found"
    assert problem(http.get("/secured"), 405)["title"] == "Method Not Allowed"
    document = problem(http.get("/fails/problem"), 409)
    assert (document["title"], document["detail"], document["errors"]) == (
        "Not possible", "pause it first", [{"field": "state", "problem": "is running"}]
    )  # fmt: skip
    assert problem(http.get("/fails/away"), 503)["detail"] == "Redis is away: connection refused"


def test_a_bug_tells_nothing_to_the_caller(http: TestClient) -> None:
    answer = http.get("/fails/bug")
    assert problem(answer, 500)["detail"] == "the log of this process has the details"
    assert "hunter2" not in answer.text


@pytest.mark.parametrize(("size", "status"), [(1000, 422), (1001, 413), (50_000, 413)])
def test_a_body_has_a_bound(http: TestClient, size: int, status: int) -> None:
    problem(http.post("/secured", content=b"x" * size, headers={"Content-Type": "application/json"}), status)


def test_a_body_that_comes_in_pieces_and_hides_its_length_has_the_same_bound(http: TestClient) -> None:
    taken = 0

    def pieces() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield b"x" * 100

    document = problem(http.post("/secured", content=pieces()), 413)
    assert document["detail"] == "a request body may have at most 1000 bytes"


def test_a_body_below_the_bound_comes_through_in_pieces(http: TestClient) -> None:
    assert http.post("/secured", content=iter([b'{"co', b'unt": 7}']), headers={"Content-Type": "application/json"}).json() == 7
