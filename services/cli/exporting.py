"""`offbeat run export`: all that is recorded of runs as files, a folder for each run."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from services.cli.attended import make_report
from services.cli.output import AsJson, print_json, say
from services.cli.session import Code, Failure, Session
from services.client import Client
from services.contracts.views import RunView, SampleView
from services.studies.display import one_line
from services.studies.export_files import Recorded, export_csv, export_json_lines, export_parquet, write_json_lines
from services.studies.export_tensorboard import export_tensorboard
from services.studies.export_wandb import Refused, export_wandb
from services.studies.run_report import spec_toml

MANIFEST = "export.json"
"""Says that a folder is an export, which the next one may replace."""


class Format(StrEnum):
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    REPORT = "report"


NEEDS = {Format.PARQUET: "pyarrow", Format.TENSORBOARD: "tensorboard", Format.WANDB: "wandb", Format.REPORT: "matplotlib"}
"""The distribution that a format is written with."""
WITH_SAMPLES = {Format.JSONL, Format.CSV, Format.PARQUET}


def export(
    ctx: typer.Context,
    run_ids: Annotated[list[str] | None, typer.Argument(metavar="[ID...]", help="Runs, as `offbeat run ls` shows them.", show_default=False)] = None,
    study: Annotated[str | None, typer.Option(metavar="ID", help="All runs of this study.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write; each run gets a folder of its own in it.")] = Path("export"),
    formats: Annotated[
        list[Format] | None, typer.Option("--format", "-f", help="May be given several times. Default: jsonl, csv and report.", show_default=False)
    ] = None,
    wandb_project: Annotated[str, typer.Option(envvar="WANDB_PROJECT", help="Project of Weights & Biases.")] = "offbeat",
    offline: Annotated[bool, typer.Option("--offline", help="For Weights & Biases: write a folder for `wandb sync`, send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write all that is recorded of runs into OUT/ID: steps, evaluations, events and samples, with the spec.

    An export that is there already is replaced as a whole, once the new one is complete.

    Example: offbeat run export demo-20260101-120000-3f9a --format tensorboard --format parquet && tensorboard --logdir export
    """
    session: Session = ctx.obj
    chosen = list(dict.fromkeys(formats or (Format.JSONL, Format.CSV, Format.REPORT)))
    check_installed(chosen)
    client = session.client()
    wanted = list(run_ids or ()) + [run.run_id for run in (client.study(study).runs if study else ()) if run.run_id is not None]
    if not wanted:
        raise Failure("which run? name one or more, or a study with --study", code=Code.USAGE)
    runs = [client.run(run_id) for run_id in dict.fromkeys(wanted)]  # one that is not known is told before anything is written
    for run in runs:
        check_replaceable(out / run.run_id)
    offline |= os.environ.get("WANDB_MODE") == "offline"
    write: dict[Format, Callable[[Path, Recorded], None]] = {
        Format.JSONL: export_json_lines,
        Format.CSV: export_csv,
        Format.PARQUET: export_parquet,
        Format.TENSORBOARD: export_tensorboard,
        Format.WANDB: lambda folder, recorded: export_wandb(folder, recorded, project=wandb_project, offline=offline),
        Format.REPORT: lambda folder, recorded: _report(client, folder, recorded),
    }
    files: list[Path] = []
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=session.err, transient=True)
    bar.disable = not session.err.is_terminal
    with bar:
        for run in runs:
            folder = export_run(client, run, out / run.run_id, chosen, write, bar)
            files += sorted(path for path in folder.rglob("*") if path.is_file())
            if not as_json:
                say(session.out, str(folder))
    if as_json:
        print_json(session.out, {"files": files})


def check_installed(formats: Sequence[Format]) -> None:
    """Raises Failure, with what to install, where a format's library is missing."""
    for one in formats:
        if (name := NEEDS.get(one)) is not None:
            try:
                metadata.version(name)
            except metadata.PackageNotFoundError as error:
                raise Failure(f"--format {one} needs {name}, which is not installed: {sys.executable} -m pip install {name}") from error


def check_replaceable(target: Path) -> None:
    """Raises Failure where something else than an export is in the place: it may be a run's checkpoints."""
    if target.exists() and not (target / MANIFEST).is_file():
        raise Failure(f"{target} is there and is no export: it is left as it is; name another folder with --out", code=Code.USAGE)


def export_run(
    client: Client, run: RunView, target: Path, formats: Sequence[Format], write: dict[Format, Callable[[Path, Recorded], None]], bar: Progress
) -> Path:
    """Write one run beside its place, then put it there; what is half written is never seen under its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    task = bar.add_task(run.run_id, total=len(formats) + 1)
    with tempfile.TemporaryDirectory(prefix=f".{run.run_id}-", dir=target.parent) as scratch:
        made, kept = Path(scratch) / "made", Path(scratch) / "samples"
        made.mkdir()
        recorded = Recorded(
            run=run, steps=client.steps(run.run_id).steps, evaluations=client.evaluations(run.run_id).evaluations,
            events=list(client.events(run.run_id)), samples=lambda: _read_samples(kept),
        )  # fmt: skip
        if WITH_SAMPLES & set(formats):
            trained = min(sum(len(step.groups) for step in recorded.steps), run.spec.record.samples)
            fetching = bar.add_task(f"{run.run_id}: groups", total=trained)
            write_json_lines(kept, bar.track(client.each_sample(run.run_id), task_id=fetching, total=trained))
            bar.remove_task(fetching)
        bar.advance(task)
        for one in formats:
            bar.update(task, description=f"{run.run_id}: {one}")
            try:
                write[one](made, recorded)
            except Refused as error:
                raise Failure(one_line(str(error))) from error
            bar.advance(task)
        (made / "spec.toml").write_text(spec_toml(run.spec))
        told = {"run_id": run.run_id, "state": run.state, "version": run.version, "formats": formats, "exported_at": time.time()}
        (made / MANIFEST).write_text(json.dumps(told, indent=2) + "\n")
        if target.exists():
            check_replaceable(target)
            target.rename(Path(scratch) / "before")
        made.rename(target)
    bar.update(task, description=run.run_id)
    return target


def _read_samples(path: Path) -> Iterator[SampleView]:
    with path.open() as file:
        for line in file:
            yield SampleView.model_validate_json(line)


def _report(client: Client, folder: Path, recorded: Recorded) -> None:
    make_report(client, recorded.run.run_id, folder)
