import io
import math

import pytest
from rich.console import Console

from services.cli.live import (
    LiveView,
    PlainView,
    Watched,
    eta_seconds,
    event_line,
    lag_text,
    panel,
    plain_line,
    queues_text,
    sparkline,
    tokens_per_second,
    waiting_for,
)
from services.contracts.messages import Role, Severity
from services.contracts.spec import RunSpec
from services.contracts.states import RunState
from services.contracts.views import ConservationView, EventView, MemberView, RunView, StepView


def a_run(state: RunState = RunState.RUNNING, version: int | None = 12, name: str = "demo") -> RunView:
    return RunView(
        run_id="demo-1", name=name, state=state, reason="", created_at=0.0, started_at=1.0, ended_at=None, version=version, versions=40,
        trainer="trainer-0", spec=RunSpec(versions=40),
    )  # fmt: skip


def a_step(version: int, **values: float | None) -> StepView:
    measured = {"reward_mean": 0.25, "entropy_nats": 1.5, "seconds": 2.0, "tokens": 300.0, "lag_mean": 0.5} | values
    return StepView(version=version, count=1, at=100.0 + version, values=measured, lags={0: 1, 2: 1}, window=(0, 2), groups=[version])


def a_member(member_id: str, role: Role, *, run_id: str | None = None, ready: bool = True, detail: str = "") -> MemberView:
    return MemberView(
        member_id=member_id, role=role, url="", pid=1, host="h", ready=ready, detail=detail, assigned=run_id, run_id=run_id, version=None,
        idle_seconds=0.0, started_at=0.0, beat_at=0.0,
    )  # fmt: skip


def a_count(**changes: int | bool) -> ConservationView:
    names = ("consumed", "generated", "taken", "replaying", "dead", "cancelled", "superseded", "unreadable")
    fields = dict.fromkeys(names, 0) | {"issued": 9, "queued": 2, "running": 3, "scored": 4, "outstanding": 9, "holds": True}
    return ConservationView(run_id="demo-1", **(fields | changes))


def an_event(text: str, severity: Severity = Severity.INFO) -> EventView:
    return EventView(id="1-0", run_id="demo-1", event="run_started", text=text, severity=severity, version=3, at=0.0, data={})


