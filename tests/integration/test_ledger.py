"""The ledger on real servers: every move happens once, however often it is made and by how many, and every group is accounted for at all times."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from services.contracts.messages import CompletionGroup, DeadLetter, PromptGroup, Sample, ScoredGroup, StepRecord, VersionPublished
from services.contracts.spec import KnobChange, RunSpec
from services.contracts.topics import Log, Work
from services.runtime.bus import Bus, Entry
from services.runtime.codec import Undecodable
from services.runtime.ledger import PLACES, Conservation, Ledger, NotOurs, Place, Plan, Row, StartRefused
from tests.integration.conftest import OwnRedis
from tests.integration.real_store import KINDS, TRAINER, LossyBus, open_run, started
from tests.unit.sample_messages import completed, prompt_group, scored, step_record


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRedis]:
    with started(request.param, tmp_path_factory.mktemp("redis")) as own:
        yield own


@pytest.fixture
def bus(server: OwnRedis) -> Iterator[Bus]:
    bus = Bus(server.url, patience=5.0)
    bus.redis.flushall()
    yield bus
    bus.close()


@pytest.fixture
def ledger(bus: Bus) -> Ledger:
    ledger = open_run(bus)
    ledger.announce(0, trainer=TRAINER)
    return ledger


def entry_of(ledger: Ledger, topic: Work, index: int) -> Entry:
    (entry,) = [entry for entry in ledger.bus.range(ledger.run_id, topic) if entry.index == index]
    return entry


def issue(ledger: Ledger, count: int = 1) -> None:
    issued = ledger.conservation().issued
    for index in range(issued, issued + count):
        assert ledger.issue(prompt_group(index))


def generate(ledger: Ledger, index: int, *, held: int = 0) -> CompletionGroup:
    """The group's completions, on the stream."""
    entry, attempt = entry_of(ledger, Work.PROMPTS, index), ledger.start(index, held=held, max_attempts=5)
    assert isinstance(attempt, int)
    done = completed(entry.message(PromptGroup), versions=(held,) * 3, attempt=attempt)
    assert ledger.finish(entry, done)
    return done


def reward(ledger: Ledger, index: int) -> ScoredGroup:
    """The group's rewards, on the stream."""
    entry = entry_of(ledger, Work.COMPLETIONS, index)
    result = scored(entry.message(CompletionGroup))
    assert ledger.score(entry, result)
    return result


def ready(ledger: Ledger, count: int) -> Plan:
    """`count` groups, scored, as a batch."""
    first = ledger.conservation().issued
    issue(ledger, count)
    for index in range(first, first + count):
        generate(ledger, index)
        reward(ledger, index)
    return Plan(tuple(range(first, first + count)), tuple(entry_of(ledger, Work.SCORED, i).id for i in range(first, first + count)))


def commit(ledger: Ledger, version: int, plan: Plan, *, trainer: str = TRAINER, samples: list[Sample] | None = None, keep: int = 10) -> None:
    ledger.commit(plan, step_record(version, plan.indices), samples or [], trainer=trainer, keep_samples=keep)


def places(ledger: Ledger) -> dict[int, Place]:
    return {row.index: row.place for row in ledger.rows()}


# -- the life of a group --------------------------------------------------------------------------------------------------------------


def test_a_group_goes_its_way_and_is_accounted_for_at_every_step(ledger: Ledger) -> None:
    def counted() -> dict[str, int]:
        counts = ledger.conservation()
        assert counts.holds
        return {name: n for name, n in vars(counts).items() if n}

    issue(ledger)
    assert (counted(), ledger.rows()) == ({"issued": 1, "queued": 1}, [Row(0, Place.QUEUED, None, 0, 2)])
    entry = entry_of(ledger, Work.PROMPTS, 0)
    assert ledger.start(0, held=0, max_attempts=5) == 1
    assert (counted(), ledger.rows()) == ({"issued": 1, "running": 1}, [Row(0, Place.RUNNING, 0, 1, 2)])
    done = completed(entry.message(PromptGroup))
    assert ledger.finish(entry, done)
    assert counted() == {"issued": 1, "generated": 1}
    assert ledger.bus.range("r", Work.PROMPTS) == []
    entry = entry_of(ledger, Work.COMPLETIONS, 0)
    assert entry.message(CompletionGroup) == done
    assert ledger.score(entry, scored(done))
    assert counted() == {"issued": 1, "scored": 1}
    assert ledger.bus.range("r", Work.COMPLETIONS) == []
    entry = entry_of(ledger, Work.SCORED, 0)
    plan = Plan((0,), (entry.id,))
    ledger.plan(0, plan, trainer=TRAINER)
    assert (counted(), ledger.plans()) == ({"issued": 1, "taken": 1}, {0: plan})
    ledger.loading(1, trainer=TRAINER)
    sample = Sample(scored=scored(done), trained_version=0, advantages=(1.0, -1.0))
    commit(ledger, 0, plan, samples=[sample])
    assert (counted(), ledger.rows(), ledger.version()) == ({"issued": 1, "consumed": 1}, [], 1)
    assert [e.message(VersionPublished).version for e in ledger.bus.range("r", Log.VERSIONS)] == [0, 1]
    assert [e.message(StepRecord) for e in ledger.bus.range("r", Log.STEPS)] == [step_record(0, [0])]
    assert [e.message(Sample) for e in ledger.bus.range("r", Log.SAMPLES)] == [sample]
    assert len(ledger.bus.range("r", Work.SCORED)) == 1, "not acknowledged before a checkpoint holds what it made"
    assert ledger.checkpointed(0) == []
    assert ledger.checkpointed(1) == [entry.id]
    assert (ledger.bus.range("r", Work.SCORED), ledger.plans()) == ([], {})


