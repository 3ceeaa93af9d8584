"""Verdicts on the claims of a study, from the runs that are completed by now."""

from __future__ import annotations

import threading
from collections import OrderedDict

from fastapi import APIRouter

from services.contracts.messages import EvaluationRecord
from services.contracts.states import RunState
from services.contracts.topics import Log
from services.contracts.views import VerdictsView, VerdictView
from services.control_plane.api.deps import Deps, WithDeps, problems
from services.control_plane.api.evaluations import evaluation_view
from services.control_plane.api.runs import mean_step, recorded_steps
from services.control_plane.api.studies import WithStudies
from services.control_plane.store import Run
from services.control_plane.studies import Study

router = APIRouter(tags=["studies"])

KEPT = 32
"""Answers that are kept: what completed runs measured does not change."""
_answers: OrderedDict[tuple[str, tuple[str, ...]], VerdictsView] = OrderedDict()
_one_at_a_time = threading.Lock()
"""All steps of a study's runs are read for an answer: two readers at once would hold twice as many."""


@router.get("/studies/{study_id}/verdicts", response_model=VerdictsView, summary="What the seeds say of a study's claims", responses=problems(404))
def verdicts(study_id: str, deps: WithDeps, studies: WithStudies) -> VerdictsView:
    """By the rules of the study's report. Runs that have not completed do not count, so a verdict may change until all have."""
    study = studies.get(study_id)
    states = studies.runs(study)
    key = (study_id, tuple(f"{run.run_id}:{run.state}" for run in states.values()))
    with _one_at_a_time:
        if key not in _answers:
            _answers[key] = _decided(deps, study, states)
            while len(_answers) > KEPT:
                _answers.popitem(last=False)
        return _answers[key]


def _decided(deps: Deps, study: Study, runs: dict[tuple[str, int], Run]) -> VerdictsView:
    from services.studies.claims import in_words  # statistics, which no other route needs, take a second to load
    from services.studies.study_data import RunData
    from services.studies.verdicts import verdicts_of

    data = [
        RunData(
            run_id=run.run_id, arm=arm, seed=seed, state=run.state, reason=run.reason, spec=run.spec,
            steps=[mean_step([record]) for record in recorded_steps(deps, run.run_id, first=0, last=None)] if _counts(run) else [],
            evaluations=[evaluation_view(entry.message(EvaluationRecord)) for entry in deps.bus.range(run.run_id, Log.EVALUATIONS)]
            if _counts(run) else [],
        )
        for (arm, seed), run in runs.items()
    ]  # fmt: skip
    views = [
        VerdictView(
            id=v.claim.id, text=v.claim.text, formula=in_words(v.claim), reads=v.reads, effect=v.effect, low=v.low, high=v.high, p=v.p, seeds=v.n,
            why=v.why, excluded=list(v.excluded),
        )
        for v in verdicts_of(study.spec, data)
    ]  # fmt: skip
    return VerdictsView(study_id=study.study_id, verdicts=views, completed=sum(map(_counts, runs.values())))


def _counts(run: Run) -> bool:
    return run.state is RunState.COMPLETED
