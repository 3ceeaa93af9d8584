"""Evaluations: what the policy did on the sets that it is evaluated on."""

from __future__ import annotations

import math
from typing import Annotated

from fastapi import APIRouter, Query

from services.contracts.messages import EvaluationRecord
from services.contracts.topics import Log
from services.contracts.views import EvaluationsView, EvaluationView
from services.control_plane.api.deps import WithDeps, WithRun, problems

router = APIRouter(tags=["runs"])


@router.get(
    "/runs/{run_id}/evaluations", response_model=EvaluationsView, summary="What the policy did on the evaluation sets", responses=problems(404)
)
def evaluations(
    run: WithRun,
    deps: WithDeps,
    first: Annotated[int, Query(alias="from", ge=0, description="First version")] = 0,
    last: Annotated[int | None, Query(alias="to", ge=0, description="Last version; default: the newest")] = None,
    name: Annotated[str | None, Query(alias="set", description="Only of the evaluation set of this name")] = None,
) -> EvaluationsView:
    places = {one.name: place for place, one in enumerate(run.spec.evaluation.sets)}
    records = [entry.message(EvaluationRecord) for entry in deps.bus.range(run.run_id, Log.EVALUATIONS)]
    asked = [r for r in records if first <= r.version and (last is None or r.version <= last) and name in (None, r.name)]
    ordered = sorted(asked, key=lambda record: (record.version, places[record.name]))
    return EvaluationsView(run_id=run.run_id, evaluations=[evaluation_view(record) for record in ordered])


def evaluation_view(record: EvaluationRecord) -> EvaluationView:
    values = {key: value if math.isfinite(value) else None for key, value in record.values.items()}
    return EvaluationView(**record.model_dump(exclude={"schema_version", "run_id", "values"}), values=values)
