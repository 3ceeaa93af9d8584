"""What the launcher decides, without a cluster: a fake Ray whose promises are kept or broken at once."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from services.contracts.messages import Severity
from services.contracts.states import Action, IllegalMove
from services.runtime.bus import StoreAway
from services.runtime.ledger import NotOurs
from services.runtime.process import Shutdown
from services.runtime.settings import Settings
from trainer import launch
from trainer.launch import Launcher


class LostError(Exception):
    """Stands for ray.exceptions.RayError."""


class FakeRay:
    """A promise is the answer itself: an exit status, or the error that is raised for it."""

    exceptions = SimpleNamespace(RayError=LostError)

    def __init__(self) -> None:
        self.killed: list[str] = []

    def get(self, promise: Any) -> Any:
        if isinstance(promise, Exception):
            raise promise
        return promise

    def wait(self, promises: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return list(promises), []

    def kill(self, place: str) -> None:
        self.killed.append(place)


class Told(Launcher):
    """A launcher whose ranks are started in words only."""

    def __init__(self, *, restarts: int) -> None:
        self.bus: Any = None
        self.ray, self.settings, self.shutdown = FakeRay(), Settings(), Shutdown()
        self.ranks, self.servers, self.restarts, self.failures = 2, 0, restarts, 0
        self._places, self._ranks, self._servers, self._waiting = ["place 0", "place 1"], {}, {}, []
        self._standing = self._failed_at = None
        self.starts, self.events = 0, list[tuple[str, str, Severity]]()

    def _start_ranks(self) -> None:
        self.starts += 1

    def _tell(self, event: str, text: str, severity: Severity) -> None:
        self.events.append((event, text, severity))

    def _fail(self, reason: str) -> None: ...

    def fail(self, standing: tuple[str, int] | None, **others: Any) -> bool:
        """Rank 1 is killed with the run standing there."""
        self._standing, self._ranks = standing, dict.fromkeys(others.values(), 0)
        return self._again({1: "ended by signal 9 (SIGKILL)"})


def test_ranks_start_again_so_many_times_in_a_row_and_no_more() -> None:
    launcher = Told(restarts=2)
    assert [launcher.fail(("r", 5)) for _ in range(3)] == [True, True, False]
    assert launcher.starts == 2
    assert [event for event, _, _ in launcher.events] == ["ranks_restarted", "ranks_restarted", "ranks_given_up"]
    assert launcher.events[1][1] == "rank 1 ended by signal 9 (SIGKILL). All 2 start again, time 2 of 2"
    assert launcher.events[2][2] is Severity.ERROR
    assert launcher.ray.killed == ["place 0", "place 1"] * 3, "what still runs is out of step"


class Lifecycle:
    """Of the run that is named; its moves, and the error that one raises."""

    moves: ClassVar[list[tuple[str, Action, str | None]]] = []
    late: Exception | None = None

    def __init__(self, _: Any, run_id: str) -> None:
        self.run_id = run_id

    def move(self, action: Action, reason: str, *, holder: str | None = None) -> None:
        assert "SIGKILL" in reason
        self.moves.append((self.run_id, action, holder))
        if self.late is not None:
            raise self.late


class Failing(Told):
    _fail = Launcher._fail


@pytest.mark.parametrize("late", [None, NotOurs("taken over"), IllegalMove("failed"), StoreAway("away")])
def test_a_run_that_ranks_are_given_up_for_fails_also_where_rank_0_was_killed_before_it_could_say_so(
    late: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "RunLifecycle", Lifecycle)
    monkeypatch.setattr(Lifecycle, "moves", [])
    monkeypatch.setattr(Lifecycle, "late", late)
    launcher = Failing(restarts=1)
    launcher.settings = Settings(member="launched")
    assert launcher.fail(("r", 5))
    assert Lifecycle.moves == []
    assert not launcher.fail(("r", 5))
    assert Lifecycle.moves == [("r", Action.FAIL, "launched")]
    assert not Failing(restarts=0).fail(("s", 5)), "it has failed once: whoever starts the launcher again may have better luck"
    assert len(Lifecycle.moves) == 1


def test_failures_between_which_the_run_got_further_are_not_in_a_row() -> None:
    launcher = Told(restarts=1)
    assert [launcher.fail(("r", version)) for version in (5, 6, 7, 7)] == [True, True, True, False]
    assert [launcher.fail(standing) for standing in (("s", 7), None, None)] == [True, True, False], "another run, and none at all"


def test_what_followed_from_a_failure_is_told_after_it() -> None:
    launcher = Told(restarts=1)
    launcher.fail(("r", 1), rank_0=1)
    assert launcher.events[0][1].startswith("rank 1 ended by signal 9 (SIGKILL); rank 0 ended with status 1. All 2 start again")


@pytest.mark.parametrize(
    ("promise", "why"),
    [(0, ""), (3, "ended with status 3"), (-15, "ended by signal 15 (SIGTERM)"), (LostError("the node died\nmore"), "lost its place: the node died")],
)
def test_the_end_of_a_process_is_told_in_words(promise: Any, why: str) -> None:
    assert Told(restarts=0)._outcome(promise) == why


class Busy(Told):
    """Its rank writes a checkpoint for longer than anybody waits."""

    def _start_ranks(self) -> None:
        self._ranks = {"promise": 0}

    def _start_servers(self) -> None:
        self.starts += 1

    def _look(self) -> None: ...


def test_ranks_that_are_asked_to_end_have_the_time_that_the_settings_give_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def still_at_work(promises: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        time.sleep(0.01)
        return [], promises

    launcher, asked = Busy(restarts=3), list[str]()
    monkeypatch.setattr(launcher.ray, "wait", still_at_work)
    launcher.settings = Settings(rank_grace=0.3)
    launcher._places = [SimpleNamespace(stop=SimpleNamespace(remote=lambda: asked.append("rank 0")))]
    launcher.shutdown.ask()
    began = time.monotonic()
    assert launcher.run() == 1
    assert 0.3 <= time.monotonic() - began < 30
    assert asked == ["rank 0"], "once"
    assert launcher.starts == 0, "no rollout server starts for a trainer that ends"


class FakePlace:
    """Its promises are the arguments of the calls."""

    def __init__(self) -> None:
        self.run = SimpleNamespace(remote=lambda *arguments: arguments)


def test_processes_get_what_is_theirs_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"OFFBEAT_DATA": "/d", "NCCL_DEBUG": "INFO", "AWS_SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(name, value)
    launcher = Told(restarts=0)
    module, environment, everywhere = launcher._run(FakePlace(), "trainer", {"RANK": "1"})
    assert (module, everywhere) == ("trainer", False)
    assert environment.items() >= {"OFFBEAT_DATA": "/d", "NCCL_DEBUG": "INFO", "RANK": "1"}.items()
    assert "AWS_SECRET_ACCESS_KEY" not in environment


def test_what_listens_everywhere_is_reached_at_the_machine_that_ray_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, given = Told(restarts=0), dict[str, str]()
    launcher.settings = Settings(host="0.0.0.0")
    *arguments, everywhere = launcher._run(FakePlace(), "trainer", {})
    assert everywhere

    def started(argv: list[str], *, env: dict[str, str]) -> Any:
        given.update(env)
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(launch.subprocess, "Popen", started)
    monkeypatch.setattr(launch.Place, "host", lambda self: "10.0.0.7")
    launch.Place().run(*arguments, everywhere)
    assert given["OFFBEAT_ADVERTISE"] == "10.0.0.7"


@pytest.mark.parametrize(
    ("told", "resources", "gpus"), [(None, {"CPU": 8.0}, 0), (None, {"CPU": 8.0, "GPU": 8.0}, 1), (1, {"CPU": 0.0}, 1), (0, {"GPU": 8.0}, 0)]
)
def test_places_have_a_gpu_also_where_machines_with_gpus_join_later(told: int | None, resources: dict[str, float], gpus: int) -> None:
    assert launch.gpus_of_place(Settings(rank_gpus=told), resources) == gpus


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["trainer.launch", *arguments])
    with pytest.raises(SystemExit) as error:
        launch.main()
    assert error.value.code == 2
    return capsys.readouterr().err


def test_without_ray_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert "Ray is not installed: `deploy/install.sh ray`, or start one rank without it, by `python -m trainer`" in refused(monkeypatch, capsys)


def test_less_than_one_rank_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "at least one rank" in refused(monkeypatch, capsys, "--ranks", "0")