def test_a_scored_group_is_skipped_once_by_its_trainer_and_never_out_of_a_batch(ledger: Ledger) -> None:
    plan = ready(ledger, 3)
    with pytest.raises(NotOurs):
        ledger.skip(1, plan.entry_ids[1], trainer="another")
    assert ledger.skip(1, plan.entry_ids[1], trainer=TRAINER)
    assert not ledger.skip(1, plan.entry_ids[1], trainer=TRAINER), "it is gone"
    counts = ledger.conservation()
    assert (counts.issued, counts.skipped, counts.scored, counts.holds) == (3, 1, 2, True)
    assert [entry.index for entry in ledger.bus.range("r", Work.SCORED)] == [0, 2]
    ledger.plan(0, Plan((0,), plan.entry_ids[:1]), trainer=TRAINER)
    assert not ledger.skip(0, plan.entry_ids[0], trainer=TRAINER), "it is in a batch"
    assert ledger.conservation().taken == 1
    issue(ledger)
    assert ledger.conservation().issued == 4, "another one takes its place"


def test_groups_are_issued_in_order_and_once(ledger: Ledger) -> None:
    assert not ledger.issue(prompt_group(1))
    issue(ledger, 2)
    assert not ledger.issue(prompt_group(1))
    assert [entry.index for entry in ledger.bus.range("r", Work.PROMPTS)] == [0, 1]
    assert ledger.conservation().issued == 2


@pytest.mark.parametrize("state", ["completed", "cancelled"])
def test_nothing_is_issued_for_a_run_that_has_ended(ledger: Ledger, state: str) -> None:
    issue(ledger)
    ledger.give_up(entry_of(ledger, Work.PROMPTS, 0), Work.PROMPTS, "why", group=prompt_group(0))
    (letter,) = ledger.bus.range("r", Log.DEAD)
    ledger.bus.redis.hset(ledger.keys.info, "state", state)
    assert not ledger.issue(prompt_group(1))
    assert not ledger.replay(letter.id)
    ledger.bus.redis.hset(ledger.keys.info, "state", "running")
    assert ledger.replay(letter.id)
    ledger.bus.redis.hset(ledger.keys.info, "state", state)
    assert not ledger.issue_replay(max_lag=2, version=0)
    assert ledger.conservation() == Conservation(1, 0, 0, 0, 0, 0, 0, replaying=1, dead=0, cancelled=0)


# -- fencing --------------------------------------------------------------------------------------------------------------------------


def test_a_server_that_does_not_hold_the_current_version_may_start_nothing(ledger: Ledger) -> None:
    issue(ledger, 4)
    ledger.announce(3, trainer=TRAINER)
    assert ledger.start(0, held=2, max_attempts=5) is StartRefused.STALE
    assert ledger.start(0, held=4, max_attempts=5) is StartRefused.STALE
    assert ledger.start(0, held=3, max_attempts=5) == 1
    ledger.loading(4, trainer=TRAINER)  # some servers hold it already, others do not yet
    assert ledger.start(1, held=3, max_attempts=5) == 1
    assert ledger.start(2, held=4, max_attempts=5) == 1
    assert [row.start for row in ledger.rows()] == [3, 3, 4, None]
    ledger.announce(4, trainer=TRAINER)
    assert ledger.start(3, held=3, max_attempts=5) is StartRefused.STALE
    assert ledger.rows()[3] == Row(3, Place.QUEUED, None, 0, 2), "a refusal costs no attempt"


