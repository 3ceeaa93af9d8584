"""The controllers of a run around its steps: what they do follows from their state and the readings alone, so that a redo of steps repeats it."""

import json
import math
import random
from typing import Any

import pytest

from services.contracts.spec import RunSpec
from trainer.control.loop import ControlLoops


def spec_of(**changes: Any) -> RunSpec:
    return RunSpec.model_validate({"versions": 40, "batch_groups": 4, "group_size": 2} | changes)


ENTROPY = [
    {"method": "positive_reweighting", "target": 0.9, "start": 0.7}, {"method": "adaptive_regularisation", "target": 0.9},
    {"method": "entropic", "target": 0.9}, {"method": "bonus"}, {"method": "clip_cov"},
]  # fmt: skip
LOOP = {"max_lag": 2, "target": {"metric": "kl", "value": 0.02}}


def readings(versions: int) -> list[dict[str, float]]:
    draw = random.Random(0)
    return [
        {
            "entropy_nats": 1.2 * 0.97**v, "lag_mean": 1.0, "reward_mean": draw.random(), "ess_share": 0.9,
            "kl_behaviour_k3_nats": 0.005 + 0.01 * draw.random(), "forking_threshold_nats": 1.0 + v if v == 0 else 1.0,
        }
        for v in range(versions)
    ]  # fmt: skip


def step(loops: ControlLoops, spec: RunSpec, version: int, values: dict[str, float]) -> tuple[Any, ...]:
    actuators = loops.actuate(spec, version)
    loops.observe(spec, version, values)
    return actuators, dict(loops.shown), loops.wanted_max_lag, loops.forking_nats


@pytest.mark.parametrize("control", ENTROPY, ids=lambda control: control["method"])
def test_steps_that_are_done_again_from_a_checkpoint_have_the_same_controllers(control: dict[str, Any]) -> None:
    spec, told = spec_of(entropy=control, staleness=LOOP), readings(30)
    first = ControlLoops(spec, prompts=10)
    done, saved = [], {}
    for version, values in enumerate(told):
        if version == 12:
            saved = json.loads(json.dumps(first.state()))  # as the manifest keeps it
        done.append(step(first, spec, version, values))
    again = ControlLoops(spec, prompts=10, saved=saved)
    assert [step(again, spec, version, told[version]) for version in range(12, 30)] == done[12:]
    assert again.state() == first.state()
    assert len({wanted for _, _, wanted, _ in done}) > 1, "the window was moved meanwhile"


def test_a_step_without_a_trained_token_teaches_nothing() -> None:
    spec = spec_of(entropy=ENTROPY[0], staleness=LOOP)
    loops = ControlLoops(spec, prompts=10)
    step(loops, spec, 0, readings(1)[0])
    before = loops.state()
    step(loops, spec, 1, {"reward_mean": 0.0, "tokens": 0.0})
    assert loops.state() == before


def test_without_a_target_no_window_is_asked_for() -> None:
    loops, spec = ControlLoops(spec_of(), prompts=10), spec_of()
    for version, values in enumerate(readings(5)):
        assert step(loops, spec, version, values)[2] is None


@pytest.mark.parametrize(("prompts", "weights"), [(None, [1.0] * 4), (40, [1.0] * 4), (8, [0.0, 0.0, 1.0, 1.0]), (4, [0.0, 1 / 3, 2 / 3, 1.0])])
def test_an_epoch_is_as_many_versions_as_the_data_last(prompts: int | None, weights: list[float]) -> None:
    spec = spec_of(versions=4, entropy={"method": "positive_reweighting", "schedule": "epoch", "floor": 0.0})
    loops = ControlLoops(spec, prompts=prompts)
    assert [loops.actuate(spec, version).positive_weight for version in range(4)] == pytest.approx(weights)


def test_the_age_of_the_reading_slows_the_controller() -> None:
    spec = spec_of(entropy=ENTROPY[0])
    moved = []
    for lag in (0.0, 4.0):
        loops = ControlLoops(spec, prompts=10)
        step(loops, spec, 0, readings(1)[0] | {"entropy_nats": 0.1, "lag_mean": lag})
        moved.append(0.7 - loops.actuate(spec, 1).positive_weight)
    assert moved == pytest.approx([0.05, 0.01])
    assert not math.isclose(*moved)
