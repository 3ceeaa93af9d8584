"""The reward server over HTTP: the same scores as on the stream, bounded in every direction, each item by itself."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from pydantic import JsonValue

from reward_server.app import MAX_BODY, create_app
from reward_server.judges.pool import JudgePools
from reward_server.scoring import Scoring
from reward_server.scoring_threads import ScoringThreads
from reward_server.verifiers import VERIFIERS
from reward_server.verifiers.verdict import Tools, Unjudged
from services.contracts.messages import Outcome
from services.contracts.scoring import BATCH
from services.runtime.metrics import RewardMetrics
from services.runtime.web import PROBLEM_JSON
from tests.integration.conftest import CLUSTER_TOKEN, wait_until

BOMB = r"9^{9^{9^{9}}}"
JSON = {"Content-Type": "application/json"}
SUM = {"rewards": [{"name": "sum_to_target"}]}
MATH = {"rewards": [{"name": "math"}]}


@dataclass
class Server:
    client: TestClient
    registry: CollectorRegistry

    def counted(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


def serve(tools: Tools, *, threads: int = 4, most_waiting: int = 64) -> Iterator[Server]:
    registry, pool = CollectorRegistry(), ScoringThreads(threads, most_waiting=most_waiting)
    scoring = Scoring(tools, pool, RewardMetrics(registry))
    app = create_app(scoring=scoring, cluster_token=CLUSTER_TOKEN, registry=registry, ready=lambda: "waits for Redis")
    with TestClient(app, headers={"Authorization": f"Bearer {CLUSTER_TOKEN}"}) as client:
        yield Server(client, registry)
    pool.close()


@pytest.fixture
def server() -> Iterator[Server]:
    pools = JudgePools()
    yield from serve(Tools(ask=pools.ask))
    pools.close()


@pytest.fixture
def http(server: Server) -> TestClient:
    return server.client


class Gate:
    """A judge that answers when it may."""

    def __init__(self) -> None:
        self.opened, self.asked = threading.Event(), threading.Semaphore(0)

    def ask(self, judge: str, request: JsonValue) -> JsonValue:
        self.asked.release()
        if not self.opened.wait(60):
            raise Unjudged(Outcome.TIMEOUT, "the test has left it closed")
        return "right"


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def gated(gate: Gate) -> Iterator[Server]:
    for server in serve(Tools(ask=gate.ask), threads=2, most_waiting=4):
        yield server
        gate.opened.set()


# -- one completion -------------------------------------------------------------------------------------------------------------------


def test_one_completion_is_judged_over_http_as_on_the_stream(server: Server) -> None:
    rewards = [{"name": "sum_to_target", "weight": 2.0}, {"name": "format", "options": {"pattern": "[0-9+]*"}}]
    answer = server.client.post("/v1/score", json={"rewards": rewards, "completion": "3+4", "answer": 7}).json()
    assert (answer["reward"], answer["outcome"], answer["tier"]) == (3.0, "ok", "")
    assert [(part["verifier"], part["score"], part["outcome"]) for part in answer["parts"]] == [("sum_to_target", 1.0, "ok"), ("format", 1.0, "ok")]
    assert 0 <= sum(part["milliseconds"] for part in answer["parts"]) <= answer["milliseconds"] + 1
    unverifiable = server.client.post("/v1/score", json={"rewards": rewards, "completion": "3+4", "answer": None}).json()
    assert (unverifiable["reward"], unverifiable["outcome"]) == (None, "unverifiable")
    assert [part["score"] for part in unverifiable["parts"]] == [None, 1.0]
    assert server.counted("offbeat_reward_verifications_total", verifier="sum_to_target", outcome="unverifiable", tier="") == 1
    assert server.counted("offbeat_reward_verifications_total", verifier="format", outcome="ok", tier="") == 2
    assert [server.counted("offbeat_reward_failures_total", verifier=name) for name in ("sum_to_target", "format")] == [1, 0]
    assert server.counted("offbeat_reward_verification_seconds_count", verifier="format") == 2


def test_an_answer_that_takes_too_long_is_a_time_out_and_no_wrong_answer(http: TestClient) -> None:
    answer = http.post("/v1/score", json={**MATH, "completion": rf"\boxed{{{BOMB}}}", "answer": "7"}).json()
    assert (answer["reward"], answer["outcome"], answer["parts"][0]["outcome"]) == (None, "timeout", "timeout")
    assert answer["milliseconds"] > 900


@pytest.mark.parametrize("path", ["/v1/rubric/check", "/v1/score", "/v1/score/batch"])
def test_each_wrong_verifier_of_a_rubric_is_named(http: TestClient, path: str) -> None:
    rewards: list[dict[str, Any]] = [
        {"name": "sum_to_target"},
        {"name": "maths"},
        {"name": "format", "options": {"boxed": True, "patern": "x"}},
        {"name": "format", "options": {"pattern": "("}},
    ]
    more: dict[str, dict[str, Any]] = {"/v1/score": {"completion": "x"}, "/v1/score/batch": {"items": [{"completion": "x"}]}}
    answer = http.post(path, json={"rewards": rewards, **more.get(path, {})})
    assert (answer.status_code, answer.json()["title"]) == (422, "Invalid rubric")
    errors = {error["field"]: error["problem"] for error in answer.json()["errors"]}
    assert errors.keys() == {"rewards.1", "rewards.2", "rewards.3"}
    assert "did you mean 'math'?" in errors["rewards.1"]
    assert "patern: Extra inputs are not permitted" in errors["rewards.2"]
    assert "Options are: " in errors["rewards.2"]
    assert "not a regular expression" in errors["rewards.3"]


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"rewards": []}, {"rewards"}),
        ({}, {"rewards"}),
        ({"rewards": [{"weight": 1.0}]}, {"rewards.0.name"}),
        ({"rewards": [{"name": "math", "weight": "heavy"}], "extra": 1}, {"extra", "rewards.0.weight"}),
    ],
)
def test_each_wrong_field_of_a_request_is_named(http: TestClient, body: dict[str, Any], fields: set[str]) -> None:
    answer = http.post("/v1/rubric/check", json=body)
    assert answer.status_code == 422
    assert {error["field"] for error in answer.json()["errors"]} >= fields


# -- batches --------------------------------------------------------------------------------------------------------------------------


def test_a_batch_keeps_its_order_and_one_bad_item_loses_no_other(http: TestClient) -> None:
    items = [
        {"completion": "3+4", "answer": 7},
        {"answer": 7},
        {"completion": "3+5", "answer": 7},
        "no object",
        {"completion": 5, "answer": 7},
        {"completion": "\ud800", "answer": 7},
        {"completion": "3+4", "answer": 7, "extra": 1},
        {"completion": "3+4", "answer": None},
        {"completion": "\x00", "answer": 7},
        {"completion": "", "answer": 7},
        {"completion": "2+5", "answer": 7},
    ]
    answer = http.post("/v1/score/batch", content=json.dumps({**SUM, "items": items}), headers=JSON)
    assert answer.status_code == 200
    found = answer.json()["items"]
    assert [item["score"] and (item["score"]["reward"], item["score"]["outcome"]) for item in found] == [
        (1.0, "ok"), None, (0.0, "ok"), None, None, (0.0, "ok"), None, (None, "unverifiable"), (0.0, "ok"), (0.0, "ok"), (1.0, "ok"),
    ]  # fmt: skip
    problems = [item["problem"] for item in found if item["score"] is None]
    assert [problem["status"] for problem in problems] == [422] * 4
    assert [problem["errors"][0]["field"] for problem in problems] == ["completion", "(whole)", "completion", "extra"]


def test_the_items_of_a_batch_are_judged_side_by_side(gated: Server, gate: Gate) -> None:
    body = {**MATH, "items": [{"completion": rf"\boxed{{x_{n}}}", "answer": "z"} for n in range(5)]}
    with ThreadPoolExecutor(1) as executor:
        answer = executor.submit(gated.client.post, "/v1/score/batch", json=body)
        assert all(gate.asked.acquire(timeout=30) for _ in range(2))
        assert not gate.asked.acquire(timeout=0.2), "there are two threads"
        gate.opened.set()
        assert [item["score"]["reward"] for item in answer.result(60).json()["items"]] == [1.0] * 5


def test_what_is_too_much_is_refused_and_told_when_to_come_again(gated: Server, gate: Gate) -> None:
    body = {**MATH, "items": [{"completion": rf"\boxed{{x_{n}}}", "answer": "z"} for n in range(5)]}
    with ThreadPoolExecutor(1) as executor:
        first = executor.submit(gated.client.post, "/v1/score/batch", json=body)
        assert all(gate.asked.acquire(timeout=30) for _ in range(2))
        refused = gated.client.post("/v1/score/batch", json=body)
        assert (refused.status_code, refused.headers["content-type"], refused.json()["status"]) == (429, PROBLEM_JSON, 429)
        assert 1 <= int(refused.headers["Retry-After"]) <= 30
        assert gated.counted("offbeat_reward_waiting", source="http") == 3
        assert gated.counted("offbeat_reward_refused_total") == 1
        assert gated.client.get("/healthz").status_code == 200, "probes are answered whatever waits"
        gate.opened.set()
        assert first.result(60).status_code == 200
    assert gated.client.post("/v1/score/batch", json=body).status_code == 200


@pytest.mark.parametrize("count", [0, BATCH + 1])
def test_a_batch_has_a_bounded_number_of_items(http: TestClient, count: int) -> None:
    answer = http.post("/v1/score/batch", json={**SUM, "items": [{"completion": "1", "answer": 1}] * count})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "items")


def test_a_body_has_a_bounded_size(http: TestClient) -> None:
    answer = http.post("/v1/score", content=json.dumps({**SUM, "completion": "1" * MAX_BODY, "answer": 1}), headers=JSON)
    assert (answer.status_code, answer.headers["content-type"]) == (413, PROBLEM_JSON)


def test_ten_thousand_boxes_and_megabytes_of_digits_are_answered(http: TestClient) -> None:
    texts = [r"\boxed{1}" * 10_000, "9" * 2_000_000, r"\boxed{" + "9" * 1_000_000 + "}", r"\boxed{" * 5_000]
    began = time.monotonic()
    found = http.post("/v1/score/batch", json={**MATH, "items": [{"completion": text, "answer": "1"} for text in texts]}).json()["items"]
    assert [item["score"]["outcome"] for item in found] == ["ok"] * 4
    assert [item["score"]["reward"] for item in found] == [1.0, 0.0, 0.0, 0.0]
    assert time.monotonic() - began < 30


# -- verifiers and their gold answers -------------------------------------------------------------------------------------------------


def test_the_verifiers_are_told_with_their_options_and_examples(http: TestClient) -> None:
    told = {verifier["name"]: verifier for verifier in http.get("/v1/verifiers").json()}
    assert told.keys() == VERIFIERS.keys()
    assert "pattern" in told["format"]["options"]["properties"]
    assert all(verifier["text"] and verifier["examples"] for verifier in told.values())
    assert {name for name, verifier in told.items() if not verifier["checks_gold"]} == {"remote", "verifiers"}


@pytest.mark.parametrize("name", ["math", "sum_to_target", "exact", "format"])
def test_the_examples_that_are_told_are_true(http: TestClient, name: str) -> None:
    (verifier,) = [verifier for verifier in http.get("/v1/verifiers").json() if verifier["name"] == name]
    for example in verifier["examples"]:
        body = {key: example[key] for key in ("completion", "answer", "prompt")}
        answer = http.post("/v1/score", json={"rewards": [{"name": name, "options": example["options"]}], **body}).json()
        assert answer["reward"] == example["score"]


def test_gold_answers_are_judged_as_if_they_had_been_given(http: TestClient) -> None:
    answers: list[JsonValue] = ["1/2", r"\frac{\sqrt{2}}{2}", 7, r"\sqrt{2", None]
    body = {"verifier": {"name": "math"}, "items": [{"answer": answer} for answer in answers]}
    found = http.post("/v1/gold/check", json=body).json()["items"]
    assert [item["score"] and item["score"]["reward"] for item in found[:3]] == [1.0] * 3
    assert r"\boxed{1/2}" in found[0]["completion"]
    assert found[4]["score"] is None or found[4]["score"]["reward"] is None
    (example,) = VERIFIERS["remote"].examples
    none = http.post("/v1/gold/check", json={"verifier": {"name": "remote", "options": dict(example.options)}, "items": [{"answer": "1"}]}).json()
    assert none["items"] == [{"completion": None, "score": None}]
    records = [{"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, {"instruction_id_list": ["punctuation:no_commas"], "kwargs": [{}]}]
    body = {"verifier": {"name": "instructions"}, "items": [{"answer": record} for record in records]}
    found = http.post("/v1/gold/check", json=body).json()["items"]
    assert [(item["completion"], item["score"]["outcome"]) for item in found] == [(None, "ok"), (None, "unverifiable")]
    wrong = http.post("/v1/gold/check", json={"verifier": {"name": "maths"}, "items": [{"answer": "1"}]}).json()
    assert wrong["errors"][0]["field"] == "verifier"


# -- access ---------------------------------------------------------------------------------------------------------------------------


def test_the_routes_are_for_the_fleet_only(http: TestClient) -> None:
    bare = {"Authorization": ""}
    routes = http.get("/openapi.json").json()["paths"]
    own = [(path, method) for path, methods in routes.items() for method in methods if path.startswith("/v1/")]
    assert len(own) == 5
    for path, method in own:
        assert http.request(method, path, json={}, headers=bare).status_code == 401
    assert http.get("/healthz", headers=bare).status_code == 200
    assert http.get("/readyz", headers=bare).json()["detail"] == "waits for Redis"


def test_a_health_probe_is_answered_while_every_thread_is_busy(gated: Server, gate: Gate) -> None:
    """Routes that wait for a verdict hold none of the threads that answer the others."""
    body = {**MATH, "completion": r"\boxed{x}", "answer": "z"}
    with ThreadPoolExecutor(6) as executor:
        waiting = [executor.submit(gated.client.post, "/v1/score", json=body) for _ in range(2)]
        assert all(gate.asked.acquire(timeout=30) for _ in range(2))  # before the others: no more than four may wait
        waiting += [executor.submit(gated.client.post, "/v1/score", json=body) for _ in range(4)]
        wait_until(lambda: gated.counted("offbeat_reward_waiting", source="http") == 4)
        assert gated.client.get("/healthz").status_code == 200
        gate.opened.set()
        assert [answer.result(60).json()["reward"] for answer in waiting] == [1.0] * 6