def test_only_the_newest_attempt_counts(ledger: Ledger) -> None:
    issue(ledger)
    entry = entry_of(ledger, Work.PROMPTS, 0)
    slow, fast = (ledger.start(0, held=0, max_attempts=5) for _ in range(2))
    assert (slow, fast) == (1, 2)
    assert not ledger.finish(entry, completed(prompt_group(0), attempt=1))
    assert places(ledger) == {0: Place.RUNNING}
    assert ledger.finish(entry, completed(prompt_group(0), attempt=2, server="fast"))
    assert not ledger.finish(entry, completed(prompt_group(0), attempt=1))
    assert ledger.start(0, held=0, max_attempts=5) is StartRefused.DONE
    assert [e.message(CompletionGroup).server for e in ledger.bus.range("r", Work.COMPLETIONS)] == ["fast"]
    entry = entry_of(ledger, Work.COMPLETIONS, 0)
    assert not ledger.score(entry, scored(completed(prompt_group(0), attempt=1)))
    assert ledger.score(entry, scored(completed(prompt_group(0), attempt=2)))
    assert int(ledger.bus.redis.hget(ledger.keys.info, "superseded")) == 3


def test_attempts_are_bounded_and_a_group_that_is_gone_is_forgotten(ledger: Ledger) -> None:
    issue(ledger)
    assert [ledger.start(0, held=0, max_attempts=2) for _ in range(3)] == [1, 2, StartRefused.SPENT]
    entry = entry_of(ledger, Work.PROMPTS, 0)
    assert ledger.give_up(entry, Work.PROMPTS, "spent", group=prompt_group(0))
    assert ledger.start(0, held=0, max_attempts=2) is StartRefused.GONE
    assert not ledger.finish(entry, completed(prompt_group(0), attempt=2))
    assert ledger.conservation().dead == 1


def test_another_trainer_takes_over_and_the_one_before_can_do_nothing(ledger: Ledger) -> None:
    plan = ready(ledger, 2)
    ledger.plan(0, plan, trainer=TRAINER)
    ledger.bus.redis.hset(ledger.keys.info, "trainer", "trainer-1")
    before = ledger.conservation()
    for late in (
        lambda: ledger.announce(7, trainer=TRAINER),
        lambda: ledger.plan(0, Plan((0,), ("1-1",)), trainer=TRAINER),
        lambda: ledger.loading(1, trainer=TRAINER),
        lambda: commit(ledger, 0, plan),
    ):
        with pytest.raises(NotOurs, match="run r is no longer this trainer's"):
            late()
    assert (ledger.conservation(), ledger.version(), ledger.plans()) == (before, 0, {0: plan})
    assert ledger.bus.redis.hget(ledger.keys.info, "loading") is None
    commit(ledger, 0, plan, trainer="trainer-1")
    assert ledger.conservation().consumed == 2


def test_a_commit_of_another_version_than_the_next_is_refused(ledger: Ledger) -> None:
    plan = ready(ledger, 1)
    for version in (1, 5):
        with pytest.raises(NotOurs):
            commit(ledger, version, plan)
    assert (ledger.version(), ledger.conservation().scored) == (0, 1)


def test_a_group_that_was_started_under_a_version_which_was_never_announced_is_as_old_as_the_announced_one(ledger: Ledger) -> None:
    """The trainer died between the load and the commit. Its successor publishes the version before again, and the group goes on under that."""
    issue(ledger, 3)
    assert ledger.start(0, held=0, max_attempts=5) == 1
    ledger.loading(1, trainer=TRAINER)
    assert ledger.start(1, held=1, max_attempts=5) == 1
    assert ledger.start(2, held=1, max_attempts=5) == 1
    entry = entry_of(ledger, Work.PROMPTS, 2)
    ledger.finish(entry, completed(prompt_group(2), versions=(1, 0, 0)))  # between the load of version 0 and its announcement
    ledger.announce(0, trainer=TRAINER)
    assert [(row.index, row.place, row.start) for row in ledger.rows()] == [
        (0, Place.RUNNING, 0), (1, Place.RUNNING, 0), (2, Place.GENERATED, 0)
    ]  # fmt: skip
    assert ledger.start(1, held=1, max_attempts=5) is StartRefused.STALE


# -- dead letters ---------------------------------------------------------------------------------------------------------------------


