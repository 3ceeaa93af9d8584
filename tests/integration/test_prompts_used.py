"""The prompts of a run are kept with it, and answered by the API."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from services.client import ApiError
from services.contracts.spec import RunSpec, with_values
from services.contracts.states import RunState
from services.control_plane import feeds
from services.control_plane.dispatcher import Dispatcher
from services.control_plane.store import RunStore
from services.runtime.bus import Bus
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.process import Shutdown
from services.runtime.prompts_used import prompts_used
from tests.integration.conftest import Api
from tests.integration.real_store import open_run


@pytest.fixture
def dispatcher(bus: Bus) -> Iterator[Dispatcher]:
    dispatcher = Dispatcher(bus, RunStore(bus), ControlPlaneMetrics(CollectorRegistry()), Shutdown())
    yield dispatcher
    dispatcher.close()


def opened(dispatcher: Dispatcher, store: RunStore, spec: RunSpec) -> str:
    """A run on the fleet whose data the dispatcher has opened."""
    run, _ = store.create(spec)
    ledger = open_run(dispatcher.bus, run.run_id, spec)
    deadline = time.monotonic() + 20
    while ledger.data_size() is None:
        assert time.monotonic() < deadline
        dispatcher.tick()
    return run.run_id


def test_the_ids_of_a_subset_are_kept_with_the_run_and_outlive_their_file(
    dispatcher: Dispatcher, bus: Bus, api: Api, spec: RunSpec, tmp_path: Path
) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("sum_to_target:30\nsum_to_target:9\nsum_to_target:12\n")
    run_id = opened(dispatcher, RunStore(bus), with_values(spec, {"data.ids": str(ids)}))
    ids.unlink()
    view = api.client.prompts(run_id)
    assert (view.run_id, view.prompts) == (run_id, 3)
    assert view.ids == ["sum_to_target:9", "sum_to_target:12", "sum_to_target:30"]


def test_without_a_subset_all_ids_are_kept(dispatcher: Dispatcher, bus: Bus, spec: RunSpec) -> None:
    run_id = opened(dispatcher, RunStore(bus), spec)
    assert prompts_used(bus, run_id) == [f"sum_to_target:{target}" for target in range(8, 41)]


def test_ids_of_a_large_source_are_not_kept_but_their_number_is(
    dispatcher: Dispatcher, bus: Bus, api: Api, spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "KEPT_IDS", 32)
    run_id = opened(dispatcher, RunStore(bus), spec)
    view = api.client.prompts(run_id)
    assert (view.prompts, view.ids) == (33, None)


def test_nothing_is_known_before_the_data_are_opened(api: Api, bus: Bus, spec: RunSpec) -> None:
    run, _ = RunStore(bus).create(spec)
    view = api.client.prompts(run.run_id)
    assert (view.prompts, view.ids) == (None, None)
    with pytest.raises(ApiError, match="not known"):
        api.client.prompts("nobody")


def test_a_run_with_wrong_ids_is_refused_when_it_is_submitted(api: Api, spec: RunSpec, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("sum_to_target:9\nsum_to_target:7\n")
    with pytest.raises(ApiError, match=r"line 2.*sum_to_target:7"):
        api.client.submit(with_values(spec, {"data.ids": str(tmp_path / "ids.txt")}))


def test_a_run_that_finds_other_data_than_it_began_with_fails_and_says_so(dispatcher: Dispatcher, bus: Bus, spec: RunSpec, tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("sum_to_target:9\nsum_to_target:12\n")
    store = RunStore(bus)
    run_id = opened(dispatcher, store, with_values(spec, {"data.ids": str(ids)}))
    ids.write_text("sum_to_target:9\nsum_to_target:13\nsum_to_target:14\n")
    again = Dispatcher(bus, store, ControlPlaneMetrics(CollectorRegistry()), Shutdown())  # as after a restart
    deadline = time.monotonic() + 20
    while store.get(run_id).state is not RunState.FAILED:
        assert time.monotonic() < deadline
        again.tick()
    again.close()
    assert "1 of 2 prompts are gone and 2 are new" in store.get(run_id).reason
    assert prompts_used(bus, run_id) == ["sum_to_target:9", "sum_to_target:12"]
