"""The `offbeat` command."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from services.cli import data, dead_letters, demo, doctor, gold_answers, init, local_stack, logs, models, replay, rewards, runs, studies
from services.cli.output import say
from services.cli.session import Code, Failure, Parts, Session
from services.client import ApiError, Unreachable
from services.local.redis_server import NoRedisServer
from services.local.stack import DEFAULT_HOME, StackError
from services.studies.display import harmless

EXPECTED = (Failure, ApiError, Unreachable, StackError, NoRedisServer, OSError)
"""What a user can meet without a fault of the program; everything else shows its traceback."""


class Offbeat(TyperGroup):
    """Ends a command that failed with one clear sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        parts: Parts = ctx.obj or Parts()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Exit(Code.INTERRUPTED) from error
        except EXPECTED as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise
            if ctx.params["debug"]:
                traceback.print_exc()
            say(parts.err, f"offbeat: {harmless(str(error))}", "red")
            raise typer.Exit(code_for(error)) from error


def code_for(error: BaseException) -> Code:
    """The exit code that tells what kind of error it was."""
    match error:
        case Failure():
            return error.code
        case Unreachable():
            return Code.NO_STACK
        case ApiError(status=404):
            return Code.NOT_FOUND
        case ApiError(status=400 | 413 | 415 | 422):
            return Code.USAGE
        case _:
            return Code.FAILED


app = typer.Typer(cls=Offbeat, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode=None)
app.command()(local_stack.up)
app.command()(local_stack.down)
app.command()(demo.demo)
app.add_typer(runs.app, name="run")
app.add_typer(studies.app, name="study")
app.command()(replay.replay)
app.command()(local_stack.fleet)
app.command()(logs.logs)
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="model")
rewards.app.command("check")(gold_answers.check)
app.add_typer(rewards.app, name="reward")
app.add_typer(dead_letters.app, name="dead-letters")
app.command()(doctor.doctor)
app.command()(init.init)


@app.callback()
def root(
    ctx: typer.Context,
    url: Annotated[str | None, typer.Option(envvar="OFFBEAT_URL", help="API to talk to; default: the local stack's.")] = None,
    token_file: Annotated[Path | None, typer.Option(envvar="OFFBEAT_TOKEN_FILE", help="File with the token of that API.")] = None,
    home: Annotated[Path, typer.Option(envvar="OFFBEAT_HOME", help="Folder of the local stack: its state, tokens and logs.")] = DEFAULT_HOME,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Asynchronous reinforcement learning with verifiable rewards, with staleness as a live dial.

    Start with: offbeat doctor, then offbeat demo.

    \b
    Exit codes:
      0    done
      1    the run or the operation failed, or was refused
      2    wrong command line, or a spec that is not valid
      3    no stack runs, or the API does not answer
      4    not found
      130  interrupted
    """
    ctx.obj = Session(home=home, url=url, token_file=token_file, debug=debug, parts=ctx.obj or Parts())


def main() -> None:
    app(prog_name="offbeat")


if __name__ == "__main__":
    main()
