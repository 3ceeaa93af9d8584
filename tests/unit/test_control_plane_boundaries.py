"""What one run asks for, or breaks, stays with it: knobs that it has not, an evaluation set that cannot be collected."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from services.contracts.spec import RunSpec, knobs_of
from services.control_plane.checks import refuse_foreign
from services.control_plane.collector import Collector
from services.runtime.bus import StoreAway
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.web import Problem


@pytest.mark.parametrize("name", ["staleness.target.value", "entropy.target", "advantage.weight"])
def test_a_knob_of_another_variant_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(Problem) as refused:
        refuse_foreign({"clip.high": 0.3, name: 0.1}, RunSpec())
    (fault,) = refused.value.document.errors
    assert fault.field == name
    assert "clip.high" in fault.problem


def test_the_knobs_that_a_run_has_are_let_through() -> None:
    spec = RunSpec.model_validate({"staleness": {"target": {"value": 0.1}}, "entropy": {"method": "entropic"}})
    refuse_foreign(knobs_of(spec), spec)


def collector(failing: Exception, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> Collector:
    store: Any = SimpleNamespace(active=lambda: {"a", "a~one", "b~two"}, bus=None)

    def collect(_: Collector, ledger: Any, parent: str) -> None:
        seen.append(parent)
        if parent == "a":
            raise failing

    monkeypatch.setattr("services.control_plane.collector.EvaluationLedger", lambda bus, child: child)
    monkeypatch.setattr(Collector, "_collect", collect)
    return Collector(store, ControlPlaneMetrics(CollectorRegistry()))


def test_a_set_that_cannot_be_collected_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    collector(LookupError("its run is gone"), seen, monkeypatch).tick()
    assert seen == ["a", "b"]


def test_an_outage_of_the_store_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    with pytest.raises(StoreAway):
        collector(StoreAway("away"), seen, monkeypatch).tick()
    assert seen == ["a"]
