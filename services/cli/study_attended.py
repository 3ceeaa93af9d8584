"""A study that this command answers for: it brings the stack up if none runs, follows the study to its end, reports it, and takes the stack down.

Interrupted, it pauses all runs, within a bound, and takes the stack down. A second Ctrl-C waits for neither. The stack is started as this process's
own: it ends with it, even when it is killed; what the runs have done until then is in Redis and in their checkpoints.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from services.cli.interrupts import Interrupts
from services.cli.local_stack import bring_up, take_down
from services.cli.output import print_json, say, table
from services.cli.session import Code, Session
from services.cli.study_following import LiveStudy, PlainStudy, StudyDisplay, follow_study
from services.client import ApiError, Client, Unreachable
from services.contracts.messages import Role
from services.contracts.states import RunState
from services.contracts.views import StudyView
from services.local.stack import DEFAULT_HOME, StackSettings
from services.studies.display import number, one_line

if TYPE_CHECKING:
    from services.studies.verdicts import Verdict

PAUSE_S = 45.0
"""How long a pause may take until the stack is taken down all the same; the trainers then have their own time of grace."""


@dataclass(frozen=True)
class Reported:
    """What a study came to, with the file that tells it."""

    study: StudyView
    verdicts: list[Verdict]
    report: Path


def attend(
    session: Session, begin: Callable[[Client], str], *, out: Path | None, side_by_side: int | None, keep_up: bool, plain: bool, as_json: bool
) -> Code:
    """Bring up what is not up, `begin` (which gives the study's id), follow, report, take down. The exit code."""
    ours = not session.names_stack and session.stack() is None
    if side_by_side is not None and not ours:
        say(session.err, "--side-by-side is for a stack that is started here; the one that runs stays as it is", "yellow")
    study_id: str | None = None
    client: Client | None = None
    with Interrupts() as interrupts:
        try:
            if ours:
                count = side_by_side or default_side_by_side()
                bring_up(session, StackSettings(trainers=count, rollouts=count, owner=None if keep_up else os.getpid()))
            client = session.client()
            with interrupts.held():
                study_id = begin(client)
            say(session.err, f"study {study_id}", "dim")
            with display_for(session.err if as_json else session.out, plain=plain) as display:
                study = follow_study(client, study_id, display)
            show_report(session, make_report(client, study, out or folder_of(session, study_id)), as_json=as_json)
            return code_of(session, study)
        except KeyboardInterrupt:
            if client is not None and study_id is not None:
                pause(session, client, study_id)
            else:
                say(session.err, "interrupted before there was a study", "yellow")
            return Code.INTERRUPTED
        finally:
            if ours and not keep_up:
                take_down(session, interrupts)


def pause(session: Session, client: Client, study_id: str) -> None:
    """Pause all runs and wait, within a bound or until interrupted again, until their trainers have written checkpoints and let go."""
    again = resume_hint(session, study_id)
    try:
        with session.err.status(f"pausing {study_id} (Ctrl-C again: at once)"):
            study = client.pause_study(study_id)
            ours = {run.run_id for run in study.runs}
            deadline = time.monotonic() + PAUSE_S
            while time.monotonic() < deadline and any(m.role is Role.TRAINER and m.run_id in ours for m in client.fleet().members):
                time.sleep(0.2)
        if all(run.state is RunState.COMPLETED for run in study.runs):
            say(session.err, f"study {study_id} is completed: `offbeat study report {study_id}` writes its report", "yellow")
        else:
            say(session.err, f"study {study_id} is paused: {again}", "yellow")
    except KeyboardInterrupt:
        say(session.err, f"not waiting for the checkpoints of {study_id}: {again} from the last ones that are complete", "yellow")
    except (ApiError, Unreachable) as error:
        say(session.err, f"study {study_id} could not be paused ({error}): {again} from its last checkpoints", "yellow")


def make_report(client: Client, study: StudyView, folder: Path) -> Reported:
    """Write the study's report into `folder`."""
    from services.studies.study_data import RunData  # statistics and plots, which no other command needs, take seconds to load
    from services.studies.study_report import write_study_report

    runs = [
        RunData(
            run_id=run.run_id, arm=run.arm, seed=run.seed, state=run.state, reason=run.reason, spec=study.spec.run(run.arm, run.seed),
            steps=client.steps(run.run_id).steps, evaluations=client.evaluations(run.run_id).evaluations,
        )
        for run in study.runs
        if run.run_id is not None and run.state is not None
    ]  # fmt: skip
    path, verdicts = write_study_report(folder, study, runs)
    return Reported(study, verdicts, path)


def show_report(session: Session, reported: Reported, *, as_json: bool) -> None:
    """The verdict on each claim, and where the report is."""
    if as_json:
        print_json(session.out, reported)
        return
    rows = [
        (v.claim.id, v.claim.text, v.reads, number(v.effect), f"{number(v.low)} to {number(v.high)}", number(v.p), v.n, v.why)
        for v in reported.verdicts
    ]
    session.out.print()
    if rows:
        session.out.print(table(("claim", "statement", "verdict", "effect", "95 % interval", "p", "seeds", "why"), rows))
    warn(session, reported.study.warnings)
    say(session.out, f"report: {reported.report}")


def code_of(session: Session, study: StudyView) -> Code:
    """The exit code of a study that moves no more; names the runs that are not completed."""
    short = [run for run in study.runs if run.state is not RunState.COMPLETED]
    if not short:
        return Code.OK
    for run in short:
        say(session.err, f"{run.arm}, seed {run.seed} is {run.state or 'not made'}{f': {one_line(run.reason)}' if run.reason else ''}", "red")
    advice = "" if study.cancelled_at is not None else f"; {resume_hint(session, study.study_id)}"
    say(session.err, f"{len(short)} of {len(study.runs)} runs are not completed{advice}", "red")
    return Code.FAILED


def resume_hint(session: Session, study_id: str) -> str:
    home = "" if session.home == DEFAULT_HOME else f" --home {session.home}"
    return f"`offbeat{home} study resume {study_id}` goes on"


def display_for(console: Console, *, plain: bool) -> StudyDisplay:
    return PlainStudy(console) if plain or not console.is_terminal else LiveStudy(console)


def default_side_by_side() -> int:
    """Runs that this machine holds at the same time: trainer and rollout server of one take turns on two cores, and would share one GPU."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2)


def folder_of(session: Session, study_id: str) -> Path:
    info = None if session.names_stack else session.stack()
    return (info.data if info is not None else Path("runs")) / study_id


def warn(session: Session, warnings: Sequence[str]) -> None:
    for warning in warnings:
        say(session.err, f"warning: {warning}", "yellow")
