"""Lines of the log on their way to Redis: cut, without secrets, never in the way of who logs."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from services.contracts.messages import LogLevel, LogLine, Role
from services.local.supervisor import free_ports
from services.runtime import log_shipping, logs, redaction
from services.runtime.bus import LogRow, StoreAway, StoreRefuses
from services.runtime.codec import decode
from services.runtime.log_shipping import MARGIN, NAME_BYTES, TEXT_BYTES, TRACEBACK_BYTES, VALUE_BYTES, VALUES, LogShipper, excerpt, line_of, take
from services.runtime.metrics import RewardMetrics
from services.runtime.redaction import hide, redacted
from services.runtime.settings import Settings

SECRET = "s3cret-0123456789-of-the-fleet"


@pytest.fixture(autouse=True)
def _nothing_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_hidden", ())


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """A logger of the test's own."""
    logger = logging.getLogger("tests.shipped")
    logger.propagate, logger.level = False, logging.DEBUG
    yield logger
    logger.handlers.clear()


class Store:
    """Takes what a shipper writes: `away` while an exception is set, `slow` while an event is awaited."""

    def __init__(self) -> None:
        self.rows: list[LogRow] = []
        self.away: Exception | None = None
        self.tries = 0
        self.slow: threading.Event | None = None
        self.says: Callable[[], None] = lambda: None

    def append_logs(self, rows: list[LogRow]) -> None:
        self.tries += 1
        self.says()
        if self.slow is not None:
            self.slow.wait(30)
        if self.away is not None:
            raise self.away
        self.rows += rows

    @property
    def lines(self) -> list[LogLine]:
        return [decode(LogLine, row.data) for row in self.rows]

    @property
    def texts(self) -> list[str]:
        return [line.text for line in self.lines]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def shipped(log: logging.Logger, store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LogShipper]]:
    """Makes a shipper of `log` that writes to `store`."""
    monkeypatch.setattr(log_shipping, "GATHER_SECONDS", 0.01)
    monkeypatch.setattr(log_shipping, "PAUSE_SECONDS", 0.01)
    made = []

    def ship(**settings: Any) -> LogShipper:
        shipper = LogShipper("redis://127.0.0.1:1/0", **{"level": "INFO", **settings})
        monkeypatch.setattr(shipper, "_bus", store)
        log.addHandler(shipper)
        made.append(shipper)
        return shipper

    yield ship
    for shipper in made:
        if store.slow is not None:
            store.slow.set()
        shipper.close()


