"""The entropy laboratory over real processes: runs that repeat, controllers that survive, evaluations, dynamic sampling, what-if."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from services.contracts.views import StepView

from .conftest import Stack

SMALL: dict[str, Any] = {"batch_groups": 8, "group_size": 4, "learning_rate": 1e-3}
CONTROLLED = {"method": "positive_reweighting", "target": 1.4, "floor": 0.2}
SETS = [
    {"name": "in", "domain": "in", "prompts": 6, "samples": 4},
    {"name": "out", "domain": "out", "prompts": 4, "samples": 4, "data": {"options": {"min_target": 41, "max_target": 52}}},
]
REPEATED = ("entropy_nats", "loss", "reward_mean", "gradient_norm", "kl_behaviour_k3_nats", "control_weight", "tokens", "learning_rate")


@contextmanager
def busy_machine(processes: int = 2) -> Iterator[None]:
    burning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


def repeated(steps: list[StepView]) -> list[dict[str, float | None]]:
    return [{name: step.values[name] for name in REPEATED if name in step.values} for step in steps]


def same(steps: list[StepView], others: list[StepView]) -> bool:
    return len(steps) == len(others) and all(
        row == pytest.approx(other, rel=1e-4, abs=1e-6) for row, other in zip(repeated(steps), repeated(others), strict=True)
    )


def test_an_exact_window_repeats_itself_on_a_busy_machine_and_through_the_death_of_its_trainer(stack: Stack) -> None:
    spec: dict[str, Any] = SMALL | {
        "versions": 12, "updates_per_batch": 2, "staleness": {"min_lag": 2, "max_lag": 2}, "entropy": CONTROLLED, "checkpoint": {"every": 4},
    }  # fmt: skip
    first = stack.submit(name="first", **spec)
    stack.finish(first)
    expected = stack.steps(first)
    assert [step.values["lag_mean"] for step in expected] == [0.0, 1.0] + [2.0] * 10
    assert len({step.values["control_weight"] for step in expected}) > 3, "the controller moved"
    with busy_machine():
        second = stack.submit(name="second", **spec)
        stack.finish(second)
    assert same(expected, stack.steps(second))
    third = stack.submit(name="third", **spec)
    stack.reach(third, 6)
    stack.kill("trainer-0")
    stack.finish(third)
    assert same(expected, stack.steps(third)), "its controller went on from where the checkpoint left it"


def test_another_seed_is_another_run(stack: Stack) -> None:
    runs = [stack.submit(name="seeded", versions=2, seed=seed, **SMALL) for seed in (1, 2)]
    for run in runs:
        stack.finish(run)
    assert not same(stack.steps(runs[0]), stack.steps(runs[1]))


def test_declared_versions_are_evaluated_by_the_policy_of_that_version_on_the_same_prompts(stack: Stack) -> None:
    run_id = stack.submit(name="evaluated", versions=6, evaluation={"every": 4, "sets": SETS}, measure={"prompt_entropy_every": 2}, **SMALL)
    stack.finish(run_id)
    records = stack.client.evaluations(run_id).evaluations
    assert sorted((one.name, one.version) for one in records) == [(name, version) for name in ("in", "out") for version in (0, 4, 6)]
    assert {(one.name, one.domain, one.prompts, one.samples) for one in records} == {("in", "in", 6, 4), ("out", "out", 4, 4)}
    for one in records:
        assert 0 <= one.values["pass_at_1"] <= one.values["pass_at_4"] <= 1
        assert one.values["entropy_estimate_nats"] > 0
    probed = {step.version: step.values.get("prompt_entropy_out_nats") for step in stack.steps(run_id)}
    assert [version for version, value in probed.items() if value is not None] == [0, 2, 4]
    counts = stack.client.conservation(run_id)
    assert (counts.issued, counts.consumed, counts.holds) == (6 * 8, 6 * 8, True), "evaluation groups are no part of training"


def test_dynamic_sampling_trains_on_groups_with_signal_alone_and_counts_the_others(stack: Stack) -> None:
    run_id = stack.submit(
        name="dynamic", versions=5, shaping={"skip_zero_signal": True}, staleness={"min_lag": 1, "max_lag": 1}, **(SMALL | {"learning_rate": 1e-4})
    )
    stack.finish(run_id)
    steps, counts = stack.steps(run_id), stack.client.conservation(run_id)
    assert [step.values["zero_signal_share"] for step in steps] == [0.0] * 5
    assert counts.consumed == 5 * 8
    assert counts.skipped > 0
    assert counts.holds
    assert sum(step.values.get("skipped_groups") or 0 for step in steps) <= counts.skipped
    for sample in stack.samples(run_id):
        assert len({completion.reward for completion in sample.completions}) > 1
        floor = min(1, sample.trained_version)
        assert all(floor <= lag <= 1 for completion in sample.completions for lag in completion.lags)


def test_a_replay_with_nothing_changed_has_the_losses_of_its_run_and_one_with_a_change_has_not(stack: Stack) -> None:
    original = stack.submit(name="original", versions=6, updates_per_batch=2, **SMALL)
    stack.reach(original, 2)
    stack.client.set_knobs(original, {"learning_rate": 5e-4})
    stack.finish(original)
    same_again = stack.client.replay_run(original, {}).run_id
    changed = stack.client.replay_run(original, {"clip.high": 0.01, "clip.low": 0.01}).run_id
    for run in (same_again, changed):
        stack.finish(run)
    assert same(stack.steps(original), stack.steps(same_again))
    assert not same(stack.steps(original), stack.steps(changed))
    assert stack.client.conservation(same_again).issued == 0
    assert (stack.steps(changed)[-1].values["ess_share"] or 0) < 1.0


def test_the_target_of_a_controller_is_a_live_knob(stack: Stack) -> None:
    run_id = stack.submit(name="live", versions=16, entropy=CONTROLLED, **SMALL)
    stack.reach(run_id, 3)
    answer = stack.client.set_knobs(run_id, {"entropy.target": 0.3})
    stack.finish(run_id)
    for step in stack.steps(run_id):
        assert step.values["control_target_nats"] == (0.3 if step.version >= answer.version else 1.4)


def test_the_staleness_controller_turns_the_window_within_its_bounds(stack: Stack) -> None:
    target = {"metric": "kl", "value": 0.05, "least": 0, "greatest": 3}
    run_id = stack.submit(name="steered", versions=24, staleness={"max_lag": 0, "target": target}, **SMALL)
    stack.finish(run_id)
    windows = [step.window[1] for step in stack.steps(run_id)]
    assert windows[0] == 0
    assert max(windows) in (1, 2, 3), "there is no lag at first, and so less KL than is asked for"
    steered = [event for event in stack.client.events(run_id) if event.event == "knobs_steered"]
    assert [event.version for event in steered][:1] == [next(i for i, window in enumerate(windows) if window > 0)]
