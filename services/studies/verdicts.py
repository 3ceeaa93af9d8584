"""Verdicts: what the seeds of a study say of a claim, by a rule that was fixed before anything ran."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from services.contracts.study import DECIDED, TESTED, Claim, StudySpec
from services.studies.claims import ClaimValues, claim_values
from services.studies.display import number, one_line
from services.studies.paired_statistics import effect_size, least_p, paired, sign_flip_p
from services.studies.study_data import RunData

LEVEL = 0.05
"""Greatest p with which a one-sided claim is decided."""


class Decision(StrEnum):
    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    NOT_SEPARABLE = "not separable"
    """The seeds do not tell: neither that it holds nor that it does not."""
    NO_DATA = "no data"


@dataclass(frozen=True)
class Verdict:
    """What became of a claim."""

    claim: Claim
    decision: Decision
    effect: float | None
    """Mean over seeds of the claim's statistic; of `spearman`, the correlation over the runs of all seeds."""
    low: float | None
    """95 % interval of the effect: Student's t over seeds; of `spearman`, a bootstrap over seeds."""
    high: float | None
    effect_size: float | None
    """(mean - threshold) / standard deviation over seeds."""
    p: float | None
    """Sign-flip permutation p against the threshold: one-sided in the claimed direction, or two-sided. None for `within`."""
    n: int
    """Seeds that count."""
    per_seed: dict[int, float]
    why: str
    """The decision's reason, in a sentence."""
    excluded: tuple[str, ...] = ()
    """Seeds and runs that are left out, with the reason."""

    @property
    def reads(self) -> str:
        """The decision as a reader wants it: a two-sided claim that holds `differs`."""
        differs = self.decision is Decision.HOLDS and self.claim.direction == "two-sided"
        return "differs" if differs else self.decision.value


def verdicts_of(study: StudySpec, runs: Sequence[RunData]) -> list[Verdict]:
    """The verdicts of all claims, in their order."""
    return [decide(claim, claim_values(claim, study, runs)) for claim in study.claims]


def decide(claim: Claim, values: ClaimValues) -> Verdict:
    """The verdict of a claim. d is a seed's statistic less the claim's threshold; n counts the seeds that are not excluded.

    - One-sided, n >= 5: holds if the sign-flip p is at most 0.05 and at least n - 1 seeds have the claimed sign; does not hold if the same is true of
      the opposite sign; otherwise not separable. (With exactly five seeds p <= 0.05 asks for all five.)
    - One-sided, n = 3 or 4: the same of all signs, since p cannot get below 0.125 or 0.0625.
    - `within`: holds if the mean is inside [low, high] and at least n - 1 seeds are; does not hold if at most one seed is inside. With n = 3 or 4 all
      seeds must be inside, or none.
    - two-sided, n >= 3: holds, read as "differs", if all seeds have one sign and the interval excludes the threshold. Never "does not hold": that
      nothing was found is not a proof that nothing is there.
    - n = 1 or 2: not separable, since there is no interval.
    - `spearman`: the seeds' own correlations are the values above, and the correlation over all runs must be on the same side.

    A seed of which an arm failed, did not end or lacks the metric is excluded, and the verdict says so.
    """
    seeds = list(values.per_seed.values())
    if not seeds:
        return Verdict(claim, Decision.NO_DATA, None, None, None, None, None, 0, {}, "no seed has all that the claim needs", values.excluded)
    over = paired(seeds)
    effect, low, high = values.pooled if values.pooled is not None else (over.mean, over.low, over.high)
    if claim.statistic == "monotone" and low is not None and high is not None:  # a mean of correlations is one: Student's interval knows no bounds
        low, high = max(low, -1.0), min(high, 1.0)
    differences = [_difference(value, claim.threshold) for value in seeds]
    if claim.direction == "within":
        p = None
        decision, why = _within(claim, seeds, effect)
    elif claim.direction == "two-sided":
        p = sign_flip_p(differences, "two-sided")
        decision, why = _two_sided(differences, p, claim.threshold, low, high)
    else:
        p = sign_flip_p(differences, claim.direction)
        decision, why = _one_sided(claim, differences, p, _difference(effect, claim.threshold))
    if over.n < DECIDED:
        decision, why = Decision.NOT_SEPARABLE, f"{_seeds(over.n)}: there is no interval, and at least {DECIDED} are needed to decide"
    sized = None if claim.direction == "within" else effect_size(differences)
    return Verdict(claim, decision, effect, low, high, sized, p, over.n, dict(values.per_seed), why, values.excluded)


