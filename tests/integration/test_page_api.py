"""The routes that the page stands on: a run live, chosen measurements, the text of single tokens, verdicts."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import connect_sse

from services.contracts.messages import StepRecord
from services.contracts.spec import RunSpec
from services.contracts.topics import Log
from services.runtime.bus import Bus
from services.runtime.codec import encode
from services.runtime.ledger import Ledger
from services.runtime.tokenizer import PromptTokenizer
from tests.browser.recorded import commit, play, recorded_run, sample
from tests.integration.conftest import TOKEN, Api

PATIENCE = 60.0


@pytest.fixture
def tokenizer(model_folder: Path) -> PromptTokenizer:
    return PromptTokenizer(model_folder)


def followed(api: Api, run_id: str, **params: str) -> Iterator[tuple[str, str, Any]]:
    """(event, id, data) as they come, to the end."""
    with connect_sse(api.http, "GET", f"/v1/runs/{run_id}/live", params=params, timeout=PATIENCE) as source:
        for message in source.iter_sse():
            yield message.event, message.id, json.loads(message.data)


def test_a_run_that_has_ended_is_told_whole_and_ends(api: Api, bus: Bus, spec_tree: dict[str, Any]) -> None:
    spec = RunSpec.model_validate(spec_tree | {"evaluation": {"sets": [{"name": "held-out"}]}})
    run_id = recorded_run(bus, spec, steps=6, sets=["held-out"], complete=True)
    found = list(followed(api, run_id))
    assert found[-1][0] == "end"
    told = {event: data for event, _, data in found}
    assert [step["version"] for step in told["steps"]] == list(range(6))
    assert told["steps"][3]["values"] == api.client.steps(run_id).steps[3].values
    assert told["steps"][3]["lags"] == {"0": 200, "1": 500}
    assert [one["version"] for one in told["evaluations"]] == [one.version for one in api.client.evaluations(run_id).evaluations]
    assert [event["id"] for event in told["events"]] == [event.id for event in api.client.events(run_id)]
    assert told["state"] == {"state": "completed", "version": 6, "reason": ""}


def test_only_the_measurements_that_were_asked_for_come(api: Api, bus: Bus, spec: RunSpec) -> None:
    run_id = recorded_run(bus, spec, steps=3, complete=True)
    told = {event: data for event, _, data in followed(api, run_id, keys="entropy_nats,ess_share/lag/2-3,no_such")}
    assert set(told["steps"][0]["values"]) == {"entropy_nats", "ess_share/lag/2-3"}
    assert set(api.http.get(f"/v1/runs/{run_id}/steps?keys=reward_mean&points=1").json()["steps"][0]["values"]) == {"reward_mean"}


def test_a_reader_goes_on_where_it_left_off(api: Api, bus: Bus, spec: RunSpec) -> None:
    run_id = recorded_run(bus, spec, steps=4)
    place = ""
    for event, message_id, data in followed(api, run_id):
        place = message_id or place
        if event == "state":
            assert data["version"] == 4
            break
    commit(bus, run_id, spec, 4)
    for event, _, data in followed(api, run_id, after=place):
        if event == "steps":
            assert [step["version"] for step in data] == [4]
            break


def test_what_comes_is_told_as_it_comes(api: Api, bus: Bus, spec: RunSpec) -> None:
    run_id = recorded_run(bus, spec, steps=1)
    versions = []
    for event, _, data in followed(api, run_id, keys="reward_mean"):
        if event == "state" and data["version"] == 1:
            threading.Timer(0.3, commit, (bus, run_id, spec, 1)).start()
        if event == "steps":
            versions += [step["version"] for step in data]
        if event == "state" and data["version"] == 2:
            break
    assert versions == [0, 1]


def test_a_number_that_is_not_finite_comes_as_null(api: Api, bus: Bus, spec: RunSpec) -> None:
    run_id = recorded_run(bus, spec, steps=0)
    record = StepRecord(run_id=run_id, version=0, values={"loss": float("nan"), "gradient_norm": float("inf")}, lags={}, window=(0, 1), groups=())
    bus.redis.xadd(Ledger(bus, run_id).keys.stream(Log.STEPS), {"seq": 1, "data": encode(record)})
    step = next(data for event, _, data in followed(api, run_id) if event == "steps")[0]
    assert step["values"] == {"loss": None, "gradient_norm": None}


@pytest.mark.parametrize("query", ["after=1", "after=x_0_0", "after=0_0_0_0", "keys=" + ",".join(f"k{i}" for i in range(201))])
def test_what_cannot_be_followed_is_refused(api: Api, bus: Bus, spec: RunSpec, query: str) -> None:
    run_id = recorded_run(bus, spec, steps=0)
    assert api.http.get(f"/v1/runs/{run_id}/live?{query}").status_code == 422
    assert api.http.get("/v1/runs/nothing/live").status_code == 404


def test_the_live_stream_needs_the_token_and_the_page_does_not(api: Api, bus: Bus, spec: RunSpec) -> None:
    run_id = recorded_run(bus, spec, steps=0)
    with httpx.Client(base_url=api.url, trust_env=False) as stranger:
        assert stranger.get(f"/v1/runs/{run_id}/live").status_code == 401
        assert stranger.get(f"/v1/runs/{run_id}/live?token={TOKEN}").status_code == 401
        page = stranger.get("/")
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert stranger.get("/static/js/main.js").status_code == 200
        assert stranger.get("/v1/runs").headers["content-security-policy"] == page.headers["content-security-policy"]


def test_a_sample_comes_with_what_is_known_of_its_tokens(api: Api, bus: Bus, spec: RunSpec, tokenizer: PromptTokenizer) -> None:
    text = "9+7 \u00fc\U0001f600\u202e"
    shown = sample("r", tokenizer, [text, "8"], index=3)
    run_id = recorded_run(bus, spec, steps=2, samples=[shown])
    (found,) = api.http.get(f"/v1/runs/{run_id}/samples?pieces=true").json()["samples"]
    one = found["completions"][0]
    assert "".join(one["pieces"]) == text
    assert len(one["pieces"]) == len(one["tokens"]) == len(text.encode())
    assert one["pieces"][4:6] == ["", "\u00fc"], "a character comes with the last of its tokens"
    assert one["entropies"] == pytest.approx(shown.measured[0].entropy_values if shown.measured[0] else [])
    assert len(one["log_ratios"]) == len(one["tokens"])
    (plain,) = api.client.samples(run_id).samples
    assert plain.completions[0].pieces is None


def test_a_sample_of_a_model_that_is_gone_is_shown_without_pieces(api: Api, bus: Bus, spec: RunSpec, tokenizer: PromptTokenizer) -> None:
    gone = spec.model_copy(update={"model": spec.model.model_copy(update={"path": "/no/such/model"})})
    run_id = recorded_run(bus, gone, steps=2, samples=[sample("r", tokenizer, ["8+9", "8"]).model_copy(update={"measured": ()})])
    (found,) = api.http.get(f"/v1/runs/{run_id}/samples?pieces=true").json()["samples"]
    assert {(one["pieces"], one["entropies"], one["log_ratios"]) for one in found["completions"]} == {(None, None, None)}


def test_verdicts_are_those_of_the_completed_runs(api: Api, bus: Bus, spec_tree: dict[str, Any]) -> None:
    base = {name: value for name, value in spec_tree.items() if name not in ("name", "seed", "versions")}
    claim = {"id": "C1", "text": "More entropy", "metric": "steps.entropy_nats.end", "arms": ["b", "a"], "direction": "greater"}
    arms = [{"name": "a"}, {"name": "b", "set": {"clip.high": 0.4}}]
    study = api.client.submit_study({"name": "two", "base": base, "budget": {"updates": 6}, "seeds": [0, 1, 2], "arms": arms, "claims": [claim]})
    path = f"/v1/studies/{study.study_id}/verdicts"
    none = api.http.get(path, timeout=PATIENCE).json()
    assert (none["completed"], none["verdicts"][0]["reads"], none["verdicts"][0]["effect"]) == (0, "no data", None)
    effects = []
    for run in study.runs:
        assert run.run_id is not None
        play(bus, run.run_id, api.client.run(run.run_id).spec, steps=run.versions, seed=run.seed + (9 if run.arm == "b" else 0), complete=True)
    for seed in (0, 1, 2):
        ends = {}
        for run in study.runs:
            if run.seed == seed and run.run_id is not None:
                values = [step.values["entropy_nats"] or 0.0 for step in api.client.steps(run.run_id).steps[-5:]]
                ends[run.arm] = sum(values) / len(values)
        effects.append(ends["b"] - ends["a"])
    done = api.http.get(path, timeout=PATIENCE).json()
    (verdict,) = done["verdicts"]
    assert done["completed"] == 6
    assert verdict["seeds"] == 3
    assert verdict["effect"] == pytest.approx(sum(effects) / 3)
    assert verdict["formula"] == "steps.entropy_nats.end: b - a > 0"
    assert verdict["reads"] == ("holds" if min(effects) > 0 else "does not hold" if max(effects) < 0 else "not separable")
    assert api.http.get("/v1/studies/nothing/verdicts").status_code == 404
