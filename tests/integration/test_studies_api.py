"""Studies through the API, over a real store and without a fleet: what is made, what is made once, and what is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from prometheus_client import CollectorRegistry

from services.client import ApiError
from services.contracts.messages import Role
from services.contracts.states import Action, RunState
from services.contracts.study import StudySpec
from services.contracts.views import StudyView
from services.control_plane.scheduler import Scheduler
from services.control_plane.store import RunStore
from services.control_plane.studies import StudyStore
from services.runtime.bus import Bus, StoreAway
from services.runtime.lifecycle import RunLifecycle
from services.runtime.metrics import ControlPlaneMetrics
from tests.integration.conftest import Api, Stubs

ROOT = Path(__file__).resolve().parents[2]
CELLS = [("n1", 0), ("n2", 0), ("n4", 0), ("n1", 3), ("n2", 3), ("n4", 3)]


@pytest.fixture
def study_tree(model_folder: Path) -> dict[str, Any]:
    """Three arms over two seeds; 6 versions each, the last arm 3."""
    return {
        "name": "reuse", "seeds": [0, 3], "budget": {"rollouts": 48},
        "base": {"batch_groups": 4, "group_size": 2, "model": {"path": str(model_folder)}, "staleness": {"max_lag": 0}},
        "arms": [
            {"name": "n1"},
            {"name": "n2", "set": {"updates_per_batch": 2}},
            {"name": "n4", "like": "n2", "set": {"updates_per_batch": 4}, "budget": {"updates": 12}},
        ],
        "claims": [{"id": "F1", "text": "less entropy", "metric": "steps.entropy_nats.end", "arms": ["n1", "n4"], "direction": "greater"}],
    }  # fmt: skip


def states(study: StudyView) -> dict[tuple[str, int], str | None]:
    return {(run.arm, run.seed): run.state.value if run.state else None for run in study.runs}


# -- making -----------------------------------------------------------------------------------------------------------------------------


def test_a_study_makes_ordinary_runs_seed_by_seed(api: Api, study_tree: dict[str, Any]) -> None:
    study = api.client.submit_study(study_tree)
    assert study.study_id.startswith("reuse-")
    assert [(run.arm, run.seed) for run in study.runs] == CELLS
    assert [run.versions for run in study.runs] == [6, 6, 3] * 2
    assert (study.counts, study.cancelled_at) == ({"queued": 6}, None)
    assert study.warnings == ["seeds: there are 2, with which no claim is decided: give 3, better 5"]
    queued = list(reversed(api.client.runs().runs))
    assert [run.run_id for run in queued] == [run.run_id for run in study.runs], "the scheduler serves the oldest first"
    last = queued[-1]
    assert (last.spec.seed, last.spec.updates_per_batch, last.versions, last.state) == (3, 4, 3, RunState.QUEUED)
    assert last.spec.labels == {"study": "reuse", "arm": "n4", "seed": "3"}
    assert api.client.study(study.study_id) == study


def test_the_runs_of_a_seed_are_the_same_but_for_their_arm(api: Api, study_tree: dict[str, Any]) -> None:
    study = api.client.submit_study(study_tree)
    specs = {(run.arm, run.seed): api.client.run(run.run_id or "").spec for run in study.runs}
    for seed in (0, 3):
        one, other = (
            specs[arm, seed].model_dump(exclude={"name": True, "labels": True, "updates_per_batch": True, "versions": True}) for arm in ("n1", "n4")
        )
        assert one == other


def test_the_same_key_makes_one_study_and_no_further_run(api: Api, study_tree: dict[str, Any]) -> None:
    first = api.client.submit_study(study_tree, idempotency_key="k")
    assert api.client.submit_study(study_tree, idempotency_key="k") == first
    assert len(api.client.runs(limit=200).runs) == 6
    with pytest.raises(ApiError) as taken:
        api.client.submit_study({**study_tree, "seeds": [1]}, idempotency_key="k")
    assert taken.value.status == 409
    with pytest.raises(ApiError) as of_a_run:
        api.client.submit({"model": study_tree["base"]["model"]}, idempotency_key="k")
    assert of_a_run.value.status == 409
    assert api.client.submit_study(study_tree).study_id != first.study_id
    assert len(api.client.studies().studies) == 2


def test_a_study_may_be_toml(api: Api, study_tree: dict[str, Any]) -> None:
    answer = api.http.post("/v1/studies", content=tomli_w.dumps(study_tree), headers={"Content-Type": "application/toml"})
    assert answer.status_code == 201
    study_id = answer.json()["study_id"]
    assert answer.headers["Location"] == f"/v1/studies/{study_id}"
    assert api.client.study(study_id).spec == StudySpec.model_validate(study_tree)


def test_studies_are_listed_newest_first(api: Api, study_tree: dict[str, Any]) -> None:
    old, new = (api.client.submit_study({**study_tree, "name": name}).study_id for name in ("old", "new"))
    api.client.cancel_study(old)
    listed = api.client.studies().studies
    assert [(one.study_id, one.arms, one.seeds, one.claims, one.counts) for one in listed] == [
        (new, 3, 2, 1, {"queued": 6}),
        (old, 3, 2, 1, {"cancelled": 6}),
    ]
    assert listed[1].cancelled_at is not None


def test_validation_makes_nothing_and_warns(api: Api, study_tree: dict[str, Any]) -> None:
    answer = api.client.validate_study({**study_tree, "seeds": [0]})
    assert (answer.runs, answer.versions, answer.rewards_checked) == (3, 15, False)
    assert answer.warnings == ["seeds: there is one, so no effect has an interval and no claim is decided: give 3, better 5"]
    assert api.client.studies().studies == []
    assert api.client.runs().runs == []


# -- going on ---------------------------------------------------------------------------------------------------------------------------


def test_a_study_that_was_cut_off_while_its_runs_were_made_is_completed_by_resume(
    api: Api, store: RunStore, study_tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    studies, make, left = StudyStore(store), store.create_as, [4]

    def dying(run_id: str, spec: Any) -> bool:
        if not left[0]:
            raise StoreAway("the control plane is killed here")
        left[0] -= 1
        return make(run_id, spec)

    study, _ = studies.create(StudySpec.model_validate(study_tree))
    monkeypatch.setattr(store, "create_as", dying)
    with pytest.raises(StoreAway):
        studies.make_runs(study)
    seen = api.client.study(study.study_id)
    assert seen.counts == {"queued": 4, "missing": 2}
    assert [run.run_id for run in seen.runs[4:]] == [None, None]
    assert [(run.arm, run.seed, run.versions) for run in seen.runs[4:]] == [("n2", 3, 6), ("n4", 3, 3)]
    whole = api.client.resume_study(study.study_id)
    assert whole.counts == {"queued": 6}
    assert whole.runs[:4] == seen.runs[:4], "what was there is left as it is"
    assert len(api.client.runs().runs) == 6


def test_runs_are_made_once_by_many_who_resume_at_once(api: Api, bus: Bus, store: RunStore, study_tree: dict[str, Any]) -> None:
    study, _ = StudyStore(store).create(StudySpec.model_validate(study_tree))
    threads = [threading.Thread(target=api.client.resume_study, args=(study.study_id,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.ids()) == 6
    for run in api.client.study(study.study_id).runs:
        assert [event.event for event in api.client.events(run.run_id or "")] == ["run_created"]


def test_pause_and_resume_leave_alone_what_has_ended(api: Api, bus: Bus, study_tree: dict[str, Any]) -> None:
    study = api.client.submit_study(study_tree)
    ids = [run.run_id or "" for run in study.runs]
    for run_id, last in ((ids[0], Action.COMPLETE), (ids[1], Action.FAIL), (ids[2], None)):
        life = RunLifecycle(bus, run_id)
        life.move(Action.ASSIGN, trainer="t")
        life.move(Action.START, holder="t")
        if last is Action.FAIL:
            life.move(last, "the loss is not finite", holder="t")
        elif last:
            life.move(last, holder="t")
    api.client.cancel(ids[5])
    paused = api.client.pause_study(study.study_id)
    assert [run.state for run in paused.runs] == ["completed", "failed", "paused", "paused", "paused", "cancelled"]
    assert paused.runs[1].reason == "the loss is not finite", "a failed run is shown, with why"
    on = api.client.resume_study(study.study_id)
    assert [run.state for run in on.runs] == ["completed", "queued", "queued", "queued", "queued", "cancelled"]
    assert api.client.resume_study(study.study_id) == on


def test_a_cancelled_study_makes_no_more_runs(api: Api, store: RunStore, study_tree: dict[str, Any]) -> None:
    study, _ = StudyStore(store).create(StudySpec.model_validate(study_tree), idempotency_key="k")
    for arm, seed in CELLS[:2]:
        store.create_as(study.run_id(arm, seed), study.spec.run(arm, seed))
    ended = api.client.cancel_study(study.study_id)
    assert ended.counts == {"cancelled": 2, "missing": 4}
    assert ended.cancelled_at is not None
    with pytest.raises(ApiError, match="was cancelled: submit it again") as refused:
        api.client.resume_study(study.study_id)
    assert refused.value.status == 409
    assert api.client.submit_study(study_tree, idempotency_key="k").counts == ended.counts
    assert api.client.cancel_study(study.study_id) == ended


def test_a_cancellation_while_runs_are_made_leaves_none_of_them_open(
    api: Api, store: RunStore, study_tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    studies, make = StudyStore(store), store.create_as
    study, _ = studies.create(StudySpec.model_validate(study_tree))

    def cancelled_before_the_third(run_id: str, spec: Any) -> bool:
        if run_id == study.run_id(*CELLS[2]):
            api.client.cancel_study(study.study_id)
        return make(run_id, spec)

    monkeypatch.setattr(store, "create_as", cancelled_before_the_third)
    studies.make_runs(study)
    assert api.client.study(study.study_id).counts == {"cancelled": 3, "missing": 3}


def test_as_many_runs_go_on_side_by_side_as_the_fleet_holds(api: Api, store: RunStore, study_tree: dict[str, Any], stubs: Stubs) -> None:

    study = api.client.submit_study(study_tree)
    for i in range(2):
        stubs.beat(f"t{i}", Role.TRAINER)
        stubs.beat(f"s{i}", Role.ROLLOUT)
    Scheduler(store, stubs.fleet, ControlPlaneMetrics(CollectorRegistry()), settle=0.0).tick()
    going = {cell for cell, state in states(api.client.study(study.study_id)).items() if state == "starting"}
    assert going == {("n1", 0), ("n2", 0)}, "the first pair"


# -- bad input --------------------------------------------------------------------------------------------------------------------------


def refused(api: Api, tree: dict[str, Any]) -> dict[str, str]:
    """What was wrong by field, as both routes that take a study say it; neither makes anything."""
    answers = [api.http.post(route, json=tree) for route in ("/v1/studies", "/v1/studies/validate")]
    assert [answer.status_code for answer in answers] == [422, 422], answers[0].text
    assert answers[0].json() == answers[1].json()
    assert answers[0].json()["title"] == "Invalid study"
    assert api.client.studies().studies == []
    assert api.client.runs().runs == []
    return {error["field"]: error["problem"] for error in answers[0].json()["errors"]}


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"budget": {"rollouts": 0}}, "budget.rollouts", "greater than or equal to 1 (got 0)"),
        ({"arms": [{"name": "a", "like": "zz"}]}, "arms.a.like", "there is no arm 'zz'; there are a"),
        ({"arms": [{"name": "a", "set": {"clip.high": 0.3, "clip": {"high": 0.2}}}]}, "arms.a.set", "clip.high is in conflict with itself"),
        ({"arms": [{"name": "a", "set": {"loss": {"kind": "gspo", "hihg": 1}}}]}, "arms.a.set.loss.hihg", "did you mean 'high'?"),
        ({"armz": []}, "armz", "did you mean 'arms'?"),
    ],
)
def test_a_wrong_field_is_named(api: Api, study_tree: dict[str, Any], change: dict[str, Any], field: str, said: str) -> None:
    errors = refused(api, {**study_tree, "claims": []} | change)
    assert list(errors) == [field]
    assert said in errors[field]


def test_a_claim_on_what_is_not_measured_is_named(api: Api, study_tree: dict[str, Any]) -> None:
    errors = refused(api, {**study_tree, "claims": [{**study_tree["claims"][0], "metric": "steps.entrpy_nats.end"}]})
    assert "no step measures 'entrpy_nats'" in errors["claims.F1.metric"]


def test_what_the_runs_stand_on_is_looked_at_in_every_arm(api: Api, study_tree: dict[str, Any]) -> None:
    base = {**study_tree["base"], "data": {"source": "jsonl", "path": "/nowhere/train.jsonl"}}
    assert list(refused(api, {**study_tree, "base": base})) == ["base.data"]
    arms = [*study_tree["arms"], {"name": "other", "set": {"model.path": "/nowhere/model"}}]
    assert "neither a folder nor in the local" in refused(api, {**study_tree, "arms": arms})["arms.other.set.model.path"]


def test_an_unknown_study_is_not_found(api: Api) -> None:
    for ask in (api.client.study, api.client.pause_study, api.client.resume_study, api.client.cancel_study):
        with pytest.raises(ApiError, match="study 'nobody' is not known") as missing:
            ask("nobody")
        assert missing.value.status == 404


def test_the_openapi_document_knows_studies(api: Api) -> None:
    parts = api.http.get("/openapi.json").json()["components"]["schemas"]
    assert {"StudySpec", "Arm", "Claim", "Budget", "StudyView", "StudyRunView"} <= parts.keys()


def test_the_smoke_study_is_accepted_with_its_model_and_data(api: Api) -> None:
    text = (ROOT / "deploy" / "studies" / "smoke.toml").read_text().replace('"deploy/models/tiny"', f'"{ROOT}/deploy/models/tiny"')
    answer = api.http.post("/v1/studies", content=text, headers={"Content-Type": "application/toml"})
    assert answer.status_code == 201, answer.text
    assert answer.json()["counts"] == {"queued": 6}
