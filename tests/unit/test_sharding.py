"""How a mini-batch is dealt to ranks, and what rank 0 tells the others."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contracts.spec import RunSpec
from services.runtime.codec import decode, encode
from tests.unit.tiny_policy import VOCABULARY, sampled_group, tiny_policy
from trainer import learner
from trainer.batching import MAX_TOKENS, Trajectory
from trainer.control.actuators import Actuators
from trainer.learner import follow
from trainer.minibatch import Forward, Minibatch, Part, backward, forward, lay, part_of
from trainer.orders import End, Envelope, Load, Order, Pass, Step, Weights
from trainer.ranks import ALONE, RankGroup, join
from trainer.sharding import IDLE, deal

CPU = torch.device("cpu")
Sources = list[tuple[Trajectory, float]]


@st.composite
def sources(draw: st.DrawFn) -> Sources:
    """Completions, some long enough to fill packs, at one or two temperatures."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 5), st.one_of(st.integers(1, 12), st.integers(300, 1200))), min_size=1, max_size=14))
    drawn = []
    for row, (prompt, length) in enumerate(lengths):
        ids, logps = [(row + i) % VOCABULARY for i in range(length)], [-0.01 * i for i in range(length)]
        trajectory = Trajectory([1] * prompt, ids, behaviour_logps=logps, versions=[row] * length, advantage=float(row), reward=1.0)
        drawn.append((trajectory, draw(st.sampled_from((1.0, 0.5)))))
    return drawn


def parts(minibatch: Minibatch, world: int) -> list[Part]:
    return [part_of(minibatch, rank=rank, world=world) for rank in range(world)]


@given(st.lists(st.integers(1, 4000), max_size=40), st.integers(1, 9))
def test_no_rank_has_more_than_the_longest_sequence_above_another(sizes: list[int], ranks: int) -> None:
    owners = deal(sizes, ranks)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_the_longest_is_dealt_first() -> None:
    assert deal([1, 5, 4, 3], 2) == [0, 0, 1, 1], "5 | 4, then 3 to the lighter, then 1: of equals the first"


@settings(deadline=None, max_examples=60)
@given(sources(), st.integers(2, 5))
def test_each_token_is_in_exactly_one_rank_s_part_where_its_own_place_is(drawn: Sources, world: int) -> None:
    minibatch = lay(drawn, device=CPU)
    dealt = parts(minibatch, world)
    assert sorted(torch.cat([part.places_T for part in dealt]).tolist()) == list(range(minibatch.tokens))
    assert len({len(part.pieces) for part in dealt}) == 1, "or a rank would wait for a pass that never comes"
    for part in dealt:
        own = part.pieces[: len(part.pieces) - part.idle]
        for name in ("targets_T", "behaviour_T", "advantages_T", "versions_T", "position_T"):
            here = torch.cat([getattr(piece.pack, name) for piece in own]) if own else torch.zeros(0)
            assert here.tolist() == minibatch.gathered(name)[part.places_T].tolist(), name
        temperatures_T = [piece.temperature for piece in own for _ in range(piece.pack.tokens)]
        assert temperatures_T == [minibatch.sources[row][1] for row in minibatch.row_T[part.places_T].tolist()]
        assert all(piece.pack.inputs <= MAX_TOKENS for piece in part.pieces)
        assert sum(piece.pack.tokens for piece in part.pieces[len(own) :]) == part.idle


@settings(deadline=None, max_examples=15)
@given(sources(), st.integers(2, 4), st.integers(0, 99))
def test_the_ranks_gradients_add_up_to_the_whole_one(drawn: Sources, world: int, seed: int) -> None:
    policy, draw = tiny_policy(), torch.Generator().manual_seed(seed)
    short = [
        (replace(t, completion_ids=t.completion_ids[:40], behaviour_logps=t.behaviour_logps[:40], versions=t.versions[:40]), k) for t, k in drawn
    ]
    minibatch = lay(short, device=CPU)
    done = forward(policy, minibatch, gradient=True)
    done.logp_T.grad = torch.randn(minibatch.tokens, generator=draw)
    done.entropy_T.grad = torch.randn(minibatch.tokens, generator=draw)

    def gradient(send: Callable[[], None]) -> torch.Tensor:
        policy.model.zero_grad()
        send()
        return torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters() if parameter.grad is not None])

    whole = gradient(lambda: backward(policy, minibatch, done))
    apart = Forward(done.logp_T, done.entropy_T, None, graph=None)
    dealt = gradient(lambda: [backward(policy, replace(minibatch, part=part), apart) for part in parts(minibatch, world)] and None)
    assert torch.allclose(whole, dealt, rtol=1e-3, atol=1e-3 * whole.abs().max().item())


