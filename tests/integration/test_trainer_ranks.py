"""What a trainer makes of a run that broke its ranks: all of them start again, until that is of no use."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from services.contracts.states import RunState
from services.runtime.bus import Bus
from services.runtime.lifecycle import RunLifecycle
from services.runtime.process import Shutdown
from services.runtime.settings import Settings
from tests.integration.real_store import TRAINER, open_run
from trainer import __main__ as process
from trainer.ranks import Ranks


def train(
    bus: Bus, redis_url: str, monkeypatch: pytest.MonkeyPatch, *, broken: bool, restarts_left: int, got_further: bool,
    began: tuple[str, int] | None = None,
) -> RunState:  # fmt: skip
    """The state of a run whose training raised, as the trainer leaves it; the error where it is the trainer's end. `began`: where it stood when the
    ranks were started, if this is not the first that they train."""
    open_run(bus)
    ranks = Ranks()
    ranks.broken, ranks.restarts_left = broken, restarts_left
    session = SimpleNamespace(announced=3, version=3, close=lambda: None)

    def breaks(session: Any) -> None:
        session.announced += got_further
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(process, "Session", lambda *_, **__: session)
    monkeypatch.setattr(process, "train", breaks)
    trainer = process.Trainer(Settings(redis_url=redis_url, member=TRAINER, data=Path("unused")), CollectorRegistry(), Shutdown(), ranks)
    trainer.began = began
    try:
        trainer.train("r")
    finally:
        trainer.bus.close()
    return RunLifecycle(bus, "r").state()


def test_ranks_that_broke_end_and_the_run_waits_for_them(bus: Bus, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for left, got_further in ((1, False), (0, True)):
        with pytest.raises(RuntimeError, match="closed by peer"):
            train(bus, redis_url, monkeypatch, broken=True, restarts_left=left, got_further=got_further)
        assert RunLifecycle(bus, "r").state() is RunState.RUNNING


def test_ranks_that_break_for_the_last_time_without_a_version_made_fail_the_run(bus: Bus, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="closed by peer"):
        train(bus, redis_url, monkeypatch, broken=True, restarts_left=0, got_further=False)
    assert RunLifecycle(bus, "r").state() is RunState.FAILED


@pytest.mark.parametrize("began", [("before", 3), ("r", 2)], ids=["another run", "the same run, which was paused"])
def test_ranks_that_have_got_further_since_they_were_started_are_started_again(
    bus: Bus, redis_url: str, monkeypatch: pytest.MonkeyPatch, began: tuple[str, int]
) -> None:
    """None was left when they were started: the launcher counts anew by now."""
    with pytest.raises(RuntimeError, match="closed by peer"):
        train(bus, redis_url, monkeypatch, broken=True, restarts_left=0, got_further=False, began=began)
    assert RunLifecycle(bus, "r").state() is RunState.RUNNING


def test_a_run_that_fails_with_its_ranks_in_step_is_no_end_of_the_trainer(bus: Bus, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(bus, redis_url, monkeypatch, broken=False, restarts_left=3, got_further=False) is RunState.FAILED
