"""Bad input to the API: each is answered with a problem document that names the field, what was wrong and what is allowed, and makes no run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from reward_server.app import create_app as create_reward_app
from reward_server.judges.pool import JudgePools
from reward_server.scoring import Scoring
from reward_server.scoring_threads import ScoringThreads
from reward_server.verifiers.verdict import Tools
from services.client import ApiError, Client, Unreachable
from services.contracts.messages import Role
from services.contracts.states import Action
from services.runtime.bus import Bus
from services.runtime.lifecycle import RunLifecycle
from services.runtime.metrics import RewardMetrics
from services.runtime.process import serving
from services.runtime.web import MAX_BODY, PROBLEM_JSON
from tests.integration.conftest import CLUSTER_TOKEN, Api, OwnRedis, Stubs, free_port, serve_api

JSON = {"Content-Type": "application/json"}
TOML = {"Content-Type": "application/toml"}


def with_field(tree: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """`tree` with the value at a dotted name."""
    head, _, rest = name.partition(".")
    return {**tree, head: with_field(tree.get(head, {}), rest, value) if rest else value}


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The problem document of an answer with this status."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM_JSON
    document = answer.json()
    assert document["status"] == status
    assert document["title"]
    return document


def refused(api: Api, tree: dict[str, Any]) -> dict[str, str]:
    """What was wrong by field, as both routes that take a spec say it; neither makes a run."""
    document = problem(api.http.post("/v1/runs", json=tree), 422)
    assert problem(api.http.post("/v1/validate", json=tree), 422) == document
    assert api.client.runs().runs == []
    return {error["field"]: error["problem"] for error in document["errors"]}


# -- the spec ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "field", "said"),
    [
        ("learning_rte", 0.1, "learning_rte", "no such field; did you mean 'learning_rate'? There are: name, seed, versions"),
        ("staleness.max_lagg", 1, "staleness.max_lagg", "no such field; did you mean 'max_lag'? There are: min_lag, max_lag, order"),
        ("rewards", [{"name": "sum_to_target", "wait": 2}], "rewards.0.wait", "did you mean 'weight'? There are: name, weight, least"),
        ("xyz", 1, "xyz", "no such field. There are: name"),
        ("versions", "many", "versions", "valid integer"),
        ("versions", 0, "versions", "greater than or equal to 1 (got 0)"),
        ("model.dtype", "float8", "model.dtype", "'float32' or 'bfloat16' (got 'float8')"),
        ("staleness", {"min_lag": 3, "max_lag": 1}, "staleness", "staleness.min_lag (3) is above staleness.max_lag (1): lower min_lag"),
        ("updates_per_batch", 3, "(whole)", "updates_per_batch (3) must divide batch_groups (4)"),
        ("sampling.max_tokens", 200, "(whole)", "leaves no room for a prompt"),
        ("data", {"source": "jsonl"}, "data", "data.path is needed for the source 'jsonl'"),
        ("rewards", [], "rewards", "at least 1 item"),
        ("name", "no spaces", "name", "pattern"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_what_is_allowed(api: Api, spec_tree: dict[str, Any], name: str, value: Any, field: str, said: str) -> None:
    errors = refused(api, with_field(spec_tree, name, value))
    assert list(errors) == [field]
    assert said in errors[field]


def test_all_wrong_fields_are_named_at_once(api: Api, spec_tree: dict[str, Any]) -> None:
    errors = refused(api, {**spec_tree, "versions": -1, "tempo": 1, "clip": {"low": "x"}})
    assert set(errors) == {"versions", "tempo", "clip.low"}


def test_a_model_that_is_not_there_or_not_whole(api: Api, spec_tree: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    assert (
        "neither a folder nor in the local Hugging Face cache" in refused(api, with_field(spec_tree, "model.path", "/nowhere/at-all"))["model.path"]
    )
    folder = tmp_path / "model"
    folder.mkdir()
    assert "has no tokenizer.json" in refused(api, with_field(spec_tree, "model.path", str(folder)))["model.path"]
    (folder / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert "has no config.json" in refused(api, with_field(spec_tree, "model.path", str(folder)))["model.path"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "is not there"),
        ("", "is empty: give it at least one prompt"),
        ('{"prompt": "1=", "answer": 1}\n{"prompt": "2="\n', "line 2 is not JSON"),
        ('{"prompt": "1=", "answer": 1}\n\n[1]\n', "line 3 is not a JSON object"),
        ('{"question": "1=", "answer": 1}\n', "has no field 'prompt': add it, or set data.prompt_field to one of those there (answer, question)"),
        ('{"prompt": "1=", "answer": 1}\n{"prompt": "%s=", "answer": 1}\n' % ("1" * 200), "201 tokens and the limit is 112"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used(api: Api, spec_tree: dict[str, Any], tmp_path: Path, lines: str | None, said: str) -> None:
    path = tmp_path / "train.jsonl"
    if lines is not None:
        path.write_text(lines)
    errors = refused(api, {**spec_tree, "data": {"source": "jsonl", "path": str(path)}})
    assert list(errors) == ["data"]
    assert said in errors["data"]
    assert "train.jsonl" in errors["data"]


def test_an_unknown_source_is_answered_with_those_that_there_are(api: Api, spec_tree: dict[str, Any]) -> None:
    assert "did you mean 'jsonl'?" in refused(api, with_field(spec_tree, "data.source", "jsonlines"))["data"]


@pytest.fixture
def reward_server(stubs: Stubs) -> Iterator[None]:
    """A real one, as far as the API asks it."""
    port, pools, threads = free_port(), JudgePools(), ScoringThreads(2)
    scoring = Scoring(Tools(ask=pools.ask), threads, RewardMetrics(CollectorRegistry()))
    app = create_reward_app(scoring=scoring, cluster_token=CLUSTER_TOKEN, registry=CollectorRegistry(), ready=lambda: None)
    with serving(app, host="127.0.0.1", port=port):
        stubs.beat("away", Role.REWARD)  # one that does not answer: the next is asked
        stubs.beat("here", Role.REWARD, url=f"http://127.0.0.1:{port}")
        yield
    threads.close()
    pools.close()


@pytest.mark.usefixtures("reward_server")
def test_verifiers_are_checked_by_a_live_reward_server(api: Api, spec_tree: dict[str, Any]) -> None:
    assert api.client.validate(spec_tree).rewards_checked
    errors = refused(api, {**spec_tree, "rewards": [{"name": "sum_to_target"}, {"name": "sum_to_targte"}]})
    assert list(errors) == ["rewards.1"]
    assert "sum_to_target" in errors["rewards.1"]
    assert "rewards.0" in refused(api, {**spec_tree, "rewards": [{"name": "sum_to_target", "options": {"nonsense": 1}}]})


def test_without_a_reward_server_the_verifiers_are_left_unchecked_and_this_is_said(api: Api, spec_tree: dict[str, Any]) -> None:
    answer = api.client.validate({**spec_tree, "rewards": [{"name": "unheard-of"}]})
    assert not answer.rewards_checked
    assert answer.prompts == 33
    assert answer.first_prompt_tokens == len(answer.first_prompt)
    assert api.client.runs().runs == [], "to validate makes nothing"


# -- bodies -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        (b"\xff\xfe\x00", JSON, 400, "cannot be read as JSON"),
        (b'{"name": "\xff"}', JSON, 400, "cannot be read as JSON"),
        (b'{"name": ', JSON, 400, "cannot be read as JSON"),
        (b"", JSON, 400, "cannot be read as JSON"),
        (b"[" * 100_000, JSON, 400, "cannot be read as JSON"),
        (b'{"seed": ' + b"9" * 5_000 + b"}", JSON, 400, "cannot be read as JSON"),
        (b'{"name": "\\ud800"}', JSON, 400, "cannot be read as JSON"),
        (b'{"temperature": NaN}', JSON, 400, "cannot be read as JSON"),
        (b"[1, 2]", JSON, 422, "must be an object with fields, not list"),
        (b"null", JSON, 422, "not NoneType"),
        (b"\xff", TOML, 400, "cannot be read as TOML"),
        (b"name = \n", TOML, 400, "line 1"),
        (b"seed = " + b"9" * 5_000, TOML, 400, "cannot be read as TOML"),
        (b"temperature = nan", TOML, 422, "see `errors`"),
        (b"<spec/>", {"Content-Type": "application/xml"}, 415, "send application/json or application/toml"),
    ],
)  # fmt: skip
def test_bodies_that_cannot_be_read(api: Api, body: bytes, headers: dict[str, str], status: int, said: str) -> None:
    for method, path in (("POST", "/v1/runs"), ("POST", "/v1/validate")):
        assert said in problem(api.http.request(method, path, content=body, headers=headers), status)["detail"]


def test_a_number_that_is_not_finite_is_named(api: Api) -> None:
    document = problem(api.http.post("/v1/validate", content=b"[[rewards]]\nname = 'x'\nweight = inf", headers=TOML), 422)
    assert document["errors"] == [{"field": "rewards.0.weight", "problem": "inf is not a finite number"}]


def test_a_body_that_is_too_large(api: Api) -> None:
    document = problem(api.http.post("/v1/runs", content=b" " * (MAX_BODY + 1), headers=JSON), 413)
    assert str(MAX_BODY) in document["detail"]


def test_an_idempotency_key_that_was_used_for_another_spec(api: Api, spec_tree: dict[str, Any]) -> None:
    key = {"Idempotency-Key": "k"}
    assert [api.http.post("/v1/runs", json=spec_tree, headers=key).status_code for _ in range(2)] == [201, 200]
    document = problem(api.http.post("/v1/runs", json={**spec_tree, "seed": 8}, headers=key), 409)
    assert "another spec" in document["detail"]
    problem(api.http.post("/v1/runs", json=spec_tree, headers={"Idempotency-Key": "k" * 201}), 422)


# -- who asks, and for what -------------------------------------------------------------------------------------------------------------


def test_every_route_wants_the_token(api: Api) -> None:
    schema = api.http.get("/openapi.json").json()
    paths = [(path, method) for path, methods in schema["paths"].items() if path.startswith("/v1") for method in methods]
    assert len(paths) >= 18
    with httpx.Client(base_url=api.url, trust_env=False) as nobody:
        for path, method in paths:
            answer = nobody.request(method, path.format(run_id="a", study_id="a", letter="1-0"))
            assert "Authorization: Bearer TOKEN" in problem(answer, 401)["detail"], path
            assert answer.headers["www-authenticate"] == "Bearer"
            problem(nobody.request(method, path.format(run_id="a", study_id="a", letter="1-0"), headers={"Authorization": "Bearer wrong"}), 401)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""), ("POST", "/pause"), ("POST", "/resume"), ("POST", "/cancel"), ("PATCH", "/knobs"), ("GET", "/knobs"), ("GET", "/steps"),
        ("GET", "/events"), ("GET", "/samples"), ("GET", "/checkpoints"), ("GET", "/conservation"), ("GET", "/prompts"),
    ],
)  # fmt: skip
def test_a_run_that_is_not_known(api: Api, method: str, path: str) -> None:
    document = problem(api.http.request(method, f"/v1/runs/nobody{path}", content=b"{}" if method == "PATCH" else None), 404)
    assert document["detail"] == "run 'nobody' is not known: `GET /v1/runs` lists those that are"


def test_other_things_that_are_not_there(api: Api, spec_tree: dict[str, Any]) -> None:
    problem(api.http.get("/v1/dead-letters", params={"run": "nobody"}), 404)
    problem(api.http.post("/v1/dead-letters/nobody/1-0/replay"), 404)
    problem(api.http.get("/v1/runs", params={"cursor": "nobody"}), 404)
    problem(api.http.get("/v1/nothing"), 404)
    problem(api.http.delete("/v1/runs"), 405)
    run_id = api.client.submit(spec_tree).run_id
    assert "no dead letter 1-0" in problem(api.http.post(f"/v1/dead-letters/{run_id}/1-0/replay"), 404)["detail"]


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/runs?state=sleeping", "query.state"), ("/v1/runs?limit=0", "query.limit"), ("/v1/runs/{}/steps?points=0", "query.points"),
        ("/v1/runs/{}/steps?from=x", "query.from"), ("/v1/runs/{}/events?after=x", "query.after"), ("/v1/runs/{}/samples?limit=9999", "query.limit"),
        ("/v1/runs/{}/samples?cursor=+", "query.cursor"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(api: Api, spec_tree: dict[str, Any], path: str, field: str) -> None:
    run_id = api.client.submit(spec_tree).run_id
    assert [error["field"] for error in problem(api.http.get(path.format(run_id)), 422)["errors"]] == [field]
    assert problem(api.http.get(f"/v1/runs/{run_id}/events", headers={"Last-Event-ID": "x"}), 422)["errors"][0]["field"] == "header.last-event-id"


# -- knobs ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "field", "said"),
    [
        ({"versions": 9}, "versions", "not a knob. Knobs are advantage.weight, clip.high, clip.low"),
        ({"staleness": {"max": 1}}, "staleness.max", "did you mean 'staleness.max_lag'?"),
        ({"model": {"path": "x"}}, "model.path", "not a knob"),
        ({"clip": 3}, "clip", "not a knob"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": 0}, "temperature", "greater than 0"),
        ({"staleness.min_lag": 2}, "staleness", "staleness.min_lag (2) is above staleness.max_lag (1)"),
        ({"updates_per_batch": 3}, "(whole)", "must divide batch_groups"),
    ],
)  # fmt: skip
def test_knobs_that_cannot_be_turned_so(api: Api, spec_tree: dict[str, Any], values: dict[str, Any], field: str, said: str) -> None:
    run_id = api.client.submit(spec_tree).run_id
    (error,) = problem(api.http.patch(f"/v1/runs/{run_id}/knobs", json=values), 422)["errors"]
    assert error["field"] == field
    assert said in error["problem"]
    assert api.client.knobs(run_id).changes == []


def test_no_knobs_at_all_and_knobs_of_a_run_that_has_ended(api: Api, bus: Bus, spec_tree: dict[str, Any]) -> None:
    run_id = api.client.submit(spec_tree).run_id
    assert (
        "name at least one of the knobs: advantage.weight, clip.high" in problem(api.http.patch(f"/v1/runs/{run_id}/knobs", json={}), 422)["detail"]
    )
    problem(api.http.patch(f"/v1/runs/{run_id}/knobs", content=b"{", headers=JSON), 400)
    RunLifecycle(bus, run_id).move(Action.CANCEL)
    document = problem(api.http.patch(f"/v1/runs/{run_id}/knobs", json={"temperature": 0.5}), 409)
    assert "is cancelled: its knobs no longer turn" in document["detail"]
    assert problem(api.http.post(f"/v1/runs/{run_id}/pause"), 409)["detail"] == "a cancelled run cannot pause; possible: nothing"


# -- Redis, the client, and the schema --------------------------------------------------------------------------------------------------


def test_while_redis_is_away_every_route_says_so(own_redis: OwnRedis, tmp_path: Path, spec_tree: dict[str, Any]) -> None:
    own_redis.start()
    with serve_api(own_redis.url, tmp_path) as api:
        run_id = api.client.submit(spec_tree).run_id
        own_redis.stop()
        for method, path in (("GET", "/v1/runs"), ("GET", f"/v1/runs/{run_id}"), ("GET", f"/v1/runs/{run_id}/events"), ("GET", "/v1/fleet")):
            assert "Redis is away" in problem(api.http.request(method, path), 503)["detail"]
        assert "Redis is away" in problem(api.http.post("/v1/runs", json=spec_tree), 503)["detail"]
        assert problem(api.http.post("/v1/runs", json={**spec_tree, "versions": 0}), 422), "a wrong spec is wrong without Redis"
        own_redis.start()
        assert api.client.run(run_id).run_id == run_id, "it goes on by itself"


def test_the_clients_error_reads_as_a_sentence_for_each_field(api: Api, spec_tree: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refusal:
        api.client.submit({**spec_tree, "versions": 0, "seed": -1})
    assert refusal.value.status == 422
    assert [error.field for error in refusal.value.problem.errors] == ["seed", "versions"]
    assert str(refusal.value).splitlines() == [
        "Invalid run spec (422): seed, versions: see `errors`; the schema is at GET /v1/schema",
        "  seed: Input should be greater than or equal to 0 (got -1)",
        "  versions: Input should be greater than or equal to 1 (got 0)",
    ]


def test_the_client_says_when_nobody_answers_and_when_the_token_is_wrong(api: Api, tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="does not answer"):
        Client(f"http://127.0.0.1:{free_port()}", "x").runs()
    with pytest.raises(ApiError, match=r"Wrong token \(401\)"):
        Client(api.url, "x").runs()
    with pytest.raises(Unreachable, match=r"no local stack in .*: start one with `offbeat up`"):
        Client.local(tmp_path)


def test_the_client_finds_the_local_stack(api: Api, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t" * 32 + "\n")
    (tmp_path / "state.json").write_text(json.dumps({"api_url": api.url, "token_file": str(tmp_path / "token"), "pid": 1}))
    with Client.local(tmp_path) as client:
        assert client.runs().runs == []
        assert "staleness.max_lag" in client.schema().knobs


def test_openapi_documents_every_problem_and_resolves(api: Api) -> None:
    schema = api.http.get("/openapi.json").json()
    parts = schema["components"]["schemas"]

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from ([node["$ref"]] if isinstance(node.get("$ref"), str) else [])
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    assert {ref.removeprefix("#/components/schemas/") for ref in references(schema)} <= set(parts)
    for path, methods in schema["paths"].items():
        if not path.startswith("/v1"):
            continue
        for method, route in methods.items():
            assert route["summary"], path
            assert {"401", "413", "422", "500", "503"} <= set(route["responses"]), (path, method)
            assert "{run_id}" not in path or "404" in route["responses"], (path, method)
            for status, response in route["responses"].items():
                assert int(status) < 400 or list(response["content"]) == [PROBLEM_JSON], (path, method, status)
    assert list(schema["paths"]["/v1/runs"]["post"]["requestBody"]["content"]) == ["application/json", "application/toml"]
    assert parts["RunSpec"]["properties"]["versions"]["description"]
    assert "required" not in parts["RunSpec"], "every field of a spec has a default"
