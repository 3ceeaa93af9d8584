"""`offbeat dead-letters`: what could not be processed, and trying it again."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.output import AsJson, clock, print_json, say, table
from services.cli.session import Session
from services.contracts.views import DeadLetterView

app = typer.Typer(no_args_is_help=True, help="Look at what could not be processed, and try it again.")


@app.command("ls")
def ls(
    ctx: typer.Context,
    run_id: Annotated[str | None, typer.Option("--run", metavar="ID", help="Only those of this run.")] = None,
    as_json: AsJson = False,
) -> None:
    """List dead letters with their reasons, newest first.

    Example: offbeat dead-letters ls --run demo-20260101-120000-3f9a
    """
    session: Session = ctx.obj
    letters = session.client().dead_letters(run_id).letters
    if as_json:
        print_json(session.out, letters)
    elif not letters:
        say(session.out, "none")
    else:
        rows = [(x.id, _run(x), x.stream, x.index, clock(x.at), "yes" if x.replayable else "no", x.reason) for x in letters]
        session.out.print(table(("letter", "run", "stream", "group", "time", "replayable", "reason"), rows))


@app.command("replay")
def replay(
    ctx: typer.Context,
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")],
    letter: Annotated[str, typer.Argument(metavar="LETTER", help="The letter's id, as `offbeat dead-letters ls` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Generate the group of a dead letter again.

    Example: offbeat dead-letters replay demo-20260101-120000-3f9a 1767268800000-0
    """
    session: Session = ctx.obj
    answer = session.client().replay(run_id, letter)
    if as_json:
        print_json(session.out, answer)
    else:
        say(session.out, f"group {answer.index} of {answer.run_id} will be generated again")


def _run(letter: DeadLetterView) -> str:
    return f"{letter.run_id} ({letter.evaluation})" if letter.evaluation else letter.run_id
