"""The life of a rank that does what it is told, without a second rank."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, cast

import pytest

from services.contracts.spec import RunSpec
from trainer import learner
from trainer.orders import End, Load, Order
from trainer.ranks import RankGroup
from trainer.sharding import ShardedPolicy


class Told:
    """Hears these orders."""

    rank = 1

    def __init__(self, *orders: Order) -> None:
        self.orders = list(orders)
        self.left = False

    def next_order(self) -> Order:
        return self.orders.pop(0)

    def leave(self) -> None:
        self.left = True


def test_the_memory_of_a_run_is_free_before_the_next_one_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[weakref.ref[ShardedPolicy]]()

    def load(path: str | Path, spec: RunSpec, **_: Any) -> tuple[ShardedPolicy, None]:
        assert [ref() for ref in taken] == [None] * len(taken), f"something holds a model while {path} is loaded"
        policy = ShardedPolicy.__new__(ShardedPolicy)
        taken.append(weakref.ref(policy))
        return policy, None

    monkeypatch.setattr(learner, "load", load)
    monkeypatch.setattr(learner.signal, "signal", lambda *_: None)
    ranks = Told(*(Load(path=name, resumed=False, spec=RunSpec()) for name in ("first", "second")), End())
    learner.follow(cast(RankGroup, ranks))
    assert ranks.left
    assert len(taken) == 2
