"""What measuring adds to the trainer's step: each part's share of a step that measures nothing beyond its loss.

    round      one step without any measurement, one with each part alone, one with all of them, in an order drawn anew
    share      median over rounds of (step with the part - step without) / step without

Time is the processor's on a CPU, so that neighbours count little, and the clock's on an accelerator. Batches are made up: the tiny model, or one that
is named, and completions of random tokens with log-probabilities near its own. The learning rate is 0, so that every step does the same work on the
same weights. The goal is that all measurements together add at most 15 %.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from rich.table import Table

from benchmarks.bench_stack import TINY, machine, tell_machine
from services.cli.output import console
from services.contracts.evaluation import Probe
from services.contracts.messages import (
    Completion,
    CompletionGroup,
    FinishReason,
    PromptGroup,
    Score,
    ScoredGroup,
    VersionSpan,
    pack_floats,
    pack_ints,
)
from services.contracts.spec import RunSpec
from trainer import step
from trainer.batching import Trajectory, pack
from trainer.measures import Measures
from trainer.minibatch import assemble, forward
from trainer.policy import Policy
from trainer.probes import PromptProbes, realised_change
from trainer.step import make_optimizer, train_step

GOAL = 0.15
VERSION = 4
PARTS = {
    "drift": "drift of the entropy in the forward pass",
    "update": "entropy, ratios, clips, covariances and budget of the trained tokens, with their bins",
    "mismatch": "trainer beside sampler at lag 0",
    "groups": "rewards and lengths of the groups",
    "probe": "entropy again after the step, on the probe tokens, spread over the versions between",
    "prompts": "prompt entropy of the probe sets, spread over the versions between",
}


@dataclass(frozen=True)
class Cost:
    """Of one part, or all, over the rounds."""

    milliseconds: float
    share: float
    least: float
    """Share at the first quartile."""
    greatest: float
    """Share at the third quartile."""


def costs(rounds: Sequence[Mapping[str, float]]) -> dict[str, Cost]:
    """`rounds` have the seconds of a step by what is measured in it, `none` among them. Raises ValueError for fewer than two."""
    found = {}
    for name in rounds[0]:
        if name != "none":
            quarters = statistics.quantiles([one[name] / one["none"] - 1 for one in rounds], n=4, method="inclusive")
            extra = statistics.median(one[name] - one["none"] for one in rounds)
            found[name] = Cost(1000 * extra, quarters[1], quarters[0], quarters[2])
    return found


def batch(policy: Policy, spec: RunSpec, *, tokens: int, seed: int) -> list[ScoredGroup]:
    """Groups whose completions have `tokens` tokens on average, sampled at the three versions before `VERSION`."""
    draw = random.Random(seed)
    return [_group(policy, spec, index, draw, tokens=tokens) for index in range(spec.batch_groups)]


def _group(policy: Policy, spec: RunSpec, index: int, draw: random.Random, *, tokens: int) -> ScoredGroup:
    vocabulary = policy.model.config.vocab_size
    prompt = [draw.randrange(vocabulary) for _ in range(4)]
    sequences = [[draw.randrange(vocabulary) for _ in range(draw.randint(tokens // 2, tokens + tokens // 2))] for _ in range(spec.group_size)]
    group = PromptGroup(
        run_id="benchmark", index=index, prompt_id=str(index), prompt="", prompt_tokens=pack_ints(prompt), group_size=spec.group_size, seed=0,
        temperature=1.0, top_p=1.0, max_tokens=2 * tokens, max_lag=VERSION, issued_version=0,
    )  # fmt: skip
    lag = draw.randrange(VERSION + 1)
    completions = tuple(
        Completion(
            tokens=pack_ints(sequence), logprobs=pack_floats([logp + draw.gauss(0, 0.1) for logp in _logprobs(policy, prompt, sequence)]), text="",
            finish=FinishReason.STOP, spans=(VersionSpan(version=VERSION - lag, start=0, end=len(sequence)),),
        )
        for sequence in sequences
    )  # fmt: skip
    done = CompletionGroup(group=group, completions=completions, server="benchmark", attempt=1, started_at=0.0)
    return ScoredGroup(completed=done, scores=tuple(Score(reward=draw.choice([0.0, 1.0]), parts=()) for _ in completions), server="benchmark")


@torch.no_grad()
def _logprobs(policy: Policy, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
    none = [0] * len(tokens)
    (one,) = pack([Trajectory(prompt_ids=prompt, completion_ids=tokens, behaviour_logps=none, versions=none, advantage=0.0)])
    return policy.forward(one.to(policy.device), temperature=1.0)[0].tolist()


@contextmanager
def measuring(*parts: str) -> Iterator[None]:
    """The trainer's step with these parts of PARTS alone, of those that lie in it."""
    instead = {
        "update": ("update_measures", _nothing), "mismatch": ("mismatch_measures", _nothing), "groups": ("_group_measures", _nothing),
        "drift": ("forward", _without_drift),
    }  # fmt: skip
    with ExitStack() as patches:
        patches.enter_context(patch.object(step, "realised_change", _nothing))  # not of every version: timed apart
        for part, (name, other) in instead.items():
            if part not in parts:
                patches.enter_context(patch.object(step, name, other))
        yield


