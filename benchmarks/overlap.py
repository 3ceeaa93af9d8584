"""How much of the time of generation and training overlaps: throughput of the windows {0,0}, {0,1} and {0,4}, each beside its ideal.

    T_gen      from the announcement of a version until its batch is there: dispatch, generation, rewards        } both measured in {0,0}, where
    T_train    training, publication and checkpoint of a version                                                  } neither disturbs the other
    ideal      {0,0}: T_gen + T_train;  {0,k}: max(T_gen, T_train)

All windows are measured in one go on one stack, in turns, and each round's ideal is that of its own {0,0}: a machine that slows down slows both.
The ratio ideal / measured (seconds a version) should be at least 0.9. That of {0,0} says only that nothing lies between the phases. A ratio above 1
is possible: a window that lets more groups in keeps the engine's batch full, where in {0,0} it runs empty at the end of each batch.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.bench_stack import TINY, BenchStack, Unfit, bench_stack, machine, tell_machine
from services.cli.output import console
from services.contracts.spec import KvPolicy, RunSpec
from services.contracts.views import StepView

MAX_LAGS = (0, 1, 4)
"""The windows {0,k}. The first is the synchronous one, from which the ideals come."""
GOAL = 0.9
PHASES = ("batch_wait", "train", "publish_prepare", "publish_wait", "publish_deliver", "checkpoint")
TRAINING = ("train", "publish_prepare", "publish_deliver", "checkpoint")
IDLE = ("idle_trainer", "idle_rollout")


@dataclass(frozen=True)
class Pass:
    """One run of one window: means over its counted versions, in seconds a version."""

    max_lag: int
    seconds: float
    tokens: float
    """Trained tokens a version."""
    phases: dict[str, float]
    idle: dict[str, float]
    cpu: dict[str, float]
    """Processor seconds by kind of process."""

    @property
    def generation(self) -> float:
        """T_gen, if this is a synchronous pass."""
        return self.phases["batch_wait"]

    @property
    def training(self) -> float:
        """T_train."""
        return sum(self.phases[phase] for phase in TRAINING)


@dataclass(frozen=True)
class Spread:
    """Of one figure over the rounds."""

    median: float
    least: float
    greatest: float

    def show(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.least:.{digits}f}-{self.greatest:.{digits}f})"


@dataclass(frozen=True)
class Result:
    """What one window came to."""

    max_lag: int
    versions_per_second: Spread
    tokens_per_second: Spread
    seconds: Spread
    """Measured, a version."""
    ideal_seconds: Spread
    ratio: Spread
    """Ideal over measured."""

    @property
    def met(self) -> bool:
        return self.ratio.median >= GOAL


def rounds(max_lags: Sequence[int], repetitions: int) -> list[list[int]]:
    """The order of the windows in each round: rotated, so that none always comes first."""
    return [[*max_lags[i % len(max_lags) :], *max_lags[: i % len(max_lags)]] for i in range(repetitions)]


def make_pass(max_lag: int, steps: Sequence[StepView], cpu_seconds: dict[str, float]) -> Pass:
    """Means over `steps`; `cpu_seconds` are those of all of them together."""

    def mean(name: str) -> float:
        return statistics.fmean(step.values[name] or 0.0 for step in steps)

    return Pass(
        max_lag, mean("seconds"), mean("tokens"), {phase: mean(f"{phase}_seconds") for phase in PHASES},
        {name: mean(f"{name}_seconds") for name in IDLE}, {name: seconds / len(steps) for name, seconds in cpu_seconds.items()},
    )  # fmt: skip


def processor_limit(cpu: Mapping[str, float], cores: int) -> float:
    """Least seconds a version on `cores` cores with the work as it is: each side of the pipeline has one, and all must fit.

    Unlike the ideal, it counts what Redis, the control plane and the reward server take, and what the KV cache of running requests costs a load.
    """
    rollout = cpu["rollout"] + cpu["engine"]
    return max(rollout, cpu["trainer"], sum(cpu.values()) / cores)


def ideal(max_lag: int, synchronous: Pass) -> float:
    """Least seconds a version of the window {0, max_lag}."""
    both = (synchronous.generation, synchronous.training)
    return max(both) if max_lag else sum(both)


def results(passes: Sequence[Sequence[Pass]]) -> list[Result]:
    """One for each window, from rounds that each hold one pass of each window."""
    found = []
    for max_lag in sorted({p.max_lag for p in passes[0]}):
        mine = [next(p for p in one if p.max_lag == max_lag) for one in passes]
        ideals = [ideal(max_lag, next(p for p in one if p.max_lag == 0)) for one in passes]
        found.append(
            Result(
                max_lag,
                versions_per_second=_spread([1 / p.seconds for p in mine]),
                tokens_per_second=_spread([p.tokens / p.seconds for p in mine]),
                seconds=_spread([p.seconds for p in mine]),
                ideal_seconds=_spread(ideals),
                ratio=_spread([best / p.seconds for best, p in zip(ideals, mine, strict=True)]),
            )
        )
    return found


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def write_prompts(path: Path, *, tokens: int, count: int = 512) -> None:
    """A JSONL data set of prompts of about so many tokens: a character each, for the tiny model.

    Longer than the task's own, so that training, which goes over the prompt with every completion, takes as long as generation, which goes over it
    once a group.
    """
    digits = random.Random(0)
    rows = ({"prompt": "".join(digits.choices("123456789+", k=tokens - 1)) + "=", "answer": digits.randint(8, 40)} for _ in range(count))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def measure(stack: BenchStack, spec: RunSpec, max_lag: int, *, versions: int, drop: int) -> Pass:
    """`spec` under the window {0, max_lag}: the first `drop` versions are not counted, nor the last `max_lag`, for which nothing is generated."""
    tree = spec.model_dump() | {"name": f"overlap-{max_lag}", "versions": drop + versions + max_lag, "staleness": {"max_lag": max_lag}}
    timed = stack.run(RunSpec.model_validate(tree), first=drop, last=drop + versions)
    return make_pass(max_lag, timed.steps[drop : drop + versions], timed.cpu_seconds)


def main(
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; each measures every window.")] = 3,
    versions: Annotated[int, typer.Option(min=1, help="Counted versions of a run.")] = 20,
    drop: Annotated[int, typer.Option(min=1, help="Versions dropped before them.")] = 8,
    batch_groups: Annotated[int, typer.Option(help="Groups of a batch.")] = 16,
    group_size: Annotated[int, typer.Option(help="Completions of a group.")] = 16,
    updates_per_batch: Annotated[int, typer.Option(help="Optimiser updates made on a batch.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Length of a prompt: longer ones make training longer, generation hardly.")] = 40,
    max_tokens: Annotated[int, typer.Option(help="Longest completion.")] = 16,
    kv_policy: Annotated[KvPolicy, typer.Option(help="What a load does to the KV cache of running requests.")] = KvPolicy.RECOMPUTE,
    pin: Annotated[bool, typer.Option(help="Pin rollout server and trainer to a core each.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured to this file.")] = None,
) -> None:
    """Throughput of the windows {0,0}, {0,1} and {0,4} on the tiny model, beside the ideal."""
    screen, about = console(), machine()
    passes: list[list[Pass]] = []
    with bench_stack() as stack:
        data = stack.home / "prompts.jsonl"
        write_prompts(data, tokens=prompt_tokens)
        spec = RunSpec.model_validate(
            {
                "model": {"path": str(TINY), "max_model_len": prompt_tokens + max_tokens + 32}, "data": {"source": "jsonl", "path": str(data)},
                "batch_groups": batch_groups, "group_size": group_size, "updates_per_batch": updates_per_batch,
                "sampling": {"max_tokens": max_tokens}, "kv_policy": kv_policy, "learning_rate": 1e-9,  # completions stay as long as they are
            }
        )  # fmt: skip
        measure(stack, spec, 1, versions=1, drop=1)  # starts the engine
        pinned = stack.pin() if pin else None
        for number, order in enumerate(rounds(MAX_LAGS, repetitions), 1):
            done = []
            for max_lag in order:
                with screen.status(f"round {number} of {repetitions}: {{0,{max_lag}}}"):
                    done.append(measure(stack, spec, max_lag, versions=versions, drop=drop))
            passes.append(done)
    found = results(passes)
    tell_machine(screen, about, pinned)
    screen.print(_summary(found), _times(passes, about["cores"]))
    for result in found[1:]:
        word = "met" if result.met else "MISSED"
        screen.print(f"{{0,{result.max_lag}}}: goal of {GOAL} {word} ({result.ratio.median:.2f} of ideal)", style="green" if result.met else "red")
    if json_file is not None:
        content = {"machine": about, "pinned": pinned, "spec": spec.model_dump(mode="json"), "goal": GOAL, "results": [asdict(r) for r in found],
                   "rounds": [[asdict(p) for p in one] for one in passes]}  # fmt: skip
        json_file.write_text(json.dumps(content, indent=1))


def _summary(found: Sequence[Result]) -> Table:
    table = Table(title="Throughput beside its ideal: median (least-greatest) of the rounds")
    for name in ("window", "versions/s", "trained tokens/s", "s a version", "ideal", "ratio"):
        table.add_column(name, justify="right")
    for r in found:
        figures = (r.versions_per_second.show(2), r.tokens_per_second.show(0), r.seconds.show(3), r.ideal_seconds.show(3), r.ratio.show(2))
        table.add_row(f"{{0,{r.max_lag}}}", *figures)
    return table


def _times(passes: Sequence[Sequence[Pass]], cores: int) -> Table:
    """Where the time goes."""
    table = Table(title="Milliseconds a version, mean of the rounds")
    windows = sorted({p.max_lag for p in passes[0]})
    table.add_column("")
    for max_lag in windows:
        table.add_column(f"{{0,{max_lag}}}", justify="right")

    def row(label: str, value: Sequence[float]) -> None:
        table.add_row(label, *(f"{1000 * v:.0f}" for v in value))

    by_window = [[p for one in passes for p in one if p.max_lag == max_lag] for max_lag in windows]
    for phase in PHASES:
        row(f"trainer: {phase.replace('_', ' ')}", [statistics.fmean(p.phases[phase] for p in mine) for mine in by_window])
    for name in IDLE:
        row(name.replace("_", ": "), [statistics.fmean(p.idle[name] for p in mine) for mine in by_window])
    for name in passes[0][0].cpu:
        row(f"processor: {name}", [statistics.fmean(p.cpu[name] for p in mine) for mine in by_window])
    row("processor: least time on these cores", [statistics.fmean(processor_limit(p.cpu, cores) for p in mine) for mine in by_window])
    return table


if __name__ == "__main__":
    try:
        typer.run(main)
    except Unfit as error:
        raise SystemExit(str(error)) from error
