"""What a replay takes over from the run that generated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from services.contracts.messages import Sample
from services.contracts.spec import KnobChange, RunSpec
from services.control_plane.api.replay import _recorded, _without
from services.runtime.web import Problem
from tests.unit.sample_messages import completed, prompt_group, scored
from trainer import replay
from trainer.replay import ReplaySession


class FakeLedger:
    """Of run `c`, a replay of `b`, a replay of `a`, which has opened its data."""

    def __init__(self, bus: object, run_id: str) -> None:
        self.run_id = run_id

    def spec(self) -> RunSpec:
        return RunSpec(replay={"c": "b", "b": "a", "a": None}[self.run_id])

    def data_size(self) -> int | None:
        return 17 if self.run_id == "a" else None


def test_an_epoch_of_a_replay_is_that_of_the_run_that_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the epoch-wise schedule of reweighting would see one epoch, and the losses would not be those of the run."""
    monkeypatch.setattr(replay, "Ledger", FakeLedger)
    session = ReplaySession.__new__(ReplaySession)
    session.bus, session.ledger = object(), FakeLedger(None, "c")  # type: ignore[assignment]
    session.spec = session.ledger.spec()
    assert session.data_size() == 17


def recorded(versions: list[int]) -> int:
    """Versions that a replay may have of a run of batches of 2, whose record has groups of these versions."""
    groups = [Sample(scored=scored(completed(prompt_group(i))), trained_version=v, advantages=(1.0, -1.0)) for i, v in enumerate(versions)]
    entries = [SimpleNamespace(message=lambda _, group=group: group) for group in groups]
    bus = SimpleNamespace(range=lambda run_id, topic, count: entries[:count])
    run: Any = SimpleNamespace(run_id="r", version=3, spec=RunSpec(batch_groups=2))
    return _recorded(SimpleNamespace(bus=bus), run)  # type: ignore[arg-type]


def test_a_run_of_which_every_batch_is_recorded_can_be_replayed() -> None:
    assert recorded([0, 0, 1, 1, 2, 2]) == 3


@pytest.mark.parametrize(("kept", "whole"), [([0, 1, 1, 2, 2], 1), ([1, 1, 2, 2], 1), ([1, 2, 2], 2)])
def test_a_record_that_begins_late_or_within_a_batch_is_refused(kept: list[int], whole: int) -> None:
    with pytest.raises(Problem, match=f"the groups of versions {whole} and later only"):
        recorded(kept)


def test_nothing_recorded_is_said() -> None:
    with pytest.raises(Problem, match="has recorded no groups"):
        recorded([])


def test_knobs_turn_again_but_for_what_is_overridden_and_the_target_of_the_staleness_loop() -> None:
    change = KnobChange(version=3, values={"clip.high": 0.3, "learning_rate": 0.1, "staleness.target.value": 0.2})
    assert _without(change, {"clip.high": 0.4}).values == {"learning_rate": 0.1}
