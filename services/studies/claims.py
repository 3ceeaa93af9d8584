"""What a claim's statistic comes to in the runs of a study: a number a seed, and which seeds are left out, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.contracts.states import RunState
from services.contracts.study import Claim, StudySpec
from services.studies.display import one_line
from services.studies.paired_statistics import clustered_spearman, spearman
from services.studies.study_data import RunData, by_arm_and_seed, metric


@dataclass(frozen=True)
class ClaimValues:
    """The statistic by seed. Only completed runs count: what half a run has come to is another quantity."""

    per_seed: dict[int, float]
    excluded: tuple[str, ...] = ()
    """Seeds, or single runs, that are left out, with the reason."""
    pooled: tuple[float, float | None, float | None] | None = None
    """`spearman` only: the rank correlation over the runs of all seeds, with its interval."""


def claim_values(claim: Claim, study: StudySpec, runs: Sequence[RunData]) -> ClaimValues:
    """The claim's statistic of every seed of which all its arms have the metric; of `spearman`, of every seed with three runs that have both."""
    table, excluded = by_arm_and_seed(runs), []
    if claim.statistic == "spearman":
        return _correlated(claim, study, table)
    per_seed: dict[int, float] = {}
    for seed in study.seeds:
        found = [(arm, table.get((arm, seed))) for arm in claim.arms]  # an interaction may name an arm twice
        if missing := [f"{arm} {why}" for arm, run in found if isinstance(why := claim_metric(run, claim), str)]:
            excluded.append(f"seed {seed}: {'; '.join(dict.fromkeys(missing))}")
            continue
        value = _statistic(claim, [run for _, run in found])
        if value is None:
            excluded.append(f"seed {seed}: the {claim.statistic} is not defined ({UNDEFINED[claim.statistic]})")
        else:
            per_seed[seed] = value
    return ClaimValues(per_seed, tuple(excluded))


def _statistic(claim: Claim, runs: Sequence[RunData | None]) -> float | None:
    """The statistic of one seed, whose runs have the metric. A `spread` with `minus` is the difference of two spreads."""

    def of(name: str | None) -> float | None:
        values = [claim_metric(run, claim, of=name) for run in runs]
        return STATISTICS[claim.statistic]([value for value in values if not isinstance(value, str)])

    if claim.statistic != "spread" or claim.minus is None:
        return of(None)
    first, second = of(claim.metric), of(claim.minus)
    return None if first is None or second is None else first - second


def _correlated(claim: Claim, study: StudySpec, table: dict[tuple[str, int], RunData]) -> ClaimValues:
    """`spearman`: a run without one of the metrics is left out by itself, its seed stays."""
    clusters: dict[int, list[tuple[float, float]]] = {}
    excluded = []
    for seed in study.seeds:
        pairs = []
        for arm in claim.arms or [arm.name for arm in study.arms]:
            run = table.get((arm, seed))
            first, second = claim_metric(run, claim), claim_metric(run, claim, of=claim.against)
            if isinstance(first, str) or isinstance(second, str):
                excluded.append(f"seed {seed}: {arm} {first if isinstance(first, str) else second}")
            else:
                pairs.append((first, second))
        if len(pairs) >= 3:
            clusters[seed] = pairs
        elif pairs:
            excluded.append(f"seed {seed}: {len(pairs)} runs, and a rank correlation needs 3")
    per_seed = {seed: rho for seed, pairs in clusters.items() if (rho := spearman(pairs)) is not None}
    excluded += [f"seed {seed}: the rank correlation is not defined ({UNDEFINED['spearman']})" for seed in clusters if seed not in per_seed]
    rho, low, high = clustered_spearman({seed: clusters[seed] for seed in per_seed})
    return ClaimValues(per_seed, tuple(excluded), None if rho is None else (rho, low, high))


def claim_metric(run: RunData | None, claim: Claim, *, of: str | None = None) -> float | str:
    """The claim's metric of one run (`minus` subtracted), or of `of` alone; in words, why the run has none."""
    if run is None:
        return "was not run"
    if run.state is not RunState.COMPLETED:
        return f"{'is ' if run.state in UNFINISHED else ''}{run.state.value}{f' ({one_line(run.reason, 160)})' if run.reason else ''}"
    values = []
    for name in (of,) if of is not None else (claim.metric, claim.minus):
        if name is None:
            continue
        value = metric(run, name)
        if value is None:
            return f"has no {name}"
        values.append(value)
    return values[0] - sum(values[1:])


UNFINISHED = frozenset({RunState.QUEUED, RunState.STARTING, RunState.RUNNING, RunState.PAUSED})

STATISTICS: dict[str, Callable[[Sequence[float]], float | None]] = {
    "level": lambda values: values[0],
    "difference": lambda values: values[0] - values[1],
    "ratio": lambda values: values[0] / values[1] if values[1] else None,
    "interaction": lambda values: (values[0] - values[1]) - (values[2] - values[3]),
    "monotone": lambda values: spearman([(float(place), value) for place, value in enumerate(values)]),
    "spread": lambda values: max(values) - min(values),
}
"""Values of the arms, in the claim's order -> the seed's statistic; None where it is not defined."""

UNDEFINED = {"ratio": "the second arm has 0", "monotone": "all arms have the same value", "spearman": "all runs have the same value"}


def in_words(claim: Claim) -> str:
    """The claim as a formula."""
    what = claim.metric + (f" - {claim.minus}" if claim.minus else "")
    a = claim.arms
    match claim.statistic:
        case "level":
            left = f"{what} of {a[0]}"
        case "difference":
            left = f"{what}: {a[0]} - {a[1]}"
        case "ratio":
            left = f"{what}: {a[0]} / {a[1]}"
        case "interaction":
            left = f"{what}: ({a[0]} - {a[1]}) - ({a[2]} - {a[3]})"
        case "monotone":
            left = f"rank correlation of {what} with the order {', '.join(a)}"
        case "spread":
            left = f"greatest less least of {', '.join(a)}: {claim.metric}{f' less that of {claim.minus}' if claim.minus else ''}"
        case "spearman":
            left = f"rank correlation of {what} and {claim.against} over {', '.join(a) or 'all arms'}"
    match claim.direction:
        case "greater":
            return f"{left} > {claim.threshold:g}"
        case "less":
            return f"{left} < {claim.threshold:g}"
        case "within":
            return f"{left} in [{claim.low:g}, {claim.high:g}]"
        case "two-sided":
            return f"{left} ≠ {claim.threshold:g}"
