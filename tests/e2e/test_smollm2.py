"""A real instruct model through the same processes: chat template, reasoning-gym arithmetic, math-verify, bf16. Minutes long."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from services.contracts.spec import RunSpec, with_values
from services.local.models.smollm2 import make_smollm2

from .conftest import ROOT, Stack


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_smollm2_trains_three_versions_on_arithmetic(stack: Stack, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="deploy/install.sh smollm2")
    model = make_smollm2(tmp_path / "smollm2", log=print)
    spec = RunSpec.model_validate(tomllib.loads((ROOT / "deploy/runs/smollm2-arithmetic.toml").read_text()))
    run_id = stack.client.submit(with_values(spec, {"model.path": str(model)})).run_id
    stack.finish(run_id, seconds=1200)
    steps = stack.steps(run_id)
    assert len(steps) == spec.versions == 3
    for step in steps:
        assert 0 < (step.values["entropy_nats"] or 0) < 11
        print({k: v for k, v in step.values.items() if "publish" in k or k in ("mismatch_lag0_nats", "reward_mean", "seconds", "entropy_nats")})
    rewards = [completion.reward for sample in stack.samples(run_id) for completion in sample.completions]
    assert None not in rewards
    assert len(set(rewards)) > 1, "all completions got the same reward"
