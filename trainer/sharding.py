"""A policy whose weights lie in shares on several ranks (FSDP2: `torch.distributed.fsdp.fully_shard`), each layer gathered when it is needed.

A gradient is the sum of the ranks' parts, not their mean: the loss is that of the whole mini-batch (trainer.minibatch), and each rank sends back the
gradients of its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.batching import Pack, Trajectory, pack
from trainer.orders import Pass, Weights
from trainer.policy import Policy
from trainer.ranks import RankGroup
from trainer.weights import GatheredWeights, named_weights

IDLE = Trajectory(prompt_ids=[0], completion_ids=[0], behaviour_logps=[0.0], versions=[0], advantage=0.0)
"""What a rank without work of its own sends through the model, so that it takes part in the others' collectives."""


def deal(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank of each sequence, by its number of input tokens: the longest first, each to the rank that has least (Graham's LPT rule)."""
    loads, owners = [0] * ranks, [0] * len(sizes)
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        owners[row] = loads.index(min(loads))
        loads[owners[row]] += sizes[row]
    return owners


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the ranks hold in shares; any other one as it is. A collective: all ranks must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """This rank's share of a whole tensor that belongs to `parameter`, such as a moment of it."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)  # every rank has read it


class ShardedPolicy(Policy):
    """A policy in shares. Rank 0 may call it like any other: outside a common act the other ranks are told to come along."""

    def __init__(self, policy: Policy, ranks: RankGroup) -> None:
        """Takes over `policy`, which every rank has loaded whole on its host; from here on each keeps its share, on the ranks' device."""
        self.model, self.dtype, self.ranks = policy.model, policy.dtype, ranks
        self._packed = _Packed(policy)
        for layer in cast(Any, policy.model.base_model).layers:
            fully_shard(layer, mesh=ranks.mesh, reshard_after_forward=True)
        # The root too gives its weights back after each pass: after one without gradient it would go on with them past the next update.
        fully_shard(self._packed, mesh=ranks.mesh, reshard_after_forward=True)
        register_fsdp_forward_method(self._packed, "logits")
        for module in self._packed.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction

    def forward(self, pack: Pack, *, temperature: float, drift: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        with self.ranks.together(Pass()):
            return cast("tuple[Tensor, Tensor, Tensor | None]", self._packed(pack, temperature, drift))

    @torch.no_grad()
    def come_along(self) -> None:
        """Take part in a forward pass of rank 0's."""
        (idle,) = pack([IDLE])
        self._packed(idle.to(self.device), 1.0, False)

    def next_logits(self, pack: Pack) -> Tensor:
        with self.ranks.together(Pass()):
            return cast(Tensor, cast(Any, self._packed).logits(pack))

    def weights(self, dtype: torch.dtype) -> GatheredWeights:
        with self.ranks.together(Weights()):
            yield from named_weights(self.model, dtype)


class _Packed(torch.nn.Module):
    """Backbone and head as one module, so that the root of the shares covers a pass from tokens to log-probabilities."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model = policy.model
        self._policy = (policy,)  # in a tuple: it is no part of the module's tree

    def forward(self, pack: Pack, temperature: float, drift: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        return self._policy[0].forward(pack, temperature=temperature, drift=drift)

    def logits(self, pack: Pack) -> Tensor:
        return self._policy[0].next_logits(pack)
