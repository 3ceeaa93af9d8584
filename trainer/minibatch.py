"""A mini-batch between packs and loss: laid out for the forward pass, whole for the loss.

The loss is computed once over all trained tokens of the mini-batch, on leaf tensors of their log-probabilities and entropies, so that it may take any
statistics of them and does not depend on how they were packed. The gradients that arrive at the leaves then go back through each pack:

    one pack:      forward with gradient, loss on its leaves, backward
    more packs:    forward without gradient, loss on the leaves, then forward and backward pack by pack: the activations of one pack exist at a time

With several ranks each takes its part of the completions through the model. What the policy says of them is put together on every rank, in the order
that it has on one; every rank computes the same loss, and sends back the gradients of its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from services.contracts.messages import ScoredGroup
from trainer.batching import Pack, Trajectory, filled, pack
from trainer.policy import Policy
from trainer.ranks import ALONE, Ranks
from trainer.sharding import IDLE, deal
from trainer.tokens import Tokens


@dataclass(frozen=True)
class Piece:
    """A pack with the temperature at which its tokens were sampled."""

    pack: Pack
    temperature: float


@dataclass(frozen=True)
class Part:
    """What one rank takes through the model. All ranks have equally many pieces: the last ones may be idle, with a token that belongs to nothing."""

    pieces: tuple[Piece, ...]
    places_T: Tensor
    """Place in the mini-batch of each of its tokens; the idle ones have none."""
    idle: int
    """Idle tokens."""


@dataclass(frozen=True)
class Minibatch:
    """The completions of one optimiser update."""

    pieces: tuple[Piece, ...]
    row_T: Tensor
    """Completion of each token, counted through all pieces."""
    rewards_R: Tensor
    sources: tuple[tuple[Trajectory, float], ...]
    """The completions, in that order, each with its temperature."""
    ranks: Ranks
    part: Part | None
    """This rank's; None where it is all of it."""

    @property
    def own(self) -> tuple[Piece, ...]:
        """What this rank takes through the model."""
        return self.pieces if self.part is None else self.part.pieces

    @property
    def tokens(self) -> int:
        return len(self.row_T)

    def gathered(self, name: str) -> Tensor:
        """A tensor over the trained tokens of all packs, by the name of the packs' field."""
        return torch.cat([getattr(piece.pack, name) for piece in self.pieces])

    def head(self, most: int) -> Minibatch:
        """Its first completions, with about `most` trained tokens between them: those with the numbers up to the last one's."""
        taken, total = 0, 0
        while taken < len(self.sources) and total < most:
            total += len(self.sources[taken][0].completion_ids)
            taken += 1
        return lay(self.sources[:taken], device=self.row_T.device, ranks=self.ranks)

    def view(self, proximal_T: Tensor, *, version: int) -> Tokens:
        """The tokens as a loss of the step at `version` sees them."""
        return Tokens(
            behaviour_T=self.gathered("behaviour_T"), proximal_T=proximal_T, advantages_T=self.gathered("advantages_T"),
            lags_T=version - self.gathered("versions_T"), row_T=self.row_T, position_T=self.gathered("position_T"), rewards_R=self.rewards_R,
        )  # fmt: skip


@dataclass(frozen=True)
class Forward:
    """What the policy says of a mini-batch's tokens. `logp_T` and `entropy_T` are leaves: the loss's gradient gathers in them."""

    logp_T: Tensor
    entropy_T: Tensor
    drift_T: Tensor | None
    graph: tuple[Tensor, Tensor] | None
    """This rank's part of the same with its history, when that is one pack."""


def assemble(
    groups: Sequence[tuple[ScoredGroup, Sequence[float], Sequence[bool]]], *, device: torch.device, ranks: Ranks = ALONE
) -> Minibatch | None:
    """Groups, each with its advantages and which of its completions are trained on, as a mini-batch. None when no completion is left."""
    sources = [(trajectory, group.group.temperature) for group, advantages, kept in groups for trajectory in _trajectories(group, advantages, kept)]
    return lay(sources, device=device, ranks=ranks) if sources else None


def lay(sources: Sequence[tuple[Trajectory, float]], *, device: torch.device, ranks: Ranks = ALONE) -> Minibatch:
    """Completions with their temperatures as a mini-batch: one temperature to a pack, since a change of that knob leaves two of them in a batch."""
    ordered = sorted(sources, key=lambda source: source[1])
    pieces: list[Piece] = []
    rows: list[Tensor] = []
    first = 0
    for temperature, same in groupby(ordered, key=lambda source: source[1]):
        trajectories = [trajectory for trajectory, _ in same]
        for packed in pack(trajectories):
            pieces.append(Piece(packed.to(device), temperature))
            rows.append(pieces[-1].pack.row_T + first)
        first += len(trajectories)
    rewards_R = torch.tensor([trajectory.reward for trajectory, _ in ordered], dtype=torch.float32, device=device)
    whole = Minibatch(tuple(pieces), torch.cat(rows), rewards_R, tuple(ordered), ranks, part=None)
    return whole if ranks.world == 1 else replace(whole, part=part_of(whole, rank=ranks.rank, world=ranks.world))


