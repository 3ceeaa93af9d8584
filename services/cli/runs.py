"""`offbeat run`: submit runs, look at them, steer them."""

from __future__ import annotations

import json
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from services.cli.attended import attend, code_of, make_report, show, view_for
from services.cli.exporting import export
from services.cli.following import follow
from services.cli.local_stack import bring_up
from services.cli.output import AsJson, as_data, clock, pairs, print_json, say, table
from services.cli.session import Code, Failure, Session
from services.cli.specs import Sets, assignments, load_spec
from services.client import Client
from services.contracts.states import RunState
from services.contracts.views import RunView
from services.local.stack import StackSettings
from services.studies.display import harmless
from services.studies.run_report import accounted, spec_toml

app = typer.Typer(no_args_is_help=True, help="Submit runs, look at them, steer them.")
RunId = Annotated[str, typer.Argument(metavar="ID", help="The run's id, as `offbeat run ls` shows it.")]
Plain = Annotated[bool, typer.Option("--plain", help="Lines instead of the live panel; always so when the output is no terminal.")]


@app.command("submit")
def submit(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help='Spec in TOML or JSON; "-" reads TOML from standard input.')],
    sets: Sets = None,
    watch_it: Annotated[bool, typer.Option("--watch", help="Follow the run until it ends; Ctrl-C only stops following.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Say whether the spec would be accepted, and submit nothing.")] = False,
    plain: Plain = False,
    as_json: AsJson = False,
) -> None:
    """Submit a run.

    Example: offbeat run submit deploy/runs/demo.toml --set staleness.max_lag=4 --watch
    """
    session: Session = ctx.obj
    spec = load_spec(file, sets or ())
    client = session.client()
    if check:
        answer = client.validate(spec)
        if as_json:
            print_json(session.out, answer)
        else:
            say(session.out, f"the spec is good: {answer.prompts:,} prompts, the first has {answer.first_prompt_tokens} tokens")
        return
    run = client.submit(spec, idempotency_key=secrets.token_hex(8))
    if watch_it:
        say(session.err, f"run {run.run_id} is submitted", "dim")
        raise typer.Exit(watch_run(session, client, run.run_id, plain=plain, as_json=as_json))
    if as_json:
        print_json(session.out, run)
    else:
        say(session.out, run.run_id)


