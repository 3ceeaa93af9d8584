"""What goes with entropy: rank correlations over the runs of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.contracts.measures import EVALUATION_KEYS
from services.studies.paired_statistics import clustered_spearman
from services.studies.study_data import RunData, entropy_at_end, metric

SAME = frozenset({"reward_mean", "pass_at_1"})
"""Accuracy under other names (pass@1 is correct_mean, and so is the reward of verifiers that say right or wrong): one row of the map is enough."""


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of the entropy at the end with a measure of the last evaluation, over runs."""

    key: str
    """The measure."""
    name: str
    """The evaluation set; with its source, where runs evaluate different tasks under one name."""
    rho: float
    low: float | None
    """95 % interval, by a bootstrap over seeds; None below three seeds."""
    high: float | None
    runs: int


def correlations_with_entropy(runs: Sequence[RunData]) -> list[Correlation]:
    """By measure, then by task; measures that fewer than three of the runs have, or that are the same in all, are left out. Runs that evaluate on
    different sources are never pooled: the tasks' own levels would pass for a correlation."""
    tasks = sorted({(one.name, _source(run, one.name)) for run in runs for one in run.evaluations})
    names = [name for name, _ in tasks]
    entropies = {run.run_id: entropy_at_end(run) for run in runs}
    found = []
    for key in (key for key in EVALUATION_KEYS if key not in SAME):
        for name, source in tasks:
            clusters: dict[int, list[tuple[float, float]]] = {}
            for run in runs:
                entropy, value = entropies[run.run_id], metric(run, f"evaluation.{name}.{key}.end")
                if entropy is not None and value is not None and _source(run, name) == source:
                    clusters.setdefault(run.seed, []).append((entropy, value))
            if all(entropy == value for pairs in clusters.values() for entropy, value in pairs):  # the entropy at the end itself
                continue
            rho, low, high = clustered_spearman(clusters)
            if rho is not None:
                shown = name if names.count(name) == 1 else f"{name} ({source})"
                found.append(Correlation(key, shown, rho, low, high, sum(map(len, clusters.values()))))
    return found


def _source(run: RunData, name: str) -> str:
    """Where the prompts of an evaluation set come from."""
    return next(((one.data or run.spec.data).source for one in run.spec.evaluation.sets if one.name == name), "")
