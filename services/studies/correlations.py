"""What goes with entropy: rank correlations over the runs of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.contracts.measures import EVALUATION_KEYS
from services.studies.drawing import END
from services.studies.paired_statistics import clustered_spearman
from services.studies.study_data import RunData, metric


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of the entropy at the end with a measure of the last evaluation, over runs."""

    key: str
    """The measure."""
    name: str
    """The evaluation set."""
    rho: float
    low: float | None
    """95 % interval, by a bootstrap over seeds; None below three seeds."""
    high: float | None
    runs: int


def correlations_with_entropy(runs: Sequence[RunData]) -> list[Correlation]:
    """By measure, then by set; measures that fewer than three of the runs have, or that are the same in all, are left out."""
    names = sorted({one.name for run in runs for one in run.evaluations})
    entropies = {run.run_id: metric(run, END) for run in runs}
    found = []
    for key in EVALUATION_KEYS:
        for name in names:
            clusters: dict[int, list[tuple[float, float]]] = {}
            for run in runs:
                entropy, value = entropies[run.run_id], metric(run, f"evaluation.{name}.{key}.end")
                if entropy is not None and value is not None:
                    clusters.setdefault(run.seed, []).append((entropy, value))
            rho, low, high = clustered_spearman(clusters)
            if rho is not None:
                found.append(Correlation(key, name, rho, low, high, sum(map(len, clusters.values()))))
    return found
