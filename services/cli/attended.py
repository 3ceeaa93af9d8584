"""A run that this command answers for: it brings the stack up if none runs, follows the run to its end, reports it, and takes the stack down.

Interrupted, it pauses the run, which makes a checkpoint, within a bound, and takes the stack down. A second Ctrl-C waits for neither.
The stack is started as this process's own: it ends with it, even when it is killed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from services.cli.following import follow
from services.cli.interrupts import Interrupts
from services.cli.live import LiveView, PlainView, View
from services.cli.local_stack import bring_up, take_down
from services.cli.output import pairs, print_json, say
from services.cli.session import Code, Session
from services.client import ApiError, Client, Unreachable
from services.contracts.messages import Role
from services.contracts.states import RunState
from services.contracts.views import ConservationView, RunView
from services.local.stack import DEFAULT_HOME, StackSettings
from services.studies.display import one_line
from services.studies.run_report import Summary, summarise, summary_rows, write_report

PAUSE_S = 45.0
"""How long a pause may take until the stack is taken down all the same; the trainer then has its own time of grace to write its checkpoint."""
REPORT_SAMPLES = 100


@dataclass(frozen=True)
class Reported:
    """What a run came to, with the files that tell it."""

    run: RunView
    summary: Summary
    conservation: ConservationView
    report: Path
    plots: list[Path]


def attend(session: Session, begin: Callable[[Client], str], *, plain: bool, keep_up: bool, as_json: bool) -> Code:
    """Bring up, `begin` (which gives the run's id), follow, report, take down. The exit code."""
    ours = session.stack() is None
    run_id: str | None = None
    client: Client | None = None
    with Interrupts() as interrupts:
        try:
            info = bring_up(session, StackSettings(owner=None if keep_up else os.getpid()))
            client = session.client_of(info)
            with interrupts.held():
                run_id = begin(client)
            say(session.err, f"run {run_id}; logs: {info.home / 'logs'}", "dim")
            with view_for(session.err if as_json else session.out, plain=plain) as view:
                run = follow(client, run_id, view).run
            show(session, make_report(client, run_id, info.data / run_id), as_json=as_json)
            return code_of(session, run)
        except KeyboardInterrupt:
            if client is not None and run_id is not None:
                pause(session, client, run_id)
            else:
                say(session.err, "interrupted before there was a run", "yellow")
            return Code.INTERRUPTED
        finally:
            if ours and not keep_up:
                take_down(session, interrupts)


def view_for(console: Console, *, plain: bool) -> View:
    return PlainView(console) if plain or not console.is_terminal else LiveView(console)


def pause(session: Session, client: Client, run_id: str) -> None:
    """Pause the run and wait, within a bound or until interrupted again, until its trainer has written the checkpoint and let go of it."""
    again = resume_hint(session, run_id)
    try:
        with session.err.status(f"pausing {run_id} (Ctrl-C again: at once)"):
            client.pause(run_id)
            deadline = time.monotonic() + PAUSE_S
            while time.monotonic() < deadline and any(m.role is Role.TRAINER and m.run_id == run_id for m in client.fleet().members):
                time.sleep(0.2)
        say(session.err, f"run {run_id} is paused: {again}", "yellow")
    except KeyboardInterrupt:
        say(session.err, f"not waiting for the checkpoint of {run_id}: {again} from the last one that is complete", "yellow")
    except (ApiError, Unreachable) as error:
        with contextlib.suppress(ApiError, Unreachable):
            if client.run(run_id).state is RunState.COMPLETED:
                say(session.err, f"run {run_id} is completed", "yellow")
                return
        say(session.err, f"run {run_id} could not be paused ({error}): {again} from its last checkpoint", "yellow")


def make_report(client: Client, run_id: str, folder: Path) -> Reported:
    """Write the run's report into `folder`."""
    run, steps, conservation = client.run(run_id), client.steps(run_id).steps, client.conservation(run_id)
    early = client.samples(run_id, last=len(steps) // 10, limit=REPORT_SAMPLES).samples
    newest = client.samples(run_id, limit=REPORT_SAMPLES).samples
    samples = list({sample.index: sample for sample in [*early, *newest]}.values())
    evaluations = client.evaluations(run_id).evaluations
    path = write_report(folder, run, steps, list(client.events(run_id)), samples, evaluations=evaluations, conservation=conservation)
    return Reported(run, summarise(steps), conservation, path, sorted(folder.glob("*.png")))


def show(session: Session, reported: Reported, *, as_json: bool) -> None:
    """The summary and the paths of the report's files."""
    if as_json:
        print_json(session.out, reported)
        return
    rows: list[tuple[str, object]] = [*summary_rows(reported.run, reported.summary, reported.conservation), ("report", reported.report)]
    session.out.print()
    session.out.print(pairs([*rows, *(("plot", plot) for plot in reported.plots)]), soft_wrap=True)


def code_of(session: Session, run: RunView) -> Code:
    """The exit code of a run that moves no more; says why when it is not completed."""
    if run.state is RunState.COMPLETED:
        return Code.OK
    advice = "" if run.state is RunState.CANCELLED else f"; {resume_hint(session, run.run_id)}"
    say(session.err, f"run {run.run_id} is {run.state}{f': {one_line(run.reason)}' if run.reason else ''}{advice}", "red")
    return Code.FAILED


def resume_hint(session: Session, run_id: str) -> str:
    home = "" if session.home == DEFAULT_HOME else f" --home {session.home}"
    return f"`offbeat{home} run resume {run_id}` goes on"