def wait_until(holds: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def record(text: object = "text", *args: object, level: int = logging.INFO, error: BaseException | None = None, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("a.b", level, "f.py", 1, text, args, None if error is None else (type(error), error, error.__traceback__))
    vars(made).update(extra)
    return made


def line(*args: Any, **fields: Any) -> LogLine:
    return line_of(take(record(*args, **fields)), host="h", pid=7)


def raised(error: Exception) -> Exception:
    try:
        raise error
    except type(error) as caught:
        return caught


# -- a line ---------------------------------------------------------------------------------------------------------------------------


def test_a_record_becomes_a_line_with_its_stamps_particulars_and_traceback() -> None:
    fault = raised(ValueError("boom"))
    made = line("%d of %s", 3, "four", level=logging.ERROR, error=fault, role=Role.TRAINER, member="t-0", run="r", version=5, index=2, why=["x", 1])
    assert (made.text, made.level, made.logger, made.role, made.member, made.run_id, made.version) == (
        "3 of four", LogLevel.ERROR, "a.b", "trainer", "t-0", "r", 5,
    )  # fmt: skip
    assert (made.host, made.pid, made.data) == ("h", 7, {"index": 2, "why": "['x', 1]"})
    assert made.traceback is not None
    assert made.traceback.startswith("Traceback (most recent call last):")
    assert made.traceback.endswith("ValueError: boom")
    assert abs(made.at - time.time()) < 60


def test_what_libraries_give_to_every_record_is_no_particular_of_a_line() -> None:
    assert line(index=2, _ray_timestamp_ns="1795397165193613326", vllm_process_name="MainProcess").data == {"index": 2}


def test_what_json_cannot_hold_becomes_text() -> None:
    made = line(nan=float("nan"), inf=-float("inf"), big=2**70, exact=2**52, flag=True, half=0.5, none=None, surrogate="\ud83d|")
    assert made.data == {"nan": "nan", "inf": "-inf", "big": str(2**70), "exact": 2**52, "flag": True, "half": 0.5, "surrogate": "\\ud83d|"}
    json.dumps(made.model_dump(mode="json"), allow_nan=False)
    assert line("x", version="seven").version is None


@pytest.mark.parametrize(
    ("number", "level"), [(10, "debug"), (15, "debug"), (20, "info"), (25, "info"), (30, "warning"), (40, "error"), (99, "critical")]
)
def test_every_number_has_a_level(number: int, level: str) -> None:
    assert line(level=number).level == level


@pytest.mark.parametrize("char", ["x", "é", "€", "🙂", "\ud83d"])
def test_every_text_is_bounded_in_bytes_and_says_that_it_was_cut(char: str) -> None:
    long = char * 1_000_000
    made = line(long, run=long, **{long: long, **{f"n{i}": i for i in range(50)}})
    assert TEXT_BYTES - 64 < len(made.text.encode()) <= TEXT_BYTES
    assert " [cut: 1,000,000 characters] " in made.text
    assert made.text.startswith(char.encode("utf-8", "backslashreplace").decode() * 100)
    assert len((made.run_id or "").encode()) <= NAME_BYTES
    assert len(made.data) == VALUES
    assert all(len(name.encode()) <= NAME_BYTES and len(str(value).encode()) <= VALUE_BYTES for name, value in made.data.items())
    whole = char * 20
    assert line(whole).text == whole.encode("utf-8", "backslashreplace").decode()


def test_a_long_traceback_keeps_its_end_where_the_error_is() -> None:
    frames = [f'  File "module_{i}.py", line {i}, in f' for i in range(1_000)]
    made = line(exc_text="\n".join(["Traceback (most recent call last):", *frames, "ValueError: the reason"]))
    assert made.traceback is not None
    assert len(made.traceback.encode()) <= TRACEBACK_BYTES
    assert made.traceback.startswith("Traceback")
    assert "[cut: " in made.traceback
    assert made.traceback.endswith("ValueError: the reason")


def test_what_waits_in_the_queue_is_bounded_too() -> None:
    taken = take(record("x" * 10_000_000, y="y" * 10_000_000))
    assert len(taken.text) <= TEXT_BYTES
    assert len(str(taken.data["y"])) <= VALUE_BYTES


# -- secrets --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("redis://:pa@ss:w#rd@h:6379/0 is away", "redis://:***@h:6379/0 is away"),
        ("rediss://user:pw@h/0", "rediss://user:***@h/0"),
        ("https://h:8700/v1?x=1 and me@example.org", "https://h:8700/v1?x=1 and me@example.org"),
        ("Authorization: Bearer abcdefghijklmnop0123", "Authorization: Bearer ***"),
        ("the bearer authentication failed", "the bearer authentication failed"),
        ("HF token hf_abcdefghijklmnopqrstuv", "HF token hf_***"),
        ("3 tokens of 5", "3 tokens of 5"),
    ],
)
def test_what_looks_like_a_secret_is_left_out(text: str, left: str) -> None:
    assert redacted(text) == left


def test_a_known_secret_is_left_out_as_it_is_in_an_address_and_in_json() -> None:
    odd = 'pass"word/with ä'
    hide(odd)
    for form in (odd, "pass%22word%2Fwith%20%C3%A4", json.dumps(odd)[1:-1]):
        assert redacted(f"({form})") == "(***)"
    hide("redis")  # so short a one would be found in other words
    hide("")
    assert redacted("redis is away") == "redis is away"