def _nothing(*_: object, **__: object) -> Measures:
    return Measures()


_forward = step.forward


def _without_drift(*args: object, drift: bool = False, **options: object) -> object:
    return _forward(*args, **options)  # type: ignore[arg-type]


def main(
    rounds: Annotated[int, typer.Option("--rounds", "-n", min=2, help="Rounds.")] = 60,
    updates: Annotated[int, typer.Option(min=1, help="Optimiser updates on a batch.")] = 1,
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = TINY,
    device: Annotated[str, typer.Option(help="Where the model is trained: cpu or cuda.")] = "cpu",
    batch_groups: Annotated[int, typer.Option(help="Groups of a batch.")] = 16,
    group_size: Annotated[int, typer.Option(help="Completions of a group.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Mean length of a completion, in tokens.")] = 10,
    prompts: Annotated[int, typer.Option(help="Prompts of a probe set; there are two sets, one in and one out of the domain.")] = 32,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured to this file.")] = None,
) -> None:
    """Share of each measurement in the trainer's step."""
    screen, about = console(), machine()
    torch.set_num_threads(1)
    spec = RunSpec.model_validate(
        {
            "name": "measures", "model": {"path": str(model.resolve())}, "versions": 1000, "batch_groups": batch_groups, "group_size": group_size,
            "updates_per_batch": updates, "learning_rate": 0,
        }
    )  # fmt: skip
    policy = Policy.load(model, device=device)
    optimizer = make_optimizer(policy, spec)
    groups = batch(policy, spec, tokens=tokens, seed=0)
    draw = random.Random(1)
    vocabulary = policy.model.config.vocab_size
    texts = [[draw.randrange(vocabulary) for _ in range(4)] for _ in range(prompts)]
    probes = PromptProbes([Probe(name=domain, domain=domain, prompts=texts) for domain in ("in", "out")], temperature=1.0, device=policy.device)

    minibatch = assemble([(group, (0.0,) * group_size, (True,) * group_size) for group in groups], device=policy.device)
    assert minibatch is not None
    before = forward(policy, minibatch, gradient=False)
    spread: list[tuple[str, Callable[[], object], int]] = [
        ("probe", lambda: realised_change(policy, minibatch, before, most=spec.measure.probe_tokens), spec.measure.probe_every),
        ("prompts", lambda: probes.values(policy), spec.measure.prompt_entropy_every),
    ]

    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(name: str) -> float:
        parts = tuple(PARTS) if name == "all" else (name,)
        with measuring(*parts):
            began = now()
            train_step(policy, optimizer, groups, spec, VERSION, forking_nats=1.0)
            spent = now() - began
        for part, call, every in spread:
            if part in parts:
                began = now()
                call()
                spent += (now() - began) / every
        return spent

    measured = []
    with screen.status(f"{rounds} rounds"):
        for number in range(rounds + 3):
            order = ["none", *PARTS, "all"]
            draw.shuffle(order)
            one = {name: seconds(name) for name in order}
            if number >= 3:  # the first ones warm up
                measured.append(one)
    found = costs(measured)
    tell_machine(screen, about, None)
    base = 1000 * statistics.median(one["none"] for one in measured)
    trained = sum(len(c.token_ids) for group in groups for c in group.completed.completions)
    table = Table(title=f"A step on {trained} tokens of {model.name} in {updates} updates, {device}: {base:.1f} ms without measurements")
    for name in ("", "added ms", "share", "quartiles", "what it is"):
        table.add_column(name, justify="right" if name in ("added ms", "share", "quartiles") else "left")
    for name, cost in found.items():
        about_it = PARTS.get(name, "all together")
        table.add_row(name, f"{cost.milliseconds:.2f}", f"{cost.share:.1%}", f"{cost.least:.1%} to {cost.greatest:.1%}", about_it)
    screen.print(table)
    met = found["all"].share <= GOAL
    screen.print(f"goal of at most {GOAL:.0%} for all together {'met' if met else 'MISSED'}", style="green" if met else "red")
    if json_file is not None:
        content = {
            "machine": about,
            "spec": spec.model_dump(mode="json"),
            "goal": GOAL,
            "costs": {n: asdict(c) for n, c in found.items()},
            "rounds": measured,
        }
        json_file.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    typer.run(main)
