"""The trainer's feed on a real store: batches keep the window, and a trainer that starts again takes the batches that the one before took."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from services.contracts.messages import CompletionGroup, DeadLetter, PromptGroup, ScoredGroup
from services.contracts.spec import Order
from services.contracts.staleness import Floor
from services.contracts.topics import GROUPS, Log, Work
from services.runtime.bus import Bus
from services.runtime.codec import encode
from services.runtime.ledger import Ledger, NotOurs
from services.runtime.metrics import TrainerMetrics
from tests.integration.real_store import TRAINER, open_run
from tests.integration.test_ledger import entry_of, generate, issue, reward
from tests.unit.sample_messages import completed, prompt_group, scored, step_record
from trainer.feed import Batch, Feed

NO_FLOOR, FLOOR_1 = Floor(((0, 0),)), Floor(((0, 1),))


@pytest.fixture
def ledger(bus: Bus) -> Ledger:
    ledger = open_run(bus)
    ledger.announce(0, trainer=TRAINER)
    return ledger


def feed_of(ledger: Ledger, *, trainer: str = TRAINER) -> Feed:
    return Feed(ledger.bus, ledger, trainer=trainer, metrics=TrainerMetrics(CollectorRegistry()))


def score_groups(ledger: Ledger, *indices: int, held: int = 0) -> None:
    for index in indices:
        generate(ledger, index, held=held)
        reward(ledger, index)


def score_tokens(ledger: Ledger, index: int, *versions: int) -> ScoredGroup:
    """A group with tokens of these versions."""
    entry, attempt = entry_of(ledger, Work.PROMPTS, index), ledger.start(index, held=ledger.version() or 0, max_attempts=5)
    assert isinstance(attempt, int)
    assert ledger.finish(entry, completed(entry.message(PromptGroup), versions=versions, attempt=attempt))
    entry = entry_of(ledger, Work.COMPLETIONS, index)
    result = scored(entry.message(CompletionGroup))
    assert ledger.score(entry, result)
    return result


def on_stream(ledger: Ledger) -> tuple[list[int | None], int]:
    """Indices of the entries, and how many of these are received and unacknowledged."""
    pending = ledger.bus.redis.xpending(ledger.keys.stream(Work.SCORED), GROUPS[Work.SCORED])["pending"]
    return [entry.index for entry in ledger.bus.range("r", Work.SCORED)], pending


def take(feed: Feed, version: int, *, batch: int = 2, floor: Floor = NO_FLOOR, order: Order = Order.READY) -> Batch | None:
    return feed.take(version, batch=batch, floor=floor, order=order)


def commit(ledger: Ledger, batch: Batch, version: int, *, trainer: str = TRAINER) -> None:
    ledger.commit(batch.plan, step_record(version, batch.plan.indices), [], trainer=trainer, keep_samples=0)


def indices(batch: Batch | None) -> list[int]:
    assert batch is not None
    assert [scored.group.index for scored in batch.groups] == list(batch.plan.indices)
    return list(batch.plan.indices)


def test_a_batch_comes_when_enough_is_scored_and_goes_into_the_ledger(ledger: Ledger) -> None:
    issue(ledger, 3)
    feed = feed_of(ledger)
    assert feed.pull(block_ms=10) is False
    score_groups(ledger, 2)
    assert feed.pull(block_ms=10) is True
    assert take(feed, 0) is None
    score_groups(ledger, 0)
    feed.pull(block_ms=None)
    batch = take(feed, 0)
    assert indices(batch) == [0, 2]
    assert batch is not None
    assert batch.groups[1] == ledger.bus.range("r", Work.SCORED)[0].message(ScoredGroup)
    assert ledger.plans() == {0: batch.plan}
    assert ledger.conservation().taken == 2
    assert [view.index for view in feed.views()] == [1], "what is taken is outstanding no more"


def test_views_tell_the_rules_what_is_known_of_each_group(ledger: Ledger) -> None:
    issue(ledger, 4)
    ledger.announce(3, trainer=TRAINER)
    assert ledger.start(1, held=3, max_attempts=5) == 1
    generate(ledger, 2, held=3)
    score_groups(ledger, 3, held=3)
    feed = feed_of(ledger)
    feed.pull(block_ms=None)
    assert [(v.index, v.max_lag, v.start, v.newest) for v in feed.views()] == [(0, 2, None, None), (1, 2, 3, None), (2, 2, 3, None), (3, 2, 3, 3)]


def test_the_floor_and_the_order_are_kept(ledger: Ledger) -> None:
    issue(ledger, 3)
    score_groups(ledger, 1)
    ledger.announce(1, trainer=TRAINER)
    score_groups(ledger, 2, held=1)
    feed = feed_of(ledger)
    feed.pull(block_ms=None)
    assert take(feed, 1, batch=1, order=Order.FIFO) is None, "group 0 comes first"
    assert take(feed, 1, batch=2, floor=Floor(((0, 1),))) is None, "group 2 has lag 0"
    assert indices(take(feed, 1, batch=1, floor=Floor(((0, 1),)))) == [1]


def test_weights_may_be_loaded_when_no_group_gets_too_old(ledger: Ledger) -> None:
    for index in range(4):
        assert ledger.issue(prompt_group(index, max_lag=1))
    score_groups(ledger, 0, 1)
    feed = feed_of(ledger)
    feed.pull(block_ms=None)
    batch = take(feed, 0)
    assert batch is not None

    def may(*, batch: int) -> bool:
        return feed.may_load(1, batch=batch, min_lag=0, floor=NO_FLOOR, order=Order.READY)

    assert may(batch=2), "the two that are left can both be trained on at 1"
    assert not may(batch=1), "one of them would be too old at 2"
    assert not feed.may_load(1, batch=2, min_lag=1, floor=Floor(((0, 1),)), order=Order.READY), "there would be nothing of lag 1"
    score_groups(ledger, 2, 3)
    feed.pull(block_ms=None)
    assert feed.may_load(1, batch=2, min_lag=1, floor=Floor(((0, 1),)), order=Order.READY)


def test_the_earliest_deadlines_go_first(ledger: Ledger) -> None:
    issue(ledger, 4)
    messages = [score_tokens(ledger, index, *versions) for index, versions in enumerate([(1, 2, 2), (0, 0, 1), (1, 1, 1), (0, 1, 2)])]
    ledger.announce(2, trainer=TRAINER)
    feed = feed_of(ledger)
    feed.pull(block_ms=None)
    batch = take(feed, 2)
    assert batch is not None
    assert batch.groups == (messages[1], messages[3])
    assert batch.plan.entry_ids == tuple(entry_of(ledger, Work.SCORED, index).id for index in (1, 3))


def test_a_running_group_that_would_come_too_late_is_waited_for(ledger: Ledger) -> None:
    assert ledger.issue(prompt_group(0, max_lag=0))
    assert ledger.start(0, held=0, max_attempts=5) == 1
    issue(ledger, 1)
    score_groups(ledger, 1)
    feed = feed_of(ledger)
    feed.pull(block_ms=None)
    assert take(feed, 0, batch=1) is None
    assert ledger.plans() == {}


@pytest.mark.parametrize(("order", "in_turn"), [(Order.READY, (5, 3)), (Order.FIFO, (5, 2, 3))])
def test_weights_wait_until_the_least_lag_is_generated(ledger: Ledger, order: Order, in_turn: tuple[int, ...]) -> None:
    issue(ledger, 6)
    score_groups(ledger, 0, 1)
    feed = feed_of(ledger)
    feed.pull(block_ms=None)
    assert take(feed, 0) is not None
    for index in in_turn:
        assert not feed.may_load(1, batch=2, min_lag=1, floor=FLOOR_1, order=order)
        score_groups(ledger, index)
        feed.pull(block_ms=None)
    assert feed.may_load(1, batch=2, min_lag=1, floor=FLOOR_1, order=order)


# -- a trainer that starts again ------------------------------------------------------------------------------------------------------


def test_a_batch_that_was_taken_comes_out_the_same_after_a_restart(ledger: Ledger) -> None:
    issue(ledger, 5)
    score_groups(ledger, 0, 1, 2, 3, 4)
    feed = feed_of(ledger)
    feed.pull(block_ms=None)
    first = take(feed, 0)
    assert first is not None
    commit(ledger, first, 0)
    second = take(feed, 1)
    assert second is not None

    again = feed_of(ledger)
    assert again.planned(0) == first, "version 1 was announced, but no checkpoint has it"
    assert again.planned(1) == second
    assert again.planned(2) is None
    assert again.planned(1) is None, "once"
    assert [view.index for view in again.views()] == [4]
    assert take(again, 1, batch=1) is not None


def test_no_group_is_trained_on_twice_over_many_restarts(ledger: Ledger) -> None:
    for index in range(12):
        assert ledger.issue(prompt_group(index, max_lag=5))
    score_groups(ledger, *range(12))
    trained: list[int] = []
    saved = 0
    for version in range(6):
        feed = feed_of(ledger)
        feed.checkpointed(saved)
        for done in range(saved, version):
            assert indices(feed.planned(done)) == trained[2 * done : 2 * done + 2]
        feed.pull(block_ms=None)
        batch = take(feed, version)
        trained += indices(batch)
        assert batch is not None
        commit(ledger, batch, version)
        if version % 3 == 2:
            saved = version + 1
            feed.checkpointed(saved)
            assert len(ledger.bus.range("r", Work.SCORED)) == 12 - len(trained)
    assert sorted(trained) == list(range(12))
    assert ledger.conservation().consumed == 12


def test_what_the_one_before_received_and_never_took_is_found_again(ledger: Ledger) -> None:
    issue(ledger, 3)
    score_groups(ledger, 0, 1)
    feed_of(ledger).pull(block_ms=None)
    score_groups(ledger, 2)
    after = feed_of(ledger)
    while after.pull(block_ms=None):
        pass
    assert indices(take(after, 0, batch=3)) == [0, 1, 2]


def test_what_the_one_before_receives_while_it_dies_is_found_later(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    issue(ledger, 2)
    before, after = feed_of(ledger), feed_of(ledger)
    after.pull(block_ms=None)
    score_groups(ledger, 0, 1)
    before.pull(block_ms=None)
    after.pull(block_ms=None)
    assert take(after, 0) is None, "it has looked a moment ago"
    monkeypatch.setattr("trainer.feed.RECOVER_SECONDS", 0.0)
    after.pull(block_ms=None)
    assert indices(take(after, 0)) == [0, 1]


def test_what_is_taken_is_not_received_again(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.feed.RECOVER_SECONDS", 0.0)
    issue(ledger, 4)
    score_groups(ledger, 0, 1, 2, 3)
    feed = feed_of(ledger)
    feed.pull(block_ms=None)
    for version in (0, 1):
        batch = take(feed, version)
        assert indices(batch) == [2 * version, 2 * version + 1]
        assert batch is not None
        commit(ledger, batch, version)
        feed.pull(block_ms=None)
    assert on_stream(ledger) == ([0, 1, 2, 3], 4)
    assert (feed.views(), take(feed, 2)) == ([], None)


def test_a_checkpoint_acknowledges_what_made_it_and_no_more(ledger: Ledger) -> None:
    issue(ledger, 6)
    assert ledger.issue(prompt_group(6, max_lag=3))
    score_groups(ledger, *range(7))
    feed = feed_of(ledger)
    feed.pull(block_ms=None)
    for version in (0, 1, 2):
        batch = take(feed, version)
        assert batch is not None
        commit(ledger, batch, version)
    assert (on_stream(ledger), sorted(ledger.plans())) == (([0, 1, 2, 3, 4, 5, 6], 7), [0, 1, 2])
    feed.checkpointed(2)
    assert (on_stream(ledger), sorted(ledger.plans())) == (([4, 5, 6], 3), [2])
    after = feed_of(ledger)
    assert (after.planned(0), after.planned(1)) == (None, None)
    assert indices(after.planned(2)) == [4, 5]
    after.checkpointed(3)
    assert (on_stream(ledger), ledger.plans()) == (([6], 1), {})
    assert indices(take(after, 3, batch=1)) == [6]


def test_a_trainer_that_was_replaced_cannot_take(ledger: Ledger) -> None:
    issue(ledger, 2)
    score_groups(ledger, 0, 1)
    feed = feed_of(ledger)
    feed.pull(block_ms=None)
    ledger.bus.redis.hset(ledger.keys.info, "trainer", "trainer-1")
    with pytest.raises(NotOurs):
        take(feed, 0)
    successor = feed_of(ledger, trainer="trainer-1")
    successor.pull(block_ms=None)
    assert indices(take(successor, 0)) == [0, 1]


def test_a_planned_batch_that_is_no_longer_there_is_an_error_and_not_another_batch(ledger: Ledger) -> None:
    issue(ledger, 2)
    score_groups(ledger, 0, 1)
    feed = feed_of(ledger)
    feed.pull(block_ms=None)
    assert take(feed, 0) is not None
    ledger.bus.acknowledge("r", Work.SCORED, [entry_of(ledger, Work.SCORED, 1).id])
    with pytest.raises(LookupError, match=r"groups \[1\] of version 0 are planned, but no longer on the stream"):
        feed_of(ledger).planned(0)


# -- garbage --------------------------------------------------------------------------------------------------------------------------


def test_garbage_is_put_aside_and_what_follows_it_is_received(ledger: Ledger) -> None:
    issue(ledger, 1)
    ledger.bus.redis.xadd(ledger.keys.stream(Work.SCORED), {"index": 7, "data": b"\x91" * 100_000})
    score_groups(ledger, 0)
    feed = feed_of(ledger)
    feed.pull(block_ms=None)
    assert indices(take(feed, 0, batch=1)) == [0]
    (letter,) = [entry.message(DeadLetter) for entry in ledger.bus.range("r", Log.DEAD)]
    assert (letter.stream, letter.group, letter.raw) == ("scored", None, b"\x91" * 4096)
    assert letter.reason.startswith("not a MessagePack ScoredGroup: ")
    assert ledger.conservation().holds


def test_all_kinds_of_garbage_are_put_aside_and_no_group_is_lost_from_the_count(ledger: Ledger) -> None:
    issue(ledger, 3)
    stream, redis = ledger.keys.stream(Work.SCORED), ledger.bus.redis
    good = [score_tokens(ledger, index, 0, 0, 0) for index in range(3)]
    other_schema, other_kind = msgspec.msgpack.encode(good[0].model_dump() | {"schema_version": 2}), encode(prompt_group(0))
    for fields in ({"data": b"\xc1"}, {"seq": 9}, {"data": other_schema}, {"data": other_kind}, {"data": b"\xc1", "index": b"-1x"}):
        redis.xadd(stream, fields)
    entry = entry_of(ledger, Work.SCORED, 1)
    cut_short = entry.fields[b"data"][:-1]
    redis.xdel(stream, entry.id)
    redis.xadd(stream, {**entry.fields, b"data": cut_short})
    feed = feed_of(ledger)
    feed.pull(block_ms=None)
    letters = [entry.message(DeadLetter) for entry in ledger.bus.range("r", Log.DEAD)]
    assert [letter.raw for letter in letters] == [b"\xc1", b"", other_schema, other_kind, b"\xc1", cut_short]
    assert letters[1].reason.startswith("an entry without data")
    assert feed.metrics.dead_letters.labels("scored")._value.get() == 6
    assert on_stream(ledger) == ([0, 2], 2)
    batch = take(feed, 0)
    assert batch is not None
    assert batch.groups == (good[0], good[2])
    counts = ledger.conservation()
    assert (counts.holds, counts.dead, counts.taken, counts.scored) == (True, 1, 2, 0), "only one of them stood for a group"


def test_garbage_that_the_one_before_received_is_put_aside_too(ledger: Ledger) -> None:
    issue(ledger, 1)
    score_groups(ledger, 0)
    ledger.bus.redis.xadd(ledger.keys.stream(Work.SCORED), {"data": b"\xc1"})
    assert len(ledger.bus.claim(["r"], Work.SCORED, "trainer", count=10, block_ms=None)) == 2
    feed = feed_of(ledger)
    feed.pull(block_ms=None)
    assert len(ledger.bus.range("r", Log.DEAD)) == 1
    assert indices(take(feed, 0, batch=1)) == [0]


def test_a_gap_in_the_stream_is_counted(ledger: Ledger) -> None:
    issue(ledger, 4)
    score_groups(ledger, 0)
    feed = feed_of(ledger)
    feed.pull(block_ms=None)
    score_groups(ledger, 1, 2, 3)
    ledger.bus.redis.xdel(ledger.keys.stream(Work.SCORED), *(entry_of(ledger, Work.SCORED, i).id for i in (1, 2)))
    feed.pull(block_ms=None)
    assert feed.metrics.sequence_gaps._value.get() == 2
