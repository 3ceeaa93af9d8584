"""Following a study: its runs as a table of arms and seeds, with the versions of all of them as one bar, until none of them moves any more."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from services.cli.session import Code, Failure
from services.client import Client, Unreachable
from services.contracts.messages import Role
from services.contracts.states import ON_FLEET, RunState
from services.contracts.views import MemberView, StudyRunView, StudyView
from services.studies.display import duration, one_line

POLL_S = 2.0
PATIENCE_S = 60.0
"""How long the API may be away: the control plane may be on its way back."""
PACE_S = 300.0
"""The newest stretch of time from which the pace is taken."""
MOVING = frozenset({RunState.QUEUED, RunState.STARTING, RunState.RUNNING})
OPEN = MOVING | {RunState.PAUSED, None}
"""States, and None of a run that was not made yet, from which versions are still to come."""
STYLES: dict[RunState | None, str] = {
    RunState.COMPLETED: "green", RunState.RUNNING: "cyan", RunState.STARTING: "cyan", RunState.FAILED: "bold red", RunState.PAUSED: "yellow",
    RunState.CANCELLED: "yellow",
}  # fmt: skip
PLAIN_PARTS = 10
"""A plain line of progress is printed so often."""


@dataclass
class StudyWatched:
    """What is known of a study that is being watched."""

    study: StudyView
    paces: deque[tuple[float, int]] = field(default_factory=deque)
    """(time, versions published by then) over the newest stretch of time."""
    waiting: str | None = None
    """What is awaited before any run can start, when none goes on."""

    def saw(self, study: StudyView, at: float) -> None:
        self.study = study
        self.paces.append((at, sum(map(done, study.runs))))
        while self.paces[-1][0] - self.paces[0][0] > PACE_S:
            self.paces.popleft()

    @property
    def eta_seconds(self) -> float | None:
        """Time to the last version at the pace of the newest stretch; None while there is no pace."""
        (began, before), (now, after) = self.paces[0], self.paces[-1]
        left = sum(map(to_come, self.study.runs))
        if not left:
            return 0.0
        return left * (now - began) / (after - before) if after > before else None


class StudyDisplay(Protocol):
    """Shows a study."""

    def __enter__(self) -> StudyDisplay: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
    def note(self, text: str) -> None: ...
    def update(self, watched: StudyWatched) -> None: ...


class LiveStudy:
    """A table that is drawn again with every update."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> LiveStudy:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        self.console.print(Text(one_line(text), style="dim"))

    def update(self, watched: StudyWatched) -> None:
        self._live.update(panel(watched), refresh=True)


