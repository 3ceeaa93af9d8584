"""Studies: named arms of one base run, over paired seeds, with the claims that they are to decide, registered before anything runs.

The seeds are paired: the runs of one seed start from the same weights, see the same prompts in the same order and sample with the same seeds,
whatever their arm. So a claim is decided by differences within seeds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, ValidationError, model_validator

from services.contracts.algorithms import TAGS, AdaptiveRegularisation, Bonus, EntroPic, EntropyControl, PositiveReweighting
from services.contracts.measures import EVALUATION_KEYS, REDUCERS, RUN_KEYS, known_step_key
from services.contracts.problems import Faults, explained
from services.contracts.section import Section
from services.contracts.spec import RunSpec, flatten, with_values

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Seed = Annotated[int, Field(ge=0, lt=2**31)]
OWN = {
    "seed": "the study's seeds decide it",
    "versions": "the budget decides it: change the study's budget, or give the arm its own",
    "name": "it is made of the study's, the arm's and the seed",
    "labels.study": "the study sets it",
    "labels.arm": "the study sets it",
    "labels.seed": "the study sets it",
}  # fmt: skip
"""Fields of a run that the study itself decides, with what to do instead."""
DECIDED, TESTED = 3, 5
"""Seeds from which a claim is decided at all, and from which p decides: with three or four it cannot be below 0.05, and all signs decide."""
CORRELATED = 3
"""Runs of a seed from which a rank correlation over arms says anything."""


class Budget(Section):
    """How long each run is; with both, the one that ends first counts."""

    rollouts: int | None = Field(None, ge=1)
    """Completions that are trained on."""
    updates: int | None = Field(None, ge=1)
    """Optimiser updates."""

    @model_validator(mode="after")
    def _given(self) -> Budget:
        if self.rollouts is None and self.updates is None:
            raise ValueError("give budget.rollouts, budget.updates or both: without a budget no run would end")
        return self

    def versions(self, spec: RunSpec) -> int:
        """Versions of a run of `spec` that this budget pays for, at least 1."""
        paid = []
        if self.rollouts is not None:
            paid.append(math.ceil(self.rollouts / (spec.batch_groups * spec.group_size)))
        if self.updates is not None:
            paid.append(math.ceil(self.updates / spec.updates_per_batch))
        return max(1, min(paid))


class Arm(Section):
    name: str = Field(min_length=1, max_length=40, pattern=NAME)
    """Name in claims, plots and labels."""
    like: str | None = None
    """Another arm whose overrides this one starts from."""
    set: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of the base run that this arm changes, by dotted name or nested."""
    budget: Budget | None = None
    """Its own budget; default: the study's."""
    factors: dict[str, float | str] = Field(default_factory=dict)
    """Values of the factors that the arm stands for, for plots of entropy against a factor; default: what `set` says."""


class Claim(Section):
    """A statement that the study is to decide."""

    id: str = Field(min_length=1, max_length=20, pattern=NAME)
    """Such as `F3` or `F3.higher`; the claims of one number are shown together."""
    text: str = Field(min_length=1)
    """The statement in words."""
    statistic: Literal["level", "difference", "ratio", "interaction", "monotone", "spread", "spearman"] = "difference"
    """By seed: `level`: the metric of arms[0]; `difference`: arms[0] - arms[1]; `ratio`: arms[0] / arms[1]; `interaction`: (arms[0] - arms[1]) -
    (arms[2] - arms[3]); `monotone`: rank correlation of the metric with the arms' order; `spread`: greatest less least over the arms, less the
    same of `minus` if given; `spearman`: rank correlation of `metric` and `against` over the arms (all, when none are named)."""
    metric: str
    """`steps.KEY.REDUCER`, `evaluation.SET.KEY.REDUCER` or `run.KEY`."""
    minus: str | None = None
    """Another metric of the same run that is subtracted from the first; of `spread`, its spread."""
    against: str | None = None
    """The other metric of `spearman`."""
    arms: tuple[str, ...] = ()
    """Arms, in the order that the statistic asks for."""
    direction: Literal["greater", "less", "within", "two-sided"] = "two-sided"
    """What is claimed of the statistic: above or below `threshold`, between `low` and `high`, or only different from `threshold`."""
    threshold: float = 0.0
    """What the statistic is compared with."""
    low: float | None = None
    """Lower bound of `within`."""
    high: float | None = None
    """Upper bound of `within`."""

    @model_validator(mode="after")
    def _whole(self) -> Claim:
        least, greatest = ARMS_OF[self.statistic]
        if not least <= len(self.arms) <= greatest:
            many = f"{least}" if least == greatest else f"{least} or more" if greatest > 99 else f"{least} to {greatest}"
            raise ValueError(f"claim {self.id}: the statistic {self.statistic!r} takes {many} arms, not {len(self.arms)}")
        if (self.statistic == "spearman") != (self.against is not None):
            raise ValueError(f"claim {self.id}: `against` belongs to the statistic `spearman`, which needs it")
        if self.statistic == "spearman" and 0 < len(self.arms) < CORRELATED:
            raise ValueError(
                f"claim {self.id}: a rank correlation over {len(self.arms)} of the arms says nothing: name three or more, or none for all"
            )
        if self.direction == "within" and (self.low is None or self.high is None or self.low >= self.high):
            raise ValueError(f"claim {self.id}: the direction `within` needs low < high")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(metric for metric in (self.metric, self.minus, self.against) if metric is not None)