def test_the_secrets_that_a_process_reads_are_known(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("token", "cluster", "redis"):
        (tmp_path / name).write_text(f"{SECRET}-{name}\n")
    monkeypatch.setenv("OFFBEAT_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("OFFBEAT_CLUSTER_TOKEN_FILE", str(tmp_path / "cluster"))
    monkeypatch.setenv("OFFBEAT_REDIS_PASSWORD_FILE", str(tmp_path / "redis"))
    settings = Settings()
    assert settings.token
    assert settings.cluster_token
    assert SECRET not in redacted(f"{SECRET}-token {SECRET}-cluster {SECRET}-redis {settings.redis_url}")
    monkeypatch.delenv("OFFBEAT_REDIS_PASSWORD_FILE")
    monkeypatch.setenv("OFFBEAT_REDIS_URL", "redis://:another-password@h:1/0")
    Settings()
    assert redacted("another-password") == "***"


def test_no_part_of_a_line_holds_a_secret() -> None:
    hide(SECRET)
    made = line(f"a {SECRET}", error=raised(ValueError(SECRET)), run=SECRET, key=SECRET, mapping={"k": SECRET}, **{SECRET: 1})
    assert SECRET not in made.model_dump_json()
    assert made.model_dump_json().count("***") >= 6


@pytest.mark.parametrize("place", range(-40, 45, 5))
def test_a_secret_through_which_a_cut_goes_is_not_left_in_part(place: int) -> None:
    hide(SECRET)
    for text in ("x" * (TEXT_BYTES + place) + SECRET + "y" * 5_000, "y" * 5_000 + SECRET + "x" * (TEXT_BYTES // 2 + place)):
        for tail in (0.0, 0.5):
            assert "s3c" not in excerpt(text, TEXT_BYTES, tail=tail)
            assert "fleet" not in excerpt(text, TEXT_BYTES, tail=tail)
    many = SECRET * 5_000  # so much is left out of it that the cut moves
    assert "s3c" not in excerpt(many, TEXT_BYTES, tail=0.5)
    assert len(SECRET) < MARGIN


def test_standard_error_shows_no_secret_either(capsys: pytest.CaptureFixture[str]) -> None:
    hide(SECRET)
    formatter = logs._Redacted("%(levelname)s %(message)s")
    out = formatter.format(record(f"a {SECRET}", error=raised(ValueError(f"redis://:{SECRET}@h:1/0")), key=SECRET))
    assert SECRET not in out
    assert json.loads(out)["message"] == "a ***"


# -- the shipper ----------------------------------------------------------------------------------------------------------------------


def test_lines_arrive_in_order_from_the_level_on(log: logging.Logger, store: Store, shipped: Callable[..., LogShipper]) -> None:
    shipper = shipped()
    log.debug("not this")
    for i in range(1_200):
        log.info("line %d", i)
    wait_until(lambda: len(store.rows) == 1_200)
    assert store.texts == [f"line {i}" for i in range(1_200)]
    assert {row.level for row in store.rows} == {"info"}
    assert shipper.dropped == 0
    assert store.tries < 100  # in batches


def test_lines_that_come_soon_after_one_another_go_together(
    log: logging.Logger, store: Store, shipped: Callable[..., LogShipper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_shipping, "GATHER_SECONDS", 1.0)
    shipped()
    for text in ("one", "two", "three"):
        log.info(text)
        time.sleep(0.05)
    wait_until(lambda: len(store.rows) == 3)
    assert store.tries == 1


def test_what_is_left_at_the_end_is_written(log: logging.Logger, store: Store, shipped: Callable[..., LogShipper]) -> None:
    shipper = shipped()
    log.error("the last words")
    shipper.acquire()  # as the interpreter does at its end
    shipper.close()
    shipper.release()
    assert store.texts == ["the last words"]


def test_lines_go_on_after_a_library_has_configured_logging(log: logging.Logger, store: Store, shipped: Callable[..., LogShipper]) -> None:
    shipper = shipped()
    log.info("before")
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})  # closes every handler, as vLLM does when it is imported
    assert [row.level for row in store.rows] == ["info"]
    log.info("after")
    wait_until(lambda: len(store.rows) == 2)
    log.info("at the end")
    shipper.close()
    assert len(store.rows) == 3


def test_an_end_that_is_asked_for_just_after_a_look_for_it_is_noticed(
    log: logging.Logger, store: Store, shipped: Callable[..., LogShipper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_shipping, "CLOSE_SECONDS", 0.0)
    shipper = shipped()

    class JustBefore(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if not self.is_set():
                shipper.close()
                return False
            return True

    monkeypatch.setattr(shipper, "_closing", JustBefore())
    monkeypatch.setattr(threading.Thread, "join", lambda *_: None)  # it is the thread itself that calls
    log.info("a line")
    wait_until(lambda: not shipper._thread.is_alive(), seconds=10)
    assert store.texts == ["a line"]


def test_a_signal_handler_may_log_at_any_moment_of_a_line_on_its_way(
    log: logging.Logger, store: Store, shipped: Callable[..., LogShipper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_shipping, "GATHER_SECONDS", 0.0)
    shipped()
    moments = handled = 0

    def comes(frame: Any, event: str, _: Any) -> Any:
        nonlocal moments
        moments += event == "line"
        if event == "line" and moments == handled + 1:
            log.info("asked to end")  # nothing is traced in here
        return comes if frame.f_globals.get("__name__") in ("threading", log_shipping.__name__) else None

    def logs_a_line() -> None:
        sys.settrace(comes)
        log.info("a line")
        sys.settrace(None)

    while moments >= handled:
        moments, rows = 0, len(store.rows)
        thread = threading.Thread(target=logs_a_line, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), f"stopped for good at moment {handled}"
        interrupted = moments > handled
        wait_until(lambda: len(store.rows) == rows + 1 + interrupted)  # noqa: B023
        handled += 1
    assert handled > 20


@pytest.mark.parametrize("error", [StoreAway("away"), StoreRefuses("OOM command not allowed")], ids=["away", "full"])
def test_while_redis_is_away_the_oldest_lines_give_way_and_are_counted(
    log: logging.Logger, store: Store, shipped: Callable[..., LogShipper], error: Exception
) -> None:
    store.away = error
    shipper = shipped(queued=100)
    log.info("line 0")
    wait_until(lambda: store.tries >= 3)  # it is in hand, and tried again
    for i in range(1, 251):
        log.info("line %d", i)
    assert shipper.dropped == 150
    store.away = None
    wait_until(lambda: len(store.rows) == 101)
    assert store.texts == ["line 0", *(f"line {i}" for i in range(151, 251))]
    log.info("again")
    wait_until(lambda: store.texts[-1] == "again")


def test_who_logs_does_not_wait_for_redis(log: logging.Logger, store: Store, shipped: Callable[..., LogShipper]) -> None:
    store.slow = threading.Event()
    shipper = shipped()
    log.info("this is being written")
    wait_until(lambda: store.tries == 1)
    began = time.monotonic()
    for _ in range(1_000):
        log.info("this waits")
    assert time.monotonic() - began < 5  # it takes milliseconds; Redis answers in 30 s
    assert len(store.rows) == 0
    store.slow.set()
    wait_until(lambda: len(store.rows) == 1_001)
    assert shipper.dropped == 0


def test_an_end_does_not_wait_for_a_redis_that_hangs(
    log: logging.Logger, store: Store, shipped: Callable[..., LogShipper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_shipping, "CLOSE_SECONDS", 0.1)
    store.slow = threading.Event()
    shipper = shipped()
    log.info("this is being written")
    wait_until(lambda: store.tries == 1)
    began = time.monotonic()
    shipper.close()
    assert time.monotonic() - began < 10


def test_what_is_logged_while_lines_are_written_is_not_shipped(log: logging.Logger, store: Store, shipped: Callable[..., LogShipper]) -> None:
    """Else every batch would make the next one."""
    shipped()
    store.says = lambda: log.error("about writing")
    log.info("one")
    wait_until(lambda: store.rows)
    log.info("two")
    wait_until(lambda: len(store.rows) >= 2)
    time.sleep(0.1)
    assert store.texts == ["one", "two"]
    assert store.tries == 2


def test_a_real_redis_that_is_away_makes_no_line_of_its_own(log: logging.Logger) -> None:
    """The bus says that it waits: not the shipper's."""
    said: list[str] = []
    spy = logging.Handler()
    spy.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("services.runtime.bus").addHandler(spy)
    shipper = LogShipper(f"redis://127.0.0.1:{free_ports(1)[0]}/0", level="INFO")
    log.addHandler(shipper)
    try:
        log.info("one")
        time.sleep(0.8)
        assert said == []
        assert shipper._thread.is_alive()
    finally:
        logging.getLogger("services.runtime.bus").removeHandler(spy)
        shipper.close()
    assert not shipper._thread.is_alive()


def test_a_record_that_cannot_be_a_line_ends_nothing(store: Store, shipped: Callable[..., LogShipper]) -> None:
    class Unspeakable:
        def __str__(self) -> str:
            raise RuntimeError("no")

    shipper = shipped()
    shipper.handle(record("%d", "no number"))  # not by the logger: pytest's own handler would fail
    shipper.handle(record("x", value=Unspeakable()))
    shipper.handle(record("%s", "fine"))
    wait_until(lambda: store.rows)
    assert store.texts == ["fine"]
    assert shipper.dropped == 2


def test_a_forked_child_ships_nothing_and_ends(log: logging.Logger, store: Store, shipped: Callable[..., LogShipper]) -> None:
    shipper = shipped()
    child = os.fork()
    if child == 0:
        log.info("of the child")
        shipper.close()
        os._exit(3 if shipper._queue else 0)
    assert os.waitpid(child, 0)[1] == 0
    log.info("of the parent")
    wait_until(lambda: store.rows)
    assert store.texts == ["of the parent"]


# -- a process ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setattr(logs, "_process", {})
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for name in [name for name in os.environ if name.startswith("OFFBEAT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OFFBEAT_REDIS_URL", f"redis://:{SECRET}@127.0.0.1:{free_ports(1)[0]}/0")
    yield root
    for handler in root.handlers:
        if isinstance(handler, LogShipper):
            handler.close()
    root.handlers, root.level = handlers, level


def shippers(root: logging.Logger) -> list[LogShipper]:
    return [handler for handler in root.handlers if isinstance(handler, LogShipper)]


def test_a_process_of_the_fleet_ships_what_it_logs_with_its_stamps(root: logging.Logger, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFBEAT_MEMBER", "reward-7")
    logs.set_up_member(Role.REWARD, Settings())
    (shipper,) = root.handlers = shippers(root)  # its stamps are its own, not those that the other handler left on the record
    monkeypatch.setattr(shipper, "_bus", store)
    logs.stamp(run="r-1")
    with logs.context(version=4):
        logging.getLogger("some.module").warning("a %s", SECRET)
    logs.stamp(run=None)
    sys.excepthook(ValueError, raised(ValueError("the end")), None)  # type: ignore[arg-type]
    shipper.close()
    first, last = store.lines
    assert (first.role, first.member, first.run_id, first.version, first.text) == ("reward", "reward-7", "r-1", 4, "a ***")
    assert (last.level, last.run_id, last.text) == ("critical", None, "ended by an error: ValueError")
    assert "the end" in (last.traceback or "")


def test_shipping_can_be_limited_and_turned_off(root: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFBEAT_SHIP_LOGS", "ERROR")
    logs.set_up_member(Role.TRAINER, Settings(), member="t.launch")
    (shipper,) = shippers(root)
    assert shipper.level == logging.ERROR
    shipper.close()
    monkeypatch.setenv("OFFBEAT_SHIP_LOGS", "OFF")
    logs.set_up_member(Role.TRAINER, Settings())
    assert shippers(root) == []
    monkeypatch.setenv("OFFBEAT_SHIP_LOGS", "INFO")
    logs.set_up_member(Role.REWARD, Settings(), ship=False)
    assert shippers(root) == []


def test_the_metric_counts_what_was_dropped(root: logging.Logger) -> None:
    registry = CollectorRegistry()
    RewardMetrics(registry)
    assert registry.get_sample_value("offbeat_log_records_dropped_total") == 0
    logs.set_up_member(Role.REWARD, Settings())
    shippers(root)[0].dropped = 12
    assert registry.get_sample_value("offbeat_log_records_dropped_total") == 12