class PlainStudy:
    """A line for each run that comes to an end, and ten for the study as a whole."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._states: dict[tuple[str, int], RunState | None] = {}
        self._part = -1
        self._waiting: str | None = None

    def __enter__(self) -> PlainStudy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def note(self, text: str) -> None:
        self.console.print(Text(one_line(text)), soft_wrap=True, highlight=False)

    def update(self, watched: StudyWatched) -> None:
        if watched.waiting != self._waiting:
            self._waiting = watched.waiting
            if watched.waiting:
                self.note(watched.waiting)
        for run in watched.study.runs:
            before = self._states.get((run.arm, run.seed))
            if run.state is not before and run.state not in MOVING:
                self.note(f"{run.arm}, seed {run.seed}: {run.state or 'not made'}{f': {run.reason}' if run.reason else ''}")
            self._states[run.arm, run.seed] = run.state
        published, total = progress(watched.study)
        if (part := PLAIN_PARTS * published // total) != self._part:
            self._part = part
            self.note(progress_line(watched))


def follow_study(client: Client, study_id: str, display: StudyDisplay) -> StudyView:
    """Show the study until none of its runs moves. Raises Failure when the API stays away."""
    watched = StudyWatched(client.study(study_id))
    away_since: float | None = None
    while True:
        try:
            watched.saw(client.study(study_id), time.monotonic())
            watched.waiting = None if on_fleet(watched.study) else missing_roles(client.fleet().members)
            away_since = None
        except Unreachable as error:
            if away_since is None:
                away_since = time.monotonic()
                display.note(f"{error}; trying again for {duration(PATIENCE_S)}")
            if time.monotonic() - away_since > PATIENCE_S:
                raise Failure(f"the API has not answered for {duration(PATIENCE_S)}", code=Code.NO_STACK) from error
        else:
            display.update(watched)
            if not any(run.state in MOVING for run in watched.study.runs):
                return watched.study
        time.sleep(POLL_S)


def on_fleet(study: StudyView) -> bool:
    """Whether one of its runs has a trainer, or none waits for one."""
    states = {run.state for run in study.runs}
    return bool(states & ON_FLEET) or RunState.QUEUED not in states


def missing_roles(members: Sequence[MemberView]) -> str | None:
    """What a fleet lacks to start any run; None when it lacks nothing."""
    roles = ((Role.TRAINER, "trainer"), (Role.ROLLOUT, "rollout server"))
    missing = [name for role, name in roles if not any(m.role is role for m in members)]
    return f"waiting for a {' and a '.join(missing)} to register" if missing else None


def done(run: StudyRunView) -> int:
    """Versions that the run has published."""
    return run.versions if run.state is RunState.COMPLETED else run.version or 0


def to_come(run: StudyRunView) -> int:
    """Versions that the run will still publish; none, of one that has failed or was cancelled."""
    return run.versions - done(run) if run.state in OPEN else 0


def progress(study: StudyView) -> tuple[int, int]:
    """Versions published, and those that there will have been at the end; at least 1."""
    published = sum(map(done, study.runs))
    return published, max(1, published + sum(map(to_come, study.runs)))


def progress_line(watched: StudyWatched) -> str:
    published, total = progress(watched.study)
    return f"{published:,}/{total:,} versions  {counts_text(watched.study.counts)}  eta {duration(watched.eta_seconds)}"


def counts_text(counts: dict[str, int]) -> str:
    """Such as "2 running · 4 queued", in the order of a run's life."""
    order = [*map(str, RunState), *counts]
    return " · ".join(f"{counts[state]} {state}" for state in dict.fromkeys(order) if counts.get(state)) or "no runs"


def panel(watched: StudyWatched) -> RenderableType:
    """The live table."""
    study = watched.study
    published, total = progress(study)
    top = Table.grid(padding=(0, 1))
    top.add_row(
        ProgressBar(total=total, completed=published, width=40), f"{published:,}/{total:,} versions", f"{100 * published // total} %",
        f"eta {duration(watched.eta_seconds)}",
    )  # fmt: skip
    failed = [Text(f"{run.arm}, seed {run.seed}: {one_line(run.reason, 90)}", style="red") for run in study.runs if run.state is RunState.FAILED]
    waiting = [Text(watched.waiting, style="yellow")] if watched.waiting else []
    title = Text(f"{one_line(study.name, 40)} · {study.study_id}")
    return Panel(
        Group(top, Text(counts_text(study.counts), style="dim"), grid(study), *waiting, *failed[:5]),
        title=title,
        title_align="left",
        border_style="blue",
    )


def grid(study: StudyView) -> Table:
    """Arms in rows, seeds in columns; in each cell the run's state and version."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("arm", style="bold", no_wrap=True)
    for seed in study.spec.seeds:
        table.add_column(f"seed {seed}", no_wrap=True)
    runs = {(run.arm, run.seed): run for run in study.runs}
    for arm in study.spec.arms:
        table.add_row(arm.name, *(_cell(runs[arm.name, seed]) for seed in study.spec.seeds))
    return table


def _cell(run: StudyRunView) -> Text:
    words = {RunState.RUNNING: "", RunState.COMPLETED: "✓ ", None: "not made"}
    word = words.get(run.state, f"{run.state} ")
    counted = run.state in (RunState.RUNNING, RunState.COMPLETED) or run.version is not None
    return Text(f"{word}{f'{done(run)}/{run.versions}' if counted else ''}".strip(), style=STYLES.get(run.state, "dim"))