ARMS_OF: dict[str, tuple[int, int]] = {
    "level": (1, 1), "difference": (2, 2), "ratio": (2, 2), "interaction": (4, 4), "monotone": (3, 1000), "spread": (2, 1000), "spearman": (0, 1000),
}  # fmt: skip
"""Least and greatest number of arms of each statistic."""


class StudySpec(Section):
    """A grid of runs, and what it is to decide."""

    name: str = Field(min_length=1, max_length=40, pattern=NAME)
    """Name, for people."""
    text: str = ""
    """What the study is about."""
    seeds: tuple[Seed, ...] = Field((0, 1, 2, 3, 4), min_length=1)
    """Seeds of each arm: one run for each."""
    budget: Budget
    """Length of each run."""
    base: dict[str, JsonValue] = Field(default_factory=dict)
    """The run spec that all arms start from; what it leaves out has the run spec's defaults."""
    arms: tuple[Arm, ...] = Field(min_length=1)
    """What is compared."""
    claims: tuple[Claim, ...] = ()
    """What is to be decided."""

    @model_validator(mode="after")
    def _whole(self) -> StudySpec:
        faults = [*self._names(), *self._base()]
        if not faults:
            faults = self._arms()
        if not faults:
            faults = self._claims()
        if faults:
            raise Faults(faults)
        return self

    def _names(self) -> list[tuple[str, str]]:
        faults = []
        for what, names in (("seeds", list(map(str, self.seeds))), ("arms", [a.name for a in self.arms]), ("claims", [c.id for c in self.claims])):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                faults.append((what, f"{', '.join(twice)} given twice"))
        return faults

    def _base(self) -> list[tuple[str, str]]:
        faults = _not_its_own(self.base, "base")
        try:
            RunSpec.model_validate(self.base)
        except ValidationError as error:
            faults += [(f"base.{name}" if name else "base", problem) for name, problem in explained(error, RunSpec)]
        return faults

    def _arms(self) -> list[tuple[str, str]]:
        faults, there = [], {arm.name for arm in self.arms}
        for arm in self.arms:
            at = f"arms.{arm.name}"
            if arm.like is not None and arm.like not in there:
                faults.append((f"{at}.like", f"there is no arm {arm.like!r}; there are {', '.join(sorted(there))}"))
                continue
            try:
                own_overrides(arm.set)
            except ValueError as error:
                faults.append((f"{at}.set", str(error)))
                continue
            if foreign := _not_its_own(arm.set, f"{at}.set"):
                faults += foreign
                continue
            try:
                self.run(arm.name, self.seeds[0])
            except ValidationError as error:
                faults += [(f"{at}.set.{name}" if name else f"{at}.set", problem) for name, problem in explained(error, RunSpec)]
            except Faults as error:
                faults += error.found
            except ValueError as error:
                faults.append((f"{at}.set", str(error)))
        return list(dict.fromkeys(faults))

    def _claims(self) -> list[tuple[str, str]]:
        faults, there = [], [arm.name for arm in self.arms]
        for claim in self.claims:
            if unknown := [name for name in claim.arms if name not in there]:
                faults.append((f"claims.{claim.id}.arms", f"there is no arm {', '.join(unknown)}; there are {', '.join(sorted(there))}"))
                continue
            faults += self._metric_faults(claim, claim.arms or there)
        return faults

    def _metric_faults(self, claim: Claim, arms: Sequence[str]) -> list[tuple[str, str]]:
        """The metrics that cannot be had of these arms: where the claim names them of each, where it is on all arms of three at least."""
        faults, without = [], set[str]()
        for field, metric in (("metric", claim.metric), ("minus", claim.minus), ("against", claim.against)):
            if metric is None:
                continue
            try:
                source, *parts = metric_parts(metric)
            except ValueError as error:
                faults.append((f"claims.{claim.id}.{field}", str(error)))
                continue
            lacking = {arm: why for arm in arms if (why := _unmeasured(self.run(arm, self.seeds[0]), source, *parts))}
            without |= lacking.keys()
            words = "; ".join(f"the runs of arm {arm!r} {why}" for arm, why in list(lacking.items())[:1])
            if claim.arms and lacking:
                faults.append((f"claims.{claim.id}.{field}", f"{metric!r}: {words}"))
            elif (left := len(arms) - len(without)) < CORRELATED and not claim.arms:
                few = f"a rank correlation over all arms needs {CORRELATED}, and {left} of {len(arms)} have what the claim names"
                faults.append((f"claims.{claim.id}.{field}", f"{metric!r}: {few}{f': {words}' if words else ''}"))
                break
        return faults

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What such a study cannot tell, in sentences. It may run all the same."""
        found, seeds = [], len(self.seeds)
        if seeds == 1:
            found.append(f"seeds: there is one, so no effect has an interval and no claim is decided: give {DECIDED}, better {TESTED}")
        elif seeds < DECIDED:
            found.append(f"seeds: there are {seeds}, with which no claim is decided: give {DECIDED}, better {TESTED}")
        elif seeds < TESTED:
            found.append(f"seeds: with {seeds} a claim is decided only if all seeds agree, since p cannot be below 0.05: {TESTED} are better")
        alike: dict[str, list[str]] = {}
        for arm in self.arms:
            spec = self.run(arm.name, self.seeds[0])
            alike.setdefault(spec.model_copy(update={"name": "", "labels": {}}).model_dump_json(), []).append(arm.name)
        found += [f"arms: {' and '.join(names)} are the same run under different names" for names in alike.values() if len(names) > 1]
        return tuple(found)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def overrides(self, name: str) -> dict[str, Any]:
        """What the arm changes in the base run, by dotted name, the overrides of the arm that it is like included. An arm that names another variant
        of a section drops what the arms before it set there. Raises ValueError for a loop of arms or for a field that is set twice."""
        chain: list[Arm] = []
        at = self.arm(name)
        while True:
            if at.name in [arm.name for arm in chain]:
                raise Faults([(f"arms.{name}.like", f"{' -> '.join([a.name for a in chain] + [at.name])} goes round in a circle")])
            chain.append(at)
            if at.like is None:
                break
            at = self.arm(at.like)
        values: dict[str, Any] = {}
        for arm in reversed(chain):
            own = own_overrides(arm.set)
            for section, tag in TAGS.items():
                if own.get(f"{section}.{tag}", values.get(f"{section}.{tag}")) != values.get(f"{section}.{tag}"):
                    values = {field: value for field, value in values.items() if not field.startswith(f"{section}.")}
            values |= own
        return values

    def run(self, arm: str, seed: int) -> RunSpec:
        """The run spec of one arm and seed. Raises ValueError (pydantic's) when the overrides do not fit."""
        spec = self._unseeded(arm)
        own = {"name": f"{self.name}-{arm}-{seed}"[:80], "seed": seed, "labels": spec.labels | {"study": self.name, "arm": arm, "seed": str(seed)}}
        return spec.model_copy(update=own)

    def _unseeded(self, arm: str) -> RunSpec:
        if arm not in self._made:
            spec = with_values(RunSpec.model_validate(self.base), self.overrides(arm))
            versions = (self.arm(arm).budget or self.budget).versions(spec)
            self._made[arm] = RunSpec.model_validate(spec.model_dump(mode="json") | {"versions": versions})
        return self._made[arm]

    @cached_property
    def _made(self) -> dict[str, RunSpec]:
        """Run specs of arms, but for what depends on the seed."""
        return {}

    def cells(self) -> list[tuple[str, int]]:
        """(arm, seed) of every run, seed by seed, so that the first results are pairs."""
        return [(arm.name, seed) for seed in self.seeds for arm in self.arms]

    def narrowed(self, *, arms: Sequence[str] = (), seeds: int | None = None) -> StudySpec:
        """The study with these arms only (all, if none are named) and its first `seeds` seeds, or more of them. Claims on other arms are left out,
        and those on all arms where too few are left. Raises ValueError for an arm that there is not."""
        there = [arm.name for arm in self.arms]
        if unknown := [name for name in arms if name not in there]:
            raise ValueError(f"there is no arm {', '.join(unknown)}; there are {', '.join(there)}")
        kept = [arm for arm in self.arms if not arms or arm.name in arms]
        names = {arm.name for arm in kept}
        alone = [arm.model_copy(update={"like": None, "set": self.overrides(arm.name)}) if arm.like not in {None, *names} else arm for arm in kept]
        claims = [claim for claim in self.claims if names.issuperset(claim.arms) and not self._metric_faults(claim, claim.arms or [*names])]
        further = (seed for seed in range(2**31) if seed not in self.seeds)
        of = self.seeds if seeds is None else (*self.seeds[:seeds], *(next(further) for _ in range(seeds - len(self.seeds))))
        return StudySpec.model_validate(
            self.model_dump(mode="json")
            | {"seeds": of, "arms": [arm.model_dump(mode="json") for arm in alone], "claims": [claim.model_dump(mode="json") for claim in claims]}
        )


def _not_its_own(tree: dict[str, Any], at: str) -> list[tuple[str, str]]:
    """Faults of a tree of run fields that sets what the study decides."""
    return [(f"{at}.{name}", f"cannot be set here: {OWN[name]}") for name in flatten(tree) if name in OWN]


def own_overrides(tree: dict[str, Any]) -> dict[str, Any]:
    """An arm's `set` by dotted name. Raises ValueError where one field is set twice, or as a whole and in part."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        for name, leaf in flatten({key: value}).items():
            clash = [other for other in values if other == name or other.startswith(f"{name}.") or name.startswith(f"{other}.")]
            if clash:
                raise ValueError(f"{name} is in conflict with {'itself, dotted and nested' if clash[0] == name else clash[0]}: give each field once")
            values[name] = leaf
    return values


def metric_parts(metric: str) -> list[str]:
    """[steps, KEY, REDUCER], [evaluation, SET, KEY, REDUCER] or [run, KEY]. Raises ValueError, which names what there is."""
    source, *parts = metric.split(".")
    match source, parts:
        case "steps", [key, reducer]:
            if not known_step_key(key):
                raise ValueError(f"{metric!r}: no step measures {key!r}; docs/metrics.md lists what is measured")
            _check_reducer(metric, reducer)
        case "evaluation", [_, key, reducer]:
            if key not in EVALUATION_KEYS:
                raise ValueError(f"{metric!r}: no evaluation measures {key!r}; there are {', '.join(EVALUATION_KEYS)}")
            _check_reducer(metric, reducer)
        case "run", [key]:
            if key not in RUN_KEYS:
                raise ValueError(f"{metric!r}: a run has no {key!r}; there are {', '.join(RUN_KEYS)}")
        case _:
            raise ValueError(f"{metric!r}: write steps.KEY.REDUCER, evaluation.SET.KEY.REDUCER or run.KEY")
    return [source, *parts]


def _unmeasured(spec: RunSpec, source: str, *parts: str) -> str | None:
    """Why a run of `spec` does not measure what these `metric_parts` name; None where it can."""
    sets = {one.name: one for one in spec.evaluation.sets}
    match source, parts:
        case "evaluation", [name, _, _] if name not in sets:
            return f"have no evaluation set {name!r}; they have {', '.join(sets) or 'none'}"
        case "evaluation", [name, key, _] if key.startswith("pass_at_") and int(key.removeprefix("pass_at_")) > sets[name].samples:
            return f"have {sets[name].samples} samples of each prompt of {name!r}, too few for {key}: raise `samples` of the set"
        case "steps", ["prompt_entropy_in_nats" | "prompt_entropy_out_nats" as key, _]:
            domain = key.split("_")[2]
            if not spec.measure.prompt_entropy_every or domain not in {one.domain for one in sets.values()}:
                return f"do not measure it: it needs measure.prompt_entropy_every above 0 and an evaluation set of the domain {domain!r}"
        case ("steps", ["entropy_change_realised" | "kl_step_k3_nats", _]) | ("run", ["budget_slope" | "budget_r2"]) if not spec.measure.probe_tokens:
            return "do not measure it: it needs measure.probe_tokens above 0"
        case "steps", [key, _] if key in CONTROL_KEYS and not CONTROL_KEYS[key](spec.entropy):
            return f"do not have it: entropy.method {spec.entropy.method!r}, as it is set there, has nothing of the kind"
        case "steps", ["staleness_target" | "staleness_wish_versions", _] if spec.staleness.target is None:
            return "do not have it: they have no staleness.target"
    return None


def _holds_a_target(control: EntropyControl) -> bool:
    return isinstance(control, AdaptiveRegularisation | EntroPic) or (isinstance(control, PositiveReweighting) and control.schedule == "entropy")


CONTROL_KEYS: dict[str, Callable[[EntropyControl], bool]] = {
    "control_weight": lambda control: isinstance(control, PositiveReweighting),
    "control_guard": lambda control: isinstance(control, PositiveReweighting) and control.schedule == "entropy" and control.guard,
    "control_coefficient": lambda control: isinstance(control, AdaptiveRegularisation | Bonus | EntroPic),
    "control_target_nats": _holds_a_target,
    "control_error_nats": _holds_a_target,
}
"""Step keys of entropy control -> whether a run under it has them."""


def _check_reducer(metric: str, reducer: str) -> None:
    if reducer not in REDUCERS and not re.fullmatch(r"at_kl_\d+(e-?\d+)?m?", reducer):
        raise ValueError(f"{metric!r}: no reducer {reducer!r}; there are {', '.join(REDUCERS)} and at_kl_Nm (at a summed KL of N thousandths)")
