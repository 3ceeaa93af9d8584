"""Evaluation on the fleet over a real store: each due version is evaluated once, of that version alone, whoever dies in between."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from rollout_server import worker as worker_module
from rollout_server.engine import Sampled, SamplingRequest
from rollout_server.scripted_engine import ScriptedEngine
from rollout_server.worker import RolloutWorker
from services.client import ApiError
from services.contracts.messages import CompletionGroup, DeadLetter, EvaluationRecord, LoadWeights, PromptGroup, Role, RunEvent
from services.contracts.spec import KvPolicy, RunSpec, Verifier
from services.contracts.states import Action
from services.contracts.topics import ACTIVE, Log, RunKeys, Work, evaluation_id
from services.contracts.views import FieldProblem
from services.control_plane import dispatcher as dispatcher_module
from services.control_plane.checks import check, invalid_spec
from services.control_plane.collector import Collector
from services.control_plane.dispatcher import Dispatcher
from services.control_plane.scheduler import Scheduler
from services.control_plane.store import RunStore
from services.runtime.bus import Bus
from services.runtime.codec import encode
from services.runtime.evaluations import EvaluationLedger, Evaluations, Round, probes
from services.runtime.fleet import Fleet
from services.runtime.ledger import Ledger, Place
from services.runtime.metrics import ControlPlaneMetrics, Latest, RolloutMetrics
from services.runtime.process import IdleClock, Shutdown
from services.runtime.tokenizer import PromptTokenizer
from services.runtime.web import Problem
from tests.integration.conftest import Api, Stubs, wait_until
from tests.integration.real_store import LossyBus
from tests.unit.sample_messages import completed, prompt_group, scored

TRAINER = "t"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "TICK_SECONDS", 0.01)


@pytest.fixture
def spec(spec_tree: dict[str, Any], tmp_path: Path) -> RunSpec:
    """Evaluated at 0, 2, 4 and 6: on three of the targets, and on the two rows of a file."""
    path = tmp_path / "far.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}+?=", "answer": n}) + "\n" for n in (4, 5)))
    near = {"name": "near", "prompts": 3, "samples": 2, "max_tokens": 8}
    far = {
        "name": "far", "domain": "out", "data": {"source": "jsonl", "path": str(path)}, "rewards": [{"name": "math"}], "samples": 4,
        "temperature": 0.6, "top_p": 0.9,
    }  # fmt: skip
    return RunSpec.model_validate({**spec_tree, "evaluation": {"every": 2, "sets": [near, far]}})


@pytest.fixture
def metrics() -> ControlPlaneMetrics:
    return ControlPlaneMetrics(CollectorRegistry())


@pytest.fixture
def dispatcher(bus: Bus, store: RunStore, metrics: ControlPlaneMetrics) -> Iterator[Dispatcher]:
    dispatcher = Dispatcher(bus, store, metrics, Shutdown())
    yield dispatcher
    dispatcher.close()


@pytest.fixture
def scheduler(bus: Bus, store: RunStore, metrics: ControlPlaneMetrics) -> Scheduler:
    return Scheduler(store, Fleet(bus), metrics, settle=0.0)


@pytest.fixture
def collector(store: RunStore, metrics: ControlPlaneMetrics) -> Collector:
    return Collector(store, metrics)


def on_fleet(store: RunStore, spec: RunSpec, *, version: int | None = 0) -> str:
    """A run that the trainer has, with `version` announced."""
    run, _ = store.create(spec)
    store.activate(run.run_id)
    store.lifecycle(run.run_id).move(Action.ASSIGN, trainer=TRAINER)
    if version is not None:
        Ledger(store.bus, run.run_id).announce(version, trainer=TRAINER)
    return run.run_id


def child(bus: Bus, run_id: str, name: str) -> EvaluationLedger:
    return EvaluationLedger(bus, evaluation_id(run_id, name))


def announce(dispatcher: Dispatcher, run_id: str, version: int) -> None:
    Ledger(dispatcher.bus, run_id).announce(version, trainer=TRAINER)
    dispatch(dispatcher, run_id)


def dispatch(dispatcher: Dispatcher, run_id: str) -> None:
    """Tick until all that may be issued now is."""
    wait_until(lambda: dispatcher.tick() is not None and dispatcher._active[run_id].feed.done())
    for _ in range(3):
        dispatcher.tick()


def prompts(ledger: Ledger) -> list[PromptGroup]:
    return [entry.message(PromptGroup) for entry in ledger.bus.range(ledger.run_id, Work.PROMPTS)]


def generate(ledger: EvaluationLedger, *, held: int, at_most: int = 100, version: int | None = None) -> list[PromptGroup]:
    """What is queued is completed by a server that holds `held`, with tokens of `version`."""
    entries = ledger.bus.claim([ledger.run_id], Work.PROMPTS, "s", count=at_most, block_ms=None)
    groups = [entry.message(PromptGroup) for entry in entries]
    for entry, group in zip(entries, groups, strict=True):
        assert ledger.start(group.index, held=held, max_attempts=3) == 1
        assert ledger.finish(entry, completed(group, versions=(held if version is None else version,) * 3))
    return groups


def judge(ledger: EvaluationLedger, *, right: int = 1) -> None:
    """What is generated is scored: the first `right` answers to each prompt are right."""
    for entry in ledger.bus.claim([ledger.run_id], Work.COMPLETIONS, "r", count=100, block_ms=None):
        done = entry.message(CompletionGroup)
        assert ledger.score(entry, scored(done, [float(g < right) for g in range(len(done.completions))]))


def records(bus: Bus, run_id: str) -> list[EvaluationRecord]:
    return [entry.message(EvaluationRecord) for entry in bus.range(run_id, Log.EVALUATIONS)]


def told(bus: Bus, run_id: str) -> dict[str, RunEvent]:
    return {event.event: event for entry in bus.range(run_id, Log.EVENTS) if (event := entry.message(RunEvent))}


# -- issue ------------------------------------------------------------------------------------------------------------------------------


def test_what_is_due_is_issued_at_once_with_the_sampling_of_its_set(bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    near, far = child(bus, run_id, "near"), child(bus, run_id, "far")
    assert [(g.run_id, g.index, g.issued_version, g.group_size, g.max_tokens, g.temperature) for g in prompts(near)] == [
        (f"{run_id}~near", n, 0, 2, 8, 1.0) for n in range(3)
    ]
    assert [(g.index, g.group_size, g.max_tokens, g.temperature, g.top_p) for g in prompts(far)] == [(n, 4, 16, 0.6, 0.9) for n in range(2)]
    assert {g.prompt for g in prompts(far)} == {"4+?=", "5+?="}
    assert len({g.prompt_id for g in prompts(near)}) == 3
    assert store.active() == {run_id, near.run_id, far.run_id}
    assert [one.name for one in far.spec().rewards] == ["math"]
    assert near.spec().rewards == spec.rewards
    assert Ledger(bus, run_id).conservation().issued == 8, "training is dispatched as ever"


def test_every_version_and_every_run_of_a_seed_is_asked_the_same_with_the_same_seeds(
    bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher
) -> None:
    def asked(run_id: str, version: int) -> list[tuple[str, bytes, int]]:
        groups = [g for name in ("near", "far") for g in prompts(child(bus, run_id, name))]
        return [(g.prompt_id, g.prompt_tokens, g.seed) for g in groups if g.issued_version == version]

    first, twin = on_fleet(store, spec), on_fleet(store, spec.model_copy(update={"learning_rate": 0.1}))
    other = on_fleet(store, spec.model_copy(update={"seed": 8}))
    for run_id in (first, twin, other):
        dispatch(dispatcher, run_id)
    announce(dispatcher, first, 2)
    assert len(asked(first, 0)) == 5
    assert asked(first, 0) == asked(first, 2) == asked(twin, 0)
    assert len({seed for *_, seed in asked(first, 0)}) == 5
    assert not {seed for *_, seed in asked(first, 0)} & {seed for *_, seed in asked(other, 0)}
    assert [g.index for g in prompts(child(bus, first, "near"))] == list(range(6))


def test_a_version_that_is_not_due_is_not_evaluated_and_one_that_is_announced_again_not_twice(
    bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, metrics: ControlPlaneMetrics
) -> None:
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    for version in (0, 1, 2, 2, 3):  # as a trainer does that takes the run over, or goes on after a pause
        announce(dispatcher, run_id, version)
    fresh = Dispatcher(bus, store, metrics, Shutdown())
    announce(fresh, run_id, 3)
    announce(fresh, run_id, 2)
    fresh.close()
    assert [group.issued_version for group in prompts(child(bus, run_id, "near"))] == [0] * 3 + [2] * 3


def test_a_dispatcher_that_was_killed_in_the_middle_is_followed_by_two_that_issue_the_rest_once(
    bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, metrics: ControlPlaneMetrics
) -> None:
    run_id = on_fleet(store, spec)
    near = child(bus, run_id, "near")
    assert near.open(spec)
    near.begin(0, count=3)
    assert near.issue(prompt_group(0, run_id=near.run_id))
    others = [Dispatcher(bus, store, metrics, Shutdown()) for _ in range(2)]
    threads = [threading.Thread(target=dispatch, args=(each, run_id)) for each in (dispatcher, *others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [group.index for group in prompts(near)] == [0, 1, 2]
    assert [group.index for group in prompts(child(bus, run_id, "far"))] == [0, 1]
    for other in others:
        other.close()


def test_the_trainer_can_read_the_prompts_before_the_first_version(bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    run_id = on_fleet(store, spec, version=None)
    assert probes(bus, run_id) == []
    dispatch(dispatcher, run_id)
    assert Ledger(bus, run_id).conservation().issued == 0
    near, far = probes(bus, run_id)
    assert (near.name, near.domain, far.name, far.domain) == ("near", "in", "far", "out")
    announce(dispatcher, run_id, 0)
    assert near.prompts == [group.prompt_ids for group in prompts(child(bus, run_id, "near"))]
    assert far.prompts == [group.prompt_ids for group in prompts(child(bus, run_id, "far"))]


def test_a_set_whose_data_are_gone_fails_the_run_with_the_reason(store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    Path(str(spec.evaluation.sets[1].data.path)).unlink()
    run_id = on_fleet(store, spec)
    wait_until(lambda: dispatcher.tick() is not None and store.get(run_id).state == "failed")
    assert "far.jsonl is not there" in store.get(run_id).reason


# -- what the trainer waits for ---------------------------------------------------------------------------------------------------------


def test_servers_may_load_another_version_once_all_that_is_due_is_generated(bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    run_id = on_fleet(store, spec)
    evaluations = Evaluations(bus, run_id, spec)
    assert not evaluations.may_load(0), "nothing is issued yet"
    dispatch(dispatcher, run_id)
    near, far = child(bus, run_id, "near"), child(bus, run_id, "far")
    generate(near, held=0)
    generate(far, held=0, at_most=1)
    assert not evaluations.may_load(0), "one is queued"
    (entry,) = bus.claim([far.run_id], Work.PROMPTS, "s", count=1, block_ms=None)
    far.start(1, held=0, max_attempts=3)
    assert not evaluations.may_load(0), "one is running"
    assert far.finish(entry, completed(entry.message(PromptGroup)))
    assert evaluations.may_load(0)
    Ledger(bus, run_id).announce(1, trainer=TRAINER)
    assert evaluations.may_load(1), "nothing is due"
    Ledger(bus, run_id).announce(2, trainer=TRAINER)
    assert not evaluations.may_load(2), "what was generated was of version 0"


def test_a_version_that_is_passed_over_is_neither_issued_nor_waited_for(bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    near, evaluations = child(bus, run_id, "near"), Evaluations(bus, run_id, spec)
    issued = near.conservation().issued
    evaluations.pass_over(2)
    announce(dispatcher, run_id, 2)
    assert evaluations.may_load(2)
    assert near.conservation().issued == issued
    announce(dispatcher, run_id, 4)
    assert not evaluations.may_load(4)
    assert near.conservation().issued == 2 * issued


def test_what_is_not_issued_yet_is_not_generated(bus: Bus, store: RunStore, spec: RunSpec) -> None:
    """The dispatcher was killed in between."""
    spec = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"sets": spec.evaluation.sets[:1]})})
    run_id = on_fleet(store, spec)
    near, evaluations = child(bus, run_id, "near"), Evaluations(bus, run_id, spec)
    assert near.open(spec)
    assert not evaluations.may_load(0)
    near.begin(0, count=2)
    for index in range(2):
        assert not evaluations.may_load(0)
        assert near.issue(prompt_group(index, run_id=near.run_id))
        generate(near, held=0)
    assert evaluations.may_load(0)


def test_a_group_that_was_given_up_holds_nobody_up(bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    for name in ("near", "far"):
        ledger = child(bus, run_id, name)
        for entry in bus.claim([ledger.run_id], Work.PROMPTS, "s", count=9, block_ms=None):
            assert not Evaluations(bus, run_id, spec).may_load(0)
            assert ledger.give_up(entry, Work.PROMPTS, "spent", group=entry.message(PromptGroup))
    assert Evaluations(bus, run_id, spec).may_load(0)


def test_the_question_costs_one_call_and_none_at_a_version_that_is_not_due(bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    evaluations = Evaluations(bus, run_id, spec)

    def calls(ask: Callable[[], Any]) -> int:
        def made() -> int:
            return int(bus.redis.info("stats")["total_commands_processed"])

        ask()  # registers the script
        before = made()
        ask()
        return made() - before

    idle = calls(lambda: None)
    assert calls(lambda: evaluations.may_load(1)) == idle
    assert calls(lambda: evaluations.recorded(1)) == idle
    # commands that a script makes are counted too: one for the script, and two of each set at most
    assert calls(lambda: evaluations.may_load(0)) - idle <= 5
    assert calls(lambda: evaluations.recorded(0)) - idle <= 5


# -- records ----------------------------------------------------------------------------------------------------------------------------


def test_a_record_is_made_of_all_groups_when_the_last_is_scored(
    bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, collector: Collector
) -> None:
    run_id = on_fleet(store, spec)
    evaluations = Evaluations(bus, run_id, spec)
    dispatch(dispatcher, run_id)
    near, far = child(bus, run_id, "near"), child(bus, run_id, "far")
    generate(near, held=0, at_most=2)
    judge(near)
    collector.tick()
    assert records(bus, run_id) == []
    generate(near, held=0)
    judge(near, right=2)
    collector.tick()
    assert not evaluations.recorded(0), "the other set is not"
    generate(far, held=0)
    judge(far, right=3)
    collector.tick()
    collector.tick()
    found = {record.name: record for record in records(bus, run_id)}
    assert len(records(bus, run_id)) == 2
    assert evaluations.recorded(0)
    assert evaluations.recorded(1), "nothing is due"
    assert not evaluations.recorded(2)
    near_record = found["near"]
    assert (near_record.version, near_record.domain, near_record.prompts, near_record.samples, near_record.max_tokens) == (0, "in", 3, 2, 8)
    assert near_record.values["correct_mean"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    far_record = found["far"]
    assert (far_record.domain, far_record.prompts, far_record.temperature, far_record.top_p, far_record.max_tokens) == ("out", 2, 0.6, 0.9, 16)
    assert far_record.values["reward_mean"] == 0.75
    assert far_record.values["length_mean"] == 2, "the end of the sequence is no part of an answer"
    assert far_record.values["entropy_estimate_nats"] == pytest.approx((0.5 + 1.0 + 1.5) / 3), "but it was sampled"
    for ledger, issued in ((near, 3), (far, 2)):
        counts = ledger.conservation()
        assert (counts.issued, counts.consumed, counts.outstanding, counts.holds) == (issued, issued, 0, True)
        assert bus.range(ledger.run_id, Work.SCORED) == []
    assert {"evaluation_failed", "evaluation_incomplete", "conservation_broken"}.isdisjoint(told(bus, run_id))


def shown(gauge: Latest) -> dict[tuple[str, ...], float]:
    return {tuple(sample.labels.values()): sample.value for family in gauge.collect() for sample in family.samples}


def test_the_last_evaluation_is_shown_until_the_run_leaves_the_fleet(
    bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, scheduler: Scheduler, collector: Collector, metrics: ControlPlaneMetrics
) -> None:
    spec = spec.model_copy(update={"labels": {"study": "paper", "arm": "N1", "word": "x"}})
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    for name in ("near", "far"):
        generate(child(bus, run_id, name), held=0)
        judge(child(bus, run_id, name), right=2)
    collector.tick()
    scheduler.tick()
    assert shown(metrics.info) == {(run_id, spec.name, "paper", "N1", str(spec.seed)): 1.0}
    assert shown(metrics.evaluation_version) == {(run_id, "near"): 0.0, (run_id, "far"): 0.0}
    values = {record.name: record.values for record in records(bus, run_id)}
    domains = {"near": "in", "far": "out"}
    expected = {(run_id, name, domains[name], key): value for name, own in values.items() for key, value in own.items()}
    assert shown(metrics.evaluation) == pytest.approx(expected, nan_ok=True)
    assert expected[run_id, "near", "in", "correct_mean"] == 1.0
    assert expected[run_id, "far", "out", "correct_mean"] == 0.5
    store.lifecycle(run_id).move(Action.CANCEL)
    scheduler.tick()
    assert shown(metrics.info) == shown(metrics.evaluation_version) == shown(metrics.evaluation) == {}


def test_records_are_made_in_the_order_of_versions(bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, collector: Collector) -> None:
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    near = child(bus, run_id, "near")
    generate(near, held=0)
    announce(dispatcher, run_id, 2)
    generate(near, held=2)
    late, *rest = bus.claim([near.run_id], Work.COMPLETIONS, "r", count=100, block_ms=None)
    for entry in rest:
        assert near.score(entry, scored(entry.message(CompletionGroup)))
    collector.tick()
    assert records(bus, run_id) == []
    assert near.score(late, scored(late.message(CompletionGroup)))
    collector.tick()
    assert [record.version for record in records(bus, run_id)] == [0, 2]


@pytest.mark.parametrize("after", [False, True])
def test_a_control_plane_that_is_killed_while_it_records_neither_loses_nor_doubles_a_record(
    bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, collector: Collector, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    near = child(bus, run_id, "near")
    generate(near, held=0)
    judge(near)
    record = EvaluationLedger.record

    class Killed(BaseException):
        pass

    def killed(*args: Any) -> bool:
        if after:
            record(*args)
        raise Killed

    monkeypatch.setattr(EvaluationLedger, "record", killed)
    with pytest.raises(Killed):
        collector.tick()
    monkeypatch.setattr(EvaluationLedger, "record", record)
    Collector(RunStore(bus), ControlPlaneMetrics(CollectorRegistry())).tick()
    assert [r.version for r in records(bus, run_id)] == [0]
    counts = near.conservation()
    assert (counts.consumed, counts.holds) == (3, True)
    assert bus.range(near.run_id, Work.SCORED) == []


def test_a_record_whose_reply_is_lost_is_made_once(redis_url: str, store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    near = child(store.bus, run_id, "near")
    generate(near, held=0)
    judge(near)
    lossy = child(LossyBus(redis_url, patience=5.0), run_id, "near")
    lossy.bus.lose_next = True  # type: ignore[attr-defined]
    entries = store.bus.range(near.run_id, Work.SCORED)
    made = EvaluationRecord(
        run_id=run_id, name="near", domain="in", version=0, prompts=3, samples=2, temperature=1.0, top_p=1.0, max_tokens=8, values={}
    )
    assert near.rounds() == [Round(version=0, first=0, count=3)]
    lossy.record(Round(version=0, first=0, count=3), made, entries)
    assert records(store.bus, run_id) == [made]
    assert near.conservation().consumed == 3


def test_what_was_given_up_is_missing_from_the_record_and_told(
    bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, collector: Collector
) -> None:
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    near, far = child(bus, run_id, "near"), child(bus, run_id, "far")
    generate(near, held=0, at_most=2)
    (entry,) = bus.claim([near.run_id], Work.PROMPTS, "s", count=1, block_ms=None)
    near.give_up(entry, Work.PROMPTS, "tried too often", group=entry.message(PromptGroup))
    judge(near)
    for entry in bus.claim([far.run_id], Work.PROMPTS, "s", count=9, block_ms=None):
        far.give_up(entry, Work.PROMPTS, "no memory", group=entry.message(PromptGroup))
    collector.tick()
    found = {record.name: record for record in records(bus, run_id)}
    assert (found["near"].prompts, found["near"].values["correct_mean"]) == (2, 0.5)
    assert (found["far"].prompts, found["far"].values) == (0, {})
    assert Evaluations(bus, run_id, spec).recorded(0)
    texts = [event.text for entry in bus.range(run_id, Log.EVENTS) if (event := entry.message(RunEvent)).event == "evaluation_incomplete"]
    assert sorted(texts) == [
        "The evaluation of version 0 on far lacks 2 of its prompts: no memory",
        "The evaluation of version 0 on near lacks 1 of its prompts: tried too often",
    ]
    assert (near.conservation().dead, near.conservation().holds, far.conservation().dead, far.conservation().holds) == (1, True, 2, True)


def test_an_entry_that_cannot_be_read_is_dead_lettered_and_the_rest_recorded(
    bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, collector: Collector
) -> None:
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    near = child(bus, run_id, "near")
    generate(near, held=0)
    judge(near)
    stream = near.keys.stream(Work.SCORED)
    bus.redis.xdel(stream, bus.range(near.run_id, Work.SCORED)[1].id)
    bus.redis.xadd(stream, {"index": "1", "data": b"garbage"})
    bus.redis.xadd(stream, {"data": b"of no group"})
    collector.tick()
    (record,) = records(bus, run_id)
    assert record.prompts == 2
    letters = [entry.message(DeadLetter) for entry in bus.range(near.run_id, Log.DEAD)]
    assert len(letters) == 2
    counts = near.conservation()
    assert (counts.consumed, counts.dead, counts.outstanding, counts.holds) == (2, 1, 0, True)
    assert bus.range(near.run_id, Work.SCORED) == []


def test_tokens_of_another_version_are_no_evaluation(bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, collector: Collector) -> None:
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    near = child(bus, run_id, "near")
    generate(near, held=0, at_most=1)
    generate(near, held=0, version=1)
    judge(near)
    collector.tick()
    (record,) = records(bus, run_id)
    assert record.values == {}
    event = told(bus, run_id)["evaluation_failed"]
    assert (event.severity, event.version) == ("error", 0)
    assert "tokens of the versions [0, 1]" in event.text


# -- the run's life ---------------------------------------------------------------------------------------------------------------------


def test_evaluations_end_with_their_run(bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, scheduler: Scheduler) -> None:
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    near, far = child(bus, run_id, "near"), child(bus, run_id, "far")
    generate(near, held=0, at_most=1)
    store.lifecycle(run_id).move(Action.CANCEL)
    scheduler.tick()
    assert store.active() == set()
    for ledger, issued in ((near, 3), (far, 2)):
        counts = ledger.conservation()
        assert (counts.issued, counts.cancelled, counts.outstanding, counts.holds) == (issued, issued, 0, True)
        assert not any(bus.redis.exists(ledger.keys.stream(topic)) for topic in Work)
    assert not near.open(spec), "nothing is begun that nobody would end"
    near.begin(2, count=3)
    assert near.rounds() == []
    assert not near.issue(prompt_group(3, run_id=near.run_id))
    assert not bus.redis.sismember(ACTIVE, near.run_id)
    assert not bus.redis.exists(near.keys.stream(Work.PROMPTS))


def test_a_paused_run_s_evaluation_goes_on_when_it_is_resumed(
    bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, scheduler: Scheduler, collector: Collector, stubs: Stubs
) -> None:
    stubs.beat("t2", Role.TRAINER)
    stubs.beat("s", Role.ROLLOUT)
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    near = child(bus, run_id, "near")
    generate(near, held=0, at_most=1)
    store.lifecycle(run_id).move(Action.PAUSE)
    dispatcher.tick()
    scheduler.tick()
    judge(near)
    collector.tick()
    assert {row.index: row.place for row in near.rows()} == {0: Place.SCORED, 1: Place.QUEUED, 2: Place.QUEUED}
    store.lifecycle(run_id).move(Action.RESUME)
    scheduler.tick()
    assert store.get(run_id).trainer == "t2"
    Ledger(bus, run_id).announce(0, trainer="t2")
    dispatch(dispatcher, run_id)
    generate(near, held=0)
    judge(near)
    collector.tick()
    assert [(record.version, record.prompts) for record in records(bus, run_id)] == [(0, 3)]
    assert near.conservation().issued == 3


# -- the servers ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "CLAIM_MS", 20)
    monkeypatch.setattr(worker_module, "TOUCH_SECONDS", 0.05)
    monkeypatch.setattr(worker_module, "RECLAIM_MS", 60_000)
    monkeypatch.setattr(worker_module, "DRAIN_SECONDS", 0.2)


class Watched(ScriptedEngine):
    """Remembers in which order groups were begun."""

    def __init__(self, *, token_seconds: float = 0.0) -> None:
        super().__init__(token_seconds=token_seconds)
        self.begun: list[str] = []

    async def sample(self, request: SamplingRequest) -> Sampled:
        group_id = request.request_id.rsplit(":", 2)[0]  # of GROUP:ATTEMPT:SAMPLE
        if group_id not in self.begun:
            self.begun.append(group_id)
        return await super().sample(request)


def weights(run_id: str, version: int) -> LoadWeights:
    return LoadWeights(run_id=run_id, version=version, transport="shm", kv_policy=KvPolicy.RECOMPUTE)


def keep(bus: Bus, run_id: str, version: int) -> None:
    """The copy from which a server loads by itself."""
    bus.redis.set(RunKeys(run_id).weights, encode(weights(run_id, version)))


@contextlib.asynccontextmanager
async def serving(
    bus: Bus, run_id: str, spec: RunSpec, *, name: str = "s", engine: Watched | None = None, max_sequences: int = 8
) -> AsyncIterator[RolloutWorker]:
    engine = engine or Watched()
    await engine.start()
    worker = RolloutWorker(
        bus, run_id, spec, engine=engine, tokenizer=PromptTokenizer(spec.model.path), member=name, max_sequences=max_sequences,
        metrics=RolloutMetrics(CollectorRegistry()), idle=IdleClock(),
    )  # fmt: skip
    task = asyncio.create_task(worker.serve())
    try:
        yield worker
    finally:
        worker.stop()
        await asyncio.wait_for(task, 10)


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not await asyncio.to_thread(holds):
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("_fast")
def test_prompts_of_evaluations_go_before_those_of_training(bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    keep(bus, run_id, 0)
    engine = Watched(token_seconds=0.001)

    async def body() -> None:
        async with serving(bus, run_id, spec, engine=engine, max_sequences=4):
            await until(lambda: Ledger(bus, run_id).conservation().generated == 8)

    asyncio.run(body())
    runs = [group_id.rpartition(":")[0] for group_id in engine.begun]
    assert runs[5:] == [run_id] * 8
    assert sorted(runs[:5]) == [f"{run_id}~far"] * 2 + [f"{run_id}~near"] * 3
    assert Evaluations(bus, run_id, spec).may_load(0)
    for entry in bus.range(f"{run_id}~far", Work.COMPLETIONS):
        done = entry.message(CompletionGroup)
        assert (done.group.run_id, done.start_version, done.newest_version, len(done.completions)) == (f"{run_id}~far", 0, 0, 4)


@pytest.mark.usefixtures("_fast")
def test_the_evaluation_of_a_dead_server_is_taken_over_by_one_that_is_busy(
    bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "RECLAIM_MS", 200)
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    keep(bus, run_id, 0)
    near, far = child(bus, run_id, "near"), child(bus, run_id, "far")
    for ledger, many in ((near, 3), (far, 2)):
        assert len(bus.claim([ledger.run_id], Work.PROMPTS, "dead", count=9, block_ms=None)) == many
        ledger.start(0, held=0, max_attempts=3)
    engine = Watched()
    engine.held = True  # no group of training ever ends

    async def body() -> None:
        async with serving(bus, run_id, spec, engine=engine, max_sequences=2):
            await until(lambda: {group_id.rpartition(":")[0] for group_id in engine.begun} == {run_id, near.run_id, far.run_id})
            engine.held = False
            await until(lambda: Evaluations(bus, run_id, spec).may_load(0))

    asyncio.run(body())
    attempts = [entry.message(CompletionGroup).attempt for entry in bus.range(near.run_id, Work.COMPLETIONS)]
    assert sorted(attempts) == [1, 1, 2]


@pytest.mark.usefixtures("_fast")
def test_entries_of_one_id_on_two_streams_are_two_groups(bus: Bus, store: RunStore, spec: RunSpec) -> None:
    run_id = on_fleet(store, spec)
    keep(bus, run_id, 0)
    near, ledger = child(bus, run_id, "near"), Ledger(bus, run_id)
    assert near.open(spec)
    near.begin(0, count=1)
    for each in (near, ledger):  # as `issue` does, at the same millisecond
        group = prompt_group(0, run_id=each.run_id, max_tokens=8)
        bus.redis.hset(each.keys.ledger, "0", "q:-1:0:2")
        bus.redis.hset(each.keys.info, "issued", 1)
        bus.redis.xadd(each.keys.stream(Work.PROMPTS), {"index": 0, "data": encode(group)}, id="7-0")

    async def body() -> None:
        async with serving(bus, run_id, spec):
            await until(lambda: near.conservation().generated + ledger.conservation().generated == 2)

    asyncio.run(body())
    for each in (near, ledger):
        (entry,) = bus.range(each.run_id, Work.COMPLETIONS)
        assert entry.message(CompletionGroup).group.run_id == each.run_id


@pytest.mark.usefixtures("_fast")
def test_a_version_that_has_passed_can_no_longer_be_evaluated(bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    """As when a trainer does not wait for the evaluation."""
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    Ledger(bus, run_id).announce(1, trainer=TRAINER)
    keep(bus, run_id, 1)
    near = child(bus, run_id, "near")

    async def body() -> None:
        async with serving(bus, run_id, spec) as worker:
            await until(lambda: near.conservation().dead == 3)
            assert worker.version == 1

    asyncio.run(body())
    letters = [entry.message(DeadLetter) for entry in bus.range(near.run_id, Log.DEAD)]
    assert {letter.reason for letter in letters} == {"version 0, which it was to evaluate, has passed: version 1 is held"}
    assert near.conservation().holds


@pytest.mark.usefixtures("_fast")
def test_a_run_is_evaluated_from_its_first_version_to_its_last(
    redis_url: str, bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher, collector: Collector
) -> None:
    """The trainer of this test trains nothing: it publishes as fast as it may, to two servers, and ends when the last evaluation is recorded."""
    run_id = on_fleet(store, spec, version=None)
    keep(bus, run_id, 0)
    evaluations, ledger, stop = Evaluations(bus, run_id, spec), Ledger(bus, run_id), threading.Event()
    sets = [child(Bus(redis_url), run_id, name) for name in ("near", "far")]

    def background() -> None:
        while not stop.is_set():
            for one in sets:
                judge(one)
            collector.tick()
            dispatcher.tick()

    async def body() -> None:
        engines = [Watched(token_seconds=0.001) for _ in range(2)]
        async with (
            serving(Bus(redis_url), run_id, spec, name="a", engine=engines[0], max_sequences=2) as a,
            serving(Bus(redis_url), run_id, spec, name="b", engine=engines[1], max_sequences=2) as b,
        ):
            await until(lambda: a.version == b.version == 0)
            ledger.announce(0, trainer=TRAINER)
            for version in range(spec.versions):
                await until(partial(evaluations.may_load, version))
                keep(bus, run_id, version + 1)
                ledger.loading(version + 1, trainer=TRAINER)
                for worker in (a, b):
                    await worker.load(weights(run_id, version + 1))
                ledger.announce(version + 1, trainer=TRAINER)
            await until(lambda: evaluations.recorded(spec.versions))

    thread = threading.Thread(target=background)
    thread.start()
    try:
        asyncio.run(asyncio.wait_for(body(), 30))
    finally:
        stop.set()
        thread.join()
    found = [(record.name, record.version, record.prompts) for record in records(bus, run_id)]
    assert sorted(found) == sorted([("near", v, 3) for v in (0, 2, 4, 6)] + [("far", v, 2) for v in (0, 2, 4, 6)])
    assert all(record.values for record in records(bus, run_id)), "every token was of the version evaluated"
    assert "evaluation_failed" not in told(bus, run_id)
    for one in sets:
        assert (one.conservation().holds, one.conservation().outstanding) == (True, 0)


# -- before a run is accepted -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"data": {"source": "jsonl", "path": "/nowhere.jsonl"}}, "data", "/nowhere.jsonl is not there"),
        ({"data": {"source": "jsonlines"}}, "data", "did you mean 'jsonl'?"),
        ({"max_tokens": 124}, "data", "has 5 tokens and the limit is 4"),
        ({"max_tokens": 128}, "max_tokens", "leaves no room for a prompt in model.max_model_len (128)"),
    ],
)  # fmt: skip
def test_a_set_that_cannot_be_used_is_refused_by_its_field(api: Api, spec: RunSpec, change: dict[str, Any], field: str, said: str) -> None:
    Path(str(spec.evaluation.sets[1].data.path)).write_text(json.dumps({"prompt": "12345", "answer": 1}) + "\n")
    tree = spec.model_dump(mode="json")
    tree["evaluation"]["sets"][1] |= change
    with pytest.raises(ApiError) as refused:
        api.client.submit(tree)
    (error,) = refused.value.problem.errors
    assert error.field == f"evaluation.sets.1.{field}"
    assert said in error.problem
    assert api.client.runs().runs == []


def test_a_set_s_rubric_is_checked_and_its_fault_is_named_by_the_set(spec: RunSpec) -> None:
    asked: list[str] = []

    def knows_no_math(rewards: tuple[Verifier, ...]) -> bool:
        asked.append(rewards[0].name)
        if rewards[0].name == "math":
            raise invalid_spec([FieldProblem(field="rewards.0", problem="there is no verifier 'math'")])
        return True

    with pytest.raises(Problem) as refused:
        check(spec, check_rewards=knows_no_math)
    assert asked == ["sum_to_target", "math"]
    assert [error.field for error in refused.value.document.errors] == ["evaluation.sets.1.rewards.0"]
    assert not check(spec, check_rewards=lambda rewards: rewards[0].name != "math").rewards_checked, "of the set's nobody could be asked"
    assert check(spec, check_rewards=lambda _: True).rewards_checked


# -- the API ----------------------------------------------------------------------------------------------------------------------------


def test_the_api_shows_evaluations_by_version_and_set(api: Api, bus: Bus, store: RunStore, spec: RunSpec) -> None:
    run_id = on_fleet(store, spec)
    for version, name, value in ((0, "far", 0.25), (0, "near", 0.5), (2, "near", float("nan"))):
        values = {"reward_mean": value}
        record = EvaluationRecord(
            run_id=run_id, name=name, domain="in", version=version, prompts=3, samples=2, temperature=1.0, top_p=1.0, max_tokens=8, values=values
        )
        bus.append(run_id, Log.EVALUATIONS, record)
    found = api.client.evaluations(run_id).evaluations
    assert [(one.version, one.name, one.values["reward_mean"]) for one in found] == [(0, "near", 0.5), (0, "far", 0.25), (2, "near", None)]
    assert [one.version for one in api.client.evaluations(run_id, first=1).evaluations] == [2]
    assert [one.name for one in api.client.evaluations(run_id, last=1, name="far").evaluations] == ["far"]
    with pytest.raises(ApiError, match="Unknown run"):
        api.client.evaluations("nobody")


def test_what_an_evaluation_gave_up_is_among_its_run_s_dead_letters(
    api: Api, bus: Bus, store: RunStore, spec: RunSpec, dispatcher: Dispatcher
) -> None:
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    far = child(bus, run_id, "far")
    (entry,) = bus.claim([far.run_id], Work.PROMPTS, "s", count=1, block_ms=None)
    far.give_up(entry, Work.PROMPTS, "tried too often", group=entry.message(PromptGroup))
    for letters in (api.client.dead_letters(run_id).letters, api.client.dead_letters().letters):
        (letter,) = letters
        assert (letter.run_id, letter.evaluation, letter.reason) == (run_id, "far", "tried too often")
        assert not letter.replayable, "its evaluation is over"
        with pytest.raises(ApiError, match="No such dead letter"):
            api.client.replay(run_id, letter.id)


def test_an_evaluation_set_is_no_run_to_the_api(api: Api, store: RunStore, spec: RunSpec, dispatcher: Dispatcher) -> None:
    run_id = on_fleet(store, spec)
    dispatch(dispatcher, run_id)
    assert [run.run_id for run in api.client.runs().runs] == [run_id]
    with pytest.raises(ApiError, match="Unknown run"):
        api.client.cancel(f"{run_id}~near")
