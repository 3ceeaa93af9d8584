"""The prompts that a run trains on."""

from __future__ import annotations

from fastapi import APIRouter

from services.contracts.views import PromptsView
from services.control_plane.api.deps import WithDeps, WithRun, problems
from services.runtime.ledger import Ledger
from services.runtime.prompts_used import prompts_used

router = APIRouter(tags=["runs"])


@router.get("/runs/{run_id}/prompts", response_model=PromptsView, summary="Which prompts the run trains on", responses=problems(404))
def prompts(run: WithRun, deps: WithDeps) -> PromptsView:
    """Kept with the run when its data are opened: the file of ids, or the data set, may have changed since."""
    return PromptsView(run_id=run.run_id, prompts=Ledger(deps.bus, run.run_id).data_size(), ids=prompts_used(deps.bus, run.run_id))