def test_a_dead_letter_tells_what_it_was_and_can_be_replayed(ledger: Ledger) -> None:
    issue(ledger, 2)
    generate(ledger, 0)
    group = prompt_group(0)
    assert ledger.give_up(entry_of(ledger, Work.COMPLETIONS, 0), Work.COMPLETIONS, "x" * 9000, group=group)
    (row,) = ledger.bus.range("r", Log.DEAD)
    letter = row.message(DeadLetter)
    assert (letter.stream, letter.group, letter.raw, letter.reason) == ("completions", group, b"", "x" * 2000)
    assert ledger.conservation() == Conservation(2, 0, queued=1, running=0, generated=0, scored=0, taken=0, replaying=0, dead=1, cancelled=0)
    assert ledger.replay(row.id)
    assert ledger.bus.range("r", Log.DEAD) == []
    assert ledger.conservation().replaying == 1
    assert ledger.issue_replay(max_lag=7, version=4)
    assert ledger.rows()[0] == Row(0, Place.QUEUED, None, 0, 7)
    again = entry_of(ledger, Work.PROMPTS, 0).message(PromptGroup)
    assert again == group.model_copy(update={"max_lag": 7, "issued_version": 4})
    assert not ledger.issue_replay(max_lag=7, version=4)
    assert ledger.conservation() == Conservation(2, 0, queued=2, running=0, generated=0, scored=0, taken=0, replaying=0, dead=0, cancelled=0)


def test_what_was_never_a_group_is_not_counted_as_one(ledger: Ledger) -> None:
    for fields in ({"data": b"\xff" * 10_000}, {"index": 77, "data": b"x"}, {"other": b"x"}):
        ledger.bus.redis.xadd(ledger.keys.stream(Work.SCORED), fields)
    for entry in ledger.bus.range("r", Work.SCORED):
        assert ledger.give_up(entry, Work.SCORED, "garbage", group=None)
    raws = [row.message(DeadLetter).raw for row in ledger.bus.range("r", Log.DEAD)]
    assert raws == [b"\xff" * 4096, b"x", b""]
    assert ledger.conservation() == Conservation(0, 0, 0, 0, 0, 0, 0, replaying=0, dead=0, cancelled=0)
    assert int(ledger.bus.redis.hget(ledger.keys.info, "unreadable")) == 3
    (first, *_) = ledger.bus.range("r", Log.DEAD)
    assert not ledger.replay(first.id), "there is no group to be replayed"
    assert not ledger.replay("0-1")


@pytest.mark.parametrize("stream", [Work.PROMPTS, Work.COMPLETIONS, Work.SCORED])
def test_garbage_with_the_number_of_a_group_that_is_elsewhere_does_not_touch_it(ledger: Ledger, stream: Work) -> None:
    plan = ready(ledger, 1)
    ledger.plan(0, plan, trainer=TRAINER)
    ledger.bus.redis.xadd(ledger.keys.stream(stream), {"index": 0, "data": b"junk"})
    garbage = [entry for entry in ledger.bus.range("r", stream) if entry.fields[b"data"] == b"junk"]
    assert ledger.give_up(garbage[0], stream, "garbage", group=None)
    assert places(ledger) == {0: Place.TAKEN}
    commit(ledger, 0, plan)
    counts = ledger.conservation()
    assert (counts.issued, counts.consumed, counts.dead, counts.holds) == (1, 1, 0, True)


def test_a_run_that_ends_cancels_what_is_left(ledger: Ledger) -> None:
    plan = ready(ledger, 2)
    commit(ledger, 0, plan)
    issue(ledger, 3)
    for index in (2, 3):
        ledger.give_up(entry_of(ledger, Work.PROMPTS, index), Work.PROMPTS, "why", group=prompt_group(index))
    assert ledger.replay(ledger.bus.range("r", Log.DEAD)[0].id)
    ledger.close()
    expected = Conservation(5, consumed=2, queued=0, running=0, generated=0, scored=0, taken=0, replaying=0, dead=1, cancelled=2)
    assert ledger.conservation() == expected
    ledger.close()
    assert ledger.conservation() == expected
    assert [ledger.bus.redis.exists(ledger.keys.stream(topic)) for topic in Work] == [0, 0, 0]
    assert len(ledger.bus.range("r", Log.STEPS)) == 1, "what people look at is kept"


# -- knobs ----------------------------------------------------------------------------------------------------------------------------


