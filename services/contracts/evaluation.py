"""Evaluation beside training: at which versions a run is evaluated, and as what its fleet sees an evaluation set.

An evaluation set is completed and scored like a run of its own: a child of the run, with a spec of its own. Its groups are issued all at once when a
version that is due has been announced, and no server loads another version before they are generated: every token is of the version evaluated.
"""

from __future__ import annotations

import hashlib

from pydantic import BaseModel, ConfigDict

from services.contracts.spec import EvaluationSet, RunSpec, Sampling


class Probe(BaseModel):
    """The prompts of an evaluation set, as tokens. Dispatcher -> trainer."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    name: str
    domain: str
    """`in` or `out` of the domain of training."""
    prompts: list[list[int]]


class Probes(BaseModel):
    """The probes of a run, in the order of its evaluation sets."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    probes: tuple[Probe, ...]


def due(spec: RunSpec, version: int) -> bool:
    """Is the policy evaluated at `version`? At the first, at the last, and at each `evaluation.every` between them; never without a set."""
    every = spec.evaluation.every
    ends = version in (0, spec.versions)
    return bool(spec.evaluation.sets) and (ends or (every > 0 and version % every == 0))


def passed_over(spec: RunSpec, version: int, *, waited: float, elapsed: float) -> bool:
    """Is the evaluation that is due at `version` left out, since training stood still for evaluations for `waited` of `elapsed` seconds?

    That is, for more than `evaluation.max_share`. Never at the first or the last version.
    """
    return due(spec, version) and 0 < version < spec.versions and waited > spec.evaluation.max_share * elapsed


def set_spec(spec: RunSpec, one: EvaluationSet) -> RunSpec:
    """The spec under which the set is completed and scored. Raises ValueError (pydantic's) when its completions leave no room for a prompt.

    Its seed, of which the draw of the prompts and the seeds of the samples are made, depends on the run's seed and the set's name alone. So all
    versions, and all runs of one seed, are compared on the same prompts with common random numbers.
    """
    return RunSpec(
        name=spec.name, seed=_seed(spec.seed, one.name), versions=spec.versions, group_size=one.samples, temperature=one.temperature,
        max_attempts=spec.max_attempts, model=spec.model, data=one.data or spec.data, rewards=one.rewards or spec.rewards,
        sampling=Sampling(top_p=one.top_p, max_tokens=one.max_tokens or spec.sampling.max_tokens),
    )  # fmt: skip


def _seed(seed: int, name: str) -> int:
    """31 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest(), "big") >> 1
