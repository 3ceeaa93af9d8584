"""Does the closed loop of staleness hold a KL divergence while throughput changes under it? On real processes, with its figure.

    .venv/bin/python -m benchmarks.staleness_control --seeds 3 --plot docs/images/staleness-control.png

A run of the tiny model with `staleness.target`. When a part of it is done, processes that only burn the processor are started beside it, which about
halves its throughput, and near its end they are stopped. The figure is the mean KL of the last half of the versions, over the target.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.bench_stack import TINY, BenchStack, Unfit, bench_stack, machine, tell_machine
from services.contracts.spec import RunSpec
from services.contracts.states import RunState
from services.contracts.views import StepView

GOAL = 0.2
"""Greatest relative distance from the target."""
BURNING = (0.5, 0.85)
"""Shares of the run between which the processor is burnt."""


@dataclass(frozen=True)
class Held:
    """What a run came to."""

    seed: int
    ratio: float
    """Mean KL of the last half of the versions, over the target."""
    seconds_before: float
    """Median time of a version before the processor was burnt."""
    seconds_during: float
    lags: tuple[int, int]
    """Least and greatest max_lag that was in force in the last half."""
    changes: int


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Runs, one for each seed.")] = 3,
    versions: Annotated[int, typer.Option(min=20, help="Versions of a run.")] = 200,
    value: Annotated[float, typer.Option(help="KL to be held, in nats.")] = 0.001,
    greatest: Annotated[int, typer.Option(help="Greatest max_lag.")] = 16,
    exact: Annotated[bool, typer.Option(help="min_lag follows max_lag.")] = True,
    learning_rate: Annotated[float, typer.Option(help="Learning rate.")] = 5e-5,
    beta1: Annotated[float, typer.Option(help="AdamW's first moment: momentum makes a policy swing on delayed gradients.")] = 0.9,
    plot: Annotated[Path | None, typer.Option(help="Draw KL and max_lag over versions into this PNG file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured to this file.")] = None,
) -> None:
    """Hold a KL divergence while throughput changes."""
    console, about = Console(), machine()
    tell_machine(console, about, None)
    found, curves = [], []
    with bench_stack() as stack:
        for seed in range(seeds):
            spec = RunSpec.model_validate(
                {
                    "name": "staleness-control", "seed": seed, "versions": versions, "learning_rate": learning_rate,
                    "model": {"path": str(TINY), "max_model_len": 64}, "record": {"samples": 16}, "checkpoint": {"every": versions},
                    "optimizer": {"beta1": beta1},
                    "staleness": {"max_lag": 0, "target": {"metric": "kl", "value": value, "least": 0, "greatest": greatest, "exact": exact}},
                }
            )  # fmt: skip
            steps = disturbed(stack, spec)
            curves.append(steps)
            found.append(held(steps, seed=seed, value=value))
            console.print(f"seed {seed}: mean KL of the last half {found[-1].ratio:.2f} of the target")
    table = Table(title=f"KL of {value} nats held over {versions} versions, {'exact' if exact else 'greatest'} lag")
    for name in ("seed", "KL / target, last half", "max_lag", "changes", "s a version before", "during"):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(
            str(one.seed), f"{one.ratio:.2f}", f"{one.lags[0]} to {one.lags[1]}", str(one.changes), f"{one.seconds_before:.2f}",
            f"{one.seconds_during:.2f}",
        )  # fmt: skip
    console.print(table)
    met = all(abs(one.ratio - 1) <= GOAL for one in found)
    console.print(f"goal of at most {GOAL:.0%} off {'met' if met else 'MISSED'}", style="green" if met else "red")
    if plot is not None:
        draw(plot, curves, value=value)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": about, "value": value, "found": [asdict(one) for one in found]}, indent=1))


def disturbed(stack: BenchStack, spec: RunSpec) -> list[StepView]:
    """Run `spec` to its end with the processor burnt between the shares BURNING of its versions. Raises Unfit."""
    begin, end = (int(share * spec.versions) for share in BURNING)
    run_id = stack.client.submit(spec).run_id
    wait(stack, run_id, begin)
    with burning():
        wait(stack, run_id, end)
    wait(stack, run_id, spec.versions)
    return stack.client.steps(run_id).steps


def wait(stack: BenchStack, run_id: str, version: int) -> None:
    while ((run := stack.client.run(run_id)).version or 0) < version:
        if run.state is RunState.FAILED:
            raise Unfit(run.reason)
        time.sleep(0.2)


@contextmanager
def burning(processes: int = 2) -> Iterator[None]:
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def held(steps: list[StepView], *, seed: int, value: float) -> Held:
    half = steps[len(steps) // 2 :]
    kl = [found for step in half if (found := step.values.get("kl_behaviour_k3_nats")) is not None]
    begin, end = (int(share * len(steps)) for share in BURNING)
    windows = [step.window[1] for step in steps]
    return Held(
        seed=seed, ratio=sum(kl) / len(kl) / value, seconds_before=median_seconds(steps[begin // 2 : begin]),
        seconds_during=median_seconds(steps[begin + 1 : end]), lags=(min(windows[len(steps) // 2 :]), max(windows[len(steps) // 2 :])),
        changes=sum(a != b for a, b in pairwise(windows)),
    )  # fmt: skip


def median_seconds(steps: list[StepView]) -> float:
    ordered = sorted(step.values.get("seconds") or 0.0 for step in steps)
    return ordered[len(ordered) // 2]


def draw(path: Path, curves: list[list[StepView]], *, value: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for seed, (steps, style) in enumerate(zip(curves, ("-", "--", ":", "-.", "-") * len(curves), strict=False)):
        versions = [step.version for step in steps]
        above.plot(versions, [step.values.get("kl_behaviour_k3_nats") for step in steps], style, label=f"seed {seed}", linewidth=1)
        below.step(versions, [step.window[1] for step in steps], style, where="post", linewidth=1)
    above.axhline(value, color="black", linewidth=1, label="target")
    above.set_ylabel("KL sampler to policy, nats")
    below.set_ylabel("max_lag, versions")
    below.set_xlabel("version")
    for axes in (above, below):
        axes.axvspan(*(share * len(curves[0]) for share in BURNING), color="0.9", label="processor burnt")
    above.legend(loc="upper left", fontsize=8, ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
