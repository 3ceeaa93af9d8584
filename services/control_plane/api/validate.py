"""Run specs: their schema, and whether one would be accepted."""

from __future__ import annotations

from fastapi import APIRouter

from services.contracts.spec import KNOBS, RunSpec
from services.contracts.views import SchemaView, ValidationView
from services.control_plane.api.deps import Tree, WithDeps, body_of, problems
from services.control_plane.checks import check, parse_spec

router = APIRouter(tags=["specs"])


@router.post(
    "/validate", response_model=ValidationView, summary="Would this spec be accepted?", openapi_extra=body_of("RunSpec"), responses=problems(400, 415)
)
def validate(tree: Tree, deps: WithDeps) -> ValidationView:
    """The same checks as submitting it, and the same problem documents; nothing is made."""
    return check(parse_spec(tree), check_rewards=deps.check_rewards)


@router.get("/schema", response_model=SchemaView, summary="JSON schema of a run spec, and the knobs", responses=problems())
def schema() -> SchemaView:
    return SchemaView(spec=RunSpec.model_json_schema(), knobs=sorted(KNOBS))
