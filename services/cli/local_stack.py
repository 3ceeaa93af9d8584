"""Bringing the local stack up and down with its progress shown, and the commands `up`, `down` and `fleet`."""

from __future__ import annotations

import os
import time
from typing import Annotated

import typer

from services.cli.interrupts import Interrupts
from services.cli.output import AsJson, clock, print_json, say, table
from services.cli.session import Failure, Session
from services.local.stack import StackError, StackInfo, StackSettings
from services.local.supervisor import ProcessState
from services.studies.display import duration

HURRY_S = 3.0
"""Time of grace for the whole stack after a second Ctrl-C."""


def bring_up(session: Session, settings: StackSettings) -> StackInfo:
    """Start the stack, or find it running, and show what is awaited until it is ready."""
    began = time.monotonic()
    shown: dict[str, ProcessState] = {}
    with session.err.status("starting the stack") as spinner:

        def progress(info: StackInfo) -> None:
            for name, process in info.processes.items():
                if shown.get(name) is not process.state and process.state is not ProcessState.ENDED:
                    shown[name] = process.state
                    if process.state is not ProcessState.STARTING:
                        say(session.err, f"{duration(time.monotonic() - began):>7}  {name}: {process.state}", "dim")
            spinner.update("waiting for " + ", ".join(process.name for process in info.not_ready) if info.not_ready else "ready")

        return session.parts.up(session.home, settings, progress=progress)


def take_down(session: Session, interrupts: Interrupts) -> None:
    """End the stack in order; at once when interrupted while it ends."""
    try:
        with session.err.status("ending the stack"):
            session.parts.down(session.home)
    except KeyboardInterrupt:
        say(session.err, "ending the stack at once", "yellow")
        interrupts.ignore()
        session.parts.down(session.home, timeout_s=HURRY_S)


def up(
    ctx: typer.Context,
    rollout_servers: Annotated[int, typer.Option(min=0, help="Rollout servers to start.")] = 1,
    reward_servers: Annotated[int, typer.Option(min=0, help="Reward servers to start.")] = 1,
    trainers: Annotated[int, typer.Option(min=0, help="Trainers to start: as many runs go on at the same time.")] = 1,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the API; default: a free one.")] = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay until Ctrl-C, then take the stack down.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start the stack on this machine.

    It stays until `offbeat down`.

    Example: offbeat up --rollout-servers 2
    """
    session: Session = ctx.obj
    running = session.stack()
    settings = StackSettings(
        rollouts=rollout_servers, rewards=reward_servers, trainers=trainers, api_port=port, owner=os.getpid() if foreground else None
    )
    if running is not None and foreground:
        raise Failure(f"a stack runs in {session.home} already: `offbeat down` ends it")
    with Interrupts() as interrupts:
        try:
            info = bring_up(session, settings)
            if as_json:
                print_json(session.out, public(info))
            elif running is not None:
                say(session.out, f"the stack was running already, as it was started then; API: {info.api_url}")
            else:
                say(session.out, f"the stack is up; API: {info.api_url}, token: {info.token_file}, logs: {info.home / 'logs'}")
        except KeyboardInterrupt:
            if running is None:
                take_down(session, interrupts)
            raise
        except StackError as error:
            raise Failure(f"{error}\n`offbeat down` ends what was started") from error
        if foreground:
            _stay(session, interrupts)


def _stay(session: Session, interrupts: Interrupts) -> None:
    """Until Ctrl-C, which is how this is meant to end."""
    try:
        while session.stack() is not None:
            time.sleep(0.5)
    except KeyboardInterrupt:
        take_down(session, interrupts)
    else:
        raise Failure(f"the stack has ended by itself: see {session.home / 'logs'}")


def down(ctx: typer.Context, as_json: AsJson = False) -> None:
    """End the local stack in order.

    Its runs go on with the next `offbeat up`.

    Example: offbeat down
    """
    session: Session = ctx.obj
    with Interrupts() as interrupts:
        was_running = session.stack() is not None
        take_down(session, interrupts)
    if as_json:
        print_json(session.out, {"was_running": was_running})
    else:
        say(session.out, "the stack is down" if was_running else f"no stack was running in {session.home}")


def fleet(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Show the processes that have registered.

    And the run that each works for, with what it says of itself.

    Example: offbeat fleet
    """
    session: Session = ctx.obj
    members = session.client().fleet().members
    if as_json:
        print_json(session.out, members)
        return
    rows = [
        (
            m.member_id,
            m.role,
            "ready" if m.ready else "not ready",
            m.run_id or m.assigned,
            m.version,
            duration(m.idle_seconds),
            f"{m.host}:{m.pid}",
            clock(m.beat_at),
            m.detail,
        )
        for m in members
    ]
    session.out.print(table(("member", "role", "state", "run", "version", "idle", "process", "last sign", "detail"), rows))
    if not members:
        say(session.out, "nobody has registered: start processes with `offbeat up`")


def public(info: StackInfo) -> dict[str, object]:
    """What may be printed of the stack: not the address of Redis, which holds its password."""
    return {
        "home": info.home,
        "pid": info.pid,
        "api_url": info.api_url,
        "token_file": info.token_file,
        "data": info.data,
        "processes": {n: {"state": p.state, "pid": p.pid, "restarts": p.restarts, "log": p.log} for n, p in info.processes.items()},
    }
