"""`offbeat demo`: the whole system on this machine, from nothing to a report, and nothing left running."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import typer

from services.cli.attended import attend
from services.cli.output import AsJson
from services.cli.session import ROOT, Code, Failure, Session
from services.cli.specs import Sets, load_spec
from services.client import Client
from services.contracts.spec import RunSpec, with_values

DEMO = ROOT / "deploy/runs/demo.toml"


def demo(
    ctx: typer.Context,
    sets: Sets = None,
    keep_up: Annotated[bool, typer.Option("--keep-up", help="Leave the stack running at the end.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of the live panel; always so when the output is no terminal.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the demo run, from nothing to a report.

    Starts the stack, shows the run live, writes its report, and takes the stack down.
    Ctrl-C at any time pauses the run and takes the stack down; `offbeat run resume ID` goes on.

    Example: offbeat demo --set versions=40
    """
    session: Session = ctx.obj
    if not DEMO.is_file():
        raise Failure(f"{DEMO} is not there: the demo runs from a checkout of the repository", code=Code.USAGE)
    spec = from_checkout(load_spec(DEMO, sets or ()))

    def begin(client: Client) -> str:
        return client.submit(spec, idempotency_key=secrets.token_hex(8)).run_id

    raise typer.Exit(attend(session, begin, plain=plain, keep_up=keep_up, as_json=as_json))


def from_checkout(spec: RunSpec) -> RunSpec:
    """`spec` with a model's folder that is given relative to the checkout made absolute, so that the demo runs from any folder."""
    path = Path(spec.model.path)
    if path.exists() or not (ROOT / path).exists():
        return spec
    return with_values(spec, {"model.path": str(ROOT / path)})