def shown(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def test_sparkline_spans_its_own_range_and_leaves_gaps():
    assert sparkline([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert sparkline([1.0, math.nan, 2.0]) == "▁ █"
    assert sparkline([3.0, 3.0]) == "▄▄"
    assert sparkline([math.nan]) == ""
    assert sparkline([float(i) for i in range(80)], width=8) == "▁▂▃▄▅▆▇█"


def test_eta_is_the_pace_of_the_newest_versions_times_those_left():
    steps = [a_step(v, seconds=100.0 if v < 5 else 2.0) for v in range(30)]
    assert eta_seconds(Watched(a_run(version=30), steps=steps)) == 10 * 2.0
    assert eta_seconds(Watched(a_run())) is None


def test_eta_falls_back_on_the_times_of_the_records():
    steps = [a_step(v, seconds=None) for v in range(10)]
    assert eta_seconds(Watched(a_run(version=10), steps=steps)) == 30 * 1.0


def test_speed_falls_back_on_the_tokens_counted_by_lag():
    assert tokens_per_second([a_step(0)]) == 150.0
    assert tokens_per_second([a_step(0, tokens=None)]) == 1.0
    assert tokens_per_second([]) is None


def test_lag_is_shown_achieved_beside_requested():
    assert lag_text([a_step(0), a_step(1)]) == "0 to 2, mean 0.50 (requested 0 to 2)"
    assert lag_text([]) == "-"


def test_queues_tell_of_dead_letters_and_of_a_broken_count():
    assert queues_text(a_count()) == "2 prompts · 3 being generated · 0 to be scored · 4 scored · 0 in training"
    assert queues_text(a_count(dead=1, holds=False)).endswith("· 1 dead-lettered · NOT ALL ACCOUNTED FOR")


def test_panel_shows_every_measure_and_a_dash_for_what_is_missing():
    page = shown(
        panel(Watched(a_run(), steps=[a_step(v, kl_behaviour_k3_nats=0.002, clip_up_share=0.034) for v in range(12)], conservation=a_count()))
    )
    for piece in (
        "12/40 versions",
        "30 %",
        "eta 56 s",
        "0.250",
        "1.500 nats",
        "requested 0 to 2",
        "150 tokens/s",
        "3 being generated",
        "0.00200 nats",
        "3.40 % up",
        "- down",
    ):
        assert piece in page


def test_panel_before_the_first_version_says_what_is_awaited():
    page = shown(panel(Watched(a_run(RunState.STARTING, None), waiting="waiting for rollout-0 (loading the model)")))
    assert "0/40 versions" in page
    assert "waiting for rollout-0 (loading the model)" in page


def test_a_name_or_an_event_from_elsewhere_cannot_drive_the_terminal():
    page = shown(panel(Watched(a_run(name="[red]x\x1b[2J\u202e"))))
    assert "[red]x\ufffd" in page
    assert "\x1b" not in shown(event_line(an_event("\x1b]0;title\x07[bold]text[/bold]")))
    assert "[bold]text[/bold]" in shown(event_line(an_event("[bold]text[/bold]")))


@pytest.mark.parametrize(
    ("state", "members", "text"),
    [
        (RunState.QUEUED, [], "waiting for a trainer and a rollout server to register"),
        (RunState.QUEUED, [a_member("t", Role.TRAINER)], "waiting for a rollout server to register"),
        (
            RunState.QUEUED,
            [a_member("t", Role.TRAINER, run_id="other"), a_member("r", Role.ROLLOUT, run_id="other")],
            "waiting in the queue behind other",
        ),
        (RunState.STARTING, [a_member("r", Role.ROLLOUT, run_id="demo-1", ready=False, detail="loading")], "waiting for r (loading)"),
        (RunState.STARTING, [a_member("r", Role.ROLLOUT, run_id="demo-1")], "models are being loaded"),
        (RunState.RUNNING, [], "waiting for the first version"),
        (RunState.PAUSED, [], None),
    ],
)
def test_what_is_awaited_comes_from_the_fleet(state: RunState, members: list[MemberView], text: str | None):
    assert waiting_for(a_run(state), members, []) == text


def test_nothing_is_awaited_once_versions_are_made():
    assert waiting_for(a_run(), [], [a_step(0)]) is None


def test_plain_view_prints_a_line_every_ten_versions_and_at_the_end():
    console = Console(file=io.StringIO(), width=80)
    with PlainView(console) as view:
        watched = Watched(a_run(), waiting="models are being loaded")
        for version in range(25):
            view.update(watched)
            watched.waiting = None
            watched.steps.append(a_step(version))
        watched.run = a_run(RunState.COMPLETED, 25)
        view.update(watched)
        view.update(watched)
        view.event(an_event("Completed"))
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "models are being loaded"
    assert [line.split()[1] for line in lines[1:4]] == ["12/40", "20/40", "25/40"]
    assert lines[4].endswith("v3 Completed")
    assert len(lines) == 5


def test_plain_line_has_the_newest_means():
    line = plain_line(Watched(a_run(), steps=[a_step(v, reward_mean=v / 10) for v in range(20)]))
    assert line.startswith("version 20/40  reward 1.450  entropy 1.500 nats  lag 0 to 2, mean 0.50 (requested 0 to 2)  150 tokens/s  eta 40 s")


def test_live_view_draws_the_panel_and_keeps_events_above_it():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with LiveView(console) as view:
        view.update(Watched(a_run(), steps=[a_step(0)]))
        view.event(an_event("Server rollout-0 joined"))
    page = console.file.getvalue()
    assert "Server rollout-0 joined" in page
    assert "12/40 versions" in page
