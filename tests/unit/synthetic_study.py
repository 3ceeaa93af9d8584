"""Runs of a study with planted effects: the entropy of each is what a function of the version says."""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from services.contracts.states import RunState
from services.contracts.study import Claim, StudySpec
from services.contracts.views import StepView, StudyRunView, StudyView
from services.studies.study_data import RunData

VERSIONS = 20
TWO_ARMS = ({"name": "n1"}, {"name": "n4", "set": {"updates_per_batch": 4}})
Entropy = Callable[[int], float | None]


def a_claim(**fields: object) -> Claim:
    tree = {"id": "F1", "text": "planted", "metric": "steps.entropy_nats.end", "arms": ["n1", "n4"], "direction": "greater"}
    return Claim.model_validate(tree | fields)


def a_study(*claims: Claim, arms: Sequence[dict] = TWO_ARMS, seeds: int = 5, **fields: object) -> StudySpec:
    sets = [{"name": "held", "domain": "in"}, {"name": "other", "domain": "out"}]
    tree = {
        "name": "planted", "budget": {"rollouts": VERSIONS * 128}, "base": {"evaluation": {"sets": sets}, "staleness": {"min_lag": 0, "max_lag": 0}},
        "seeds": list(range(seeds)), "arms": list(arms), "claims": [claim.model_dump() for claim in claims],
    }  # fmt: skip
    return StudySpec.model_validate(tree | fields)


def a_view(study: StudySpec, runs: Sequence[RunData] = (), *, warnings: Sequence[str] = ()) -> StudyView:
    made = {(run.arm, run.seed): run for run in runs}
    shown = []
    for seed in study.seeds:
        for arm in study.arms:
            run = made.get((arm.name, seed))
            state, reason, run_id = (run.state, run.reason, run.run_id) if run else (None, "", None)
            shown.append(StudyRunView(
                arm=arm.name, seed=seed, run_id=run_id, state=state, reason=reason, version=None, versions=VERSIONS, started_at=100.0, ended_at=160.0
            ))  # fmt: skip
    return StudyView(
        study_id="study-1", name=study.name, created_at=90.0, cancelled_at=None, spec=study, runs=shown, counts={}, warnings=list(warnings)
    )


def a_step(version: int, entropy: float | None, *, updates: int = 1, kl: float = 0.01) -> StepView:
    measured: dict[str, float | None] = {"entropy_nats": entropy, "kl_behaviour_k3_nats": kl, "updates": updates, "seconds": 0.5, "tokens": 128.0}
    if entropy is not None:
        change = -0.1 * entropy
        measured |= {
            "reward_mean": 1.0 - 0.5 * math.exp(entropy) / math.e, "entropy_change_predicted": change, "entropy_change_realised": 0.9 * change,
            "entropy_change_predicted_positive": 2 * change, "entropy_change_predicted_negative": -change,
        }  # fmt: skip
    return StepView(version=version, count=1, at=100.0 + version, values=measured, lags={0: 128}, window=(0, 0), groups=list(range(16)))


def a_run(
    study: StudySpec, arm: str, seed: int, entropy: Entropy, *, state: RunState = RunState.COMPLETED, reason: str = "", versions: int = VERSIONS
) -> RunData:
    spec = study.run(arm, seed)
    steps = [a_step(version, entropy(version), updates=spec.updates_per_batch) for version in range(versions)]
    evaluations = [
        SimpleNamespace(name=name, version=version, values={"correct_mean": 0.5 - 0.1 * (entropy(version) or 0), "distinct_3": entropy(version)})
        for version in (0, versions - 1)
        for name in ("held", "other")
        if versions
    ]
    return RunData(f"{study.name}-{arm}-{seed}", arm, seed, state, reason, spec, steps, evaluations)


def level(value: float | None) -> Entropy:
    return lambda version: value


def runs_at(study: StudySpec, levels: dict[str, Sequence[float | None]]) -> list[RunData]:
    """A completed run of each arm and seed whose entropy is the given number throughout."""
    return [a_run(study, arm, seed, level(value)) for arm, values in levels.items() for seed, value in enumerate(values)]