def _one_sided(claim: Claim, differences: Sequence[float], p: float, pooled: float) -> tuple[Decision, str]:
    sign, side = (1, "above") if claim.direction == "greater" else (-1, "below")
    n, bound = len(differences), f"{claim.threshold:g}"
    agree, oppose = (sum(way * sign * d > 0 for d in differences) for way in (1, -1))
    opposite_p = sign_flip_p(differences, "less" if sign > 0 else "greater")
    least = f"with {_seeds(n)} p cannot be below {number(least_p(n, 'greater'), 3)}"
    if n < TESTED:
        holds, fails = agree == n, oppose == n
    else:
        holds, fails = p <= LEVEL and agree >= n - 1, opposite_p <= LEVEL and oppose >= n - 1
    counted = f"{agree} of {n} seeds {side} {bound}"
    if (holds and sign * pooled <= 0) or (fails and sign * pooled >= 0):
        return Decision.NOT_SEPARABLE, f"{counted}, but the correlation over all runs is not on that side"
    if holds:
        return Decision.HOLDS, f"{counted}; {least if n < TESTED else f'p = {number(p, 3)}'}"
    if fails:
        other = "below" if sign > 0 else "above"
        return (
            Decision.DOES_NOT_HOLD,
            f"{oppose} of {n} seeds {other} {bound}; {least if n < TESTED else f'p of the opposite = {number(opposite_p, 3)}'}",
        )
    return Decision.NOT_SEPARABLE, f"{counted}, p = {number(p, 3)}" + (f"; {least}, so all signs must agree" if n < TESTED else "")


def _two_sided(differences: Sequence[float], p: float, threshold: float, low: float | None, high: float | None) -> tuple[Decision, str]:
    n = len(differences)
    above, below = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    excludes = low is not None and high is not None and not low <= threshold <= high
    counted = f"{above} of {n} seeds above {threshold:g}, {below} below, p = {number(p, 3)}"
    if max(above, below) == n and excludes:
        return Decision.HOLDS, f"{counted}; the interval excludes {threshold:g}"
    return Decision.NOT_SEPARABLE, f"{counted}; the interval {'excludes' if excludes else 'includes'} {threshold:g}"


def _within(claim: Claim, seeds: Sequence[float], effect: float) -> tuple[Decision, str]:
    assert claim.low is not None
    assert claim.high is not None
    inside = sum(claim.low <= value <= claim.high for value in seeds)
    counted = f"{inside} of {len(seeds)} seeds in [{claim.low:g}, {claim.high:g}]"
    exceptions = 1 if len(seeds) >= TESTED else 0
    if claim.low <= effect <= claim.high and inside >= len(seeds) - exceptions:
        return Decision.HOLDS, f"{counted}, and so is their mean"
    if inside <= exceptions:
        return Decision.DOES_NOT_HOLD, counted
    return Decision.NOT_SEPARABLE, counted


def _difference(value: float, threshold: float) -> float:
    """value - threshold, 0 where they differ by rounding alone: a rank correlation of 0.8 is not above 0.8."""
    difference = value - threshold
    return 0.0 if abs(difference) <= 1e-9 * max(abs(value), abs(threshold)) else difference


def _seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def claim_number(claim_id: str) -> str:
    """What is before the first dot: the claims of one number are shown together."""
    return claim_id.partition(".")[0]


def interval_text(verdict: Verdict) -> str:
    """The effect with its interval, for people."""
    if verdict.low is None or verdict.high is None:
        return number(verdict.effect)
    return f"{number(verdict.effect)} [{number(verdict.low)}, {number(verdict.high)}]"


def markdown_verdicts(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as a table in Markdown."""
    lines = ["| claim | statement | verdict | effect [95 % interval] | seeds | p |", "|---|---|---|---|---|---|"]
    for v in verdicts:
        cells = (v.claim.id, v.claim.text, f"**{v.reads}**", interval_text(v), str(v.n), number(v.p))
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A table's cell: nothing in it ends the cell, or is HTML or a link."""
    return re.sub(r"([|<>\[\]`\\])", r"\\\1", one_line(text).replace("⏎", " "))
