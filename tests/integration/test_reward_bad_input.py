"""Bad input to a reward server: a clear outcome each, and for what its OpenAPI schema lets one think of never a fault of the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from reward_server.app import create_app
from reward_server.judges.pool import JudgePools
from reward_server.scoring import Scoring
from reward_server.scoring_threads import ScoringThreads
from reward_server.verifiers import VERIFIERS
from reward_server.verifiers.verdict import Tools
from services.runtime.metrics import RewardMetrics
from services.runtime.web import PROBLEM_JSON
from tests.integration.conftest import CLUSTER_TOKEN

HEADERS = {"Authorization": f"Bearer {CLUSTER_TOKEN}", "Content-Type": "application/json"}


@pytest.fixture(scope="module")
def app() -> Iterator[FastAPI]:
    pools, threads, registry = JudgePools(workers=1), ScoringThreads(4), CollectorRegistry()
    scoring = Scoring(Tools(ask=pools.ask), threads, RewardMetrics(registry))
    yield create_app(scoring=scoring, cluster_token=CLUSTER_TOKEN, registry=registry, ready=lambda: None)
    threads.close()
    pools.close()


@pytest.fixture(scope="module")
def http(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, headers=HEADERS, raise_server_exceptions=False) as client:
        yield client


def item(verifier: str, completion: str, answer: Any = None, **options: Any) -> dict[str, Any]:
    return {"rewards": [{"name": verifier, "options": options}], "completion": completion, "answer": answer}


TESTS = {"function": "f", "calls": [{"args": [1], "expected": 1}]}
NO_COMMA = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
SOLUTION = "```python\ndef f(x): return x\n```"
ROWS: list[tuple[str, dict[str, Any], float | None, str, str]] = [
    ("megabytes of text", item("math", "a" * 3_000_000, "1"), 0.0, "ok", "no answer"),
    ("megabytes in a box", item("math", "\\boxed{" + "9" * 3_000_000 + "}", "1"), 0.0, "ok", "no answer"),
    ("megabytes of code", item("code", f"```python\n{'a' * 3_000_000}\n```", TESTS), 0.0, "ok", "longer than"),
    ("NUL", item("math", "\\boxed{1\x002}", "12"), 0.0, "ok", "answer '1\\x002' is no expression"),
    ("NUL in code", item("code", "```python\n\x00\n```", TESTS), 0.0, "ok", "NUL"),
    ("broken unicode", item("math", "\\boxed{\ud800}", "1"), 0.0, "ok", "answer '\\ud800'"),
    ("broken unicode in code", item("code", "```python\n'\ud800'\n```", TESTS), 0.0, "ok", "not valid Unicode"),
    ("broken unicode as gold", item("exact", "a", "\ud800"), 0.0, "ok", "not equal"),
    ("empty completion", item("math", "", "1"), 0.0, "ok", "no answer"),
    ("empty completion, code", item("code", "", TESTS), 0.0, "ok", "no code"),
    ("empty completion, instructions", item("instructions", "", NO_COMMA), 0.0, "ok", "0 of 1"),
    ("gold missing", item("math", "\\boxed{1}"), None, "unverifiable", "the answer must be a number, or a text"),
    ("gold missing, code", item("code", SOLUTION), None, "unverifiable", "must be a record of tests"),
    ("gold missing, exact", item("exact", "a"), None, "unverifiable", "must be a text or a number"),
    ("gold missing, reasoning_gym", item("reasoning_gym", "<answer>1</answer>"), None, "unverifiable", "must be a reasoning-gym entry"),
    ("gold missing, instructions", item("instructions", "a"), None, "unverifiable", "no record of instructions"),
    ("gold missing, regex", item("regex", "a"), None, "unverifiable", "must be a text"),
    ("gold missing, sum", item("sum_to_target", "1"), None, "unverifiable", "must be a whole number"),
    ("gold that cannot be read", item("math", "\\boxed{1}", "\\sqrt{2"), None, "unverifiable", "cannot read the gold answer"),
    ("tests that are no JSON", item("code", SOLUTION, "{'function': f"), None, "unverifiable", "the answer is not valid JSON"),
    ("tests that are half JSON", item("code", SOLUTION, {"input_output": '{"inputs": ['}), None, "unverifiable", "input_output is not valid JSON"),
    ("tests that are none", item("code", SOLUTION, {"function": "f", "calls": []}), None, "unverifiable", "0 tests"),
    ("packed tests that are none", item("code", SOLUTION, {"private_test_cases": "eJw="}), None, "unverifiable", "neither JSON nor packed"),
    ("10,000 boxes", item("math", "\\boxed{1}" * 10_000, "1"), 1.0, "ok", "answer '1'"),
    ("10,000 open boxes", item("math", "\\boxed{" * 10_000, "1"), 0.0, "ok", "no answer"),
    ("10,000 boxes for a format", item("format", "\\boxed{1}" * 10_000, boxed=True), 0.0, "ok", "10000 boxes"),
    ("10,000 blocks of code", item("code", "```\n1\n```\n" * 10_000, {}), None, "unverifiable", "no record of tests"),
    ("no sandbox", item("code", SOLUTION, TESTS), None, "error:sandbox", "no sandbox"),
    ("no file there", item("length", "a", unit="tokens", tokenizer="/nowhere"), None, "error:verifier", "no tokenizer"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reward", "outcome", "detail"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_bad_input_has_a_clear_outcome(http: TestClient, body: dict[str, Any], reward: float | None, outcome: str, detail: str) -> None:
    answer = http.post("/v1/score", content=json.dumps(body))
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert (said["reward"], said["outcome"]) == (reward, outcome)
    assert detail in said["parts"][0]["detail"]


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        (item("maths", "1", "1"), "rewards.0", "there is no verifier 'maths': did you mean 'math'?"),
        (item("math", "1", "1", extract="middle"), "rewards.0", "extract: Input should be 'boxed' or 'last'"),
        (item("math", "1", "1", boxed=True), "rewards.0", "boxed: Extra inputs are not permitted. Options are: timeout_score, extract"),
        (item("exact", "1", "1", **{"\ud800": 1}), "rewards.0", "unicode"),
        (item("format", "1", pattern="("), "rewards.0", "not a regular expression"),
        (item("remote", "1", url="file:///etc/passwd"), "rewards.0", "must begin with http"),
        (item("math", "1") | {"reward_least": 1.0, "reward_most": 0.0}, "(whole)", "above reward_most"),
        (item("math", "1") | {"reward_least": float("inf")}, "reward_least", "finite"),
        (item("math", "1") | {"rewards": [{"name": "math", "weight": 1e300}]}, "rewards.0.weight", "less than or equal to 1000000"),
        (item("math", "1") | {"rewards": []}, "rewards", "at least 1"),
        ({"rewards": [{"name": "math"}]}, "completion", "Field required"),
    ],
)
def test_bad_arguments_are_named(http: TestClient, body: dict[str, Any], field: str, said: str) -> None:
    answer = http.post("/v1/score", content=json.dumps(body))
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM_JSON)
    problems = {error["field"]: error["problem"] for error in answer.json()["errors"]}
    assert said in problems[field]


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 422), (b"{", 422), (b"[]", 422), (b"null", 422), (b'"\xff"', 400), (b"[" * 100_000, 400), (b'{"answer": ' + b"9" * 5000 + b"}", 400)],
)
def test_a_body_that_cannot_be_read_is_refused(http: TestClient, body: bytes, status: int) -> None:
    answer = http.post("/v1/score", content=body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM_JSON)


def test_a_gold_answer_of_broken_unicode_is_told_escaped(http: TestClient) -> None:
    answer = http.post("/v1/gold/check", content=json.dumps({"verifier": {"name": "exact"}, "items": [{"answer": "\ud800"}]}))
    assert answer.json()["items"][0]["completion"] == "\\ud800"
    assert answer.json()["items"][0]["score"]["reward"] == 1.0


REAL = [{"name": name, "options": dict(example.options)} for name, one in VERIFIERS.items() for example in one.examples]
ROUTES = [("GET", "/v1/verifiers"), *(("POST", f"/v1/{path}") for path in ("score", "score/batch", "gold/check", "rubric/check"))]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_the_server_answers_as_its_schema_says_whatever_is_sent(app: FastAPI, method: str, path: str) -> None:
    operation = schemathesis.openapi.from_asgi("/openapi.json", app)[path][method]

    @settings(max_examples=60 if method == "POST" else 5, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(operation.as_strategy() | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE), st.none() | st.sampled_from(REAL))
    def check(case: Case, real: dict[str, Any] | None) -> None:
        if real and isinstance(case.body, dict):  # a verifier that there is: any other name ends in a refusal
            case.body = case.body | ({"verifier": real} if path == "/v1/gold/check" else {"rewards": [real]})
        case.call_and_validate(
            headers={"Authorization": f"Bearer {CLUSTER_TOKEN}"}, excluded_checks=[positive_data_acceptance, negative_data_rejection]
        )

    check()


def test_the_schema_has_every_route_with_its_errors_and_an_example(http: TestClient) -> None:
    told = http.get("/openapi.json").json()
    routes = {(method.upper(), path): one for path, methods in told["paths"].items() if path.startswith("/v1/") for method, one in methods.items()}
    assert routes.keys() == set(ROUTES)
    for (method, path), route in routes.items():
        assert {"200", "401"} <= route["responses"].keys()
        assert all(list(one["content"]) == [PROBLEM_JSON] for status, one in route["responses"].items() if status != "200")
        if method == "POST":
            name = route["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            for example in told["components"]["schemas"][name]["examples"]:
                assert http.request(method, path, json=example).status_code == 200


def test_the_example_of_a_score_is_true(http: TestClient) -> None:
    (example,) = http.get("/openapi.json").json()["components"]["schemas"]["ScoreBody"]["examples"]
    assert http.post("/v1/score", json=example).json()["reward"] == 1.5
