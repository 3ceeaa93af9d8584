"""`offbeat reward check`: a data set's gold answers against their own verifier, before a run finds out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from services.cli.interrupts import Interrupts
from services.cli.json_lines import Line, batches_of, line_by_line, lines_of, progress, refuse_unreadable, side_by_side
from services.cli.output import AsJson, print_json, say, table
from services.cli.reward_api import RewardApi, reward_api
from services.cli.rewards import SHOWN, ClusterToken, Name, Options, Rewards, Server, rubric_of, why_not
from services.cli.session import Code, Failure, Session
from services.cli.specs import Sets, load_spec
from services.contracts.evaluation import set_spec
from services.contracts.scoring import GoldView, ItemView
from services.contracts.spec import RunSpec, Verifier
from services.local.programs import ProgramFailed, run_module

Answer = GoldView | str
"""What the server says of a gold answer, or why it says nothing."""
RIGHT = 1.0
"""Score that a gold answer must have."""


def check(
    ctx: typer.Context,
    file: Annotated[Path | None, typer.Argument(metavar="[SPEC]", help="Run spec whose data, and those of its evaluation sets, are checked.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON Lines to check, in place of a run spec.")] = None,
    rewards: Rewards = None,
    verifier: Name = None,
    options: Options = None,
    prompt_field: Annotated[str, typer.Option(help="Field of --data with the prompt.")] = "prompt",
    answer_field: Annotated[str, typer.Option(help="Field of --data with the gold answer.")] = "answer",
    sets: Sets = None,
    server: Server = None,
    cluster_token_file: ClusterToken = None,
    as_json: AsJson = False,
) -> None:
    """Judge a data set's gold answers with its own verifier, as if they had been given. Ends with 1 when one is refused.

    Example: offbeat reward check deploy/runs/smollm2-arithmetic.toml
    """
    session: Session = ctx.obj
    if (file is None) == (data is None):
        raise Failure("name what to check: either a run spec, or --data FILE with --verifier NAME", code=Code.USAGE)
    findings: list[Finding] = []
    fields: tuple[str, ...] = (prompt_field, answer_field)
    with Interrupts(), reward_api(session, server=server, token_file=cluster_token_file) as api, TemporaryDirectory(prefix="offbeat-") as folder:
        checkable = {view.name for view in api.verifiers() if view.checks_gold}
        if data is not None:
            refuse_unreadable(data)
            sources = iter([(data.name, data, rubric_of(rewards, verifier, options or ()))])
        else:
            assert file is not None
            fields = ("prompt", "answer", "id")
            own = rubric_of(rewards, verifier, options or ()) if rewards or verifier else None
            sources = _of_spec(session, load_spec(file, sets or ()), own, Path(folder))
        for name, path, rubric in sources:
            api.check(rubric)
            for one in rubric:
                finding = Finding(name, one.name, one.name in checkable)
                findings.append(finding)
                if finding.checkable:
                    _check_gold(session, api, one, path, fields, finding)
    _tell_findings(session, findings, as_json=as_json)
    if any(finding.refused for finding in findings):
        raise typer.Exit(Code.FAILED)


class Finding:
    """What one verifier says of the gold answers of one data set."""

    def __init__(self, data: str, verifier: str, checkable: bool) -> None:
        self.data, self.verifier, self.checkable = data, verifier, checkable
        self.accepted = self.unknown = 0
        self.refused: list[dict[str, Any]] = []

    def add(self, line: Line, answer: Answer, *, gold: Any) -> None:
        score = answer.score if isinstance(answer, GoldView) else None
        if isinstance(answer, GoldView) and answer.completion is None and (score is None or score.outcome == "ok"):
            self.unknown += 1
        elif score is not None and score.outcome == "ok" and (score.parts[0].score or 0) >= RIGHT:
            self.accepted += 1
        else:
            why = answer if isinstance(answer, str) else why_not(ItemView(score=score)) or f"scored {score and score.parts[0].score}"
            where = str(line.item["id"]) if line.item and "id" in line.item else f"line {line.number}"  # a source names its rows itself
            completion = answer.completion if isinstance(answer, GoldView) else None
            self.refused.append({"line": line.number, "where": where, "answer": gold, "completion": completion, "why": why})


def _check_gold(session: Session, api: RewardApi, verifier: Verifier, path: Path, fields: tuple[str, ...], finding: Finding) -> None:
    prompt_field, answer_field, *_ = fields

    def ask(batch: list[Line]) -> list[Answer]:
        items = [{"prompt": _text(line.item.get(prompt_field)), "answer": line.item.get(answer_field)} for line in batch if line.item is not None]
        views = iter(api.gold(verifier, items).items if items else ())
        return [line.problem if line.item is None else next(views) for line in batch]

    def judge(batch: list[Line]) -> list[Answer]:
        return line_by_line(batch, ask, refused=lambda problem: why_not(ItemView(problem=problem)))

    with progress(session.err, path) as advance:
        for batch, found in side_by_side(batches_of(lines_of(path, fields, required=answer_field)), judge):
            for line, answer in zip(batch, found, strict=True):
                finding.add(line, answer, gold=(line.item or {}).get(answer_field))
            advance(batch)


def _tell_findings(session: Session, findings: Sequence[Finding], *, as_json: bool) -> None:
    if as_json:
        print_json(session.out, [vars(finding) for finding in findings])
        return
    rows = [(f.data, f.verifier, f.accepted if f.checkable else None, len(f.refused) if f.checkable else None, f.unknown or None) for f in findings]
    session.out.print(table(("data", "verifier", "accepted", "refused", "no text to judge"), rows))
    for finding in findings:
        if not finding.checkable:
            say(session.err, f"{finding.verifier}: its gold answers cannot be checked without asking others, so they are not", "dim")
        for one in finding.refused[:SHOWN]:
            say(session.err, f"{one['where']}: {finding.verifier} refuses {ascii(one['answer'])[:80]}: {one['why']}", "yellow")
        if len(finding.refused) > SHOWN:
            say(session.err, f"and {len(finding.refused) - SHOWN:,} more; --json has them all", "yellow")


def _of_spec(session: Session, spec: RunSpec, own: tuple[Verifier, ...] | None, folder: Path) -> Iterator[tuple[str, Path, tuple[Verifier, ...]]]:
    """(name, JSON Lines, rubric) of each data set of a run."""
    for name, one in [("training", spec), *((each.name, set_spec(spec, each)) for each in spec.evaluation.sets)]:
        yield name, _prompts_of(session, one, folder / f"{name}.set"), own or one.rewards


def _prompts_of(session: Session, spec: RunSpec, folder: Path) -> Path:
    folder.mkdir()
    (folder / "spec.json").write_text(spec.model_dump_json())
    try:
        options = ("--spec", str(folder / "spec.json"), "--out", str(folder / "prompts.jsonl"))
        run_module("services.control_plane.data", *options, progress=lambda line: say(session.err, line, "dim"))
    except ProgramFailed as failed:
        raise Failure(str(failed).rpartition("\n")[2]) from failed
    return folder / "prompts.jsonl"


def _text(prompt: Any) -> str:
    """The prompt as one text; of chat messages the last one."""
    last = prompt[-1] if isinstance(prompt, list) and prompt else prompt
    content = last.get("content") if isinstance(last, dict) else last
    return content if isinstance(content, str) else ""
