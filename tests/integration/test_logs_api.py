"""The log of the fleet from a process's logger through a real store to the API, its stream and its client."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from services.client import ApiError, Client
from services.contracts.messages import LogLevel, LogLine, Role
from services.contracts.spec import RunSpec
from services.contracts.states import Action
from services.contracts.topics import LOGS, LOGS_KEPT, evaluation_id
from services.contracts.views import LogView
from services.control_plane.api import events, logs
from services.control_plane.store import RunStore
from services.runtime.bus import Bus, StoreRefuses
from services.runtime.log_shipping import LogShipper
from tests.browser.recorded import log_row
from tests.integration.conftest import TOKEN, Api, OwnRedis, serve_api, wait_until

PATIENCE = 60.0


def texts(lines: Any) -> list[str]:
    return [line.text for line in lines]


@pytest.fixture
def run_id(bus: Bus, spec: RunSpec) -> str:
    return RunStore(bus).create(spec)[0].run_id


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("tests.logs_api")
    logger.propagate, logger.level = False, logging.INFO
    yield logger
    logger.handlers.clear()


def shipping(logger: logging.Logger, redis_url: str, **stamps: Any) -> LogShipper:
    def stamp(record: logging.LogRecord) -> bool:
        vars(record).update(stamps)
        return True

    shipper = LogShipper(redis_url, level="INFO")
    shipper.addFilter(stamp)
    logger.addHandler(shipper)
    return shipper


def test_what_a_process_logs_is_served_with_all_that_it_said(api: Api, redis_url: str, logger: logging.Logger, run_id: str) -> None:
    shipper = shipping(logger, redis_url, role=Role.TRAINER, member="t-0", run=run_id)
    logger.debug("not this")
    logger.warning("a %s", "warning", extra={"version": 3, "index": 9})
    try:
        raise ValueError("boom")
    except ValueError:
        logger.exception("a step failed")
    shipper.close()
    warned, failed = api.client.logs()
    assert (warned.text, warned.level, warned.logger, warned.role, warned.member, warned.run_id, warned.version, warned.data) == (
        "a warning", "warning", "tests.logs_api", "trainer", "t-0", run_id, 3, {"index": 9},
    )  # fmt: skip
    assert abs(warned.at - time.time()) < 600
    assert failed.level is LogLevel.ERROR
    assert (failed.traceback or "").endswith("ValueError: boom")


def test_filters_let_pass_what_was_asked_for(api: Api, bus: Bus, run_id: str) -> None:
    bus.append_logs(
        [
            log_row("1", level=LogLevel.DEBUG),
            log_row("2", role="reward", member="r-0", run_id=run_id),
            log_row("3", level=LogLevel.WARNING, run_id=evaluation_id(run_id, "held-out")),
            log_row("4", level=LogLevel.ERROR, member="t-1", run_id=f"{run_id}x", traceback="ValueError: a Needle"),
            log_row("5", level=LogLevel.CRITICAL, data={"where": "NEEDLE"}),
        ]
    )
    client = api.client
    assert texts(client.logs()) == ["1", "2", "3", "4", "5"]
    assert texts(client.logs(level=LogLevel.INFO)) == ["2", "3", "4", "5"]
    assert texts(client.logs(level=LogLevel.WARNING)) == ["3", "4", "5"]
    assert texts(client.logs(level=LogLevel.CRITICAL)) == ["5"]
    assert texts(client.logs(run=run_id)) == ["2", "3"]
    assert texts(client.logs(role=Role.REWARD)) == ["2"]
    assert texts(client.logs(member="t-1")) == ["4"]
    assert texts(client.logs(text="needle")) == ["4", "5"]
    assert texts(client.logs(text="needle", member="t-0", level=LogLevel.ERROR)) == ["5"]
    assert texts(client.logs(text="no such")) == []


def test_pages_go_from_the_newest_line_to_the_oldest_and_end(api: Api, bus: Bus) -> None:
    for start in range(0, 2_500, 500):
        bus.append_logs([log_row(str(i), level=LogLevel.ERROR if i % 5 == 0 else LogLevel.INFO) for i in range(start, start + 500)])
    seen: list[int] = []
    cursor, pages = None, 0
    while pages == 0 or cursor is not None:
        params = {"limit": 150, "level": "error"} | ({"cursor": cursor} if cursor else {})
        page = api.http.get("/v1/logs", params=params, headers={"Accept": "application/json"}).json()
        seen += [int(line["text"]) for line in page["lines"]]
        cursor, pages = page["next"], pages + 1
    assert seen == list(range(2_495, -1, -5))
    assert pages == 4
    whole = list(api.client.logs(limit=2_100))
    assert texts(whole) == [str(i) for i in range(400, 2_500)]
    assert texts(api.client.logs(after=whole[-3].id)) == ["2498", "2499"]
    assert texts(api.client.logs(after=whole[-1].id)) == []


def test_the_log_is_bounded(bus: Bus) -> None:
    """Trimming is by whole nodes of the stream, some hundred lines each."""
    row = log_row("x" * 200)
    for _ in range(LOGS_KEPT // 2_000 + 2):
        bus.append_logs([row] * 2_000)
    assert LOGS_KEPT <= bus.redis.xlen(LOGS) < LOGS_KEPT + 500


def test_what_cannot_be_read_is_passed_over(api: Api, bus: Bus) -> None:
    bus.append_logs([log_row("before")])
    bus.redis.xadd(LOGS, {"level": "info", "data": b"\xc1garbage"})
    bus.redis.xadd(LOGS, {"something": "else"})
    bus.redis.xadd(LOGS, {"level": b"\xff\xfe", "role": b"\xff", "run": b"\xff", "data": b""})
    bus.append_logs([log_row("after")])
    assert texts(api.client.logs(level=LogLevel.INFO)) == ["before", "after"]
    assert texts(api.client.logs(role=Role.TRAINER)) == ["before", "after"]


def test_questions_that_make_no_sense_are_refused(api: Api) -> None:
    for params in ({"level": "loud"}, {"role": "cook"}, {"limit": "0"}, {"limit": "1001"}, {"cursor": "x"}, {"after": "-1"}, {"text": "x" * 201}):
        answer = api.http.get("/v1/logs", params=params, headers={"Accept": "application/json"})
        assert answer.status_code == 422, params
        assert answer.json()["errors"][0]["field"].split(".")[-1] == next(iter(params))
    for accept in ("application/json", "text/event-stream"):
        answer = api.http.get("/v1/logs", params={"run": "nobody"}, headers={"Accept": accept})
        assert (answer.status_code, answer.json()["title"]) == (404, "Unknown run")
    assert httpx.get(f"{api.url}/v1/logs", trust_env=False).status_code == 401


DIES = """
from services.contracts.messages import Role
from services.runtime import logs
from services.runtime.settings import Settings

