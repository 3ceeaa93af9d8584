"""The reward service on this machine: verifications a second and their latency, bombs among them, memory over many; beside plain math-verify and a
plain subprocess, in the same run.

    throughput   as many completions waiting as keep the threads busy, in the order in which they are drawn; latency is of the verification alone
    bombs        requests at a fixed rate (Poisson), with and without one bomb in ten; latency from the moment a request was due, of ordinary ones
    memory       resident, of the server's process and all below it, over many verifications of both kinds

What is measured is what the stream's worker and the HTTP routes both call: threads, rubric, judges, sandbox. Nothing else should run on the machine.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from prometheus_client import CollectorRegistry
from rich.table import Table

from benchmarks.bench_stack import machine, tell_machine
from reward_server.rubric import Rubric
from reward_server.scoring import Scoring
from reward_server.scoring_threads import ScoringThreads
from reward_server.tools import open_tools
from services.cli.output import console
from services.contracts.messages import Score
from services.contracts.spec import Verifier
from services.runtime.metrics import RewardMetrics
from services.runtime.settings import Settings

GOALS = {"maths, ordinary mix": 1000.0, "maths, all distinct symbolic": 200.0, "code, 5 tests": 120.0}
"""Verifications a second on two cores."""
BOMB_GOAL = 3.0
"""p99 of ordinary requests with one bomb in ten, over that without."""
BOMB_SECONDS = 1.2
"""What a bomb may cost a worker."""
BOMBS_ALONE = 8
FLAT = 1.05
"""Resident memory at the end over that after the first tenth."""
AHEAD = 64
"""Completions that wait, so that no thread is idle."""
MATH_BOMBS = (r"9^{9^{9^{9}}}", r"(10^9)!", r"2^{2^{2^{2^{2^{2}}}}}", r"\binom{10^9}{5\cdot 10^8}")

Item = tuple[str, Any]
"""(completion, answer)."""


@dataclass(frozen=True)
class Rate:
    name: str
    count: int
    per_second: float
    p50_ms: float
    p99_ms: float
    outcomes: dict[str, int]


@dataclass(frozen=True)
class Bombed:
    """Ordinary requests at a fixed rate, without and with bombs."""

    name: str
    rate: float
    p99_ms: float
    p99_with_bombs_ms: float
    bomb_s: float
    """The longest of a few bombs, one at a time: what one takes of a worker, when it need not share the processor with other bombs."""
    longest_bomb_s: float
    """Of those beside ordinary requests, which share it."""

    @property
    def ratio(self) -> float:
        return self.p99_with_bombs_ms / self.p99_ms


def ordinary(draw: random.Random) -> Iterator[Item]:
    """Four in five are numbers, most of them seen before; the rest computer algebra over some hundred questions."""
    while True:
        if draw.random() < 0.8:
            gold = draw.randrange(400)
            yield rf"so the answer is \boxed{{{gold if draw.random() < 0.5 else draw.randrange(400)}}}.", str(gold)
        else:
            a, b = draw.randrange(1, 20), draw.randrange(1, 10)
            yield rf"thus \boxed{{{b}+{a}x+\sqrt{{{draw.choice((2, 3))}}}}}", rf"{a}x+{b}+\sqrt{{2}}"


def symbolic(draw: random.Random) -> Iterator[Item]:
    """In the shapes of competition answers, each one for the first time; half of them are right, and written in another way than the gold answer."""
    number = draw.randrange(10**6)
    while True:
        number += 1
        a, b, wrong = draw.randrange(2, 50), draw.randrange(2, 50), number % 2
        shapes = (
            (rf"{number}\sqrt{{{2 + wrong}}}", rf"\sqrt{{2}}\cdot {number}"),
            (rf"\frac{{{number}\pi}}{{{a + wrong}}}", rf"\frac{{{number}}}{{{a}}}\pi"),
            (rf"{a}x^2+{number + wrong}x", rf"x({a}x+{number})"),
            (rf"({number},{a + wrong})", rf"\left({number}, {a}\right)"),
            (rf"[{a},{number + wrong})", rf"\left[{a},{number}\right)"),
            (rf"{a}+{number}i+{wrong}", rf"{number}i+{a}"),
            (rf"e^{{{number}}}+{b + wrong}", rf"{b}+e^{{{number}}}"),
            (rf"x={number + wrong}", rf"{number}=x"),
            (rf"\{{{a},{number + wrong},{b}\}}", rf"\{{{number},{b},{a}\}}"),
            (rf"\frac{{{number}}}{{{a}}}+{b}x^2+\sqrt{{{3 + wrong}}}", rf"{b}x^2+\sqrt{{3}}+\frac{{{number}}}{{{a}}}"),
        )
        answer, gold = shapes[draw.randrange(len(shapes))]
        yield rf"\boxed{{{answer}}}", gold


def programs(draw: random.Random) -> Iterator[Item]:
    """A small function with five tests; none is the same text as another, and half of them are right."""
    number = draw.randrange(10**6)
    while True:
        number += 1
        wrong = " + 1" if number % 2 else ""
        code = f"def solve(a, b):\n    # {number}\n    total = 0\n    for i in range(a, b):\n        total += i * i\n    return total{wrong}\n"
        calls = [{"args": [a, a + 10], "expected": sum(i * i for i in range(a, a + 10))} for a in range(5)]
        yield f"```python\n{code}```", {"function": "solve", "calls": calls}


def with_bombs(items: Iterator[Item], bombs: Iterator[Item], draw: random.Random) -> Iterator[tuple[bool, Item]]:
    """One in ten is a bomb, which the first part says."""
    while True:
        bomb = draw.random() < 0.1
        yield bomb, next(bombs if bomb else items)


def math_bombs() -> Iterator[Item]:
    """No two are the same text, so that none is remembered."""
    number = 0
    while True:
        number += 1
        yield rf"\boxed{{{MATH_BOMBS[number % len(MATH_BOMBS)]}+{number}}}", "7"


def code_bombs() -> Iterator[Item]:
    kinds = ("while True:\n        pass", "x = []\n    while True:\n        x.append(bytearray(1 << 20))", "import time\n    time.sleep(60)")
    number = 0
    while True:
        number += 1
        yield f"```python\ndef solve(a, b):\n    {kinds[number % len(kinds)]}\n```", {"function": "solve", "calls": [{"args": [0, 1], "expected": 0}]}


class Service:
    """The service without its streams and routes."""

    def __init__(self, scoring: Scoring) -> None:
        self.scoring = scoring

    def rubric(self, name: str, **options: Any) -> Rubric:
        return self.scoring.rubric((Verifier(name=name, options=options),))

    def submit(self, rubric: Rubric, item: Item) -> Future[Score]:
        (future,) = self.scoring.threads.submit("benchmark", [partial(self.scoring.judge, rubric, item[0], prompt="", answer=item[1])])
        return future

    def through(self, rubric: Rubric, items: Iterable[Item]) -> Iterator[Score]:
        """Their scores, with `AHEAD` waiting all the time."""
        waiting: list[Future[Score]] = []
        for item in items:
            waiting.append(self.submit(rubric, item))
            if len(waiting) >= AHEAD:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def throughput(service: Service, name: str, rubric: Rubric, items: Iterator[Item], *, seconds: float) -> Rate:
    for _ in service.through(rubric, islice(items, AHEAD)):
        pass  # processes are started and warm
    scores: list[Score] = []
    began = time.monotonic()
    for score in service.through(rubric, _until(began + seconds, items)):
        scores.append(score)
    took = time.monotonic() - began
    return Rate(name, len(scores), len(scores) / took, *_quantiles([score.seconds for score in scores]), _outcomes(scores))


def _until(deadline: float, items: Iterator[Item]) -> Iterator[Item]:
    while time.monotonic() < deadline:
        yield next(items)


def bombed(service: Service, name: str, rubric: Rubric, items: Iterator[Item], bombs: Iterator[Item], *, rate: float, seconds: float) -> Bombed:
    draw = random.Random(0)
    alone = max(service.submit(rubric, next(bombs)).result().seconds for _ in range(BOMBS_ALONE))
    without, _ = _at_rate(service, rubric, ((False, item) for item in items), rate=rate, seconds=seconds, draw=draw)
    beside, costs = _at_rate(service, rubric, with_bombs(items, bombs, draw), rate=rate, seconds=seconds, draw=draw)
    return Bombed(name, rate, _quantiles(without)[1], _quantiles(beside)[1], alone, max(costs, default=0.0))


def _at_rate(
    service: Service, rubric: Rubric, items: Iterator[tuple[bool, Item]], *, rate: float, seconds: float, draw: random.Random
) -> tuple[list[float], list[float]]:
    """(seconds from due to done of ordinary requests, seconds that each bomb took of a worker)."""
    latencies: list[float] = []
    bombs: list[Future[Score]] = []
    ordinary: list[Future[Score]] = []
    due = time.monotonic()
    end = due + seconds
    while due < end:
        time.sleep(max(0.0, due - time.monotonic()))
        bomb, item = next(items)
        future = service.submit(rubric, item)
        (bombs if bomb else ordinary).append(future)
        if not bomb:
            future.add_done_callback(partial(_note, latencies, due))
        due += draw.expovariate(rate)
    for future in [*ordinary, *bombs]:
        future.result()
    return latencies, [future.result().seconds for future in bombs]


def _note(latencies: list[float], due: float, _: Future[Score]) -> None:
    latencies.append(time.monotonic() - due)


def memory(service: Service, rubrics: Sequence[tuple[Rubric, Iterator[Item]]], *, count: int) -> list[float]:
    """Megabytes resident after each tenth of `count` verifications."""
    found: list[float] = []
    for _ in range(10):
        for rubric, items in rubrics:
            for _ in service.through(rubric, islice(items, count // 10 // len(rubrics))):
                pass
        found.append(_resident())
    return found


def _resident() -> float:
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


# -- what it is held against ------------------------------------------------------------------------------------------------------------


def plain_math(item: Item) -> float:
    """math-verify as its documentation has it, without time-outs; seconds."""
    from math_verify import parse, verify

    began = time.monotonic()
    verify(parse(f"${item[1]}$", parsing_timeout=None), parse(item[0], parsing_timeout=None), timeout_seconds=None)
    return time.monotonic() - began


def plain_subprocess(item: Item) -> float:
    """The function with its tests as asserts, in a fresh interpreter; seconds."""
    code, record = item[0].removeprefix("```python\n").removesuffix("```"), item[1]
    tests = "\n".join(f"assert {record['function']}(*{call['args']!r}) == {call['expected']!r}" for call in record["calls"])
    began = time.monotonic()
    subprocess.run([sys.executable, "-I", "-c", f"{code}\n{tests}"], capture_output=True, timeout=60, check=False)
    return time.monotonic() - began


def plain(name: str, run: Callable[[Item], float], pool: Any, items: Iterator[Item], *, count: int) -> Rate:
    chosen = list(islice(items, count))
    list(pool.map(run, chosen[:8]))  # warm
    began = time.monotonic()
    times = list(pool.map(run, chosen))
    return Rate(name, count, count / (time.monotonic() - began), *_quantiles(times), {})


def _quantiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile in milliseconds."""
    if len(seconds) < 2:
        return (1000 * sum(seconds), 1000 * sum(seconds))
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return 1000 * cuts[49], 1000 * cuts[98]


