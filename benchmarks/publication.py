"""What a weight publication costs: for how long generation stands still, and how long the trainer is at it, from one run with the window {0,2}.

    stall         from the call that pauses the engine until it has resumed, at the slowest server: the goal is a median under 100 ms
    publication   prepare (the weights are copied to shared memory) and deliver (every server loads them and proves it): under 250 ms

The goals are for the tiny model on CPU. The engine is busy all the while, as it is in training.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.bench_stack import TINY, Unfit, bench_stack, machine, tell_machine
from services.cli.output import console
from services.contracts.spec import RunSpec
from services.contracts.views import StepView

GOALS = {"stall": 0.100, "publication": 0.250}
"""Greatest median, in seconds."""


@dataclass(frozen=True)
class Figures:
    """Of one duration over all publications, in seconds."""

    median: float
    p90: float
    greatest: float


def figures(seconds: Sequence[float]) -> Figures:
    """Raises ValueError for fewer than two."""
    if len(seconds) < 2:
        raise ValueError("give at least two publications")
    return Figures(statistics.median(seconds), statistics.quantiles(seconds, n=10, method="inclusive")[8], max(seconds))


def durations(steps: Sequence[StepView]) -> dict[str, list[float]]:
    """Seconds of each publication, by what is timed."""
    stages = {"stall": ("publish_stall",), "prepare": ("publish_prepare",), "deliver": ("publish_deliver",),
              "publication": ("publish_prepare", "publish_deliver")}  # fmt: skip
    return {name: [sum(step.values[f"{stage}_seconds"] or 0.0 for stage in of) for step in steps] for name, of in stages.items()}


def main(
    publications: Annotated[int, typer.Option("--publications", "-n", min=2, help="How many are counted.")] = 100,
    drop: Annotated[int, typer.Option(min=0, help="How many before them are not.")] = 5,
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = TINY,
    dtype: Annotated[str, typer.Option(help="Number format that is served: float32 or bfloat16.")] = "float32",
    batch_groups: Annotated[int, typer.Option(help="Groups of a batch.")] = 16,
    group_size: Annotated[int, typer.Option(help="Completions of a group.")] = 8,
    pin: Annotated[bool, typer.Option(help="Pin rollout server and trainer to a core each.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured to this file.")] = None,
) -> None:
    """Stall of generation and whole time of weight publications."""
    screen, about = console(), machine()
    spec = RunSpec.model_validate(
        {
            "name": "publication", "model": {"path": str(model.resolve()), "dtype": dtype, "max_model_len": 64}, "versions": drop + publications,
            "batch_groups": batch_groups, "group_size": group_size, "learning_rate": 1e-9, "staleness": {"max_lag": 2},
        }
    )  # fmt: skip
    with bench_stack() as stack, screen.status(f"{publications} publications of {model}"):
        stack.run(RunSpec.model_validate(spec.model_dump() | {"versions": 2}))  # starts the engine
        pinned = stack.pin() if pin else None
        steps = stack.run(spec).steps[drop:]
    found = {name: figures(seconds) for name, seconds in durations(steps).items()}
    tell_machine(screen, about, pinned)
    table = Table(title=f"{publications} publications of {model.name} ({dtype}), milliseconds")
    for name in ("", "median", "p90", "greatest"):
        table.add_column(name, justify="right" if name else "left")
    for name, f in found.items():
        table.add_row(name, *(f"{1000 * seconds:.1f}" for seconds in (f.median, f.p90, f.greatest)))
    screen.print(table)
    if model.resolve() == TINY:
        for name, goal in GOALS.items():
            met = found[name].median < goal
            screen.print(f"{name}: goal of a median under {1000 * goal:.0f} ms {'met' if met else 'MISSED'}", style="green" if met else "red")
    if json_file is not None:
        content = {"machine": about, "pinned": pinned, "spec": spec.model_dump(mode="json"), "goals": GOALS,
                   "figures": {name: asdict(f) for name, f in found.items()}, "seconds": durations(steps)}  # fmt: skip
        json_file.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    try:
        typer.run(main)
    except Unfit as error:
        raise SystemExit(str(error)) from error
