"""The fleet: who lives, for which run, and what becomes of those who fall silent."""

from __future__ import annotations

import time
from typing import Any

import pytest

from services.contracts.messages import Member, Role
from services.contracts.topics import FLEET
from services.runtime import fleet as fleet_module
from services.runtime.bus import Bus
from services.runtime.fleet import Fleet, Heartbeat
from tests.integration.conftest import wait_until


def member(member_id: str, role: Role = Role.ROLLOUT, **fields: Any) -> Member:
    return Member(member_id=member_id, role=role, url="http://127.0.0.1:1", pid=1, host="h", started_at=1.0, **fields)


@pytest.fixture
def fleet(bus: Bus) -> Fleet:
    return Fleet(bus)


def test_members_are_found_by_role_and_run_in_order(fleet: Fleet) -> None:
    assert fleet.members() == []
    assert fleet.assignments() == {}
    members = [member("c", run_id="r"), member("a", run_id="s"), member("b", Role.REWARD), member("d", run_id="r", version=4, ready=True)]
    for one in members:
        assert fleet.beat(one) is None
    assert [m.member_id for m in fleet.members()] == ["a", "b", "c", "d"]
    assert fleet.members(role=Role.ROLLOUT, run_id="r") == [members[0], members[3]]
    assert fleet.members(role=Role.TRAINER) == []


def test_a_heartbeat_answers_the_run_that_the_member_was_assigned_to(fleet: Fleet) -> None:
    fleet.beat(member("a"))
    fleet.assign("a", "r")
    assert (fleet.beat(member("a")), fleet.assignments()) == ("r", {"a": "r"})
    fleet.assign("a", "s")
    assert fleet.beat(member("a", run_id="r")) == "s"
    fleet.release("a")
    assert (fleet.beat(member("a")), fleet.assignments()) == (None, {})


def test_who_says_good_bye_is_gone_at_once_with_the_assignment(fleet: Fleet) -> None:
    fleet.beat(member("a"))
    fleet.assign("a", "r")
    fleet.leave("a")
    assert (fleet.members(), fleet.assignments()) == ([], {})
    assert fleet.beat(member("a")) is None, "one that starts again is assigned again"


def test_who_falls_silent_is_forgotten(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "LIFE_SECONDS", 0.2)
    fleet.beat(member("silent"))
    fleet.assign("silent", "r")
    for _ in range(4):
        fleet.beat(member("living"))
        time.sleep(0.08)
    assert [m.member_id for m in fleet.members()] == ["living"]
    assert fleet.assignments() == {}
    assert fleet.bus.redis.smembers(FLEET) == {b"living"}


def test_a_member_of_another_release_is_left_out_and_no_harm_to_the_others(fleet: Fleet) -> None:
    fleet.beat(member("a"))
    fleet.beat(member("b"))
    fleet.bus.redis.set(f"{FLEET}:member:a", b"\xff not a member")
    assert [m.member_id for m in fleet.members()] == ["b"]


def test_the_heartbeat_goes_on_beside_what_the_process_does(fleet: Fleet) -> None:
    version = 0
    heartbeat = Heartbeat(fleet, lambda: member("a", version=version), seconds=0.02)
    heartbeat.start()
    assert [m.version for m in fleet.members()] == [0], "it is known as soon as it has started"
    fleet.assign("a", "r")
    wait_until(lambda: heartbeat.assigned == "r", seconds=3)
    version = 5
    wait_until(lambda: fleet.members()[0].version == 5, seconds=3)
    fleet.release("a")
    assert heartbeat.beat() is None
    heartbeat.stop()
    assert fleet.members() == []
    time.sleep(0.06)
    assert fleet.members() == [], "it beats no more"