def _outcomes(scores: Iterable[Score]) -> dict[str, int]:
    return dict(Counter(part.said for score in scores for part in score.parts))


def main(
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each throughput.")] = 20.0,
    bomb_seconds: Annotated[float, typer.Option(min=0.1, help="Of each of the two phases with and without bombs.")] = 60.0,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests a second beside bombs: a tenth of them costs a second each.")] = 8.0,
    verifications: Annotated[int, typer.Option(min=20, help="Over which memory is watched.")] = 100_000,
    plain_count: Annotated[int, typer.Option(min=8, help="Of plain math-verify and of plain subprocesses.")] = 400,
    code: Annotated[bool, typer.Option(help="Measure code too, which needs a sandbox.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for everything that was measured.")] = None,
) -> None:
    """Measure the reward service. Ends with 1 when a goal is missed."""
    out = console()
    about = machine()
    tell_machine(out, about, None)
    metrics, draw = RewardMetrics(CollectorRegistry()), random.Random(0)
    settings = Settings()
    threads = ScoringThreads(settings.reward_threads)
    rates: list[Rate] = []
    with multiprocessing.get_context("spawn").Pool(2) as processes, ThreadPoolExecutor(2) as pairs:
        rates.append(plain("plain math-verify, two processes, ordinary mix", plain_math, processes, ordinary(draw), count=plain_count))
        rates.append(plain("plain math-verify, two processes, all distinct", plain_math, processes, symbolic(draw), count=plain_count))
        if code:
            rates.append(plain("plain subprocess, two at a time", plain_subprocess, pairs, programs(draw), count=plain_count))
    with open_tools(settings, metrics) as tools:
        service = Service(Scoring(tools, threads, metrics))
        maths = service.rubric("math")
        coding = service.rubric("code", seconds=1.0, seconds_per_test=1.0) if code else None
        rates.append(throughput(service, "maths, ordinary mix", maths, ordinary(draw), seconds=seconds))
        rates.append(throughput(service, "maths, all distinct symbolic", maths, symbolic(draw), seconds=seconds))
        if coding:
            rates.append(throughput(service, "code, 5 tests", coding, programs(draw), seconds=seconds))
        beside = [bombed(service, "maths", maths, symbolic(draw), math_bombs(), rate=rate, seconds=bomb_seconds)]
        if coding:
            beside.append(bombed(service, "code", coding, programs(draw), code_bombs(), rate=rate, seconds=bomb_seconds))
        watched = [(maths, ordinary(draw)), (maths, symbolic(draw)), *([(coding, programs(draw))] if coding else [])]
        resident = memory(service, watched, count=verifications)
        tier = tools.sandbox().tier.value if code else ""
    threads.close()
    missed = _tell(out, rates, beside, resident, verifications, tier)
    if json_file is not None:
        found = {
            "machine": about, "tier": tier, "rates": [asdict(one) for one in rates], "missed": missed,
            "bombs": [{**asdict(one), "ratio": one.ratio} for one in beside], "resident_mb": resident, "verifications": verifications,
        }  # fmt: skip
        json_file.write_text(json.dumps(found, indent=1))
    if missed:
        raise typer.Exit(1)


