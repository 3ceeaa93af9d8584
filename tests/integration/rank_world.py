"""Two processes that are the ranks of a trainer, by torch.distributed alone: what they do is compared with what one process does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from safetensors.torch import save_file

from services.contracts.messages import ScoredGroup
from services.contracts.spec import RunSpec
from tests.unit.tiny_policy import sampled_group, tiny_policy
from trainer import checkpoint
from trainer.checkpoint import Checkpoints
from trainer.control.actuators import Actuators
from trainer.learner import follow, load
from trainer.orders import Step
from trainer.policy import Policy
from trainer.ranks import RankGroup, Ranks, join
from trainer.step import train_step


def spec(**fields: Any) -> RunSpec:
    given = {"batch_groups": 12, "group_size": 2, "versions": 10, "learning_rate": 3e-3, "measure": {"probe_every": 1}}
    return RunSpec.model_validate(given | fields)


def batch(
    version: int, *, groups: int = 4, members: int = 2, lengths: Sequence[int] = (4, 7), temperatures: Sequence[float] = (1.0,)
) -> list[ScoredGroup]:
    """Groups of a policy of its own, so that ratios are not 1."""
    rewards = [float(g % 2 == 0) for g in range(members)]
    return [
        sampled_group(
            tiny_policy(seed=1), 100 * version + i, rewards, version=version, temperature=temperatures[i % len(temperatures)], lengths=lengths
        )
        for i in range(groups)
    ]  # fmt: skip


def steps(
    ranks: Ranks,
    path: Path,
    settings: RunSpec,
    batches: dict[int, list[ScoredGroup]],
    *,
    resumed: bool = False,
    actuators: Actuators | None = None,
    forking_nats: float | None = 1.0,
) -> tuple[Policy, torch.optim.Optimizer, list[dict[str, float]]]:
    """The policy in `path` after a step on each of the batches."""
    policy, optimizer = load(path, settings, resumed=resumed, ranks=ranks)
    values = []
    for version, groups in batches.items():
        acts = actuators or Actuators()
        with ranks.together(Step(groups=tuple(groups), spec=settings, version=version, actuators=acts, forking_nats=forking_nats)):
            values.append(train_step(policy, optimizer, groups, settings, version, actuators=acts, forking_nats=forking_nats).values)
    return policy, optimizer, values


def keep(folder: Path, version: int, policy: Policy, optimizer: torch.optim.Optimizer) -> Path:
    return Checkpoints(folder, keep=9).save(checkpoint.manifest("r", version, consumed=0, issued=0, knobs={}), policy, optimizer)


def tell(out: Path, name: str, policy: Policy, values: Any) -> None:
    """Write down the weights and whatever else for the test to look at."""
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in policy.weights(torch.float32)}, out / f"{name}.safetensors")
    (out / f"{name}.json").write_text(json.dumps(values))


def _rank(rank: int, world: int, port: int, gpus: bool, act: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    ranks = join(timeout=120)
    assert isinstance(ranks, RankGroup)
    if rank:
        follow(ranks)
        return
    act(ranks, *arguments)
    ranks.close()


def on_ranks(world: int, port: int, act: Callable[..., None], *arguments: Any, gpus: bool = False) -> None:
    """`act` on rank 0 of so many processes, on CPU or with a GPU each."""
    torch.multiprocessing.spawn(_rank, (world, port, gpus, act, arguments), nprocs=world)
