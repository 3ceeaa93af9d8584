"""A run's model on its way into memory, and the life of a rank that is not rank 0: it does what it is told."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import torch

from services.contracts.spec import RunSpec
from trainer.checkpoint import gather, restore_optimizer
from trainer.orders import End, Load, Moments, Pass, Step, Weights
from trainer.policy import Policy
from trainer.ranks import RankGroup, Ranks
from trainer.sharding import ShardedPolicy
from trainer.step import make_optimizer, train_step

log = logging.getLogger(__name__)


def load(path: str | Path, spec: RunSpec, *, resumed: bool, ranks: Ranks) -> tuple[Policy, torch.optim.Optimizer]:
    """The policy in `path` and its optimiser, with its moments if it is a checkpoint that is `resumed`. ValueError where there is no such model."""
    ranks.tell(Load(path=str(path), resumed=resumed, spec=spec))
    torch.manual_seed(spec.seed)
    if isinstance(ranks, RankGroup):  # whole on the host first: a GPU never holds more than a layer and its share
        policy: Policy = ShardedPolicy(Policy.load(path, dtype=spec.model.dtype), ranks)
    else:
        policy = Policy.load(path, dtype=spec.model.dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    optimizer = make_optimizer(policy, spec)
    if resumed:
        restore_optimizer(Path(path), policy, optimizer)
    return policy, optimizer


def follow(ranks: RankGroup) -> None:
    """Do what rank 0 tells until it says that the trainer ends. Raises RuntimeError when rank 0 is gone, or when this rank cannot do its part."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # rank 0 ends the trainer: it may have a checkpoint to write first, which takes all ranks
    policy: Policy | None = None
    optimizer: torch.optim.Optimizer | None = None
    failure: Exception | None = None
    while True:
        order = ranks.next_order()
        if isinstance(order, End):
            ranks.leave()
            return
        if isinstance(order, Load):
            policy = optimizer = failure = None  # the memory of the run before is free before the next one is loaded
            try:
                policy, optimizer = load(order.path, order.spec, resumed=order.resumed, ranks=ranks)
            except (ValueError, OSError) as error:  # most likely rank 0's own failure too, which is the run's: it may tell of another one
                log.error("the model was not loaded", extra={"error": str(error), "rank": ranks.rank})
                failure = error
            continue
        if policy is None or optimizer is None:
            raise RuntimeError(f"rank {ranks.rank} has no model to go on with: {failure or 'it was told of none'}")
        match order:
            case Step():
                train_step(policy, optimizer, order.groups, order.spec, order.version, actuators=order.actuators, forking_nats=order.forking_nats)
            case Pass():
                assert isinstance(policy, ShardedPolicy)
                policy.come_along()
            case Weights():
                for _ in policy.weights(torch.float32):
                    pass
            case Moments():
                gather(policy, optimizer)