def test_an_idle_rank_sends_a_gradient_of_zero() -> None:
    policy = tiny_policy()
    minibatch = lay([(replace(IDLE, completion_ids=[3]), 1.0)], device=CPU)
    idle = part_of(minibatch, rank=1, world=2)
    assert (len(idle.pieces), idle.idle, len(idle.places_T)) == (1, 1, 0)
    done = forward(policy, minibatch, gradient=True)
    done.logp_T.grad = torch.ones(1)
    backward(policy, replace(minibatch, part=idle), Forward(done.logp_T, done.entropy_T, None, graph=None))
    assert all(not parameter.grad.any() for parameter in policy.model.parameters() if parameter.grad is not None)
    assert any(parameter.grad is not None for parameter in policy.model.parameters()), "it takes part in every collective"


def test_an_order_comes_out_as_it_went_in() -> None:
    group = sampled_group(tiny_policy(), 1, (1.0, 0.0))
    step = Step(groups=(group,), spec=RunSpec(temperature=0.5), version=3, actuators=Actuators(entropy_coefficient=0.1), forking_nats=None)
    for order in (step, Load(path="m", resumed=True, spec=RunSpec()), Pass(), Weights(), End()):
        assert decode(Envelope, encode(Envelope(order=order))).order == order


class ScriptedRanks(RankGroup):
    """Ranks without processes: what rank 0 tells is kept, and what another rank is told is given."""

    def __init__(self, *orders: Order, rank: int = 0) -> None:
        self.rank, self.world, self._depth = rank, 2, 0
        self.told: list[Order] = []
        self._next, self.left = iter(orders), False

    def tell(self, order: Order) -> None:
        self.told.append(order)

    def next_order(self) -> Order:
        return next(self._next)

    def leave(self) -> None:
        self.left = True


def test_what_is_nested_in_a_common_act_is_not_told() -> None:
    ranks = ScriptedRanks()
    with ranks.together(Weights()), ranks.together(Pass()):
        pass
    with ranks.together(Pass()):
        pass
    assert ranks.told == [Weights(), Pass()]
    assert not ranks.broken


def test_an_act_that_fails_half_way_leaves_the_ranks_broken() -> None:
    ranks = ScriptedRanks()
    with pytest.raises(OSError, match="gone"), ranks.together(Weights()):
        raise OSError("gone")
    assert ranks.broken


def test_one_rank_needs_nobody() -> None:
    assert join({}, timeout=1.0) is ALONE
    with ALONE.together(Pass()):
        ALONE.tell(End())
    assert not ALONE.broken
    assert torch.equal(ALONE.add_up(torch.ones(2)), torch.ones(2))


@pytest.fixture
def ignored(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """What a following rank does about signals, without doing it to the tests."""
    set_to: dict[int, Any] = {}
    monkeypatch.setattr(learner.signal, "signal", set_to.__setitem__)
    return set_to


def test_a_model_that_cannot_be_loaded_is_the_run_s_failure_and_not_the_rank_s(ignored: dict[int, Any], tmp_path: Path) -> None:
    bad = Load(path=str(tmp_path / "none"), resumed=False, spec=RunSpec())
    follow(ranks := ScriptedRanks(bad, bad, End(), rank=1))
    assert ranks.left
    assert ignored[signal.SIGTERM] is signal.SIG_IGN, "rank 0 ends the trainer, with a checkpoint that takes all ranks"


def test_a_rank_that_lacks_what_rank_0_has_loaded_ends_with_the_reason(ignored: dict[int, Any], tmp_path: Path) -> None:
    bad = Load(path=str(tmp_path / "none"), resumed=False, spec=RunSpec())
    with pytest.raises(RuntimeError, match=r"rank 1 has no model to go on with: model\.path: no model at"):
        follow(ScriptedRanks(bad, Pass(), rank=1))
    with pytest.raises(RuntimeError, match="it was told of none"):
        follow(ScriptedRanks(Pass(), rank=1))
