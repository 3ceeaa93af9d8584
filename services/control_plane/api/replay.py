"""What-if replay: a run trained again on the recorded groups of another one, with another loss, clip or controller."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import ValidationError

from services.contracts.messages import Sample
from services.contracts.spec import KnobChange, RunSpec, flatten, spec_at, with_values
from services.contracts.topics import Log
from services.contracts.views import FieldProblem, RunView
from services.control_plane.api.deps import Deps, Tree, WithDeps, WithRun, body_of, problems, run_view
from services.control_plane.checks import invalid_overrides, invalid_spec
from services.control_plane.store import Run, new_run_id
from services.runtime.ledger import Ledger
from services.runtime.web import Problem

router = APIRouter(tags=["runs"])

FIXED = ("data", "sampling", "group_size", "batch_groups", "temperature", "model", "rewards", "replay", "record")
"""What the recorded groups were made with: a replay cannot change it."""


@router.post(
    "/runs/{run_id}/replay", status_code=201, response_model=RunView, summary="Train again on what a run has recorded",
    openapi_extra=body_of("Overrides"), responses=problems(400, 404, 409, 415),
)  # fmt: skip
def replay(tree: Tree, run: WithRun, deps: WithDeps) -> RunView:
    """A new run on the recorded groups of this one, with the fields of the body changed: no generation. With nothing changed it comes out the same;
    with anything changed the groups are off-policy for the policy that is trained, and `ess_share` of its steps says how much."""
    overrides = flatten(tree)
    if wrong := [name for name in overrides if name.split(".")[0] in FIXED]:
        why = "the recorded groups were made with it: submit a new run to change it"
        raise invalid_spec([FieldProblem(field=name, problem=why) for name in wrong])
    recorded = _recorded(deps, run)
    spec = _spec(run, overrides, recorded)
    changes = [kept for change in Ledger(deps.bus, run.run_id).knobs() if (kept := _without(change, overrides)).values]
    try:
        spec_at(spec, changes, spec.versions)
    except ValidationError as error:
        raise invalid_overrides(error) from error
    made = new_run_id(spec.name)
    Ledger(deps.bus, made).preset(changes)  # before there is a run that a trainer could take
    if not deps.store.create_as(made, spec):
        raise Problem(503, "Try again", f"another run was given the id {made} at this moment")
    return run_view(deps.store.get(made))


def _recorded(deps: Deps, run: Run) -> int:
    """Versions of the run whose groups are recorded, from 0 on. Raises Problem when the first ones are gone or there are none."""
    first = deps.bus.range(run.run_id, Log.SAMPLES, count=run.spec.batch_groups)
    if not first:
        raise Problem(409, "Nothing recorded", f"run {run.run_id} has recorded no groups: it has trained on none, or record.samples is 0")
    oldest = first[-1].message(Sample).trained_version  # a batch from the oldest group on: of the oldest version the record may have kept a part
    if oldest > 0:
        raise Problem(
            409, "Not all recorded",
            f"run {run.run_id} has kept the groups of versions {oldest} and later only: a run that is to be replayed needs record.samples of"
            f" at least {run.spec.versions * run.spec.batch_groups}",
        )  # fmt: skip
    return run.version or 0


def _spec(run: Run, overrides: dict[str, Any], recorded: int) -> RunSpec:
    if recorded < run.spec.versions and "versions" not in overrides:
        raise Problem(
            409, "Not ended",
            f"run {run.run_id} has trained on {recorded} of {run.spec.versions} versions: wait for its end, or give versions = {recorded} or less,"
            " which schedules over the run then follow",
        )  # fmt: skip
    own = {"replay": run.run_id, "name": f"{run.name}-replay"[:80], "versions": recorded, "evaluation.sets": [], "staleness.target": None}
    try:
        spec = with_values(run.spec, own | overrides)
    except ValidationError as error:
        raise invalid_overrides(error) from error
    if spec.versions > recorded:
        problem = f"{spec.versions} is more than the {recorded} that run {run.run_id} has recorded"
        raise invalid_spec([FieldProblem(field="versions", problem=problem)])
    return spec


def _without(change: KnobChange, overrides: dict[str, Any]) -> KnobChange:
    """The other run's knobs turn in the replay too, but for those that it overrides and for the target of the staleness loop, which it has not."""
    kept = {name: value for name, value in change.values.items() if name not in overrides and not name.startswith("staleness.target.")}
    return change.model_copy(update={"values": kept})
