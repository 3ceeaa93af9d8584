"""Two ranks do what one does: weights, measures, checkpoints, publications. Over torch.distributed on CPU (gloo, FSDP2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import free_port
from tests.integration.rank_world import batch, keep, on_ranks, spec, steps, tell
from tests.unit.tiny_policy import tiny_policy
from trainer.batching import Trajectory, pack
from trainer.control.actuators import Actuators
from trainer.policy import Policy
from trainer.ranks import ALONE, Ranks

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "three updates": ({"updates_per_batch": 3}, {"groups": 6}),
    "several packs on each rank": ({}, {"groups": 2, "members": 60, "lengths": (40, 11, 60)}),
    "two temperatures": ({"updates_per_batch": 2}, {"temperatures": (1.0, 0.5), "groups": 6}),
    "fewer completions than ranks": ({"advantage": {"estimator": "psr"}}, {"groups": 1, "members": 1}),
    "random choices": ({"entropy": {"method": "random_positive_clip", "fraction": 0.5}}, {}),
}
"""What the spec and the batches have of each case."""
pytestmark = pytest.mark.timeout(900)  # two more processes, on what may be two busy cores
ACTS = Actuators(entropy_coefficient=0.01)
VERSIONS = range(5)


def trained(ranks: Ranks, model: Path, out: Path, label: str) -> None:
    """Every case, for five steps."""
    for name, (fields, shape) in CASES.items():
        policy, _, values = steps(ranks, model, spec(**fields), {v: batch(v, **shape) for v in VERSIONS}, actuators=ACTS)
        tell(out, f"{label} {name}", policy, values)


def resumed(ranks: Ranks, model: Path, out: Path, label: str) -> None:
    """Three steps and a checkpoint; then two more from the checkpoint of each kind that lies there."""
    policy, optimizer, _ = steps(ranks, model, spec(), {v: batch(v) for v in range(3)})
    keep(out / label, 3, policy, optimizer)
    for other in sorted(path.name for path in out.iterdir() if path.is_dir()):
        policy, _, values = steps(ranks, out / other / "v00000003", spec(), {v: batch(v) for v in (3, 4)}, resumed=True)
        tell(out, f"{label} from {other}", policy, values)


def published(ranks: Ranks, model: Path, out: Path, label: str) -> None:
    """What the publisher and the probes ask of a policy outside of a step."""
    policy, _, _ = steps(ranks, model, spec(), {0: batch(0)})
    tokens = policy.sample(3, 12, seed=5)
    (packed,) = pack([Trajectory(tokens[:1], tokens[1:], [0.0] * 11, [0] * 11, advantage=0.0)])
    with torch.no_grad():
        logp, entropy, _ = policy.forward(packed, temperature=0.7)
    tell(out, f"{label} published", policy, {"tokens": tokens, "logp": logp.tolist(), "entropy": entropy.tolist()})


def rounded(ranks: Ranks, model: Path, out: Path, label: str) -> None:
    """Five steps with passes in bfloat16."""
    policy, _, values = steps(ranks, model, spec(model={"dtype": "bfloat16"}), {v: batch(v) for v in VERSIONS})
    tell(out, f"{label} rounded", policy, values)


def everything(ranks: Ranks, model: Path, out: Path, label: str) -> None:
    trained(ranks, model, out, label)
    rounded(ranks, model, out, label)
    resumed(ranks, model, out, label)
    published(ranks, model, out, label)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank and two ranks have come to."""
    out, model = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("model")
    tiny_policy().model.save_pretrained(model)
    with pytest.MonkeyPatch.context() as here:
        here.setattr(torch.cuda, "is_available", lambda: False)  # tests/gpu has them on GPUs
        everything(ALONE, model, out, "one")
        on_ranks(2, free_port(), everything, model, out, "two")
        resumed(ALONE, model, out, "one")
    return out


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / f"{name}.safetensors")


def told(out: Path, name: str) -> Any:
    return json.loads((out / f"{name}.json").read_text())


def assert_near(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], *, within: float) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max().item() < within, name


@pytest.mark.parametrize("name", CASES)
def test_five_steps_of_two_ranks_give_the_weights_of_one(out: Path, name: str) -> None:
    one, start = weights(out, f"one {name}"), dict(tiny_policy().model.named_parameters())
    assert_near(one, weights(out, f"two {name}"), within=2e-5)
    moved = max((tensor - start[key]).abs().max().item() for key, tensor in one.items())
    assert moved > 5e-3, "or else nothing was trained"


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_measure_what_one_measures(out: Path, name: str) -> None:
    for one, two in zip(told(out, f"one {name}"), told(out, f"two {name}"), strict=True):
        assert one.keys() == two.keys()
        smooth = [key for key in one if "/entropy/" not in key]  # a token on the edge of two bins may fall into either
        assert len(smooth) > 50
        assert [two[key] for key in smooth] == pytest.approx([one[key] for key in smooth], rel=2e-3, abs=2e-5)


def test_in_bfloat16_they_differ_by_less_than_they_learn(out: Path) -> None:
    """Adam makes a whole step of a gradient near 0 whose sign rounding has turned, so that the largest difference says little."""
    one, two, start = weights(out, "one rounded"), weights(out, "two rounded"), dict(tiny_policy().model.named_parameters())
    apart = sum((tensor - two[name]).abs().sum().item() for name, tensor in one.items())
    moved = sum((tensor - start[name]).abs().sum().item() for name, tensor in one.items())
    assert 0 < apart < 0.05 * moved
    last_one, last_two = told(out, "one rounded")[-1], told(out, "two rounded")[-1]
    assert last_two["entropy_nats"] == pytest.approx(last_one["entropy_nats"], rel=5e-3)


@pytest.mark.parametrize(("here", "there"), [("one", "two"), ("two", "one"), ("two", "two")])
def test_a_checkpoint_is_resumed_by_any_number_of_ranks(out: Path, here: str, there: str) -> None:
    assert_near(weights(out, "one from one"), weights(out, f"{here} from {there}"), within=2e-5)


def test_a_checkpoint_of_two_ranks_is_a_model_like_any_other(out: Path) -> None:
    back = Policy.load(out / "two" / "v00000003")
    assert type(back.model).__name__ == "LlamaForCausalLM"
    assert back.model.lm_head.weight is back.model.model.embed_tokens.weight
    assert sorted(path.name for path in (out / "two" / "v00000003").iterdir()) == sorted(path.name for path in (out / "one" / "v00000003").iterdir())


def test_canary_and_samples_are_those_of_one_rank(out: Path) -> None:
    one, two = told(out, "one published"), told(out, "two published")
    assert one["tokens"] == two["tokens"]
    assert two["logp"] == pytest.approx(one["logp"], abs=1e-4)
    assert two["entropy"] == pytest.approx(one["entropy"], abs=1e-4)
    assert_near(weights(out, "one published"), weights(out, "two published"), within=2e-5)
