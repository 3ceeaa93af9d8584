"""The control plane over a real store: runs, scheduling, dispatching, and the API as its client sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import connect_sse
from prometheus_client import CollectorRegistry, generate_latest

from services.client import ApiError, Client, Unreachable
from services.contracts.messages import (
    Completion,
    CompletionGroup,
    FinishReason,
    Outcome,
    Part,
    PromptGroup,
    Role,
    RunEvent,
    Sample,
    Score,
    ScoredGroup,
    StepRecord,
    VersionSpan,
    pack_floats,
    pack_ints,
)
from services.contracts.spec import RunSpec
from services.contracts.states import Action, IllegalMove, RunState
from services.contracts.topics import ACTIVE, Log, RunKeys, Work
from services.control_plane.__main__ import ControlPlane
from services.control_plane.dispatcher import Dispatcher
from services.control_plane.feeds import group_seed, open_feed
from services.control_plane.lease import Lease
from services.control_plane.scheduler import Scheduler
from services.control_plane.store import KeyTaken, RunStore
from services.runtime.bus import Bus
from services.runtime.fleet import Fleet
from services.runtime.ledger import Ledger, NotOurs, Plan
from services.runtime.lifecycle import RunLifecycle, UnknownRun
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.process import Shutdown
from services.runtime.settings import Settings
from tests.integration.conftest import CLUSTER_TOKEN, TOKEN, Api, OwnRedis, Stubs, free_port, serve_api, wait_until


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> ControlPlaneMetrics:
    return ControlPlaneMetrics(registry)


@pytest.fixture
def scheduler(bus: Bus, store: RunStore, metrics: ControlPlaneMetrics) -> Scheduler:
    """One that takes absence for death at once."""
    return Scheduler(store, Fleet(bus), metrics, settle=0.0)


@pytest.fixture
def dispatcher(bus: Bus, store: RunStore, metrics: ControlPlaneMetrics) -> Iterator[Dispatcher]:
    dispatcher = Dispatcher(bus, store, metrics, Shutdown())
    yield dispatcher
    dispatcher.close()


def on_fleet(store: RunStore, spec: RunSpec, *, version: int | None = 0) -> tuple[str, Ledger]:
    """A run that trainer t has, with `version` announced."""
    run, _ = store.create(spec)
    store.activate(run.run_id)
    store.lifecycle(run.run_id).move(Action.ASSIGN, trainer="t")
    ledger = Ledger(store.bus, run.run_id)
    if version is not None:
        ledger.announce(version, trainer="t")
    return run.run_id, ledger


def settle(dispatcher: Dispatcher, ledger: Ledger, *, ticks: int = 60) -> None:
    """Tick until nothing more is issued."""
    before = -1
    for _ in range(ticks):
        dispatcher.tick()
        issued = ledger.conservation().issued
        opened = all(active.feed.done() for active in dispatcher._active.values())
        if issued == before and opened:
            return
        before = issued if opened else -1
    raise AssertionError("the dispatcher never came to rest")


def prompts(bus: Bus, run_id: str) -> list[PromptGroup]:
    return [entry.message(PromptGroup) for entry in bus.range(run_id, Work.PROMPTS)]


def completed(group: PromptGroup, *, version: int = 0) -> CompletionGroup:
    done = Completion(
        tokens=pack_ints([3, 4]), logprobs=pack_floats([-0.5, -0.25]), spans=(VersionSpan(version=version, start=0, end=2),), text="4+",
        finish=FinishReason.STOP,
    )  # fmt: skip
    return CompletionGroup(group=group, completions=(done,) * group.group_size, server="s", attempt=1, started_at=0.0)


def rewarded(done: CompletionGroup) -> ScoredGroup:
    part = Part(verifier="sum_to_target", weight=1.0, score=1.0, outcome=Outcome.OK)
    return ScoredGroup(completed=done, scores=(Score(reward=1.0, parts=(part,)),) * len(done.completions), server="r")


def step_of(run_id: str, version: int, **values: float) -> StepRecord:
    return StepRecord(run_id=run_id, version=version, at=float(version), values=values, lags={0: 2, 1: 1}, window=(0, 1), groups=(version,))


def consume(ledger: Ledger, *, version: int, count: int) -> None:
    """Train on the `count` oldest outstanding groups, as a trainer would, and announce the next version."""
    indices = tuple(row.index for row in ledger.rows()[:count])
    ledger.commit(Plan(indices, ()), step_of(ledger.run_id, version), (), trainer="t", keep_samples=0)


# -- lifecycle and store ----------------------------------------------------------------------------------------------------------------


def test_a_move_changes_the_state_and_tells_of_it_at_once(bus: Bus, store: RunStore, spec: RunSpec) -> None:
    run_id, _ = on_fleet(store, spec)
    lifecycle = RunLifecycle(bus, run_id)
    assert lifecycle.move(Action.START, holder="t") is RunState.RUNNING
    assert lifecycle.move(Action.PAUSE, "the disk is full", holder="t") is RunState.PAUSED
    events = [entry.message(RunEvent) for entry in bus.range(run_id, Log.EVENTS)]
    assert [event.event for event in events] == ["run_created", "run_assigned", "run_started", "run_paused"]
    assert events[-1].text == "Paused: the disk is full"
    assert events[-1].severity == "warning"
    assert events[-1].version == 0
    run = store.get(run_id)
    assert (run.state, run.reason) == (RunState.PAUSED, "the disk is full")
    assert run.started_at is not None
    assert run.ended_at is None


def test_an_illegal_move_changes_nothing(bus: Bus, store: RunStore, spec: RunSpec) -> None:
    run, _ = store.create(spec)
    with pytest.raises(IllegalMove, match="a queued run cannot complete"):
        RunLifecycle(bus, run.run_id).move(Action.COMPLETE)
    assert store.get(run.run_id).state is RunState.QUEUED
    assert len(bus.range(run.run_id, Log.EVENTS)) == 1
    with pytest.raises(UnknownRun, match="run 'nobody' is not known"):
        RunLifecycle(bus, "nobody").move(Action.PAUSE)


def test_of_many_who_move_a_run_at_once_one_does(redis_url: str, store: RunStore, spec: RunSpec) -> None:
    run, _ = store.create(spec)
    won: list[str] = []

    def move(name: str) -> None:
        try:
            RunLifecycle(Bus(redis_url), run.run_id).move(Action.ASSIGN, trainer=name)
            won.append(name)
        except IllegalMove:
            pass

    threads = [threading.Thread(target=move, args=(f"t{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get(run.run_id).trainer == won[0]


def test_a_trainer_that_lost_its_run_can_neither_move_nor_commit_it(bus: Bus, store: RunStore, spec: RunSpec) -> None:
    run_id, ledger = on_fleet(store, spec)
    lifecycle = RunLifecycle(bus, run_id)
    lifecycle.move(Action.LOSE_TRAINER)
    lifecycle.move(Action.ASSIGN, trainer="other")
    with pytest.raises(NotOurs, match="no longer t's"):
        lifecycle.move(Action.FAIL, "late", holder="t")
    with pytest.raises(NotOurs):
        ledger.announce(1, trainer="t")
    assert lifecycle.state() is RunState.STARTING


def test_the_same_key_with_the_same_spec_makes_one_run(store: RunStore, spec: RunSpec) -> None:
    first, made = store.create(spec, idempotency_key="k")
    again, made_again = store.create(spec, idempotency_key="k")
    assert (made, made_again, again.run_id) == (True, False, first.run_id)
    with pytest.raises(KeyTaken):
        store.create(spec.model_copy(update={"seed": 8}), idempotency_key="k")
    assert len(store.ids()) == 1
    assert store.create(spec)[0].run_id != first.run_id


def test_hundreds_of_runs_of_one_second_all_get_ids(store: RunStore, spec: RunSpec) -> None:
    made = {store.create(spec)[0].run_id for _ in range(300)}
    assert len(made) == 300 == len(store.ids())


def test_pages_show_every_run_once_newest_first(store: RunStore, spec: RunSpec) -> None:
    made = [store.create(spec.model_copy(update={"name": name}))[0].run_id for name in ("a", "b", "a", "b", "a")]
    first, cursor = store.page(state=None, name=None, cursor=None, limit=2)
    store.create(spec.model_copy(update={"name": "late"}))
    second, cursor = store.page(state=None, name=None, cursor=cursor, limit=3)
    assert [run.run_id for run in first + second] == made[::-1]
    assert cursor is None
    assert [run.name for run in store.page(state=None, name="b", cursor=None, limit=9)[0]] == ["b", "b"]
    assert store.page(state=RunState.PAUSED, name=None, cursor=None, limit=9) == ([], None)


def test_runs_are_found_by_a_part_of_their_name_or_the_beginning_of_their_id(store: RunStore, spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: store.create(spec.model_copy(update={"name": name}))[0].run_id for name in ("Wide_Window", "other", "narrow-window", "windy")}

    def found(name: str) -> list[str]:
        return [run.name for run in store.page(state=None, name=name, cursor=None, limit=9)[0]]

    assert found("WINDOW") == found("window") == ["narrow-window", "Wide_Window"]
    assert found("wide_w") == found("wide-w") == found(made["Wide_Window"].upper()) == ["Wide_Window"]
    assert found("w.n") == found("window*") == [], "it is a text, no pattern"
    assert found("20") == [], "not what all ids have"
    for scan in (1, 2, 3, 4):
        monkeypatch.setattr("services.control_plane.store.SCAN", scan)
        pages, cursor = [], None
        while pages == [] or cursor:
            page, cursor = store.page(state=RunState.QUEUED, name="wind", cursor=cursor, limit=1)
            pages.append([run.name for run in page])
        assert pages == [["windy"], ["narrow-window"], ["Wide_Window"]], "each once, and no empty page after the last one"


def test_a_filter_reads_no_specs_but_those_that_it_answers(store: RunStore, spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(5):
        store.create(spec.model_copy(update={"name": f"run-{n}"}))
    read: list[str] = []
    several = store.several
    monkeypatch.setattr(store, "several", lambda run_ids: read.extend(run_ids) or several(run_ids))
    (found,), _ = store.page(state=None, name="N-3", cursor=None, limit=50)
    assert read == [found.run_id]


def test_the_lease_has_one_holder_and_passes_on_when_it_is_given_up_or_not_renewed(redis_url: str) -> None:
    first, second = Lease(Bus(redis_url), "a", life=0.2), Lease(Bus(redis_url), "b", life=0.2)
    assert first.hold()
    assert not second.hold()
    first.release()
    assert wait_until(second.hold, seconds=1)
    assert not first.hold()
    time.sleep(0.3)  # `b` no longer renews
    assert wait_until(first.hold, seconds=1)


def test_a_control_plane_tells_of_runs_only_while_it_holds_the_lease(redis_url: str, tmp_path: Path) -> None:
    for name in ("token", "cluster-token"):
        (tmp_path / name).write_text("a-token-of-sixteen-and-more")
    plane = ControlPlane(Settings(redis_url=redis_url, token_file=tmp_path / "token", cluster_token_file=tmp_path / "cluster-token"))
    plane.lease.life = 0.5
    plane.metrics.runs.labels("queued").set(1)

    def queued() -> float | None:
        return plane.registry.get_sample_value("offbeat_runs", {"state": "queued"})

    assert queued() is None, "it stands by"
    assert plane.lease.hold()
    assert queued() == 1
    assert wait_until(lambda: queued() is None, seconds=10), "it was stopped for longer than the lease lives"
    other = Lease(Bus(redis_url), "b")
    assert wait_until(other.hold, seconds=10)
    assert not plane.lease.hold()
    assert queued() is None


# -- scheduler --------------------------------------------------------------------------------------------------------------------------


def test_runs_go_through_the_fleet_one_after_the_other(bus: Bus, store: RunStore, spec: RunSpec, scheduler: Scheduler, stubs: Stubs) -> None:
    old, new = store.create(spec)[0].run_id, store.create(spec)[0].run_id
    scheduler.tick()
    assert store.get(old).state is RunState.QUEUED, "no fleet yet"
    stubs.beat("t", Role.TRAINER)
    stubs.beat("s", Role.ROLLOUT)
    scheduler.tick()
    assert (store.get(old).state, store.get(old).trainer, store.get(new).state) == (RunState.STARTING, "t", RunState.QUEUED)
    assert stubs.fleet.assignments() == {"s": old, "t": old}
    assert store.active() == {old}
    stubs.work()
    RunLifecycle(bus, old).move(Action.START, holder="t")
    RunLifecycle(bus, old).move(Action.COMPLETE, holder="t")
    scheduler.tick()
    assert stubs.fleet.assignments() == {}
    assert store.active() == set()
    scheduler.tick()
    assert store.get(new).state is RunState.QUEUED, "the trainer has not let go of the old run yet"
    stubs.work()
    scheduler.tick()
    assert store.get(new).state is RunState.STARTING
    assert stubs.fleet.assignments() == {"s": new, "t": new}


def test_a_run_that_ends_is_closed_with_its_groups_counted(
    bus: Bus, store: RunStore, spec: RunSpec, scheduler: Scheduler, dispatcher: Dispatcher
) -> None:
    run_id, ledger = on_fleet(store, spec)
    settle(dispatcher, ledger)
    RunLifecycle(bus, run_id).move(Action.CANCEL)
    with pytest.raises(NotOurs):  # a step that ends now would be counted beside its cancelled groups
        consume(ledger, version=0, count=4)
    scheduler.tick()
    counts = ledger.conservation()
    assert (counts.issued, counts.cancelled, counts.outstanding, counts.holds) == (8, 8, 0, True)
    assert not bus.redis.exists(RunKeys(run_id).stream(Work.PROMPTS))
    assert not bus.redis.sismember(ACTIVE, run_id)
    settle(dispatcher, ledger)
    assert ledger.conservation().issued == 8, "nothing is issued after the end"


def test_a_lost_trainer_is_replaced_and_the_rollout_servers_stay(
    bus: Bus, store: RunStore, spec: RunSpec, scheduler: Scheduler, stubs: Stubs
) -> None:
    run_id = store.create(spec)[0].run_id
    for member_id, role in (("t1", Role.TRAINER), ("s", Role.ROLLOUT)):
        stubs.beat(member_id, role)
    scheduler.tick()
    stubs.work()
    RunLifecycle(bus, run_id).move(Action.START, holder="t1")
    stubs.die("t1")
    stubs.beat("t2", Role.TRAINER)
    scheduler.tick()
    assert store.get(run_id).state is RunState.QUEUED
    assert store.get(run_id).trainer is None
    assert stubs.fleet.assignments()["s"] == run_id
    scheduler.tick()
    run = store.get(run_id)
    assert (run.state, run.trainer) == (RunState.STARTING, "t2")
    events = [entry.message(RunEvent) for entry in bus.range(run_id, Log.EVENTS)]
    lost = next(event for event in events if event.event == "trainer_lost")
    assert "t1 gives no sign of life" in lost.text
    assert lost.severity == "warning"


def test_nobody_is_lost_right_after_the_scheduler_has_started(store: RunStore, spec: RunSpec, bus: Bus, metrics: ControlPlaneMetrics) -> None:
    run_id, _ = on_fleet(store, spec)
    patient = Scheduler(store, Fleet(bus), metrics, settle=0.5)
    patient.tick()
    assert store.get(run_id).state is RunState.STARTING
    end = time.monotonic() + 20.0
    while store.get(run_id).state is not RunState.QUEUED and time.monotonic() < end:
        time.sleep(0.1)  # a tick that comes later than the settling time begins it anew
        patient.tick()
    assert store.get(run_id).state is RunState.QUEUED


def test_servers_that_join_and_die_are_told(bus: Bus, store: RunStore, spec: RunSpec, scheduler: Scheduler, stubs: Stubs) -> None:
    run_id = store.create(spec)[0].run_id
    stubs.beat("t", Role.TRAINER)
    stubs.beat("s1", Role.ROLLOUT)
    for _ in range(2):
        scheduler.tick()
        stubs.work()
    stubs.beat("s2", Role.ROLLOUT)
    for _ in range(2):
        scheduler.tick()
        stubs.work()
    assert stubs.fleet.assignments()["s2"] == run_id
    stubs.die("s1")
    for _ in range(2):
        scheduler.tick()
    told = [entry.message(RunEvent) for entry in bus.range(run_id, Log.EVENTS)]
    assert [(event.event, event.text) for event in told[2:]] == [
        ("server_joined", "Rollout server s2 joined"),
        ("server_lost", "Rollout server s1 gives no sign of life"),
    ]


def test_a_paused_run_leaves_the_fleet_and_keeps_its_groups(
    bus: Bus, store: RunStore, spec: RunSpec, scheduler: Scheduler, dispatcher: Dispatcher, stubs: Stubs
) -> None:
    run_id = store.create(spec)[0].run_id
    stubs.beat("t", Role.TRAINER)
    stubs.beat("s", Role.ROLLOUT)
    scheduler.tick()
    stubs.work()
    ledger = Ledger(bus, run_id)
    ledger.announce(0, trainer="t")
    settle(dispatcher, ledger)
    RunLifecycle(bus, run_id).move(Action.PAUSE)
    scheduler.tick()
    assert stubs.fleet.assignments() == {}
    assert ledger.conservation().queued == 8
    RunLifecycle(bus, run_id).move(Action.RESUME)
    stubs.work()
    scheduler.tick()
    assert store.get(run_id).state is RunState.STARTING
    assert ledger.conservation().queued == 8


# -- dispatcher -------------------------------------------------------------------------------------------------------------------------


def test_as_many_groups_are_issued_as_the_window_admits(
    bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, registry: CollectorRegistry
) -> None:
    run_id, ledger = on_fleet(store, spec)
    settle(dispatcher, ledger)
    groups = prompts(bus, run_id)
    assert [group.index for group in groups] == list(range(8)), "(max_lag + 1) * B"
    assert {(group.max_lag, group.issued_version, group.group_size, group.max_tokens) for group in groups} == {(1, 0, 2, 16)}
    text = generate_latest(registry).decode()
    assert f'offbeat_queue_groups{{place="queued",run="{run_id}"}} 8.0' in text
    assert f'offbeat_conservation_broken{{run="{run_id}"}} 0.0' in text
    consume(ledger, version=0, count=4)
    settle(dispatcher, ledger)
    assert [(group.index, group.issued_version) for group in prompts(bus, run_id)[8:]] == [(8, 1), (9, 1), (10, 1), (11, 1)]


def test_groups_are_a_function_of_the_seed_and_their_index(bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    run_id, ledger = on_fleet(store, spec)
    settle(dispatcher, ledger)
    feed = open_feed(spec)
    for group in prompts(bus, run_id):
        item, tokens = feed.prompt(group.index)
        assert (group.prompt_id, group.prompt, group.prompt_ids, group.answer) == (item.id, item.text, tokens, item.answer)
        assert group.seed == group_seed(7, group.index)
    assert len({group_seed(7, n) for n in range(1000)}) == 1000
    assert all(0 <= group_seed(s, n) < 2**31 for s in (0, 2**31 - 1) for n in range(100))
    assert group_seed(0, 0) != group_seed(1, 0)


def test_no_more_groups_are_issued_than_the_run_needs(store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    _, ledger = on_fleet(store, spec)
    for version in range(spec.versions):
        settle(dispatcher, ledger)
        consume(ledger, version=version, count=spec.batch_groups)
    settle(dispatcher, ledger)
    counts = ledger.conservation()
    assert (counts.issued, counts.consumed, counts.outstanding) == (24, 24, 0)


def test_nothing_is_issued_before_the_first_version_is_announced(store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    _, ledger = on_fleet(store, spec, version=None)
    settle(dispatcher, ledger)
    assert ledger.conservation().issued == 0
    ledger.announce(0, trainer="t")
    settle(dispatcher, ledger)
    assert ledger.conservation().issued == 8


def test_a_knob_holds_from_the_version_that_was_answered(bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    run_id, ledger = on_fleet(store, spec)
    settle(dispatcher, ledger)
    assert ledger.turn({"staleness.max_lag": 2, "temperature": 0.5}, expected=0) == 1
    settle(dispatcher, ledger)
    assert ledger.conservation().issued == 8, "version 0 is still under the old window"
    consume(ledger, version=0, count=4)
    settle(dispatcher, ledger)
    fresh = prompts(bus, run_id)[8:]
    assert [(group.index, group.max_lag, group.temperature) for group in fresh] == [(n, 2, 0.5) for n in range(8, 16)]


def test_a_dispatcher_that_was_killed_in_the_middle_is_followed_by_one_that_issues_the_rest_once(
    bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, metrics: ControlPlaneMetrics
) -> None:
    run_id, ledger = on_fleet(store, spec)
    feed = open_feed(spec)
    for n in range(3):  # what the one before had issued
        assert ledger.issue(feed.group(run_id, n, spec=spec, version=0))
    others = [Dispatcher(bus, store, metrics, Shutdown()) for _ in range(2)]
    threads = [threading.Thread(target=settle, args=(each, ledger)) for each in (dispatcher, *others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [group.index for group in prompts(bus, run_id)] == list(range(8))
    assert ledger.conservation().issued == 8
    for other in others:
        other.close()


def test_a_dead_letter_frees_its_place_and_a_replay_comes_before_new_groups(bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    run_id, ledger = on_fleet(store, spec)
    settle(dispatcher, ledger)
    for entry in bus.range(run_id, Work.PROMPTS)[:2]:
        assert ledger.give_up(entry, Work.PROMPTS, "spent", group=entry.message(PromptGroup))
    first, second = (entry.id for entry in bus.range(run_id, Log.DEAD))
    assert ledger.replay(first)
    assert not ledger.replay(first)
    settle(dispatcher, ledger)
    assert [group.index for group in prompts(bus, run_id)] == [2, 3, 4, 5, 6, 7, 0, 8]
    counts = ledger.conservation()
    assert (counts.issued, counts.queued, counts.dead, counts.replaying, counts.holds) == (9, 8, 1, 0, True)
    assert ledger.replay(second)
    settle(dispatcher, ledger)
    assert ledger.conservation().replaying == 1, "the window is full"


def test_a_run_whose_data_are_gone_fails_with_the_reason(store: RunStore, spec_tree: dict[str, Any], dispatcher: Dispatcher, tmp_path: Path) -> None:
    path = tmp_path / "gone.jsonl"
    spec = RunSpec.model_validate({**spec_tree, "data": {"source": "jsonl", "path": str(path)}})
    run_id, ledger = on_fleet(store, spec, version=None)
    wait_until(lambda: dispatcher.tick() is not None and store.get(run_id).state is RunState.FAILED)
    assert f"{path} is not there" in store.get(run_id).reason
    path.write_text('{"prompt": "1=", "answer": 1}\n')
    store.lifecycle(run_id).move(Action.RESUME)
    store.lifecycle(run_id).move(Action.ASSIGN, trainer="t")
    ledger.announce(0, trainer="t")
    wait_until(lambda: dispatcher.tick() is not None and ledger.conservation().issued == 8)


def test_a_broken_conservation_is_told_once(bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, registry: CollectorRegistry) -> None:
    run_id, ledger = on_fleet(store, spec)
    settle(dispatcher, ledger)
    bus.redis.hdel(RunKeys(run_id).ledger, "3")
    for _ in range(5):
        dispatcher.tick()
    told = [event for entry in bus.range(run_id, Log.EVENTS) if (event := entry.message(RunEvent)).event == "conservation_broken"]
    assert len(told) == 1
    assert told[0].severity == "error"
    assert told[0].data == {"missing": 1}
    assert f'offbeat_conservation_broken{{run="{run_id}"}} 1.0' in generate_latest(registry).decode()


# -- the API, through the client --------------------------------------------------------------------------------------------------------


def test_a_run_is_submitted_looked_at_and_steered(api: Api, spec_tree: dict[str, Any]) -> None:
    made = api.client.submit(spec_tree, idempotency_key="one")
    assert made.run_id.startswith("test-")
    assert made.state is RunState.QUEUED
    assert made.versions == 6
    assert made.spec.seed == 7
    assert api.client.submit(spec_tree, idempotency_key="one").run_id == made.run_id
    assert [run.run_id for run in api.client.runs().runs] == [made.run_id]
    assert api.client.pause(made.run_id).state is RunState.PAUSED
    assert api.client.runs(state=RunState.PAUSED).runs[0].run_id == made.run_id
    assert not api.client.runs(state=RunState.QUEUED).runs
    assert [run.run_id for run in api.client.runs(name="TES").runs] == [made.run_id]
    assert not api.client.runs(name="tester").runs
    assert api.client.resume(made.run_id).state is RunState.QUEUED
    ended = api.client.cancel(made.run_id)
    assert ended.state is RunState.CANCELLED
    assert ended.ended_at is not None
    with pytest.raises(ApiError, match="a cancelled run cannot resume") as refused:
        api.client.resume(made.run_id)
    assert refused.value.status == 409
    assert [event.event for event in api.client.events(made.run_id)] == ["run_created", "run_paused", "run_resumed", "run_cancelled"]


def test_toml_is_taken_as_well_as_json(api: Api, model_folder: Path) -> None:
    text = f'name = "toml"\nversions = 3\n[model]\npath = "{model_folder}"\n[staleness]\nmax_lag = 4\n'
    answer = api.http.post("/v1/runs", content=text, headers={"Content-Type": "application/toml"})
    assert answer.status_code == 201
    assert answer.headers["Location"] == f"/v1/runs/{answer.json()['run_id']}"
    assert api.client.run(answer.json()["run_id"]).spec.staleness.max_lag == 4


def test_knobs_are_answered_with_the_version_from_which_they_hold(api: Api, bus: Bus, spec_tree: dict[str, Any]) -> None:
    run_id = api.client.submit(spec_tree).run_id
    assert api.client.set_knobs(run_id, {"temperature": 0.5}).version == 0, "before the first version"
    RunLifecycle(bus, run_id).move(Action.ASSIGN, trainer="t")
    Ledger(bus, run_id).announce(4, trainer="t")
    answer = api.client.set_knobs(run_id, {"staleness": {"max_lag": 3}, "clip.high": 0.28})
    assert answer.version == 5
    assert answer.knobs["staleness.max_lag"] == 3
    assert answer.knobs["temperature"] == 0.5
    now = api.client.knobs(run_id)
    assert (now.version, now.knobs["staleness.max_lag"], [change.version for change in now.changes]) == (4, 1, [0, 5])
    told = list(api.client.events(run_id))[-1]
    assert (told.event, told.version) == ("knobs_changed", 5)
    assert told.text == "From version 5: clip.high 0.2 -> 0.28, staleness.max_lag 1 -> 3"
    assert told.data == {"before": {"clip.high": 0.2, "staleness.max_lag": 1}, "after": {"clip.high": 0.28, "staleness.max_lag": 3}}


def test_knobs_turned_by_many_at_once_are_all_kept(api: Api, spec_tree: dict[str, Any]) -> None:
    run_id = api.client.submit(spec_tree).run_id
    names = ("temperature", "learning_rate", "clip.low", "clip.high")
    threads = [threading.Thread(target=api.client.set_knobs, args=(run_id, {name: 0.125})) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    knobs = api.client.knobs(run_id)
    assert len(knobs.changes) == 4
    assert all(knobs.knobs[name] == 0.125 for name in names)


def test_steps_come_by_range_and_averaged(api: Api, bus: Bus, spec_tree: dict[str, Any]) -> None:
    run_id = api.client.submit(spec_tree).run_id
    for version in range(1_203):  # more than one chunk
        bus.append(run_id, Log.STEPS, step_of(run_id, version, reward=version / 2, odd=float("nan") if version % 2 else 1.0))
    part = api.client.steps(run_id, first=3, last=6)
    assert [(step.version, step.values["reward"]) for step in part.steps] == [(3, 1.5), (4, 2.0), (5, 2.5), (6, 3.0)]
    assert part.steps[0].values["odd"] is None
    assert part.steps[0].groups == [3]
    few = api.client.steps(run_id, points=3)
    assert few.recorded == 1_203
    assert [(step.version, step.count) for step in few.steps] == [(0, 401), (401, 401), (802, 401)]
    assert few.steps[0].values == {"reward": 100.0, "odd": 1.0}
    assert few.steps[0].lags == {0: 802, 1: 401}
    assert [step.version for step in api.client.steps(run_id, first=1_200).steps] == [1_200, 1_201, 1_202]


def test_samples_show_tokens_versions_and_lags_and_the_newest_record_wins(api: Api, bus: Bus, spec_tree: dict[str, Any]) -> None:
    run_id = api.client.submit(spec_tree).run_id
    feed = open_feed(RunSpec.model_validate(spec_tree))
    for version, index in ((1, 0), (1, 1), (2, 2), (3, 1)):
        group = feed.group(run_id, index, spec=feed.spec, version=0)
        bus.append(run_id, Log.SAMPLES, Sample(scored=rewarded(completed(group)), trained_version=version, advantages=(0.5, -0.5)))
    found = api.client.samples(run_id).samples
    assert [(sample.index, sample.trained_version) for sample in found] == [(1, 3), (2, 2), (0, 1)]
    done = found[0].completions[1]
    assert (done.tokens, done.versions, done.lags, done.reward, done.advantage, done.text) == ([3, 4], [0, 0], [3, 3], 1.0, -0.5, "4+")
    assert done.parts[0].verifier == "sum_to_target"
    assert found[0].prompt.endswith("=")
    assert [sample.index for sample in api.client.samples(run_id, first=2, last=2).samples] == [2]
    assert [sample.index for sample in api.client.samples(run_id, limit=2).samples] == [1, 2]


def test_more_samples_than_a_page_holds_are_fetched_in_pages(api: Api, bus: Bus, spec_tree: dict[str, Any]) -> None:
    run_id = api.client.submit(spec_tree).run_id
    feed = open_feed(RunSpec.model_validate(spec_tree))
    for index in range(230):
        group = feed.group(run_id, index, spec=feed.spec, version=0)
        bus.append(run_id, Log.SAMPLES, Sample(scored=rewarded(completed(group)), trained_version=index, advantages=()))
    assert [sample.index for sample in api.client.samples(run_id, limit=1_000).samples] == list(range(229, -1, -1))
    assert len(api.client.samples(run_id, limit=205).samples) == 205


def test_checkpoints_are_those_whose_manifest_is_whole(api: Api, spec_tree: dict[str, Any]) -> None:
    run_id = api.client.submit(spec_tree).run_id
    assert api.client.checkpoints(run_id).checkpoints == []
    for version, manifest in ((2, None), (10, None), (11, "{")):
        folder = api.data / run_id / "checkpoints" / f"v{version:08d}"
        folder.mkdir(parents=True)
        whole = f'{{"run_id": "{run_id}", "version": {version}, "consumed": 8, "issued": 12, "knobs": {{"temperature": 1.0}}, "made_at": 5.0}}'
        (folder / "manifest.json").write_text(manifest or whole)
    found = api.client.checkpoints(run_id).checkpoints
    assert [(c.name, c.version, c.issued, c.knobs) for c in found] == [
        ("v00000002", 2, 12, {"temperature": 1.0}),
        ("v00000010", 10, 12, {"temperature": 1.0}),
    ]


def test_dead_letters_are_looked_at_and_replayed(api: Api, bus: Bus, spec_tree: dict[str, Any], store: RunStore, dispatcher: Dispatcher) -> None:
    run_id, ledger = on_fleet(store, RunSpec.model_validate(spec_tree))
    settle(dispatcher, ledger)
    entry = bus.range(run_id, Work.PROMPTS)[0]
    ledger.give_up(entry, Work.PROMPTS, "given up after 5 attempts", group=entry.message(PromptGroup))
    bus.redis.xadd(RunKeys(run_id).stream(Work.COMPLETIONS), {"data": b"\xffgarbage"})
    ledger.give_up(bus.range(run_id, Work.COMPLETIONS)[0], Work.COMPLETIONS, "not a CompletionGroup", group=None)
    garbage, letter = api.client.dead_letters(run_id).letters
    assert (letter.index, letter.replayable, letter.reason, letter.stream) == (0, True, "given up after 5 attempts", "prompts")
    assert (garbage.index, garbage.replayable, garbage.raw) == (None, False, "\\xffgarbage")
    assert [one.id for one in api.client.dead_letters(limit=1).letters] == [garbage.id]
    counts = api.client.conservation(run_id)
    assert (counts.issued, counts.dead, counts.unreadable, counts.holds) == (8, 1, 1, True)
    assert api.client.replay(run_id, letter.id).index == 0
    assert api.client.conservation(run_id).replaying == 1
    with pytest.raises(ApiError, match="has no dead letter"):
        api.client.replay(run_id, letter.id)
    with pytest.raises(ApiError, match="could not be read"):
        api.client.replay(run_id, garbage.id)


def test_the_fleet_shows_who_works_for_what(api: Api, stubs: Stubs) -> None:
    stubs.beat("s", Role.ROLLOUT, run_id="a", version=3)
    stubs.fleet.assign("s", "b")
    (shown,) = api.client.fleet().members
    assert (shown.member_id, shown.role, shown.run_id, shown.assigned, shown.version, shown.ready) == ("s", Role.ROLLOUT, "a", "b", 3, True)


def test_events_stream_until_the_run_ends_and_go_on_after_the_last_one_known(api: Api, bus: Bus, spec_tree: dict[str, Any]) -> None:
    run_id = api.client.submit(spec_tree).run_id
    heard: list[str] = []
    listener = threading.Thread(target=lambda: heard.extend(event.event for event in api.client.events(run_id, follow=True)))
    listener.start()
    for action in (Action.PAUSE, Action.RESUME, Action.CANCEL):
        RunLifecycle(bus, run_id).move(action)
        time.sleep(0.05)
    listener.join(timeout=10)
    assert heard == ["run_created", "run_paused", "run_resumed", "run_cancelled"]
    known = list(api.client.events(run_id))[1].id
    with connect_sse(api.http, "GET", f"/v1/runs/{run_id}/events", headers={"Last-Event-ID": known}) as source:
        told = [(event.event, event.id) for event in source.iter_sse()]
    assert [name for name, _ in told] == ["message", "message", "end"]
    assert told[0][1] > known
    assert [event.event for event in api.client.events(run_id, after=known)] == ["run_resumed", "run_cancelled"]


def test_watchers_of_events_hold_no_threads(api: Api, spec_tree: dict[str, Any]) -> None:
    run_id = api.client.submit(spec_tree).run_id
    with httpx.Client(
        base_url=api.url, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False, limits=httpx.Limits(max_connections=None)
    ) as many:
        streams = [many.stream("GET", f"/v1/runs/{run_id}/events", headers={"Accept": "text/event-stream"}) for _ in range(60)]
        answers = [stream.__enter__() for stream in streams]
        assert all(answer.status_code == 200 for answer in answers)
        assert api.client.run(run_id).run_id == run_id, "more watchers than worker threads, and the API still answers"
        assert threading.active_count() < 60
        for stream in streams:
            stream.__exit__(None, None, None)


def test_a_follower_of_events_outlives_a_restart_of_the_api(redis_url: str, tmp_path: Path, bus: Bus, store: RunStore, spec: RunSpec) -> None:
    run_id = store.create(spec)[0].run_id
    heard: list[str] = []
    with serve_api(redis_url, tmp_path) as first:
        port = httpx.URL(first.url).port
        client = Client(first.url, TOKEN)
        listener = threading.Thread(target=lambda: heard.extend(event.event for event in client.events(run_id, follow=True)))
        listener.start()
        wait_until(lambda: heard == [] and listener.is_alive())
        time.sleep(0.3)
    RunLifecycle(bus, run_id).move(Action.CANCEL)
    with serve_api(redis_url, tmp_path, port=port):
        listener.join(timeout=10)
    assert heard == ["run_created", "run_cancelled"]
    assert not listener.is_alive()


def test_requests_are_measured_by_route_and_not_by_run(api: Api, spec_tree: dict[str, Any]) -> None:
    run_id = api.client.submit(spec_tree).run_id
    api.client.run(run_id)
    text = api.http.get("/metrics").text
    assert 'offbeat_http_request_seconds_count{method="GET",route="/v1/runs/{run_id}",status="200"} 1.0' in text
    assert run_id not in text


# -- the process ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def start_process(own_redis: OwnRedis, tmp_path: Path) -> Iterator[Any]:
    """Starts control planes as processes of their own, on one store."""
    started: list[subprocess.Popen[bytes]] = []
    for name, token in (("token", TOKEN), ("cluster-token", CLUSTER_TOKEN)):
        (tmp_path / name).write_text(token)

    def start(member: str) -> tuple[Client, subprocess.Popen[bytes], Path]:
        port = free_port()
        env = {
            **os.environ, "OFFBEAT_REDIS_URL": own_redis.url, "OFFBEAT_PORT": str(port), "OFFBEAT_TOKEN_FILE": str(tmp_path / "token"),
            "OFFBEAT_CLUSTER_TOKEN_FILE": str(tmp_path / "cluster-token"), "OFFBEAT_DATA": str(tmp_path / "runs"), "OFFBEAT_MEMBER": member,
        }  # fmt: skip
        log = tmp_path / f"{member}.log"
        with log.open("wb") as output:
            process = subprocess.Popen([sys.executable, "-m", "services.control_plane"], env=env, stderr=output)
        started.append(process)
        return Client(f"http://127.0.0.1:{port}", TOKEN), process, log

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=10)


def answers(client: Client) -> bool:
    try:
        client.fleet()
    except Unreachable:
        return False
    return True


def test_the_process_waits_for_redis_outlives_its_outage_and_drains(own_redis: OwnRedis, start_process: Any, spec_tree: dict[str, Any]) -> None:
    client, process, log = start_process("cp")
    health = httpx.Client(base_url=client.url, trust_env=False)
    wait_until(lambda: "waiting for Redis" in log.read_text(), seconds=20)
    assert health.get("/healthz").status_code == 200
    assert health.get("/readyz").json()["detail"] == "waits for Redis"
    with pytest.raises(Unreachable, match="Redis is away"):
        client.runs()
    own_redis.start()
    wait_until(lambda: health.get("/readyz").status_code == 200)

    fleet = Fleet(Bus(own_redis.url))
    stubs = Stubs(fleet)
    stubs.beat("t", Role.TRAINER)
    stubs.beat("s", Role.ROLLOUT)
    run_id = client.submit(spec_tree).run_id
    wait_until(lambda: client.run(run_id).state is RunState.STARTING)
    stubs.work()
    Ledger(fleet.bus, run_id).announce(0, trainer="t")
    wait_until(lambda: client.conservation(run_id).issued == 8)

    own_redis.stop()
    with pytest.raises(Unreachable, match="Redis is away"):
        client.runs()
    assert health.get("/readyz").status_code == 503
    assert health.get("/healthz").status_code == 200
    own_redis.start()
    stubs.work()
    consume(Ledger(fleet.bus, run_id), version=0, count=4)
    wait_until(lambda: client.conservation(run_id).issued == 12)
    assert client.run(run_id).state is RunState.STARTING, "an outage of Redis is no death of a trainer"

    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0
    assert [member.role for member in fleet.members()] == [Role.ROLLOUT, Role.TRAINER], "it has said good-bye"


def test_of_two_control_planes_one_dispatches_and_the_other_takes_over(own_redis: OwnRedis, start_process: Any, spec_tree: dict[str, Any]) -> None:
    own_redis.start()
    first, leader, _ = start_process("a")
    wait_until(lambda: answers(first) and any(m.detail == "dispatches" for m in first.fleet().members), seconds=20)
    second, _, _ = start_process("b")
    wait_until(lambda: answers(second) and len(second.fleet().members) == 2, seconds=20)
    assert {m.member_id: m.detail for m in second.fleet().members} == {"a": "dispatches", "b": "stands by"}
    leader.kill()
    stubs = Stubs(Fleet(Bus(own_redis.url)))
    run_id = second.submit(spec_tree).run_id

    def assigned() -> bool:
        stubs.beat("t", Role.TRAINER)
        stubs.beat("s", Role.ROLLOUT)
        return second.run(run_id).state is RunState.STARTING

    wait_until(assigned, seconds=15)


def test_the_process_says_what_keeps_it_from_starting(own_redis: OwnRedis, start_process: Any, tmp_path: Path) -> None:
    own_redis.start()
    (tmp_path / "token").write_text("changeme")
    _, process, log = start_process("cp")
    assert process.wait(timeout=20) == 2
    assert "holds no usable token" in log.read_text()
