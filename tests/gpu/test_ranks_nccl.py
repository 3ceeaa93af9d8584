"""Two ranks with a GPU each (NCCL) do what one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.conftest import free_port
from tests.integration.rank_world import on_ranks
from tests.integration.test_ranks import CASES, assert_near, everything, weights
from tests.unit.tiny_policy import tiny_policy
from trainer.ranks import ALONE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


def test_two_gpus_train_and_resume_as_one_does(tmp_path: Path) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    out.mkdir()
    tiny_policy().model.save_pretrained(model)
    everything(ALONE, model, out, "one")
    on_ranks(2, free_port(), everything, model, out, "two", gpus=True)
    for name in CASES:  # TF32 is off unless it is asked for: what differs is the order of sums
        assert_near(weights(out, f"one {name}"), weights(out, f"two {name}"), within=1e-4)
    assert_near(weights(out, "two from one"), weights(out, "two from two"), within=1e-4)
    assert_near(weights(out, "one from one"), weights(out, "two from one"), within=1e-4)
