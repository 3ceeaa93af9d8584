"""A run whose rewards come from running what the policy writes: the file deploy/runs/code.toml, shorter, over real processes."""

from __future__ import annotations

import statistics
import tomllib

from services.contracts.messages import Outcome
from services.contracts.spec import RunSpec, with_values

from .conftest import ROOT, Stack

VERSIONS = 16
RISE = 0.05
"""Of the mean reward from the first to the last quarter. Measured: 0.13 to 0.18, seeds 0 to 2."""
NOT_RUN = ("no code", "the code is not valid Unicode")
"""What is said of completions in which there is nothing to be run."""


def test_a_policy_learns_to_write_code_that_passes_its_tests(stack: Stack) -> None:
    spec = RunSpec.model_validate(tomllib.loads((ROOT / "deploy/runs/code.toml").read_text()))
    run_id = stack.client.submit(with_values(spec, {"versions": VERSIONS, "model.path": str(ROOT / spec.model.path)})).run_id
    stack.finish(run_id, seconds=240)
    counts = stack.client.conservation(run_id)
    assert (counts.consumed, counts.dead, counts.outstanding, counts.holds) == (VERSIONS * spec.batch_groups, 0, 0, True)
    samples = stack.samples(run_id)
    assert len({sample.index for sample in samples}) == len(samples) == VERSIONS * spec.batch_groups
    completions = [completion for sample in samples for completion in sample.completions]
    for completion in completions:
        (part,) = completion.parts
        assert (part.verifier, part.outcome) == ("code", Outcome.OK), part
        assert part.tier or part.detail.startswith(NOT_RUN), part
        assert completion.reward == part.score == float(part.detail == "passes 6 of 6"), part
    assert len({part.tier for completion in completions for part in completion.parts if part.tier}) == 1
    assert sum(len({completion.reward for completion in sample.completions}) > 1 for sample in samples) > len(samples) / 4
    rewards = [step.values["reward_mean"] or 0.0 for step in stack.steps(run_id)]
    assert len(rewards) == VERSIONS
    quarter = VERSIONS // 4
    assert statistics.mean(rewards[-quarter:]) > statistics.mean(rewards[:quarter]) + RISE
