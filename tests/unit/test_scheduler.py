"""Who is to work for which run: the scheduler's plan, as a table."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.contracts.messages import Member, Role
from services.contracts.spec import RunSpec
from services.contracts.states import ON_FLEET, RunState
from services.control_plane.scheduler import plan
from services.control_plane.store import Run


def run(run_id: str, state: RunState = RunState.QUEUED, *, trainer: str | None = None, replay: str | None = None) -> Run:
    return Run(
        run_id=run_id, spec_json=RunSpec(replay=replay).model_dump_json().encode(), name="x", state=state, reason="", created_at=0.0,
        started_at=None, ended_at=None, trainer=trainer, version=None, superseded=0, unreadable=0,
    )  # fmt: skip


def member(member_id: str, role: Role, **fields: Any) -> Member:
    return Member(member_id=member_id, role=role, url="", pid=1, host="", started_at=0.0, **{"ready": True, **fields})


def trainer(member_id: str, **fields: Any) -> Member:
    return member(member_id, Role.TRAINER, **fields)


def server(member_id: str, **fields: Any) -> Member:
    return member(member_id, Role.ROLLOUT, **fields)


def test_a_replay_starts_with_a_trainer_alone_and_takes_no_server_from_others() -> None:
    fleet = [trainer("t1"), trainer("t2"), server("s1")]
    decided = plan([run("replay", replay="other"), run("ordinary")], fleet, {})
    assert dict(decided.starts) == {"replay": "t1", "ordinary": "t2"}
    assert dict(decided.assign) == {"t1": "replay", "t2": "ordinary", "s1": "ordinary"}
    going = run("replay", RunState.RUNNING, trainer="t1", replay="other")
    assert plan([going], fleet, {"t1": "replay"}).assign == ()


def test_the_oldest_queued_run_gets_the_trainer_and_all_free_servers() -> None:
    todo = plan([run("old"), run("new")], [trainer("t"), server("s1"), server("s2"), member("r", Role.REWARD)], {})
    assert todo.starts == (("old", "t"),)
    assert dict(todo.assign) == {"t": "old", "s1": "old", "s2": "old"}


def test_two_trainers_start_two_runs_that_share_the_servers() -> None:
    todo = plan([run("old"), run("new")], [trainer("t1"), trainer("t2"), server("s1"), server("s2"), server("s3")], {})
    assert todo.starts == (("old", "t1"), ("new", "t2"))
    assert dict(todo.assign) == {"t1": "old", "t2": "new", "s1": "old", "s2": "new", "s3": "old"}


def test_nothing_starts_without_a_server_or_without_a_ready_trainer() -> None:
    assert plan([run("a")], [trainer("t")], {}).starts == ()
    assert plan([run("a")], [server("s")], {}).starts == ()
    assert plan([run("a")], [trainer("t", ready=False), server("s")], {}).starts == ()


def test_a_second_run_waits_while_there_is_only_one_server() -> None:
    todo = plan([run("old"), run("new")], [trainer("t1"), trainer("t2"), server("s1")], {})
    assert todo.starts == (("old", "t1"),)


def test_a_server_that_joins_late_goes_to_the_running_run_with_the_fewest() -> None:
    runs = [run("a", RunState.RUNNING, trainer="t1"), run("b", RunState.RUNNING, trainer="t2")]
    members = [trainer("t1", run_id="a"), trainer("t2", run_id="b"), server("s1", run_id="a"), server("s2")]
    todo = plan(runs, members, {"t1": "a", "t2": "b", "s1": "a"})
    assert todo.assign == (("s2", "b"),)


def test_a_server_goes_to_a_running_run_that_lost_its_last_one_before_a_queued_run_starts() -> None:
    runs = [run("a", RunState.RUNNING, trainer="t1"), run("b")]
    todo = plan(runs, [trainer("t1", run_id="a"), trainer("t2"), server("s")], {"t1": "a"})
    assert todo.starts == ()
    assert todo.assign == (("s", "a"),)


def test_a_run_whose_trainer_is_gone_is_lost_and_keeps_its_servers() -> None:
    runs = [run("a", RunState.RUNNING, trainer="t1")]
    todo = plan(runs, [server("s", run_id="a"), trainer("t2")], {"t1": "a", "s": "a"})
    assert todo.lost == ("a",)
    assert "s" not in todo.release
    again = plan([run("a")], [server("s", run_id="a"), trainer("t2")], {"s": "a"})
    assert again.starts == (("a", "t2"),)
    assert again.release == ()


def test_nobody_is_declared_dead_while_heartbeats_may_only_be_late() -> None:
    assert plan([run("a", RunState.RUNNING, trainer="t1")], [], {}, settled=False).lost == ()


def test_a_run_waits_until_its_former_trainer_has_let_go_of_it() -> None:
    busy = [trainer("t1", run_id="a"), trainer("t2"), server("s")]
    assert plan([run("a")], busy, {}).starts == ()
    assert plan([run("a")], [trainer("t1"), trainer("t2"), server("s")], {}).starts == (("a", "t1"),)


def test_a_trainer_that_still_works_for_a_queued_run_is_taken_off_it() -> None:
    assert plan([run("a", trainer="t1")], [trainer("t1", run_id="a")], {"t1": "a"}).release == ("t1",)


def test_members_of_paused_failed_ended_and_unknown_runs_are_released() -> None:
    runs = [run("p", RunState.PAUSED, trainer="t"), run("f", RunState.FAILED), run("e", RunState.COMPLETED)]
    members = [trainer("t", run_id="p"), server("s1", run_id="p"), server("s2", run_id="f"), server("s3", run_id="e"), server("s4")]
    todo = plan(runs, members, {"t": "p", "s1": "p", "s2": "f", "s3": "e", "s4": "gone"})
    assert todo.release == ("s1", "s2", "s3", "s4", "t")
    assert todo.assign == ()


def test_a_released_member_is_given_away_only_after_it_has_let_go() -> None:
    members = [trainer("t", run_id="old"), server("s", run_id="old")]
    assert plan([run("new")], members, {}).starts == ()
    assert plan([run("new")], [trainer("t"), server("s")], {}).starts == (("new", "t"),)


def test_assignments_forgotten_while_redis_was_away_are_made_again() -> None:
    runs = [run("a", RunState.RUNNING, trainer="t")]
    todo = plan(runs, [trainer("t", run_id="a"), server("s", run_id="a")], {})
    assert dict(todo.assign) == {"t": "a", "s": "a"}
    assert todo.lost == ()


def test_a_trainer_that_was_replaced_is_released_when_it_comes_back() -> None:
    runs = [run("a", RunState.RUNNING, trainer="t2")]
    todo = plan(runs, [trainer("t1", run_id="a"), trainer("t2", run_id="a")], {"t1": "a", "t2": "a"})
    assert todo.release == ("t1",)


def test_a_trainer_of_one_run_takes_that_run_only_and_before_one_that_takes_any() -> None:
    servers = [server("s1"), server("s2")]
    pinned = trainer("t1", only_run="new")
    assert plan([run("old"), run("new")], [pinned, *servers], {}).starts == (("new", "t1"),)
    assert plan([run("old")], [pinned, *servers], {}).starts == ()
    assert plan([run("old"), run("new")], [trainer("t0"), pinned, *servers], {}).starts == (("old", "t0"), ("new", "t1"))
    assert plan([run("new")], [trainer("t0"), pinned, *servers], {}).starts == (("new", "t1"),)


def test_a_run_that_lost_its_trainer_goes_to_the_next_one_of_its_own() -> None:
    members = [trainer("t2", only_run="a"), trainer("t3", only_run="b"), server("s", run_id="a")]
    assert plan([run("a", RunState.RUNNING, trainer="t1")], members, {"s": "a"}).lost == ("a",)
    assert plan([run("a")], members, {"s": "a"}).starts == (("a", "t2"),)


IDS = ("a", "b", "c")


@given(
    states=st.lists(st.sampled_from(list(RunState)), min_size=3, max_size=3),
    trainers=st.lists(st.sampled_from([None, "t0", "t1"]), min_size=3, max_size=3),
    alive=st.lists(st.tuples(st.sampled_from(["t0", "t1", "s0", "s1", "s2"]), st.sampled_from([None, *IDS])), unique_by=lambda pair: pair[0]),
    assigned=st.dictionaries(st.sampled_from(["t0", "t1", "s0", "s1", "s2"]), st.sampled_from([*IDS, "gone"])),
    pins=st.dictionaries(st.sampled_from(["t0", "t1"]), st.sampled_from([*IDS, "gone"])),
    settled=st.booleans(),
)
def test_whatever_the_fleet_looks_like_no_run_gets_two_trainers_and_nobody_two_runs(
    states: list[RunState],
    trainers: list[str | None],
    alive: list[tuple[str, str | None]],
    assigned: dict[str, str],
    pins: dict[str, str],
    settled: bool,
) -> None:
    runs = [run(i, state, trainer=t) for i, state, t in zip(IDS, states, trainers, strict=True)]
    members = [member(m, Role.TRAINER if m.startswith("t") else Role.ROLLOUT, run_id=r, only_run=pins.get(m)) for m, r in alive]
    by_id, living = {r.run_id: r for r in runs}, {m.member_id: m for m in members}
    todo = plan(runs, members, assigned, settled=settled)

    started = [run_id for run_id, _ in todo.starts]
    assert len(set(started)) == len(started)
    assert len({t for _, t in todo.starts}) == len(started)
    assert len({m for m, _ in todo.assign}) == len(todo.assign)
    for run_id, chosen in todo.starts:
        assert by_id[run_id].state is RunState.QUEUED
        assert living[chosen].run_id is None
        assert chosen not in assigned
        assert pins.get(chosen, run_id) == run_id
        assert not any(m.role is Role.TRAINER and m.run_id == run_id for m in members)
        assert any(m.startswith("s") for m, r in {**assigned, **dict(todo.assign)}.items() if r == run_id), "a run starts with a server"
    for member_id, run_id in todo.assign:
        assert member_id in living
        assert member_id not in todo.release
        assert run_id in started or by_id[run_id].state in ON_FLEET | {RunState.QUEUED}
