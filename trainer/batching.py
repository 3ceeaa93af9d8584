"""Batches without padding: sequences laid end to end in packs, and a batch of groups split into mini-batches.

A pack has two dimensions: `_I` its input tokens (each sequence's prompt and completion, less the last token, which predicts nothing) and `_T` its
trained tokens (the completions), in the same order. `index_T` leads from the second to the first: the hidden state at input `index_T[t]` predicts
trained token t.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

MAX_TOKENS = 2048
"""Input tokens of a pack. Measured on one CPU thread with 2 layers of width 64: a batch of 128 short completions is fastest as one pack."""

Group = TypeVar("Group")


@dataclass(frozen=True)
class Trajectory:
    """One completion to be trained on. The last three sequences have the completion's length."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    behaviour_logps: Sequence[float]
    """Log-probability of each completion token as the sampler reported it, in nats."""
    versions: Sequence[int]
    """Policy version that sampled each completion token."""
    advantage: float
    reward: float = 0.0
    """As the verifiers gave it."""
    place: tuple[int, int] = (0, 0)
    """Index of its group, and its own among the group's completions."""

    @property
    def inputs(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids) - 1


@dataclass(frozen=True)
class Block:
    """Neighbouring sequences of a pack that attention takes as one rectangle of `rows` x `length`; at most half of it is padding."""

    start: int
    stop: int
    """Input tokens [start, stop) of the pack."""
    rows: int
    length: int
    spread: Tensor
    """(rows * length,) input token at each place of the rectangle, counted from `start`; a place past its row's end repeats some other token."""
    gather: Tensor
    """(stop - start,) the place in the rectangle of each input token."""


@dataclass(frozen=True)
class Pack:
    """Sequences laid end to end, longest first."""

    input_ids_I: Tensor
    position_ids_I: Tensor
    """Place of each input token in its own sequence."""
    blocks: tuple[Block, ...]
    index_T: Tensor
    """Input position whose hidden state predicts each trained token."""
    targets_T: Tensor
    behaviour_T: Tensor
    """Log-probability under the sampler, float32, in nats."""
    advantages_T: Tensor
    versions_T: Tensor
    row_T: Tensor
    """Trajectory of each trained token, by its place in the list that was packed."""
    position_T: Tensor
    """Place of each trained token in its completion, from 0."""

    @property
    def inputs(self) -> int:
        return len(self.input_ids_I)

    @property
    def tokens(self) -> int:
        """Trained tokens: what a token-mean loss is divided by, summed over the packs of a mini-batch."""
        return len(self.targets_T)

    def to(self, device: torch.device | str) -> Pack:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        blocks = tuple(replace(block, spread=block.spread.to(device), gather=block.gather.to(device)) for block in self.blocks)
        return replace(self, blocks=blocks, **moved)


def pack(trajectories: Sequence[Trajectory], *, max_tokens: int = MAX_TOKENS) -> list[Pack]:
    """Packs of at most `max_tokens` input tokens; a longer sequence gets a pack of its own. Deterministic.

    Longest first, each pack filled before the next is begun (next-fit decreasing): sequences of like length come together, which keeps blocks full.
    """
    for row, trajectory in enumerate(trajectories):
        _check(row, trajectory)
    return [_lay(trajectories, rows) for rows in filled([trajectory.inputs for trajectory in trajectories], max_tokens=max_tokens)]


def filled(sizes: Sequence[int], *, max_tokens: int = MAX_TOKENS) -> list[list[int]]:
    """Which sequences, of these numbers of input tokens, `pack` puts into each pack."""
    packs: list[list[int]] = []
    total = max_tokens
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        if total + sizes[row] > max_tokens:
            packs.append([])
            total = 0
        packs[-1].append(row)
        total += sizes[row]
    return packs


def minibatches(groups: Sequence[Group], updates: int, *, seed: int) -> list[list[Group]]:
    """The batch's groups in `updates` equal parts, shuffled by `seed`: the same parts for the same seed on every machine."""
    if updates < 1 or len(groups) % updates:
        raise ValueError(f"{len(groups)} groups cannot be split into {updates} equal mini-batches: let updates_per_batch divide batch_groups")
    order = list(groups)
    random.Random(seed).shuffle(order)
    size = len(order) // updates
    return [order[i * size : (i + 1) * size] for i in range(updates)]


def _check(row: int, trajectory: Trajectory) -> None:
    tokens = len(trajectory.completion_ids)
    if not len(trajectory.prompt_ids) or not tokens:
        raise ValueError(f"trajectory {row} has {len(trajectory.prompt_ids)} prompt and {tokens} completion tokens: it needs at least one of each")
    if len(trajectory.behaviour_logps) != tokens or len(trajectory.versions) != tokens:
        raise ValueError(
            f"trajectory {row} has {tokens} completion tokens, but {len(trajectory.behaviour_logps)} log-probabilities"
            f" and {len(trajectory.versions)} versions"
        )


def _lay(trajectories: Sequence[Trajectory], rows: list[int]) -> Pack:
    chosen = [trajectories[row] for row in rows]
    starts = [0]
    for trajectory in chosen:
        starts.append(starts[-1] + trajectory.inputs)
    first_outputs = [start + len(t.prompt_ids) - 1 for start, t in zip(starts, chosen, strict=False)]

    def ints(values: chain[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64)

    return Pack(
        input_ids_I=ints(chain.from_iterable([*t.prompt_ids, *t.completion_ids[:-1]] for t in chosen)),
        position_ids_I=ints(chain.from_iterable(range(t.inputs) for t in chosen)),
        blocks=_blocks([t.inputs for t in chosen]),
        index_T=ints(chain.from_iterable(range(first, first + len(t.completion_ids)) for first, t in zip(first_outputs, chosen, strict=True))),
        targets_T=ints(chain.from_iterable(t.completion_ids for t in chosen)),
        behaviour_T=torch.tensor(list(chain.from_iterable(t.behaviour_logps for t in chosen)), dtype=torch.float32),
        advantages_T=torch.tensor([t.advantage for t in chosen for _ in t.completion_ids], dtype=torch.float32),
        versions_T=ints(chain.from_iterable(t.versions for t in chosen)),
        row_T=ints(chain.from_iterable([row] * len(t.completion_ids) for row, t in zip(rows, chosen, strict=True))),
        position_T=ints(chain.from_iterable(range(len(t.completion_ids)) for t in chosen)),
    )


def _blocks(lengths: list[int]) -> tuple[Block, ...]:
    """Lengths, longest first, cut greedily into rectangles of which at least half is filled."""
    blocks: list[Block] = []
    members: list[int] = []
    start = 0
    for length in [*lengths, 0]:
        if members and (length == 0 or members[0] * (len(members) + 1) > 2 * (sum(members) + length)):
            blocks.append(_block(start, members))
            start += sum(members)
            members = []
        members.append(length)
    return tuple(blocks)


def _block(start: int, lengths: list[int]) -> Block:
    lengths_B = torch.tensor(lengths)
    ends_B = lengths_B.cumsum(0)
    columns = torch.arange(lengths[0])
    spread_BL = (ends_B - lengths_B)[:, None] + columns
    inside_BL = columns < lengths_B[:, None]
    total = int(ends_B[-1])
    return Block(
        start=start,
        stop=start + total,
        rows=len(lengths),
        length=lengths[0],
        spread=spread_BL.clamp(max=total - 1).flatten(),
        gather=inside_BL.flatten().nonzero()[:, 0],
    )
