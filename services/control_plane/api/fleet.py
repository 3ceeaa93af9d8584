"""The fleet: the processes that live, and what each one does."""

from __future__ import annotations

from fastapi import APIRouter

from services.contracts.views import FleetView, MemberView
from services.control_plane.api.deps import WithDeps, problems

router = APIRouter(tags=["fleet"])


@router.get("/fleet", response_model=FleetView, summary="Every process that lives", responses=problems())
def fleet(deps: WithDeps) -> FleetView:
    assigned = deps.fleet.assignments()
    return FleetView(
        members=[
            MemberView(
                member_id=m.member_id, role=m.role, url=m.url, pid=m.pid, host=m.host, ready=m.ready, detail=m.detail,
                assigned=assigned.get(m.member_id), run_id=m.run_id, version=m.version, idle_seconds=m.idle_seconds,
                started_at=m.started_at, beat_at=m.beat_at,
            )
            for m in deps.fleet.members()
        ]
    )  # fmt: skip
