"""Runs: submit, look, steer, and what they recorded."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from pydantic import JsonValue, ValidationError

from services.contracts.messages import Sample, StepRecord
from services.contracts.spec import knobs_of, spec_at, with_knobs
from services.contracts.states import TERMINAL, Action, RunState
from services.contracts.topics import Log
from services.contracts.views import (
    CheckpointsView,
    CheckpointView,
    CompletionView,
    ConservationView,
    KnobAnswer,
    KnobsView,
    RunPage,
    RunView,
    SamplesView,
    SampleView,
    StepsView,
    StepView,
)
from services.control_plane.api.deps import Deps, Tree, WithDeps, WithRun, body_of, problems, run_view
from services.control_plane.api.pieces import PieceSplitter, piece_splitter
from services.control_plane.checks import check, invalid_knobs, parse_knobs, parse_spec, refuse_foreign
from services.control_plane.store import KeyTaken, Run
from services.runtime.ledger import Ledger
from services.runtime.web import Problem

log = logging.getLogger(__name__)
router = APIRouter(tags=["runs"])

CHUNK = 500
"""Steps read together; samples are larger by far."""
SAMPLES_CHUNK = 50


@router.post(
    "/runs", status_code=201, response_model=RunView, summary="Submit a run", openapi_extra=body_of("RunSpec"),
    responses={200: {"model": RunView, "description": "The run that this idempotency key made before"}, **problems(400, 409, 415)},
)  # fmt: skip
def submit(
    tree: Tree,
    deps: WithDeps,
    response: Response,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=200, description="The same key with the same spec, within a day, makes no second run")
    ] = None,
) -> RunView:
    """The spec as JSON or TOML. It is checked as deeply as can be (model, data, first prompts, verifiers) before the run is queued."""
    spec = parse_spec(tree)
    check(spec, check_rewards=deps.check_rewards)
    try:
        run, made = deps.store.create(spec, idempotency_key=idempotency_key)
    except KeyTaken as error:
        raise Problem(409, "Idempotency key taken", str(error)) from error
    response.status_code = 201 if made else 200
    response.headers["Location"] = f"/v1/runs/{run.run_id}"
    return run_view(run)


@router.get("/runs", response_model=RunPage, summary="List runs, newest first", responses=problems(404))
def runs(
    deps: WithDeps,
    state: Annotated[RunState | None, Query(description="Only runs in this state")] = None,
    name: Annotated[str | None, Query(max_length=200, description="Part of their name, or how their id begins; in whatever case")] = None,
    cursor: Annotated[str | None, Query(description="`next` of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="Runs on a page")] = 50,
) -> RunPage:
    found, following = deps.store.page(state=state, name=name, cursor=cursor, limit=limit)
    return RunPage(runs=[run_view(run) for run in found], next=following)


@router.get("/runs/{run_id}", response_model=RunView, summary="One run", responses=problems(404))
def one_run(run: WithRun) -> RunView:
    return run_view(run)


@router.post("/runs/{run_id}/pause", response_model=RunView, summary="Pause a run", responses=problems(404, 409))
def pause(run: WithRun, deps: WithDeps) -> RunView:
    """The trainer writes a checkpoint and leaves; groups are kept."""
    return _moved(run, Action.PAUSE, deps)


@router.post("/runs/{run_id}/resume", response_model=RunView, summary="Resume a paused or failed run", responses=problems(404, 409))
def resume(run: WithRun, deps: WithDeps) -> RunView:
    """It is queued, and goes on from its last checkpoint when a trainer is free."""
    return _moved(run, Action.RESUME, deps)


@router.post("/runs/{run_id}/cancel", response_model=RunView, summary="Cancel a run for good", responses=problems(404, 409))
def cancel(run: WithRun, deps: WithDeps) -> RunView:
    """What is outstanding is cancelled. What was recorded, and the checkpoints, stay."""
    return _moved(run, Action.CANCEL, deps)


@router.patch(
    "/runs/{run_id}/knobs", response_model=KnobAnswer, summary="Turn knobs while the run goes on", openapi_extra=body_of("Knobs"),
    responses=problems(400, 404, 409, 415),
)  # fmt: skip
def turn(tree: Tree, run: WithRun, deps: WithDeps) -> KnobAnswer:
    """Values nested or by dotted name. The change holds from the version that is answered, which is a version boundary."""
    values = parse_knobs(tree)
    if run.state in TERMINAL:
        raise Problem(409, "The run has ended", f"run {run.run_id} is {run.state}: its knobs no longer turn")
    ledger = Ledger(deps.bus, run.run_id)
    while True:
        changes = ledger.knobs()
        newest = max((change.version for change in changes), default=0)
        before = spec_at(run.spec, changes, newest)
        refuse_foreign(values, before)
        try:
            after = with_knobs(before, values)
        except ValidationError as error:
            raise invalid_knobs(error) from error
        was, now = knobs_of(before), knobs_of(after)
        version = ledger.turn({name: now[name] for name in values}, expected=len(changes))
        if version is not None:
            text = ", ".join(f"{name} {was[name]} -> {now[name]}" for name in sorted(values))
            data: dict[str, JsonValue] = {"before": {name: was[name] for name in values}, "after": {name: now[name] for name in values}}
            deps.store.lifecycle(run.run_id).event("knobs_changed", f"From version {version}: {text}", version=version, data=data)
            return KnobAnswer(run_id=run.run_id, version=version, knobs=now)


@router.get("/runs/{run_id}/knobs", response_model=KnobsView, summary="The knobs in force, and how they were turned", responses=problems(404))
def knobs(run: WithRun, deps: WithDeps) -> KnobsView:
    changes = Ledger(deps.bus, run.run_id).knobs()
    return KnobsView(run_id=run.run_id, version=run.version, knobs=knobs_of(spec_at(run.spec, changes, run.version or 0)), changes=changes)


@router.get("/runs/{run_id}/steps", response_model=StepsView, summary="What each version measured", responses=problems(404))
def steps(
    run: WithRun,
    deps: WithDeps,
    first: Annotated[int, Query(alias="from", ge=0, description="First version")] = 0,
    last: Annotated[int | None, Query(alias="to", ge=0, description="Last version; default: the newest")] = None,
    points: Annotated[int | None, Query(ge=1, le=10_000, description="At most so many: equal stretches of versions are averaged")] = None,
    keys: Annotated[str | None, Query(max_length=8_000, description="Only these measurements, with commas between; default: all")] = None,
) -> StepsView:
    found = recorded_steps(deps, run.run_id, first=first, last=last)
    if keys is not None:
        wanted = set(keys.split(","))
        found = [one.model_copy(update={"values": {key: value for key, value in one.values.items() if key in wanted}}) for one in found]
    return StepsView(run_id=run.run_id, steps=downsampled(found, points=points), recorded=len(found))


@router.get("/runs/{run_id}/samples", response_model=SamplesView, summary="Groups that were trained on, token by token", responses=problems(404))
def samples(
    run: WithRun,
    deps: WithDeps,
    first: Annotated[int, Query(alias="from", ge=0, description="First version at which they were trained on")] = 0,
    last: Annotated[int | None, Query(alias="to", ge=0, description="Last version; default: the newest")] = None,
    cursor: Annotated[str | None, Query(pattern=r"^\d{1,20}-\d{1,20}$", description="`next` of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="Groups at most, the newest ones")] = 20,
    pieces: Annotated[bool, Query(description="With the text that each token adds")] = False,
) -> SamplesView:
    """The newest groups, of those that `record.samples` keeps. One that was recorded twice appears once on a page, as it was trained on last."""
    split = piece_splitter(run.spec.model.path) if pieces else None
    found: dict[int, SampleView] = {}
    end = f"({cursor}" if cursor else "+"
    while True:
        entries = deps.bus.range(run.run_id, Log.SAMPLES, end=end, count=SAMPLES_CHUNK, newest_first=True)
        for entry in entries:
            sample = entry.message(Sample)
            if sample.trained_version < first:
                return SamplesView(run_id=run.run_id, samples=list(found.values()), next=None)
            index = sample.scored.group.index
            if index not in found and (last is None or sample.trained_version <= last):
                found[index] = sample_view(run.run_id, sample, split=split)
                if len(found) == limit:
                    return SamplesView(run_id=run.run_id, samples=list(found.values()), next=entry.id)
        if len(entries) < SAMPLES_CHUNK:
            return SamplesView(run_id=run.run_id, samples=list(found.values()), next=None)
        end = f"({entries[-1].id}"


@router.get("/runs/{run_id}/checkpoints", response_model=CheckpointsView, summary="Checkpoints on the shared storage", responses=problems(404))
def checkpoints(run: WithRun, deps: WithDeps) -> CheckpointsView:
    found = [view for path in sorted((deps.data / run.run_id / "checkpoints").glob("v*/manifest.json")) if (view := _checkpoint(path)) is not None]
    return CheckpointsView(run_id=run.run_id, checkpoints=sorted(found, key=lambda view: view.version))


@router.get("/runs/{run_id}/conservation", response_model=ConservationView, summary="What became of every group", responses=problems(404))
def conservation(run: WithRun, deps: WithDeps) -> ConservationView:
    counts = Ledger(deps.bus, run.run_id).conservation()
    return ConservationView(
        run_id=run.run_id, issued=counts.issued, consumed=counts.consumed, queued=counts.queued, running=counts.running, generated=counts.generated,
        scored=counts.scored, taken=counts.taken, replaying=counts.replaying, dead=counts.dead, cancelled=counts.cancelled, skipped=counts.skipped,
        outstanding=counts.outstanding, superseded=run.superseded, unreadable=run.unreadable, holds=counts.holds,
    )  # fmt: skip


def recorded_steps(deps: Deps, run_id: str, *, first: int, last: int | None) -> list[StepRecord]:
    """Records of the versions in [first, last], in order. Read from the newest end, where one who follows a run finds what is new at once."""
    found: dict[int, StepRecord] = {}
    end = "+"
    while True:
        entries = deps.bus.range(run_id, Log.STEPS, end=end, count=CHUNK, newest_first=True)
        for entry in entries:
            record = entry.message(StepRecord)
            if record.version < first:
                return [found[version] for version in sorted(found)]
            if last is None or record.version <= last:
                found.setdefault(record.version, record)
        if len(entries) < CHUNK:
            return [found[version] for version in sorted(found)]
        end = f"({entries[-1].id}"


def downsampled(records: Sequence[StepRecord], *, points: int | None) -> list[StepView]:
    """At most `points` views: equal stretches of records, each as its mean: all curves of a record keep their common versions."""
    stretch = 1 if points is None else max(1, math.ceil(len(records) / points))
    return [mean_step(records[i : i + stretch]) for i in range(0, len(records), stretch)]


def mean_step(records: Sequence[StepRecord]) -> StepView:
    """Values: mean of the finite ones; lags: sum; window and time: those of the last."""
    names = dict.fromkeys(name for record in records for name in record.values)
    values: dict[str, float | None] = {}
    for name in names:
        finite = [value for record in records if (value := record.values.get(name)) is not None and math.isfinite(value)]
        values[name] = math.fsum(finite) / len(finite) if finite else None
    lags: dict[int, int] = {}
    for record in records:
        for lag, tokens in record.lags.items():
            lags[lag] = lags.get(lag, 0) + tokens
    return StepView(
        version=records[0].version, count=len(records), at=records[-1].at, values=values, lags=dict(sorted(lags.items())),
        window=records[-1].window, groups=[index for record in records for index in record.groups],
    )  # fmt: skip


def sample_view(run_id: str, sample: Sample, *, split: PieceSplitter | None = None) -> SampleView:
    group, completed = sample.scored.group, sample.scored.completed
    advantages = [*sample.advantages, *[None] * len(completed.completions)]  # none were computed for a group that taught nothing
    measured = [*sample.measured, *[None] * len(completed.completions)]
    completions = [
        CompletionView(
            text=done.text, tokens=done.token_ids, versions=done.versions, lags=lags, finish=done.finish, reward=score.reward,
            parts=list(score.parts), advantage=advantage, entropies=known.entropy_values if known else None,
            log_ratios=known.log_ratio_values if known else None, pieces=split(done.token_ids) if split else None,
        )
        for done, score, lags, advantage, known in zip(
            completed.completions, sample.scored.scores, sample.lags, advantages, measured, strict=False
        )
    ]  # fmt: skip
    return SampleView(
        run_id=run_id, index=group.index, prompt_id=group.prompt_id, prompt=group.prompt, answer=group.answer, trained_version=sample.trained_version,
        issued_version=group.issued_version, max_lag=group.max_lag, server=completed.server, attempt=completed.attempt, completions=completions,
    )  # fmt: skip


def _moved(run: Run, action: Action, deps: Deps) -> RunView:
    deps.store.lifecycle(run.run_id).move(action)
    return run_view(deps.store.get(run.run_id))


def _checkpoint(manifest: Path) -> CheckpointView | None:
    """None for one that was deleted meanwhile, or whose manifest is none."""
    try:
        tree = json.loads(manifest.read_bytes())
        return CheckpointView(name=manifest.parent.name, path=str(manifest.parent), **tree)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        log.warning("a checkpoint cannot be read", extra={"path": str(manifest), "error": str(error)})
        return None
