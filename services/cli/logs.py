"""What the processes of the fleet log, from the API: wherever they run."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.text import Text

from services.cli.output import AsJson, print_json
from services.cli.session import Session
from services.contracts.messages import LogLevel, Role
from services.contracts.views import LogView
from services.studies.display import harmless, one_line

STYLES = {LogLevel.DEBUG: "dim", LogLevel.INFO: "", LogLevel.WARNING: "yellow", LogLevel.ERROR: "bold red", LogLevel.CRITICAL: "bold red"}


def logs(
    ctx: typer.Context,
    run: Annotated[str | None, typer.Option(help="Only lines that name this run.")] = None,
    role: Annotated[Role | None, typer.Option(help="Only processes of this kind.")] = None,
    member: Annotated[str | None, typer.Option(help="Only the process with this id: see `offbeat fleet`.")] = None,
    level: Annotated[LogLevel | None, typer.Option(help="Only lines of this level and above.")] = None,
    text: Annotated[str | None, typer.Option(help="Only lines in which this occurs.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the newest lines.")] = 50,
    following: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what the processes of the fleet log, wherever they run.

    What the processes of this machine's own stack wrote, vLLM's lines too and those of a stack that is down, is in `offbeat run logs`.

    Example: offbeat logs --level warning --follow
    """
    session: Session = ctx.obj
    with session.client() as client:
        for line in client.logs(run=run, role=role, member=member, level=level, text=text, limit=lines, follow=following):
            if as_json:
                print_json(session.out, line, indent=None)
            else:
                session.out.print(shown(line), soft_wrap=True, highlight=False)


def shown(line: LogView) -> Text:
    """Time, level, process, run, text and particulars; a traceback on lines of its own."""
    at = time.strftime("%m-%d %H:%M:%S", time.localtime(line.at))
    run = f" [{one_line(line.run_id, 80)}]" if line.run_id else ""
    data = "".join(f" {one_line(name, 40)}={one_line(str(value), 300)}" for name, value in line.data.items())
    text = Text(f"{at} {line.level:<8} {one_line(line.member, 40)}{run} {one_line(line.text)}", style=STYLES[line.level])
    text.append(data, style="dim")
    if line.traceback:
        text.append("".join(f"\n    {part}" for part in harmless(line.traceback).rstrip().split("\n")), style="dim")
    return text