def test_a_knob_holds_from_the_version_after_the_announced_one(ledger: Ledger, bus: Bus) -> None:
    fresh = open_run(bus, "s")
    assert fresh.turn({"temperature": 0.5}, expected=0) == 0, "no version yet: from the first on"
    assert ledger.turn({"temperature": 0.5}, expected=0) == 1
    ledger.announce(6, trainer=TRAINER)
    assert ledger.turn({"clip.low": 0.1, "kv_policy": "keep"}, expected=1) == 7
    assert ledger.turn({"clip.low": 0.3}, expected=1) is None, "another change came first: it must be looked at"
    assert ledger.knobs() == [
        KnobChange(version=1, values={"temperature": 0.5}), KnobChange(version=7, values={"clip.low": 0.1, "kv_policy": "keep"})
    ]  # fmt: skip


def test_the_spec_is_the_one_that_was_submitted(ledger: Ledger, bus: Bus) -> None:
    assert open_run(bus, "s", RunSpec(seed=9)).spec() == RunSpec(seed=9)
    with pytest.raises(NotOurs, match="run nobody is not known"):
        Ledger(bus, "nobody").spec()


# -- together -------------------------------------------------------------------------------------------------------------------------


@dataclass
class Race:
    """One move, and how it is told whether it was made."""

    make: Callable[[Ledger], Any]
    made: Callable[[Any], bool] = bool


def once(result: Any) -> bool:
    return result is not None


RACES = {
    "issue": lambda ledger: Race(lambda mine: mine.issue(prompt_group(1))),
    "finish": lambda ledger: Race(_finishing(ledger)),
    "score": lambda ledger: Race(_scoring(ledger)),
    "give up": lambda ledger: Race(_giving_up(ledger)),
    "replay": lambda ledger: Race(_replaying(ledger)),
    "issue a replay": lambda ledger: Race(_issuing_a_replay(ledger)),
    "turn": lambda ledger: Race(lambda mine: mine.turn({"temperature": 0.5}, expected=0), once),
}


def _finishing(ledger: Ledger) -> Callable[[Ledger], bool]:
    entry = entry_of(ledger, Work.PROMPTS, 0)
    ledger.start(0, held=0, max_attempts=5)
    done = completed(prompt_group(0))
    return lambda mine: mine.finish(entry, done)


def _scoring(ledger: Ledger) -> Callable[[Ledger], bool]:
    result = scored(generate(ledger, 0))
    entry = entry_of(ledger, Work.COMPLETIONS, 0)
    return lambda mine: mine.score(entry, result)


def _giving_up(ledger: Ledger) -> Callable[[Ledger], bool]:
    entry = entry_of(ledger, Work.PROMPTS, 0)
    return lambda mine: mine.give_up(entry, Work.PROMPTS, "why", group=prompt_group(0))


def _replaying(ledger: Ledger) -> Callable[[Ledger], bool]:
    _giving_up(ledger)(ledger)
    (letter,) = ledger.bus.range("r", Log.DEAD)
    return lambda mine: mine.replay(letter.id)


def _issuing_a_replay(ledger: Ledger) -> Callable[[Ledger], bool]:
    _replaying(ledger)(ledger)
    return lambda mine: mine.issue_replay(max_lag=2, version=0)


@pytest.mark.parametrize("move", RACES)
def test_a_move_that_many_make_at_once_happens_once(server: OwnRedis, ledger: Ledger, move: str) -> None:
    issue(ledger)
    race = RACES[move](ledger)
    results = at_once(server, race.make)
    assert sum(race.made(result) for result in results) == 1
    assert ledger.conservation().holds
    topics = {"finish": Work.COMPLETIONS, "score": Work.SCORED, "give up": Log.DEAD, "issue": Work.PROMPTS, "issue a replay": Work.PROMPTS}
    if move in topics:
        assert len(ledger.bus.range("r", topics[move])) == (2 if move == "issue" else 1)


def at_once(server: OwnRedis, do: Callable[[Ledger], Any], *, threads: int = 6) -> list[Any]:
    barrier = threading.Barrier(threads)

    def one(_: int) -> Any:
        bus = Bus(server.url)
        bus.redis.ping()
        barrier.wait()
        try:
            return do(Ledger(bus, "r"))
        finally:
            bus.close()

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(threads)))


def test_starts_at_once_each_get_an_attempt_of_their_own(server: OwnRedis, ledger: Ledger) -> None:
    issue(ledger)
    assert sorted(at_once(server, lambda mine: mine.start(0, held=0, max_attempts=99))) == [1, 2, 3, 4, 5, 6]