logs.set_up_member(Role.REWARD, Settings())
logs.stamp(run="r")
raise ValueError("the end, with the password " + Settings().redis_url)
"""


def test_the_last_words_of_a_process_arrive_and_tell_no_password(api: Api, redis_url: str) -> None:
    env = os.environ | {"OFFBEAT_REDIS_URL": redis_url, "OFFBEAT_MEMBER": "dies"}
    done = subprocess.run([sys.executable, "-c", DIES], env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    (line,) = api.client.logs(member="dies")
    assert (line.level, line.role, line.run_id, line.text) == (LogLevel.CRITICAL, "reward", "r", "ended by an error: ValueError")
    password = urlsplit(redis_url).password
    assert password
    for said in (line.model_dump_json(), done.stderr):
        assert "the end, with the password redis://:***@" in said
        assert password not in said


# -- as it comes ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def following(client: Client, **wanted: Any) -> Iterator[list[LogView]]:
    """Lines as a follower gets them, in a thread that is left behind with the API."""
    got: list[LogView] = []

    def follow() -> None:
        with contextlib.suppress(RuntimeError, ConnectionError):  # the client is closed
            for line in client.logs(follow=True, **wanted):
                got.append(line)

    threading.Thread(target=follow, daemon=True).start()
    yield got


def test_a_follower_gets_the_newest_lines_and_then_each_as_it_comes(api: Api, bus: Bus, redis_url: str, logger: logging.Logger) -> None:
    bus.append_logs([log_row(str(i)) for i in range(30)])
    with following(api.client, limit=3) as got, following(api.client, level=LogLevel.ERROR) as errors:
        wait_until(lambda: len(got) == 3, seconds=PATIENCE)
        shipper = shipping(logger, redis_url, role=Role.REWARD, member="r-0")
        logger.info("quiet")
        logger.error("loud")
        wait_until(lambda: len(got) == 5 and len(errors) == 1, seconds=PATIENCE)
        shipper.close()
    assert texts(got) == ["27", "28", "29", "quiet", "loud"]
    assert texts(errors) == ["loud"]


def test_a_follower_goes_on_behind_what_it_knows(api: Api, bus: Bus) -> None:
    bus.append_logs([log_row(str(i)) for i in range(450)])
    known = next(iter(api.client.logs(limit=449)))
    with following(api.client, after=known.id, limit=1) as got:
        wait_until(lambda: len(got) == 448, seconds=PATIENCE)
    assert texts(got) == [str(i) for i in range(2, 450)]


def test_an_empty_log_is_followed_from_its_first_line(api: Api, bus: Bus) -> None:
    with following(api.client) as got:
        time.sleep(0.5)
        bus.append_logs([log_row("the first")])
        wait_until(lambda: got, seconds=PATIENCE)
    assert texts(got) == ["the first"]


def test_the_stream_speaks_in_lists_with_a_place_to_go_on_from(api: Api, bus: Bus) -> None:
    bus.append_logs([log_row(str(i)) for i in range(250)])
    sizes, last = [], ""
    with api.http.stream("GET", "/v1/logs", params={"limit": 250}, timeout=PATIENCE) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                sizes.append(len(json.loads(line[6:])))
                last = json.loads(line[6:])[-1]["id"]
            if line == f"id: {last}" and sum(sizes) == 250:
                break
    assert sizes == [200, 50]


def test_the_log_outlives_redis_and_so_does_a_process_that_logs(own_redis: OwnRedis, logger: logging.Logger, tmp_path: Path) -> None:
    own_redis.start()
    shipper = shipping(logger, own_redis.url, role=Role.ROLLOUT, member="v-0")
    with serve_api(own_redis.url, tmp_path) as api:
        with following(api.client) as got:
            logger.info("before")
            wait_until(lambda: len(got) == 1, seconds=PATIENCE)
            own_redis.stop()
            for i in range(700):
                logger.info("while it is away: %d", i)
            answer = api.http.get("/v1/logs", headers={"Accept": "application/json"})
            assert (answer.status_code, answer.json()["title"]) == (503, "Redis is away")
            own_redis.start()
            wait_until(lambda: len(got) >= 701, seconds=PATIENCE)
        assert texts(got) == ["before", *(f"while it is away: {i}" for i in range(700))]
    assert shipper.dropped == 0
    shipper.close()


def test_a_redis_whose_memory_is_full_is_waited_for(own_redis: OwnRedis, logger: logging.Logger) -> None:
    own_redis.start()
    bus = Bus(own_redis.url, patience=5.0)
    bus.redis.config_set("maxmemory", 1)
    with pytest.raises(StoreRefuses, match="memory"):
        bus.append_logs([log_row()])
    shipper = shipping(logger, own_redis.url, role=Role.REWARD, member="r-0")
    logger.info("kept")
    time.sleep(0.5)
    bus.redis.config_set("maxmemory", 0)
    wait_until(lambda: bus.logs(count=10), seconds=PATIENCE)
    shipper.close()
    assert [entry.message(LogLine).text for entry in bus.logs(count=10)] == ["kept"]
    bus.close()


def test_no_character_breaks_a_stream(api: Api, bus: Bus, run_id: str) -> None:
    """Some end a line to Python and not to JSON."""
    odd = "".join(chr(code) for code in (*range(32), 0x7F, 0x85, 0xA0, 0x2028, 0x2029, 0xFEFF, 0x1F642)) + "\r\n\n"
    bus.append_logs([log_row(odd, data={odd: odd}, traceback=odd)])
    with following(api.client) as got:
        wait_until(lambda: got, seconds=PATIENCE)
    (listed,) = api.client.logs()
    assert got == [listed]
    assert (listed.text, listed.traceback, listed.data) == (odd, odd, {odd: odd})
    lifecycle = RunStore(bus).lifecycle(run_id)
    lifecycle.event("odd", odd)
    lifecycle.move(Action.CANCEL)
    assert [event.text for event in api.client.events(run_id, follow=True)][1] == odd


def test_a_silence_ends_no_follower(api: Api, bus: Bus, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent into it for proxies is no message."""
    for module in (logs, events):
        monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.0)
    bus.append_logs([log_row("before")])
    told: list[str] = []

    def follow_events() -> None:
        told.extend(event.event for event in api.client.events(run_id, follow=True))

    thread = threading.Thread(target=follow_events, daemon=True)
    thread.start()
    with following(api.client) as got:
        wait_until(lambda: got, seconds=PATIENCE)
        time.sleep(3 * events.BLOCK_MS / 1000)
        bus.append_logs([log_row("after")])
        RunStore(bus).lifecycle(run_id).move(Action.CANCEL)
        wait_until(lambda: len(got) == 2, seconds=PATIENCE)
    thread.join(PATIENCE)
    assert told == ["run_created", "run_cancelled"]


def test_a_refusal_reaches_who_follows(api: Api) -> None:
    with pytest.raises(ApiError, match="nobody"):
        next(api.client.logs(run="nobody", follow=True))
    assert TOKEN not in str(api.http.get("/v1/logs", headers={"Accept": "application/json"}).json())
