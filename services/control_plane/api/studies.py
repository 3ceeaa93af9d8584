"""Studies: submit, look, pause, go on, cancel. Their runs are ordinary runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Response

from services.contracts.views import StudiesView, StudyRunView, StudySummary, StudyValidationView, StudyView
from services.control_plane.api.deps import Tree, WithDeps, body_of, problems
from services.control_plane.store import KeyTaken, Run
from services.control_plane.studies import Study, StudyStore
from services.control_plane.study_checks import check_study, parse_study
from services.runtime.web import Problem

router = APIRouter(tags=["studies"])
MISSING = "missing"
"""How runs that have not been made are counted."""


def studies_of(deps: WithDeps) -> StudyStore:
    return StudyStore(deps.store)


WithStudies = Annotated[StudyStore, Depends(studies_of)]


@router.post(
    "/studies", status_code=201, response_model=StudyView, summary="Submit a study", openapi_extra=body_of("StudySpec"),
    responses={200: {"model": StudyView, "description": "The study that this idempotency key made before"}, **problems(400, 409, 415)},
)  # fmt: skip
def submit(
    tree: Tree,
    deps: WithDeps,
    studies: WithStudies,
    response: Response,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=200, description="The same key with the same spec, within a day, makes no second study")
    ] = None,
) -> StudyView:
    """The spec as JSON or TOML. All that its runs stand on is checked before any of them is queued. They are queued seed by seed, so that the first
    results come in pairs; as many go on side by side as the fleet holds."""
    spec = parse_study(tree)
    check_study(spec, check_rewards=deps.check_rewards)
    try:
        study, made = studies.create(spec, idempotency_key=idempotency_key)
    except KeyTaken as error:
        raise Problem(409, "Idempotency key taken", str(error)) from error
    studies.make_runs(study)
    response.status_code = 201 if made else 200
    response.headers["Location"] = f"/v1/studies/{study.study_id}"
    return _view(studies, study)


@router.post(
    "/studies/validate", response_model=StudyValidationView, summary="Would this study be accepted?", openapi_extra=body_of("StudySpec"),
    responses=problems(400, 415),
)  # fmt: skip
def validate(tree: Tree, deps: WithDeps) -> StudyValidationView:
    """The same checks as submitting it, and the same problem documents; nothing is made. `warnings` say what the study cannot tell."""
    return check_study(parse_study(tree), check_rewards=deps.check_rewards)


@router.get("/studies", response_model=StudiesView, summary="List studies, newest first", responses=problems())
def listed(studies: WithStudies) -> StudiesView:
    found = []
    for study_id in studies.ids():
        study = studies.get(study_id)
        spec = study.spec
        found.append(
            StudySummary(
                study_id=study_id, name=study.name, created_at=study.created_at, cancelled_at=study.cancelled_at, arms=len(spec.arms),
                seeds=len(spec.seeds), claims=len(spec.claims), counts=_counts(study, studies.runs(study).values()),
            )
        )  # fmt: skip
    return StudiesView(studies=found)


@router.get("/studies/{study_id}", response_model=StudyView, summary="One study, with all its runs", responses=problems(404))
def one_study(study_id: str, studies: WithStudies) -> StudyView:
    """Every run is shown, also one that failed or was not made yet."""
    return _view(studies, studies.get(study_id))


@router.post("/studies/{study_id}/pause", response_model=StudyView, summary="Pause all runs of a study", responses=problems(404))
def pause(study_id: str, studies: WithStudies) -> StudyView:
    """Their trainers write checkpoints and leave; what waits is not started."""
    study = studies.get(study_id)
    studies.pause(study)
    return _view(studies, study)


@router.post("/studies/{study_id}/resume", response_model=StudyView, summary="Go on with a study", responses=problems(404, 409))
def resume(study_id: str, studies: WithStudies) -> StudyView:
    """Runs that are paused or have failed are queued again, and go on from their last checkpoints; runs that are missing are made. No run is made
    twice."""
    study = studies.get(study_id)
    studies.resume(study)
    return _view(studies, study)


@router.post("/studies/{study_id}/cancel", response_model=StudyView, summary="Cancel a study for good", responses=problems(404))
def cancel(study_id: str, studies: WithStudies) -> StudyView:
    """Its runs that have not ended are cancelled. What was recorded, and the checkpoints, stay."""
    studies.cancel(studies.get(study_id))
    return _view(studies, studies.get(study_id))


def _view(studies: StudyStore, study: Study) -> StudyView:
    spec, there = study.spec, studies.runs(study)
    runs = [_run_view(arm, seed, there.get((arm, seed)), versions=spec.run(arm, seed).versions) for arm, seed in spec.cells()]
    return StudyView(
        study_id=study.study_id, name=study.name, created_at=study.created_at, cancelled_at=study.cancelled_at, spec=spec, runs=runs,
        counts=_counts(study, there.values()), warnings=list(spec.warnings),
    )  # fmt: skip


def _run_view(arm: str, seed: int, run: Run | None, *, versions: int) -> StudyRunView:
    if run is None:
        return StudyRunView(
            arm=arm, seed=seed, run_id=None, state=None, reason="", version=None, versions=versions, started_at=None, ended_at=None
        )  # fmt: skip
    return StudyRunView(
        arm=arm, seed=seed, run_id=run.run_id, state=run.state, reason=run.reason, version=run.version, versions=versions,
        started_at=run.started_at, ended_at=run.ended_at,
    )  # fmt: skip


def _counts(study: Study, runs: Iterable[Run]) -> dict[str, int]:
    counts = Counter(run.state.value for run in runs)
    missing = len(study.spec.cells()) - counts.total()
    return dict(counts) | ({MISSING: missing} if missing else {})