def part_of(minibatch: Minibatch, *, rank: int, world: int) -> Part:
    """What `rank` takes of a mini-batch through the model, of `world` ranks."""
    owners = deal([trajectory.inputs for trajectory, _ in minibatch.sources], world)
    packs = max(_packs(minibatch, owners, other) for other in range(world))
    device = minibatch.row_T.device
    begins_T = minibatch.gathered("position_T") == 0
    starts_R = torch.zeros(len(minibatch.sources), dtype=torch.int64, device=device)
    starts_R[minibatch.row_T[begins_T]] = begins_T.nonzero()[:, 0]
    pieces: list[Piece] = []
    places = [starts_R[:0]]
    for temperature, rows in _owned(minibatch, owners, rank):
        rows_R = torch.tensor(rows, device=device)
        for packed in pack([minibatch.sources[row][0] for row in rows]):
            pieces.append(Piece(packed.to(device), temperature))
            places.append(starts_R[rows_R[pieces[-1].pack.row_T]] + pieces[-1].pack.position_T)
    idle = packs - len(pieces)
    return Part((*pieces, *[Piece(pack([IDLE])[0].to(device), 1.0)] * idle), torch.cat(places), idle)


def _owned(minibatch: Minibatch, owners: Sequence[int], rank: int) -> list[tuple[float, list[int]]]:
    """The completions of a rank, by temperature."""
    mine = [row for row, owner in enumerate(owners) if owner == rank]
    return [(temperature, list(rows)) for temperature, rows in groupby(mine, key=lambda row: minibatch.sources[row][1])]


def _packs(minibatch: Minibatch, owners: Sequence[int], rank: int) -> int:
    """How many packs the completions of a rank make."""
    return sum(len(filled([minibatch.sources[row][0].inputs for row in rows])) for _, rows in _owned(minibatch, owners, rank))


def forward(policy: Policy, minibatch: Minibatch, *, gradient: bool, drift: bool = False) -> Forward:
    """One pass over all packs; with `gradient`, `backward` can follow."""
    keeps_graph = gradient and len(minibatch.own) == 1
    with torch.set_grad_enabled(keeps_graph):
        outputs = [policy.forward(piece.pack, temperature=piece.temperature, drift=drift) for piece in minibatch.own]
    logp_T, entropy_T = torch.cat([logp for logp, _, _ in outputs]), torch.cat([entropy for _, entropy, _ in outputs])
    graph = (logp_T, entropy_T) if keeps_graph else None
    drifts = [found for _, _, found in outputs if found is not None]
    told = [logp_T.detach(), entropy_T.detach(), *([torch.cat(drifts)] if drifts else [])]
    if minibatch.part is not None:
        told = _of_all_ranks(minibatch, minibatch.part, told)
    return Forward(
        logp_T=told[0].requires_grad_(gradient),
        entropy_T=told[1].requires_grad_(gradient),
        drift_T=told[2] if drifts else None,
        graph=graph,
    )


def backward(policy: Policy, minibatch: Minibatch, done: Forward) -> None:
    """Send the gradients that have gathered in the leaves back through the policy."""
    gradients = [done.logp_T.grad, done.entropy_T.grad]
    if (part := minibatch.part) is not None:
        gradients = [None if g is None else torch.cat([g[part.places_T], g.new_zeros(part.idle)]) for g in gradients]
    if done.graph is not None:
        _backward(done.graph, gradients)
        return
    start = 0
    for piece in minibatch.own:
        stretch = slice(start, start + piece.pack.tokens)
        logp_T, entropy_T, _ = policy.forward(piece.pack, temperature=piece.temperature)
        _backward((logp_T, entropy_T), (None if g is None else g[stretch] for g in gradients))
        start = stretch.stop


def _of_all_ranks(minibatch: Minibatch, part: Part, told: Sequence[Tensor]) -> list[Tensor]:
    """What the ranks' passes have told of their tokens, put together. Each token is added to zeros: nothing is rounded."""
    whole_KT = told[0].new_zeros(len(told), minibatch.tokens)
    whole_KT[:, part.places_T] = torch.stack(list(told))[:, : len(part.places_T)]
    return list(minibatch.ranks.add_up(whole_KT))


def _backward(outputs: Sequence[Tensor], gradients: Iterable[Tensor | None]) -> None:
    reached = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
    if reached:
        torch.autograd.backward([output for output, _ in reached], [gradient for _, gradient in reached])


def _trajectories(group: ScoredGroup, advantages: Sequence[float], kept: Sequence[bool]) -> list[Trajectory]:
    return [
        Trajectory(
            prompt_ids=group.group.prompt_ids, completion_ids=c.token_ids, behaviour_logps=c.logprob_values, versions=c.versions,
            advantage=advantage, reward=reward, place=(group.group.index, g),
        )
        for g, (c, advantage, reward, keep) in enumerate(zip(group.completed.completions, advantages, group.rewards, kept, strict=True)) if keep
    ]  # fmt: skip
