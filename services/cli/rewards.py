"""`offbeat reward score`: score the completions of a file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from services.cli.interrupts import Interrupts
from services.cli.json_lines import Line, batches_of, last_result, line_by_line, lines_of, progress, refuse_unreadable, side_by_side
from services.cli.output import AsJson, print_json, say, table
from services.cli.reward_api import reward_api
from services.cli.session import Code, Failure, Session
from services.cli.specs import assignments, read_tree
from services.contracts.scoring import ItemView
from services.contracts.spec import Verifier
from services.contracts.views import ProblemDocument

app = typer.Typer(no_args_is_help=True, help="Score completions, and check gold answers before a run.")
Server = Annotated[
    str | None, typer.Option(metavar="URL", help="Reward server to ask; default: the local stack's, or one that is started for the time.")
]
ClusterToken = Annotated[Path | None, typer.Option(envvar="OFFBEAT_CLUSTER_TOKEN_FILE", help="File with the token of that reward server.")]
Rewards = Annotated[Path | None, typer.Option(metavar="FILE", help="TOML or JSON file with [[rewards]], such as a run spec.")]
Name = Annotated[str | None, typer.Option("--verifier", metavar="NAME", help="One verifier, in place of --rewards.")]
Options = Annotated[list[str] | None, typer.Option("--option", metavar="K=V", help="Option of that verifier; may be given several times.")]

SHOWN = 20
"""Lines that a summary names."""


@app.command("score")
def score(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON Lines with the fields completion and, as the verifiers need, answer, prompt.")],
    rewards: Rewards = None,
    verifier: Name = None,
    options: Options = None,
    out: Annotated[Path | None, typer.Option(help="File to write, one result a line.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted --out file ends.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    server: Server = None,
    cluster_token_file: ClusterToken = None,
    as_json: AsJson = False,
) -> None:
    """Score the completions of a file.

    Ends with 1 when some line has no reward: it could not be read, or its verifier could not judge it.

    Example: offbeat reward score completions.jsonl --verifier math --out scores.jsonl
    """
    session: Session = ctx.obj
    rubric = rubric_of(rewards, verifier, options or ())
    refuse_unreadable(file)
    done = last_result(out, of=file, resume=resume, force=force)
    summary = Summary()
    lines = (line for line in lines_of(file, ("completion", "answer", "prompt"), required="completion") if line.number > done)

    def ask(batch: list[Line]) -> list[ItemView]:
        items = [line.item for line in batch if line.item is not None]
        views = iter(api.score(rubric, items).items if items else ())
        return [_not_read(line) if line.item is None else next(views) for line in batch]

    def judge(batch: list[Line]) -> list[ItemView]:
        return line_by_line(batch, ask, refused=lambda problem: ItemView(problem=problem))

    try:
        with Interrupts() as interrupts, reward_api(session, server=server, token_file=cluster_token_file) as api:
            api.check(rubric)  # before an older file of results is written over
            with open(os.devnull if out is None else out, "a" if resume else "w", encoding="utf-8") as sink, progress(session.err, file) as advance:
                for batch, found in side_by_side(batches_of(lines), judge):
                    with interrupts.held():  # a batch is written whole or not at all
                        for line, view in zip(batch, found, strict=True):
                            summary.add(line, view)
                            sink.write(json.dumps({"line": line.number, **view.model_dump(mode="json", exclude_none=True)}) + "\n")
                        sink.flush()
                    advance(batch)
    except KeyboardInterrupt:
        if out is not None:
            say(session.err, f"interrupted: {out} has what was judged, --resume goes on with it", "yellow")
        raise
    summary.tell(session, as_json=as_json, skipped=done)
    if summary.unscored:
        raise typer.Exit(Code.FAILED)


def rubric_of(file: Path | None, name: str | None, options: Sequence[str]) -> tuple[Verifier, ...]:
    """The verifiers that the options of a command name."""
    if (file is None) == (name is None):
        raise Failure("name the verifiers: either --rewards FILE or --verifier NAME", code=Code.USAGE)
    if name is not None:
        return (Verifier(name=name, options=assignments(options)),)
    if options:
        raise Failure("--option is for --verifier: put the options of --rewards into its file", code=Code.USAGE)
    assert file is not None
    tree = read_tree(file).get("rewards")
    try:
        rubric = TypeAdapter(tuple[Verifier, ...]).validate_python(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in ("rewards", *first["loc"]))
        raise Failure(f"{file}: {where}: {first['msg']}; write it as [[rewards]] of a run spec", code=Code.USAGE) from error
    if not rubric:
        raise Failure(f"{file} has no rewards: give at least one", code=Code.USAGE)
    return rubric


class Summary:
    """What came out, by outcome."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.rewards: dict[str, float] = {}
        self.milliseconds: list[float] = []
        self.unscored: list[tuple[int, str]] = []
        """(line, why) of what has no reward."""

    def add(self, line: Line, view: ItemView) -> None:
        outcome = view.score.outcome if view.score else "not read"
        self.count[outcome] += 1
        if view.score:
            self.milliseconds.append(view.score.milliseconds)
        if view.score and view.score.reward is not None:
            self.rewards[outcome] = self.rewards.get(outcome, 0.0) + view.score.reward
        else:
            self.unscored.append((line.number, why_not(view)))

    def tell(self, session: Session, *, as_json: bool, skipped: int) -> None:
        scored = sum(self.count.values()) - len(self.unscored)
        mean = sum(self.rewards.values()) / scored if scored else None
        times = sorted(self.milliseconds)
        p50, p99 = (times[int(q * (len(times) - 1))] if times else None for q in (0.5, 0.99))
        if as_json:
            unscored = [{"line": number, "why": why} for number, why in self.unscored]
            print_json(
                session.out,
                {
                    "outcomes": dict(self.count), "scored": scored, "reward_mean": mean, "skipped": skipped, "milliseconds_p50": p50,
                    "milliseconds_p99": p99, "unscored": unscored,
                },
            )  # fmt: skip
            return
        rows = [(outcome, count, mean_of(self.rewards.get(outcome), count)) for outcome, count in self.count.most_common()]
        session.out.print(table(("outcome", "completions", "mean reward"), rows))
        if mean is not None:
            say(session.out, f"{scored:,} scored, mean reward {mean:.4f}; {p50:.1f} ms each at the median, {p99:.1f} ms at the 99th percentile")
        if skipped:
            say(session.out, f"{skipped:,} lines were there already")
        for number, why in self.unscored[:SHOWN]:
            say(session.err, f"line {number}: {why}", "yellow")
        if len(self.unscored) > SHOWN:
            say(session.err, f"and {len(self.unscored) - SHOWN:,} lines more without a reward", "yellow")


def _not_read(line: Line) -> ItemView:
    return ItemView(problem=ProblemDocument(title="Not read", status=422, detail=line.problem))


def why_not(view: ItemView) -> str:
    """Why there is no reward; empty when nothing went wrong."""
    if view.problem is not None:
        return "; ".join([view.problem.detail, *(f"{error.field}: {error.problem}" for error in view.problem.errors)])
    parts = view.score.parts if view.score else ()
    return "; ".join(f"{part.verifier}: {part.outcome}: {part.detail}" for part in parts if part.outcome != "ok")


def mean_of(total: float | None, count: int) -> str | None:
    return None if total is None else f"{total / count:.4f}"