@app.command("ls")
def ls(
    ctx: typer.Context,
    state: Annotated[RunState | None, typer.Option(help="Only runs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many of the newest runs to show.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first.

    Example: offbeat run ls --state running
    """
    session: Session = ctx.obj
    runs = session.client().runs(state=state, limit=limit).runs
    if as_json:
        print_json(session.out, runs)
        return
    rows = [(r.run_id, r.name, r.state, f"{r.version or 0}/{r.versions}", clock(r.created_at), r.reason) for r in runs]
    session.out.print(table(("id", "name", "state", "version", "submitted", "reason"), rows))


@app.command("show")
def show_run(ctx: typer.Context, run_id: RunId, as_json: AsJson = False) -> None:
    """Show a run: its state, its groups, its checkpoints, the knobs in force and its spec.

    Example: offbeat run show demo-20260101-120000-3f9a
    """
    session: Session = ctx.obj
    client = session.client()
    run, conservation, knobs = client.run(run_id), client.conservation(run_id), client.knobs(run_id)
    checkpoints = client.checkpoints(run_id).checkpoints
    if as_json:
        print_json(session.out, {"run": run, "conservation": conservation, "knobs": knobs, "checkpoints": checkpoints})
        return
    rows: list[tuple[str, object]] = [
        ("run", run.run_id),
        ("state", f"{run.state}{f': {run.reason}' if run.reason else ''}"),
        ("version", f"{run.version or 0} of {run.versions}"),
        ("trainer", run.trainer),
        ("submitted, started, ended", f"{clock(run.created_at)}, {clock(run.started_at)}, {clock(run.ended_at)}"),
        ("groups", accounted(conservation)),
        ("checkpoints", ", ".join(f"version {c.version}" for c in checkpoints) or None),
        ("knobs in force", ", ".join(f"{name}={json.dumps(value)}" for name, value in knobs.knobs.items())),
        *(
            (f"  changed at version {change.version}", ", ".join(f"{n}={json.dumps(v)}" for n, v in change.values.items()))
            for change in knobs.changes
        ),
    ]
    session.out.print(pairs(rows), soft_wrap=True)
    say(session.out, f"\n{harmless(spec_toml(run.spec))}")


@app.command("watch")
def watch(ctx: typer.Context, run_id: RunId, plain: Plain = False, as_json: AsJson = False) -> None:
    """Follow a run until it ends or is paused. Ctrl-C stops following; the run goes on.

    Example: offbeat run watch demo-20260101-120000-3f9a
    """
    session: Session = ctx.obj
    raise typer.Exit(watch_run(session, session.client(), run_id, plain=plain, as_json=as_json))


def watch_run(
    session: Session, client: Client, run_id: str, *, plain: bool, as_json: bool, beside: Callable[[], Mapping[str, object]] = dict
) -> Code:
    """Follow a run; the exit code that its end, or Ctrl-C, gives. As JSON the run is printed at its end, with the fields of `beside`."""
    try:
        with view_for(session.err if as_json else session.out, plain=plain) as view:
            watched = follow(client, run_id, view)
    except KeyboardInterrupt:
        say(session.err, f"no longer following {run_id}, which goes on: `offbeat run watch {run_id}` follows again", "yellow")
        return Code.INTERRUPTED
    if as_json:
        print_json(session.out, as_data(watched.run) | beside())
    return code_of(session, watched.run)


@app.command("pause")
def pause(ctx: typer.Context, run_id: RunId, as_json: AsJson = False) -> None:
    """Pause a run: it makes a checkpoint and leaves its trainer and rollout servers to others.

    Example: offbeat run pause demo-20260101-120000-3f9a
    """
    session: Session = ctx.obj
    _state(session, session.client().pause(run_id), as_json=as_json)


@app.command("resume")
def resume(
    ctx: typer.Context,
    run_id: RunId,
    watch_it: Annotated[bool, typer.Option("--watch", help="Follow the run until it ends.")] = False,
    keep_up: Annotated[bool, typer.Option("--keep-up", help="Leave a stack running that this command had to start.")] = False,
    plain: Plain = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that is paused or has failed, from its last checkpoint.

    Starts the local stack when none runs; then it follows the run to its end, pauses it on Ctrl-C, and takes the stack down.

    Example: offbeat run resume demo-20260101-120000-3f9a
    """
    session: Session = ctx.obj

    def begin(client: Client) -> str:
        return _go_on(session, client, run_id)

    if session.names_stack or session.stack() is not None:
        client = session.client()
        begin(client)
        if watch_it:
            raise typer.Exit(watch_run(session, client, run_id, plain=plain, as_json=as_json))
        if as_json:
            print_json(session.out, client.run(run_id))
    elif keep_up and not watch_it:
        client = session.client_of(bring_up(session, StackSettings()))
        begin(client)
        if as_json:
            print_json(session.out, client.run(run_id))
    else:
        raise typer.Exit(attend(session, begin, plain=plain, keep_up=keep_up, as_json=as_json))


def _go_on(session: Session, client: Client, run_id: str) -> str:
    run = client.run(run_id)
    if run.state in (RunState.PAUSED, RunState.FAILED):
        client.resume(run_id)
        say(session.err, f"run {run_id} goes on from its last checkpoint", "dim")
    elif run.state in (RunState.COMPLETED, RunState.CANCELLED):
        raise Failure(f"run {run_id} is {run.state}: there is nothing to go on with")
    else:
        say(session.err, f"run {run_id} is {run.state} already", "dim")
    return run_id


@app.command("cancel")
def cancel(ctx: typer.Context, run_id: RunId, as_json: AsJson = False) -> None:
    """End a run for good. What it has learned stays in its last checkpoint.

    Example: offbeat run cancel demo-20260101-120000-3f9a
    """
    session: Session = ctx.obj
    _state(session, session.client().cancel(run_id), as_json=as_json)


@app.command("set")
def set_knobs(
    ctx: typer.Context,
    run_id: RunId,
    knobs: Annotated[list[str], typer.Argument(metavar="NAME=VALUE...", help="Knobs and their new values.")],
    as_json: AsJson = False,
) -> None:
    """Change knobs of a run while it goes on; tells the version from which the change holds.

    Example: offbeat run set demo-20260101-120000-3f9a staleness.max_lag=4 clip.high=0.28
    """
    session: Session = ctx.obj
    answer = session.client().set_knobs(run_id, assignments(knobs))
    if as_json:
        print_json(session.out, answer)
    else:
        say(session.out, f"holds from version {answer.version} on: {', '.join(knobs)}")


@app.command("logs")
def logs(
    ctx: typer.Context,
    run_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Only lines that name this run.")] = None,
    process: Annotated[str | None, typer.Option(help="Only this process, such as trainer-0.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the newest lines of each process.")] = 50,
    following: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the logs of the local stack's processes, also of one that is down.

    Example: offbeat run logs --process trainer-0 --follow
    """
    session: Session = ctx.obj
    files = sorted((session.home / "logs").glob(f"{process or '*'}.log"))
    if not files:
        there = ", ".join(sorted(path.stem for path in (session.home / "logs").glob("*.log")))
        raise Failure(
            f"no logs of {process or 'any process'} in {session.home / 'logs'}" + (f": there are {there}" if there else ""), code=Code.NOT_FOUND
        )

    def put(path: Path, line: str) -> None:
        if as_json:
            print_json(session.out, {"process": path.stem, "line": line}, indent=None)
        else:
            say(session.out, f"{path.stem}  {harmless(line)}")

    ends: dict[Path, int] = {}
    for path in files:
        with open(path, errors="replace") as log:
            for line in deque((text for text in log if run_id is None or run_id in text), maxlen=lines):
                put(path, line.rstrip("\n"))
            ends[path] = log.tell()
    while following:
        time.sleep(0.3)
        for path in files:
            if path.stat().st_size < ends[path]:  # rotated
                ends[path] = 0
            with open(path, errors="replace") as log:
                log.seek(ends[path])
                for text in iter(log.readline, ""):
                    if run_id is None or run_id in text:
                        put(path, text.rstrip("\n"))
                ends[path] = log.tell()


@app.command("report")
def report(
    ctx: typer.Context,
    run_id: RunId,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: runs/ID.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report of a run as it stands: report.html with its plots.

    Example: offbeat run report demo-20260101-120000-3f9a --out report
    """
    session: Session = ctx.obj
    show(session, make_report(session.client(), run_id, out or Path("runs") / run_id), as_json=as_json)


app.command("export")(export)


def _state(session: Session, run: RunView, *, as_json: bool) -> None:
    if as_json:
        print_json(session.out, run)
    else:
        say(session.out, f"run {run.run_id} is {run.state}")
