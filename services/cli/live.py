"""What is seen of a run while it goes on: a live panel on a terminal, plain lines elsewhere. All is drawn from `Watched`; nothing asks the API."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from services.contracts.messages import Role, Severity
from services.contracts.states import RunState
from services.contracts.views import ConservationView, EventView, MemberView, RunView, StepView
from services.studies.display import duration, number, one_line

RECENT = 10
"""Versions in the means of the panel and of a plain line."""
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 110
"""Columns of the panel, where the terminal has so many."""
STYLES = {Severity.INFO: "dim", Severity.WARNING: "yellow", Severity.ERROR: "bold red"}


@dataclass
class Watched:
    """What is known of a run that is being watched."""

    run: RunView
    steps: list[StepView] = field(default_factory=list)
    """In order of version."""
    conservation: ConservationView | None = None
    waiting: str | None = None
    """What is awaited before the next version, when the run does not move."""


class View(Protocol):
    """Shows a run."""

    def __enter__(self) -> View: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
    def event(self, event: EventView) -> None: ...
    def note(self, text: str) -> None: ...
    def update(self, watched: Watched) -> None: ...


class LiveView:
    """A panel that is drawn again with every update; events scroll past above it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def event(self, event: EventView) -> None:
        self.console.print(event_line(event))

    def note(self, text: str) -> None:
        self.console.print(Text(one_line(text), style="dim"))

    def update(self, watched: Watched) -> None:
        self._live.update(panel(watched), refresh=True)