def test_a_commit_that_is_made_many_times_at_once_counts_once(server: OwnRedis, ledger: Ledger) -> None:
    plan = ready(ledger, 3)
    ledger.plan(0, plan, trainer=TRAINER)
    sample = Sample(scored=scored(completed(prompt_group(0))), trained_version=0, advantages=(1.0, -1.0))
    at_once(server, lambda mine: commit(mine, 0, plan, samples=[sample]))
    counts = ledger.conservation()
    assert (counts.consumed, counts.outstanding, counts.holds, ledger.version()) == (3, 0, True, 1)
    assert [len(ledger.bus.range("r", log)) for log in (Log.STEPS, Log.SAMPLES, Log.VERSIONS)] == [1, 1, 2]


def test_no_samples_are_kept_where_none_are_wanted(ledger: Ledger) -> None:
    plan = ready(ledger, 1)
    commit(ledger, 0, plan, samples=[Sample(scored=scored(completed(prompt_group(0))), trained_version=0, advantages=(1.0, -1.0))], keep=0)
    assert ledger.bus.range("r", Log.SAMPLES) == []


# -- all of them, in any order, with replies that get lost ----------------------------------------------------------------------------


class LedgerMachine(RuleBasedStateMachine):
    """Two servers of each kind and one trainer after another. Any call may be made twice, as the bus does when a reply is lost."""

    url: str
    servers = st.sampled_from(["a", "b"])
    pick = st.integers(0, 99)
    lost = st.booleans()

    def __init__(self) -> None:
        super().__init__()
        self.bus = LossyBus(self.url, patience=5.0)
        self.bus.redis.flushall()
        self.ledger, self.trainer, self.issued = open_run(self.bus), TRAINER, 0
        self.ledger.announce(0, trainer=TRAINER)
        self.hands: dict[tuple[str, Work], list[Entry]] = {}
        """Entries that each server has been given, some of which others have by now too."""
        self.started: list[tuple[Entry, PromptGroup, int]] = []
        """Attempts that were ever begun."""

    @initialize(stages=st.lists(st.sampled_from(["queued", "running", "generated", "scored", "taken", "dead"]), min_size=2, max_size=7))
    def some_groups_are_on_their_way(self, stages: list[str]) -> None:
        issue(self.ledger, len(stages))
        self.issued, taken = len(stages), list[int]()
        for index, stage in enumerate(stages):
            match stage:
                case "running":
                    (entry,) = self.bus.claim(["r"], Work.PROMPTS, "a", count=1, block_ms=None)
                    attempt = self.ledger.start(entry.message(PromptGroup).index, held=0, max_attempts=6)
                    assert isinstance(attempt, int)
                    self.started.append((entry, entry.message(PromptGroup), attempt))
                case "dead":
                    self.ledger.give_up(entry_of(self.ledger, Work.PROMPTS, index), Work.PROMPTS, "why", group=prompt_group(index))
                case "generated" | "scored" | "taken":
                    generate(self.ledger, index)
                    if stage != "generated":
                        reward(self.ledger, index)
                    if stage == "taken":
                        taken.append(index)
        if taken:
            self.ledger.plan(0, Plan(tuple(taken), tuple(entry_of(self.ledger, Work.SCORED, i).id for i in taken)), trainer=TRAINER)

    def teardown(self) -> None:
        self.bus.lose_next = True
        self.ledger.close()
        counts = self.ledger.conservation()
        assert (counts.outstanding, counts.replaying, counts.holds) == (0, 0, True)
        assert [self.ledger.start(index, held=0, max_attempts=9) for index in range(self.issued)] == [StartRefused.GONE] * self.issued
        self.bus.close()

    def row(self, index: int) -> Row | None:
        return next((row for row in self.ledger.rows() if row.index == index), None)

    def given(self, server: str, topic: Work, pick: int) -> Entry | None:
        """One of the entries in a server's hand; it takes more when it has none."""
        hand = self.hands.setdefault((server, topic), [])
        if not hand:
            hand += self.bus.claim(["r"], topic, server, count=2, block_ms=None) or self.bus.reclaim("r", topic, server, idle_ms=0, count=2)
        return hand.pop(pick % len(hand)) if hand else None

    def bury(self, entry: Entry, topic: Work) -> bool:
        """Is it garbage? Then it goes to the dead letters."""
        try:
            entry.message(PromptGroup if topic is Work.PROMPTS else CompletionGroup if topic is Work.COMPLETIONS else ScoredGroup)
        except Undecodable as error:
            self.ledger.give_up(entry, topic, str(error), group=None)
            return True
        return False

    @rule(lost=lost)
    def issue(self, lost: bool) -> None:
        self.bus.lose_next = lost
        assert self.ledger.issue(prompt_group(self.issued)) is not lost
        self.issued += 1

    @rule(server=servers, topic=st.sampled_from([Work.PROMPTS, Work.COMPLETIONS]), lost=lost)
    def take_over_work(self, server: str, topic: Work, lost: bool) -> None:
        """What is claimed with a lost reply is in nobody's hand until it is claimed again."""
        self.bus.lose_next = lost
        self.hands.setdefault((server, topic), []).extend(self.bus.reclaim("r", topic, server, idle_ms=0, count=3))

    @rule(server=servers)
    def crash(self, server: str) -> None:
        self.hands = {key: hand for key, hand in self.hands.items() if key[0] != server}

    @rule(server=servers, pick=pick, held=st.sampled_from([0, 0, 0, -1, 1]), lost=lost)
    def start(self, server: str, pick: int, held: int, lost: bool) -> None:
        entry = self.given(server, Work.PROMPTS, pick)
        if entry is None or self.bury(entry, Work.PROMPTS):
            return
        group, before = entry.message(PromptGroup), self.row(entry.message(PromptGroup).index)
        self.bus.lose_next = lost
        attempt = self.ledger.start(group.index, held=(self.ledger.version() or 0) + held, max_attempts=6)
        self.bus.lose_next = False
        after = self.row(group.index)
        match attempt:
            case StartRefused.GONE:
                assert before is None
                self.bus.acknowledge("r", Work.PROMPTS, [entry.id])
            case StartRefused.DONE:
                assert before is not None
                assert before.place in (Place.GENERATED, Place.SCORED, Place.TAKEN)
                self.bus.acknowledge("r", Work.PROMPTS, [entry.id])
            case StartRefused.STALE:
                assert held != 0
                assert after == before
                self.bus.hand_back("r", Work.PROMPTS, server, [entry.id])
            case StartRefused.SPENT:
                assert before is not None
                assert before.attempt >= 5
                self.ledger.give_up(entry, Work.PROMPTS, "spent", group=group)
            case _:
                assert before is not None
                assert after is not None
                assert (after.place, after.attempt) == (Place.RUNNING, attempt)
                assert attempt > before.attempt
                self.started.append((entry, group, attempt))

    @precondition(lambda self: self.started)
    @rule(pick=pick, lost=lost, keep=st.booleans())
    def finish(self, pick: int, lost: bool, keep: bool) -> None:
        entry, group, attempt = self.started[-1 - pick % len(self.started)]
        if not keep:
            self.started.remove((entry, group, attempt))
        before = self.row(group.index)
        newest = before is not None and (before.place, before.attempt) == (Place.RUNNING, attempt)
        self.bus.lose_next = lost
        assert self.ledger.finish(entry, completed(group, attempt=attempt)) is (newest and not lost)
        after = self.row(group.index)
        assert after == before or (newest and after is not None and after.place is Place.GENERATED)

    @precondition(lambda self: self.started)
    @rule(pick=pick, lost=lost)
    def fail(self, pick: int, lost: bool) -> None:
        entry, group, _ = self.started.pop(-1 - pick % len(self.started))
        there = bool(self.bus.redis.xrange(entry.stream, entry.id, entry.id))
        self.bus.lose_next = lost
        assert self.ledger.give_up(entry, Work.PROMPTS, "failed", group=group) is (there and not lost)
        assert not there or self.row(group.index) is None

    @rule(server=servers, pick=pick, lost=lost, fails=st.sampled_from([False, False, True]))
    def judge(self, server: str, pick: int, lost: bool, fails: bool) -> None:
        entry = self.given(server, Work.COMPLETIONS, pick)
        if entry is None or self.bury(entry, Work.COMPLETIONS):
            return
        done = entry.message(CompletionGroup)
        self.bus.lose_next = lost
        if fails:
            self.ledger.give_up(entry, Work.COMPLETIONS, "failed", group=done.group)
        elif not self.ledger.score(entry, scored(done)):
            self.bus.acknowledge("r", Work.COMPLETIONS, [entry.id])

    @rule(count=st.integers(1, 3), lost=lost)
    def train(self, count: int, lost: bool) -> None:
        """The trainer of the moment takes what is there, or what one before it took at this version, and makes the next version of it."""
        version, entries = self.ledger.version() or 0, dict[int, Entry]()
        self.bus.claim(["r"], Work.SCORED, "trainer", count=100, block_ms=None)
        for entry in self.bus.own("r", Work.SCORED, "trainer"):
            if not self.bury(entry, Work.SCORED):
                entries[entry.message(ScoredGroup).group.index] = entry
        plan = self.ledger.plans().get(version)
        if plan is None:
            ready = [row.index for row in self.ledger.rows() if row.place is Place.SCORED][:count]
            if len(ready) < count:
                return
            plan = Plan(tuple(ready), tuple(entries[i].id for i in ready))
            self.bus.lose_next = lost
            self.ledger.plan(version, plan, trainer=self.trainer)
            assert [self.row(index).place for index in ready] == [Place.TAKEN] * count
            return
        assert [entries[i].id for i in plan.indices] == list(plan.entry_ids), "what was taken is there still"
        self.ledger.loading(version + 1, trainer=self.trainer)
        self.bus.lose_next = lost
        commit(self.ledger, version, plan, trainer=self.trainer)
        assert self.ledger.version() == version + 1

    @rule(lost=lost)
    def change_the_trainer(self, lost: bool) -> None:
        before, self.trainer = self.trainer, f"trainer-{int(self.trainer[-1]) ^ 1}"
        self.bus.redis.hset(self.ledger.keys.info, "trainer", self.trainer)
        version, nothing = self.ledger.version() or 0, Plan((0,), ("0-1",))
        for late in (
            lambda: self.ledger.plan(version, nothing, trainer=before),
            lambda: self.ledger.loading(version + 1, trainer=before),
            lambda: commit(self.ledger, version, nothing, trainer=before),
            lambda: self.ledger.announce(version + 1, trainer=before),
        ):
            with pytest.raises(NotOurs):
                late()
        self.bus.lose_next = lost
        self.ledger.announce(self.ledger.version() or 0, trainer=self.trainer)

    @rule(lost=lost, back=st.integers(0, 2))
    def checkpoint(self, lost: bool, back: int) -> None:
        self.bus.lose_next = lost
        self.ledger.checkpointed((self.ledger.version() or 0) - back)

    @rule(pick=pick, lost=lost)
    def replay(self, pick: int, lost: bool) -> None:
        letters = self.bus.range("r", Log.DEAD)
        if letters:
            letter = letters[pick % len(letters)]
            self.bus.lose_next = lost
            replayable = letter.message(DeadLetter).group is not None
            assert self.ledger.replay(letter.id) is (replayable and not lost)

    @rule(lost=lost)
    def issue_replay(self, lost: bool) -> None:
        waits = self.ledger.conservation().replaying
        self.bus.lose_next = lost
        self.ledger.issue_replay(max_lag=3, version=self.ledger.version() or 0)
        self.bus.lose_next = False
        assert self.ledger.conservation().replaying == max(0, waits - 1)

    @rule(topic=st.sampled_from(list(Work)), numbered=st.booleans())
    def garbage(self, topic: Work, numbered: bool) -> None:
        """With the number of a group that is elsewhere, or with none."""
        elsewhere = [row.index for row in self.ledger.rows() if row.place not in PLACES[topic]]
        number = {"index": elsewhere[0]} if numbered and elsewhere else {}
        if number and topic is not Work.SCORED:  # it may come to where its namesake is by the time that it is read
            number = {"index": 1_000_000}
        self.bus.redis.xadd(self.ledger.keys.stream(topic), {"data": b"junk", **number})
        if topic is Work.SCORED:
            for entry in self.bus.range("r", topic):
                self.bury(entry, topic)

    @invariant()
    def every_group_is_accounted_for(self) -> None:
        self.bus.lose_next = False
        counts = self.ledger.conservation()
        assert counts.holds, counts
        assert counts.issued == self.issued

    @invariant()
    def no_group_is_consumed_twice(self) -> None:
        consumed = [index for entry in self.bus.range("r", Log.STEPS) for index in entry.message(StepRecord).groups]
        assert len(consumed) == len(set(consumed)) == self.ledger.conservation().consumed
        assert not set(consumed) & places(self.ledger).keys()

    @invariant()
    def the_streams_hold_what_the_ledger_says(self) -> None:
        where = places(self.ledger)
        unacknowledged = [i for version, plan in self.ledger.plans().items() if version < (self.ledger.version() or 0) for i in plan.indices]
        for topic in Work:
            on_stream = sorted(entry.index for entry in self.bus.range("r", topic) if b"seq" in entry.fields and entry.index is not None)
            expected = [index for index, place in where.items() if place in PLACES[topic] or (topic is Work.SCORED and place is Place.TAKEN)]
            assert on_stream == sorted(expected + (unacknowledged if topic is Work.SCORED else []))


def test_whatever_happens_in_whatever_order_every_group_is_accounted_for(server: OwnRedis) -> None:
    machine = type("Machine", (LedgerMachine,), {"url": server.url})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine, settings=settings(max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
    )
