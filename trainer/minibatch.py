"""A mini-batch between packs and loss: laid out for the forward pass, whole for the loss.

The loss is computed once over all trained tokens of the mini-batch, on leaf tensors of their log-probabilities and entropies, so that it may take any
statistics of them and does not depend on how they were packed. The gradients that arrive at the leaves then go back through each pack:

    one pack:      forward with gradient, loss on its leaves, backward
    more packs:    forward without gradient, loss on the leaves, then forward and backward pack by pack: the activations of one pack exist at a time
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from services.contracts.messages import ScoredGroup
from trainer.batching import Pack, Trajectory, pack
from trainer.policy import Policy
from trainer.tokens import Tokens


@dataclass(frozen=True)
class Piece:
    """A pack with the temperature at which its tokens were sampled."""

    pack: Pack
    temperature: float


@dataclass(frozen=True)
class Minibatch:
    """The completions of one optimiser update."""

    pieces: tuple[Piece, ...]
    row_T: Tensor
    """Completion of each token, counted through all pieces."""
    rewards_R: Tensor
    sources: tuple[tuple[Trajectory, float], ...]
    """The completions, in that order, each with its temperature."""

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
        return lay(self.sources[:taken], device=self.row_T.device)

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
    """The same with their history, when the mini-batch is one pack."""


def assemble(groups: Sequence[tuple[ScoredGroup, Sequence[float], Sequence[bool]]], *, device: torch.device) -> Minibatch | None:
    """Groups, each with its advantages and which of its completions are trained on, as a mini-batch. None when no completion is left."""
    sources = [(trajectory, group.group.temperature) for group, advantages, kept in groups for trajectory in _trajectories(group, advantages, kept)]
    return lay(sources, device=device) if sources else None


def lay(sources: Sequence[tuple[Trajectory, float]], *, device: torch.device) -> Minibatch:
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
    return Minibatch(tuple(pieces), torch.cat(rows), rewards_R, tuple(ordered))


def forward(policy: Policy, minibatch: Minibatch, *, gradient: bool, drift: bool = False) -> Forward:
    """One pass over all packs; with `gradient`, `backward` can follow."""
    keeps_graph = gradient and len(minibatch.pieces) == 1
    with torch.set_grad_enabled(keeps_graph):
        outputs = [policy.forward(piece.pack, temperature=piece.temperature, drift=drift) for piece in minibatch.pieces]
    logp_T, entropy_T = torch.cat([logp for logp, _, _ in outputs]), torch.cat([entropy for _, entropy, _ in outputs])
    drifts = [found for _, _, found in outputs if found is not None]
    return Forward(
        logp_T=logp_T.detach().requires_grad_(gradient),
        entropy_T=entropy_T.detach().requires_grad_(gradient),
        drift_T=torch.cat(drifts) if drifts else None,
        graph=(logp_T, entropy_T) if keeps_graph else None,
    )


def backward(policy: Policy, minibatch: Minibatch, done: Forward) -> None:
    """Send the gradients that have gathered in the leaves back through the policy."""
    gradients = (done.logp_T.grad, done.entropy_T.grad)
    if done.graph is not None:
        _backward(done.graph, gradients)
        return
    start = 0
    for piece in minibatch.pieces:
        part = slice(start, start + piece.pack.tokens)
        logp_T, entropy_T, _ = policy.forward(piece.pack, temperature=piece.temperature)
        _backward((logp_T, entropy_T), (None if g is None else g[part] for g in gradients))
        start = part.stop


def _backward(outputs: Sequence[Tensor], gradients: Iterable[Tensor | None]) -> None:
    reached = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
    if reached:
        torch.autograd.backward([output for output, _ in reached], [gradient for _, gradient in reached])


def _trajectories(group: ScoredGroup, advantages: Sequence[float], kept: Sequence[bool]) -> list[Trajectory]:
    return [
        Trajectory(
            prompt_ids=group.group.prompt_ids, completion_ids=c.token_ids, behaviour_logps=c.logprob_values, versions=c.versions,
            advantage=advantage, reward=reward,
        )
        for c, advantage, reward, keep in zip(group.completed.completions, advantages, group.rewards, kept, strict=True) if keep
    ]  # fmt: skip