def _tell(out: Any, rates: Sequence[Rate], beside: Sequence[Bombed], resident: Sequence[float], verifications: int, tier: str) -> list[str]:
    """Prints the tables; what missed its goal."""
    missed = [f"{one.name}: {one.per_second:.0f}/s" for one in rates if one.per_second < GOALS.get(one.name, 0.0)]
    missed += [f"bombs beside {one.name}: p99 {one.ratio:.1f}x" for one in beside if one.ratio >= BOMB_GOAL]
    missed += [f"bombs beside {one.name}: {one.bomb_s:.2f} s of a worker" for one in beside if one.bomb_s > BOMB_SECONDS]
    if resident[-1] > FLAT * resident[0]:
        missed.append(f"memory: {resident[0]:.0f} to {resident[-1]:.0f} MB")
    table = Table("", "a second", "p50, ms", "p99, ms", "goal", "outcomes", box=None)
    for one in rates:
        goal = GOALS.get(one.name)
        outcomes = ", ".join(f"{name} {count}" for name, count in one.outcomes.items())
        table.add_row(one.name, f"{one.per_second:,.0f}", f"{one.p50_ms:.2f}", f"{one.p99_ms:.1f}", f"{goal:,.0f}" if goal else "", outcomes)
    out.print(table)
    table = Table("beside bombs", "requests/s", "p99 without, ms", "p99 with, ms", "ratio", "bomb alone, s", "longest beside, s", box=None)
    for two in beside:
        table.add_row(
            two.name,
            f"{two.rate:g}",
            f"{two.p99_ms:.1f}",
            f"{two.p99_with_bombs_ms:.1f}",
            f"{two.ratio:.2f}",
            f"{two.bomb_s:.2f}",
            f"{two.longest_bomb_s:.2f}",
        )
    out.print(table)
    out.print(
        f"memory over {verifications:,} verifications, by tenths: {', '.join(f'{mb:.0f}' for mb in resident)} MB" + (f"; tier {tier}" if tier else "")
    )
    out.print("every goal is met" if not missed else "missed: " + "; ".join(missed))
    return missed


if __name__ == "__main__":
    typer.run(main)