class PlainView:
    """A line every ten versions, a line for each event and for each change of what is awaited."""

    def __init__(self, console: Console, *, every: int = RECENT) -> None:
        self.console, self.every = console, every
        self._shown = -1
        self._waiting: str | None = None

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def event(self, event: EventView) -> None:
        self._print(event_line(event))

    def note(self, text: str) -> None:
        self._print(Text(one_line(text)))

    def update(self, watched: Watched) -> None:
        if watched.waiting != self._waiting:
            self._waiting = watched.waiting
            if watched.waiting:
                self.note(watched.waiting)
        done = len(watched.steps)
        ended = watched.run.state not in (RunState.QUEUED, RunState.STARTING, RunState.RUNNING)
        if done and (done // self.every > max(self._shown, 0) // self.every or (ended and done != self._shown)):
            self._shown = done
            self._print(Text(plain_line(watched)))

    def _print(self, line: Text) -> None:
        self.console.print(line, soft_wrap=True, highlight=False)


def recent(steps: Sequence[StepView], key: str, count: int = RECENT) -> float | None:
    """Mean of a value over the newest `count` steps that have it; None when none has."""
    known = [value for value in series(steps[-count:], key) if math.isfinite(value)]
    return fmean(known) if known else None


def series(steps: Sequence[StepView], key: str) -> list[float]:
    """A value over versions; NaN where a step does not have it."""
    return [math.nan if (value := step.values.get(key)) is None else value for step in steps]


def seconds_per_version(steps: Sequence[StepView], count: int = 2 * RECENT) -> float | None:
    """From the versions' own lengths; where they are not told, from the times of the records. None while it cannot be known."""
    told = recent(steps, "seconds", count)
    if told is not None:
        return told
    last = steps[-count:]
    return (last[-1].at - last[0].at) / (len(last) - 1) if len(last) > 1 else None


def eta_seconds(watched: Watched) -> float | None:
    """Time to the last version at the pace of the newest ones."""
    pace = seconds_per_version(watched.steps)
    return None if pace is None else pace * max(0, watched.run.versions - published(watched))


def published(watched: Watched) -> int:
    """Versions published so far."""
    after_last = watched.steps[-1].version + 1 if watched.steps else 0
    return max(watched.run.version or 0, after_last)


def tokens_per_second(steps: Sequence[StepView]) -> float | None:
    """Trained tokens per second over the newest versions."""
    tokens = recent(steps, "tokens") or (fmean(sum(step.lags.values()) for step in steps[-RECENT:]) if steps else 0.0)
    pace = seconds_per_version(steps, RECENT)
    return tokens / pace if tokens and pace else None


def lag_text(steps: Sequence[StepView]) -> str:
    """Achieved beside requested lag, over the newest versions."""
    lags = [lag for step in steps[-RECENT:] for lag in step.lags]
    if not steps or not lags:
        return "-"
    least, greatest = steps[-1].window
    return f"{min(lags)} to {max(lags)}, mean {number(recent(steps, 'lag_mean'), 2)} (requested {least} to {greatest})"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Bars of eight heights for the means of `width` equal parts of `values`; a gap where nothing is known."""
    parts = min(width, len(values))
    cells = []
    for i in range(parts):
        known = [v for v in values[i * len(values) // parts : (i + 1) * len(values) // parts] if math.isfinite(v)]
        cells.append(fmean(known) if known else math.nan)
    finite = [c for c in cells if math.isfinite(c)]
    if not finite:
        return ""
    low, extent = min(finite), max(finite) - min(finite)
    return "".join(" " if not math.isfinite(c) else BARS[min(7, int(8 * (c - low) / extent))] if extent else BARS[3] for c in cells)


def queues_text(conservation: ConservationView | None) -> str:
    """Groups at each place between the dispatcher and the trainer."""
    if conservation is None:
        return "-"
    c = conservation
    text = f"{c.queued} prompts · {c.running} being generated · {c.generated} to be scored · {c.scored} scored · {c.taken} in training"
    dead = f" · {c.dead} dead-lettered" if c.dead else ""
    return f"{text}{dead}" + ("" if c.holds else " · NOT ALL ACCOUNTED FOR")


def event_line(event: EventView) -> Text:
    """Time, version and sentence of an event."""
    at = time.strftime("%H:%M:%S", time.localtime(event.at))
    version = "" if event.version is None else f" v{event.version}"
    return Text(f"{at}{version} {one_line(event.text)}", style=STYLES[event.severity])


def plain_line(watched: Watched) -> str:
    """The newest versions in a line, for logs."""
    steps = watched.steps
    return (
        f"version {published(watched)}/{watched.run.versions}"
        f"  reward {number(recent(steps, 'reward_mean'))}  entropy {number(recent(steps, 'entropy_nats'), unit='nats')}"
        f"  lag {lag_text(steps)}  {number(tokens_per_second(steps), 0)} tokens/s  eta {duration(eta_seconds(watched))}"
    )


def panel(watched: Watched) -> RenderableType:
    """The live panel."""
    run, steps = watched.run, watched.steps
    done, total = published(watched), run.versions
    top = Table.grid(padding=(0, 1))
    top.add_row(
        ProgressBar(total=total, completed=done, width=40),
        f"{done}/{total} versions",
        f"{100 * done // total} %",
        f"eta {duration(eta_seconds(watched))}",
    )
    body = Table.grid(padding=(0, 2))
    body.add_column(style="bold", no_wrap=True, min_width=7)
    body.add_column(no_wrap=True)
    body.add_column(style="cyan", no_wrap=True)
    body.add_row("reward", number(recent(steps, "reward_mean")), _sparkline_of(steps, "reward_mean"))
    body.add_row("entropy", number(recent(steps, "entropy_nats"), unit="nats"), _sparkline_of(steps, "entropy_nats"))
    low = Table.grid(padding=(0, 2))
    low.add_column(style="bold", no_wrap=True, min_width=7)
    low.add_column()
    low.add_row("lag", lag_text(steps))
    low.add_row("speed", f"{number(tokens_per_second(steps), 0)} tokens/s · {duration(seconds_per_version(steps))} a version · {_idle_text(steps)}")
    low.add_row("queues", queues_text(watched.conservation))
    kl = number(recent(steps, "kl_behaviour_k3_nats"), 5, "nats")
    up, down = (number(_percent(recent(steps, key)), 2, "%") for key in ("clip_up_share", "clip_down_share"))
    low.add_row("KL", f"{kl} to the sampler · clipped {up} up, {down} down")
    rows: list[RenderableType] = [top, body, low]
    if watched.waiting:
        rows.append(Text(one_line(watched.waiting), style="yellow"))
    title = Text(f"{one_line(run.name, 40)} · {run.run_id} · {run.state}")
    return Panel(Group(*rows), title=title, title_align="left", border_style="blue", width=WIDTH)


def waiting_for(run: RunView, members: Sequence[MemberView], steps: Sequence[StepView]) -> str | None:
    """What a run that does not move yet waits for, from the fleet as it says itself; None when it moves."""
    if run.state is RunState.QUEUED:
        missing = [name for role, name in ((Role.TRAINER, "trainer"), (Role.ROLLOUT, "rollout server")) if not any(m.role is role for m in members)]
        if missing:
            return f"waiting for a {' and a '.join(missing)} to register"
        others = sorted({m.run_id for m in members if m.run_id and m.run_id != run.run_id and m.role in (Role.TRAINER, Role.ROLLOUT)})
        return f"waiting in the queue behind {', '.join(others)}" if others else "waiting to be given a trainer and a rollout server"
    if run.state is RunState.STARTING or (run.state is RunState.RUNNING and not steps):
        unready = [m for m in members if m.run_id == run.run_id and not m.ready]
        if unready:
            return "waiting for " + ", ".join(f"{m.member_id}{f' ({m.detail})' if m.detail else ''}" for m in unready)
        return "models are being loaded" if run.state is RunState.STARTING else "waiting for the first version"
    return None


def _sparkline_of(steps: Sequence[StepView], key: str) -> str:
    return sparkline(series(steps, key))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _idle_text(steps: Sequence[StepView]) -> str:
    pace = seconds_per_version(steps, RECENT)
    parts = []
    for name in ("trainer", "rollout"):
        idle = recent(steps, f"idle_{name}_seconds")
        parts.append(f"{name} idle {number(None if idle is None or not pace else 100 * idle / pace, 0, '%')}")
    return " · ".join(parts)
