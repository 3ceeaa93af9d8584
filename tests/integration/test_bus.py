"""The bus on real servers: an entry of work has one holder at a time and lives until it is acknowledged, whoever dies, Redis included."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest

from services.contracts.messages import RunEvent
from services.contracts.topics import GROUPS, Log, RunKeys, Work
from services.runtime.bus import Bus, Entry, SequenceCheck, StoreAway, StoreRefuses
from services.runtime.codec import Undecodable
from tests.integration.conftest import OwnRedis, free_port, wait_until
from tests.integration.real_store import KINDS, kill, started

P = Work.PROMPTS


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRedis]:
    with started(request.param, tmp_path_factory.mktemp("redis")) as own:
        yield own


@pytest.fixture(params=[2, 3])
def bus(server: OwnRedis, request: pytest.FixtureRequest) -> Iterator[Bus]:
    """On both versions of the protocol, which shape the answers differently."""
    bus = Bus(f"{server.url}?protocol={request.param}", patience=5.0)
    bus.redis.flushall()
    bus.open_work("r")
    yield bus
    bus.close()


def add(bus: Bus, count: int, *, run_id: str = "r", topic: Work = P) -> list[str]:
    pipe = bus.redis.pipeline()
    for i in range(count):
        pipe.xadd(RunKeys(run_id).stream(topic), {"seq": i + 1, "index": i, "data": b"%d" % i})
    return [raw.decode() for raw in pipe.execute()]


def ids(entries: list[Entry]) -> list[str]:
    return [entry.id for entry in entries]


def in_order(entry_ids: Iterable[str]) -> list[str]:
    return sorted(entry_ids, key=lambda entry_id: [int(part) for part in entry_id.split("-")])


def claim(bus: Bus, consumer: str, *, count: int = 100) -> list[Entry]:
    return bus.claim(["r"], P, consumer, count=count, block_ms=None)


def reclaim(bus: Bus, consumer: str, *, idle_ms: int = 0, count: int = 100) -> list[Entry]:
    return bus.reclaim("r", P, consumer, idle_ms=idle_ms, count=count)


def test_the_server_is_new_enough(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    name, version = bus.check_version().split()
    assert name in ("valkey", "redis")
    assert int(version.split(".")[0]) >= 7
    monkeypatch.setattr(bus.redis, "info", lambda section: {"redis_version": "6.2.14"})
    with pytest.raises(StoreRefuses, match=r"redis 6\.2\.14 is too old: Offbeat needs Redis 7\.0 or newer, or Valkey"):
        bus.check_version()


def test_an_entry_is_given_once_and_is_gone_when_it_is_acknowledged(bus: Bus) -> None:
    added = add(bus, 3)
    bus.open_work("r")  # again: harmless
    first = claim(bus, "a", count=2)
    assert [(e.id, e.stream, e.index, e.seq, e.fields[b"data"]) for e in first] == [
        (added[i], RunKeys("r").stream(P), i, i + 1, b"%d" % i) for i in (0, 1)
    ]
    assert ids(claim(bus, "b")) == added[2:]
    assert claim(bus, "a") == []
    bus.acknowledge("r", P, added[:1])
    assert ids(bus.range("r", P)) == added[1:]
    assert ids(bus.own("r", P, "a")) == added[1:2]
    bus.acknowledge("r", P, added)
    bus.acknowledge("r", P, added)
    assert bus.range("r", P) == []
    assert bus.redis.xpending(RunKeys("r").stream(P), GROUPS[P])["pending"] == 0


def test_thousands_are_acknowledged_at_once(bus: Bus) -> None:
    added = add(bus, 9000)
    assert len(claim(bus, "a", count=9000)) == 9000
    bus.acknowledge("r", P, added[:-1])
    assert ids(bus.range("r", P)) == added[-1:]


def test_consumers_that_race_never_get_the_same_entry(server: OwnRedis, bus: Bus) -> None:
    added = add(bus, 300)
    barrier = threading.Barrier(6)

    def consume(name: str) -> list[str]:
        mine, found = Bus(server.url), list[str]()
        barrier.wait()
        while entries := mine.claim(["r"], P, name, count=7, block_ms=None):
            found += ids(entries)
        mine.close()
        return found

    with ThreadPoolExecutor(6) as pool:
        shares = list(pool.map(consume, "abcdef"))
    assert in_order(list(chain.from_iterable(shares))) == added
    assert sum(bool(share) for share in shares) > 1, "they did race"


def test_a_claim_waits_for_the_first_entry(bus: Bus) -> None:
    began = time.monotonic()
    assert bus.claim(["r"], P, "a", count=1, block_ms=100) == []
    assert 0.09 <= time.monotonic() - began < 2
    later = threading.Timer(0.1, add, (bus, 1))
    later.start()
    assert len(bus.claim(["r"], P, "a", count=1, block_ms=5000)) == 1
    assert time.monotonic() - began < 4
    later.join()


def test_a_claim_of_several_runs_takes_from_each(bus: Bus) -> None:
    bus.open_work("s")
    add(bus, 3)
    add(bus, 1, run_id="s")
    entries = bus.claim(["r", "s"], P, "a", count=2, block_ms=None)
    assert sorted((entry.stream, entry.index) for entry in entries) == [
        (RunKeys("r").stream(P), 0), (RunKeys("r").stream(P), 1), (RunKeys("s").stream(P), 0)
    ]  # fmt: skip
    add(bus, 4)
    bus.redis.delete(RunKeys("s").stream(P))
    assert len(bus.claim(["s", "r", "t"], P, "a", count=9, block_ms=None)) == 5, "a run that has ended keeps nobody from the others"
    assert bus.claim([], P, "a", count=1, block_ms=None) == []
    assert bus.claim(["r"], P, "a", count=0, block_ms=None) == []


# -- the dead and the living ----------------------------------------------------------------------------------------------------------


def test_what_the_dead_held_is_taken_over_and_what_the_living_hold_is_not(bus: Bus) -> None:
    added = add(bus, 4)
    claim(bus, "dead", count=2)
    claim(bus, "living", count=2)
    time.sleep(0.15)
    bus.touch("r", P, "living", added[2:])
    assert ids(reclaim(bus, "heir", idle_ms=100)) == added[:2]
    assert ids(bus.own("r", P, "heir")) == added[:2]
    assert bus.own("r", P, "dead") == []
    assert reclaim(bus, "late", idle_ms=100) == [], "they have a holder again"


def test_the_dead_s_entries_are_found_behind_many_of_the_living(bus: Bus) -> None:
    added = add(bus, 60)
    claim(bus, "living", count=59)
    claim(bus, "dead", count=1)
    time.sleep(0.06)
    bus.touch("r", P, "living", added[:59])
    assert ids(reclaim(bus, "heir", idle_ms=50, count=1)) == added[59:]


def test_two_heirs_share_what_is_left(server: OwnRedis, bus: Bus) -> None:
    added = add(bus, 100)
    claim(bus, "dead")
    time.sleep(0.06)
    barrier = threading.Barrier(4)

    def inherit(name: str) -> list[str]:
        mine = Bus(server.url)
        barrier.wait()
        found = list(chain.from_iterable(ids(mine.reclaim("r", P, name, idle_ms=50, count=10)) for _ in range(12)))
        mine.close()
        return found

    with ThreadPoolExecutor(4) as pool:
        shares = list(pool.map(inherit, "abcd"))
    assert in_order(set(chain.from_iterable(shares))) == added


def test_an_heir_that_got_an_entry_keeps_it_for_a_while(bus: Bus) -> None:
    add(bus, 1)
    claim(bus, "dead")
    time.sleep(0.06)
    assert [len(reclaim(bus, name, idle_ms=50)) for name in "abc"] == [1, 0, 0]


def test_what_is_handed_back_is_anybody_s_at_once(bus: Bus) -> None:
    added = add(bus, 2)
    claim(bus, "a")
    bus.hand_back("r", P, "a", added[:1])
    assert ids(reclaim(bus, "b", idle_ms=60_000)) == added[:1]
    assert reclaim(bus, "c", idle_ms=60_000) == []
    bus.hand_back("r", P, "b", added[:1])
    assert ids(reclaim(bus, "b", idle_ms=60_000)) == added[:1], "who handed it back may have it too"


def test_a_sign_of_life_takes_nothing_back(bus: Bus) -> None:
    added = add(bus, 2)
    claim(bus, "a")
    bus.hand_back("r", P, "a", added[:1])
    bus.touch("r", P, "a", added)  # it overtook, or was overtaken by, what handed the first one back
    assert ids(reclaim(bus, "b", idle_ms=60_000)) == added[:1]
    bus.touch("r", P, "a", added)
    bus.hand_back("r", P, "a", added[:1])
    assert ids(bus.own("r", P, "b")) == added[:1], "who has lost an entry to another cannot take it from there"
    assert reclaim(bus, "c", idle_ms=60_000) == []


def test_deliveries_count_how_often_an_entry_was_given_out(bus: Bus) -> None:
    (entry_id,) = add(bus, 1)
    assert bus.deliveries("r", P, entry_id) == 0
    claim(bus, "a")
    bus.touch("r", P, "a", [entry_id])
    assert bus.deliveries("r", P, entry_id) == 1, "a sign of life is no delivery"
    for n, (holder, heir) in enumerate(pairwise("abba"), 2):
        bus.hand_back("r", P, holder, [entry_id])
        reclaim(bus, heir, idle_ms=60_000)
        assert bus.deliveries("r", P, entry_id) == n
    bus.acknowledge("r", P, [entry_id])
    assert bus.deliveries("r", P, entry_id) == 0


def test_a_restarted_consumer_finds_all_of_its_own(bus: Bus) -> None:
    added = add(bus, 25)
    claim(bus, "a", count=24)
    claim(bus, "b")
    bus.redis.xdel(RunKeys("r").stream(P), added[3], added[10])  # deleted, but not acknowledged: nothing to be done with these
    expected = [entry_id for entry_id in added[:24] if entry_id not in (added[3], added[10])]
    for page in (1, 4, 24, 100):
        assert ids(bus.own("r", P, "a", page=page)) == expected
    assert [entry.index for entry in bus.own("r", P, "b")] == [24]
    assert bus.own("r", P, "nobody") == []


def test_entries_that_were_deleted_are_nobody_s(bus: Bus) -> None:
    added = add(bus, 2)
    claim(bus, "dead")
    bus.redis.xdel(RunKeys("r").stream(P), added[0])
    assert ids(reclaim(bus, "heir")) == added[1:]


def test_a_run_that_has_ended_is_no_error_for_those_who_still_work_on_it(bus: Bus) -> None:
    (entry_id,) = add(bus, 1)
    claim(bus, "a")
    bus.redis.delete(RunKeys("r").stream(P))
    bus.touch("r", P, "a", [entry_id])
    bus.hand_back("r", P, "a", [entry_id])
    bus.acknowledge("r", P, [entry_id])
    assert claim(bus, "a") == reclaim(bus, "a") == bus.own("r", P, "a") == []
    assert bus.deliveries("r", P, entry_id) == 0
    began = time.monotonic()
    assert bus.claim(["r"], P, "a", count=1, block_ms=100) == []
    assert time.monotonic() - began >= 0.1, "who asks again and again must not spin"


def test_a_run_that_ends_is_no_error_for_those_who_wait_for_its_work(bus: Bus) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(bus.claim, ["r"], P, "a", count=9, block_ms=3_000)
        wait_until(lambda: bus.redis.info("clients")["blocked_clients"] == 1)
        bus.redis.delete(RunKeys("r").stream(P))
        assert waiting.result() == []


def test_other_errors_are_not_swallowed(bus: Bus) -> None:
    bus.redis.set(RunKeys("x").stream(P), "not a stream")
    for broken in (
        lambda: bus.claim(["x"], P, "a", count=1, block_ms=None),
        lambda: bus.reclaim("x", P, "a", idle_ms=0, count=1),
        lambda: bus.touch("x", P, "a", ["0-1"]),
        lambda: bus.own("x", P, "a"),
        lambda: bus.open_work("x"),
    ):
        with pytest.raises(Exception, match="WRONGTYPE"):
            broken()


# -- logs -----------------------------------------------------------------------------------------------------------------------------


def event(n: int) -> RunEvent:
    return RunEvent(run_id="r", event="e", text=str(n), at=float(n))


def test_a_log_is_read_in_order_from_any_place(bus: Bus) -> None:
    for n in range(5):
        bus.append("r", Log.EVENTS, event(n))
    entries = bus.read_log("r", Log.EVENTS)
    assert [entry.message(RunEvent) for entry in entries] == [event(n) for n in range(5)]
    assert [entry.seq for entry in entries] == [1, 2, 3, 4, 5]
    assert bus.read_log("r", Log.EVENTS, after=entries[2].id) == entries[3:]
    assert bus.read_log("r", Log.EVENTS, count=2) == entries[:2]
    assert bus.range("r", Log.EVENTS, newest_first=True, count=2) == [entries[4], entries[3]]
    assert bus.range("r", Log.EVENTS, start=entries[1].id, end=entries[3].id) == entries[1:4]
    assert bus.read_log("r", Log.EVENTS, after=entries[4].id, block_ms=20) == []


def test_a_log_is_trimmed_at_its_oldest_end(bus: Bus) -> None:
    for n in range(250):
        bus.append("r", Log.EVENTS, event(n), keep=10)
    kept = [int(entry.message(RunEvent).text) for entry in bus.range("r", Log.EVENTS)]
    assert 10 <= len(kept) <= 110, "Redis trims by whole nodes of 100 entries"
    assert kept == list(range(250 - len(kept), 250))


def test_a_gap_in_the_sequence_is_seen(bus: Bus) -> None:
    for n in range(6):
        bus.append("r", Log.EVENTS, event(n))
    entries, check = bus.read_log("r", Log.EVENTS), SequenceCheck()
    assert [check.see(entries[i]) for i in (1, 2, 5, 3)] == [0, 0, 2, 0], "where it starts is no gap, and one seen again is none"
    assert check.gaps == 2
    assert check.see(Entry(entries[0].stream, "9-9", {b"data": b"x"})) == 0, "an entry without a number is somebody else's"


@pytest.mark.parametrize(
    ("fields", "index", "seq"),
    [
        ({b"index": b"12", b"seq": b"3"}, 12, 3),
        ({}, None, -1),
        ({b"index": b"-1", b"seq": b"x"}, None, -1),
        ({b"index": b"9" * 5000, b"seq": b"9" * 5000}, None, -1),
        ({b"index": "²".encode()}, None, -1),
    ],
)
def test_the_numbers_of_an_entry_may_be_garbage(fields: dict[bytes, bytes], index: int | None, seq: int) -> None:
    entry = Entry("s", "1-1", fields)
    assert (entry.index, entry.seq) == (index, seq)
    with pytest.raises(Undecodable, match=r"^an entry without data: fields \["):
        entry.message(RunEvent)


# -- Redis away -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mortal(server: OwnRedis, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OwnRedis]:
    kind = request.node.callspec.params["server"]
    with started(kind, tmp_path / "mortal") as own:
        yield own


def test_who_calls_while_redis_is_away_waits_and_goes_on_with_nothing_lost(mortal: OwnRedis, caplog: pytest.LogCaptureFixture) -> None:
    bus, other = Bus(mortal.url), Bus(mortal.url)
    bus.open_work("r")
    added = add(bus, 5)
    claim(bus, "a", count=2)
    bus.append("r", Log.EVENTS, event(0))
    time.sleep(1.2)  # the append-only file is written every second
    answers: dict[str, Any] = {}

    def calling(name: str, do: Callable[[], Any]) -> threading.Thread:
        thread = threading.Thread(target=lambda: answers.update({name: do()}), daemon=True)
        thread.start()
        return thread

    blocked = calling("blocked", lambda: other.claim(["s"], P, "b", count=1, block_ms=10_000) if other.open_work("s") is None else None)
    time.sleep(0.1)
    kill(mortal)
    with caplog.at_level(logging.WARNING, "services.runtime.bus"):
        script = calling("script", lambda: bus.append("r", Log.EVENTS, event(1)))
        wait_until(lambda: any(record.message == "waiting for Redis" for record in caplog.records))
        assert not answers
        mortal.start()
        script.join(5)
        wait_until(lambda: any(record.message == "Redis is back" for record in caplog.records))
    assert "script" in answers
    assert 0 < bus.away_seconds < 20
    assert [entry.message(RunEvent) for entry in bus.range("r", Log.EVENTS)] == [event(0), event(1)]
    assert ids(bus.range("r", P)) == added
    assert ids(bus.own("r", P, "a")) == added[:2], "who held what is known still"
    assert ids(claim(bus, "b")) == added[2:]
    wait_until(lambda: other.redis.exists(RunKeys("s").stream(P)))
    add(bus, 1, run_id="s")
    blocked.join(5)
    assert [entry.index for entry in answers["blocked"]] == [0]


def test_a_caller_s_patience_ends(tmp_path: Path) -> None:
    bus = Bus(f"redis://127.0.0.1:{free_port()}/0", patience=0.3)
    began = time.monotonic()
    with pytest.raises(StoreAway, match=r"^Redis is away: "):
        bus.append("r", Log.EVENTS, event(0))
    assert 0.3 <= time.monotonic() - began < 2


@pytest.mark.parametrize("password", ["wrong", None])
def test_a_wrong_password_is_refused_at_once(server: OwnRedis, password: str | None) -> None:
    secret = server.server.password
    url = server.url.replace(f":{secret}@", f":{password}@" if password else "")
    assert secret not in url
    began = time.monotonic()
    with pytest.raises(StoreRefuses, match=r"^Redis refuses the password: "):
        Bus(url).check_version()
    assert time.monotonic() - began < 2, "waiting cannot help"
