"""`offbeat study`: run grids of arms and seeds, follow them, and read what they decide."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from services.cli.output import AsJson, clock, pairs, print_json, say, table
from services.cli.session import ROOT, Code, Failure, Session
from services.cli.specs import read_tree
from services.cli.study_attended import attend, code_of, display_for, folder_of, make_report, show_report, warn
from services.cli.study_following import counts_text, done, follow_study, grid
from services.client import Client
from services.contracts.problems import explained
from services.contracts.spec import Model
from services.contracts.study import StudySpec, own_overrides
from services.contracts.views import StudyView

app = typer.Typer(no_args_is_help=True, help="Run grids of arms and seeds, and read what they decide.")
StudyId = Annotated[str, typer.Argument(metavar="ID", help="The study's id, as `offbeat study ls` shows it.")]
StudyFile = Annotated[Path, typer.Argument(metavar="FILE", help='Study in TOML or JSON; "-" reads TOML from standard input.')]
Plain = Annotated[bool, typer.Option("--plain", help="Lines instead of the live table; always so when the output is no terminal.")]
KeepUp = Annotated[bool, typer.Option("--keep-up", help="Leave a stack running that this command had to start.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the report; default: the study's own in the folder of runs.")]
SideBySide = Annotated[
    int | None, typer.Option(min=1, max=64, help="Trainers and rollout servers of a stack started here; default: half the cores, 1 with a GPU.")
]


@app.command("run")
def run(
    ctx: typer.Context,
    file: StudyFile,
    seeds: Annotated[int | None, typer.Option(min=1, max=1000, help="Only so many of its seeds, or more of them.")] = None,
    arms: Annotated[str | None, typer.Option(metavar="A,B", help="Only these arms, and the claims that need no others.")] = None,
    out: Out = None,
    side_by_side: SideBySide = None,
    keep_up: KeepUp = False,
    plain: Plain = False,
    as_json: AsJson = False,
) -> None:
    """Run a study, from nothing to its report.

    Starts the local stack when none runs. Ctrl-C pauses the runs; `offbeat study resume ID` goes on. The exit code is 0 when all runs are completed.

    Example: offbeat study run deploy/studies/smoke.toml
    """
    session: Session = ctx.obj
    spec = _narrowed(session, from_checkout(load_study(file)), arms=arms, seeds=seeds)
    warn(session, spec.warnings)

    def begin(client: Client) -> str:
        return client.submit_study(spec, idempotency_key=secrets.token_hex(8)).study_id

    raise typer.Exit(attend(session, begin, out=out, side_by_side=side_by_side, keep_up=keep_up, plain=plain, as_json=as_json))


@app.command("check")
def check(ctx: typer.Context, file: StudyFile, as_json: AsJson = False) -> None:
    """Say whether a study would be accepted, how many runs it would make, and what it could not tell.

    Where a stack runs, models, data and verifiers are looked at too.

    Example: offbeat study check deploy/studies/smoke.toml
    """
    session: Session = ctx.obj
    spec = from_checkout(load_study(file))
    cells = spec.cells()
    versions = sum(spec.run(*cell).versions for cell in cells)
    deep = session.names_stack or session.stack() is not None
    if deep:
        session.client().validate_study(spec)
    if as_json:
        print_json(session.out, {"valid": True, "runs": len(cells), "versions": versions, "warnings": spec.warnings, "data_checked": deep})
        return
    said = "" if deep else "; models, data and verifiers were not looked at, since no stack runs"
    say(session.out, f"the study is good: {len(spec.arms)} arms x {len(spec.seeds)} seeds = {len(cells)} runs, {versions:,} versions in all{said}")
    warn(session, spec.warnings)


@app.command("ls")
def ls(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List studies, newest first.

    Example: offbeat study ls
    """
    session: Session = ctx.obj
    studies = session.client().studies().studies
    if as_json:
        print_json(session.out, studies)
        return
    rows = [(s.study_id, s.arms, s.seeds, s.claims, counts_text(s.counts), clock(s.created_at)) for s in studies]
    session.out.print(table(("id", "arms", "seeds", "claims", "runs", "submitted"), rows))


@app.command("show")
def show(ctx: typer.Context, study_id: StudyId, as_json: AsJson = False) -> None:
    """Show a study: its runs as they stand, its claims, and what it cannot tell.

    Example: offbeat study show smoke-20260101-120000-3f9a
    """
    session: Session = ctx.obj
    study = session.client().study(study_id)
    if as_json:
        print_json(session.out, study)
        return
    rows: list[tuple[str, object]] = [("study", study.study_id), ("submitted", clock(study.created_at)), ("runs", counts_text(study.counts))]
    if study.spec.text:
        rows.insert(1, ("about", study.spec.text))
    if study.cancelled_at is not None:
        rows.append(("cancelled", clock(study.cancelled_at)))
    session.out.print(pairs(rows), soft_wrap=True)
    session.out.print(grid(study))
    session.out.print()
    runs = [(r.run_id, r.state or "not made", f"{done(r)}/{r.versions}", r.reason) for r in study.runs]
    session.out.print(table(("run", "state", "version", "reason"), runs))
    if study.spec.claims:
        session.out.print()
        claims = [(c.id, c.text, c.statistic, c.metric, ", ".join(c.arms) or "all", c.direction) for c in study.spec.claims]
        session.out.print(table(("claim", "statement", "statistic", "metric", "arms", "direction"), claims))
    warn(session, study.warnings)


@app.command("watch")
def watch(ctx: typer.Context, study_id: StudyId, plain: Plain = False, as_json: AsJson = False) -> None:
    """Follow a study until none of its runs moves. Ctrl-C stops following; the study goes on.

    Example: offbeat study watch smoke-20260101-120000-3f9a
    """
    session: Session = ctx.obj
    client = session.client()
    try:
        with display_for(session.err if as_json else session.out, plain=plain) as display:
            study = follow_study(client, study_id, display)
    except KeyboardInterrupt as error:
        say(session.err, f"no longer following {study_id}, which goes on: `offbeat study watch {study_id}` follows again", "yellow")
        raise typer.Exit(Code.INTERRUPTED) from error
    if as_json:
        print_json(session.out, study)
    raise typer.Exit(code_of(session, study))


@app.command("report")
def report(ctx: typer.Context, study_id: StudyId, out: Out = None, as_json: AsJson = False) -> None:
    """Write the report of a study as it stands, and print the verdicts on its claims.

    Example: offbeat study report smoke-20260101-120000-3f9a --out report
    """
    session: Session = ctx.obj
    client = session.client()
    study = client.study(study_id)
    show_report(session, make_report(client, study, out or folder_of(session, study_id)), as_json=as_json)


@app.command("resume")
def resume(
    ctx: typer.Context,
    study_id: StudyId,
    watch_it: Annotated[bool, typer.Option("--watch", help="Follow the study until it ends, and write its report.")] = False,
    out: Out = None,
    side_by_side: SideBySide = None,
    keep_up: KeepUp = False,
    plain: Plain = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a study: runs that are paused or failed go on from their last checkpoints, and runs that are missing are made.

    Starts the local stack when none runs; then it follows the study to its end and reports it, pauses it on Ctrl-C, and takes the stack down.

    Example: offbeat study resume smoke-20260101-120000-3f9a
    """
    session: Session = ctx.obj

    def begin(client: Client) -> str:
        return client.resume_study(study_id).study_id

    if not watch_it and (session.names_stack or session.stack() is not None):
        client = session.client()
        begin(client)
        _said(session, client.study(study_id), as_json=as_json)
    else:
        raise typer.Exit(attend(session, begin, out=out, side_by_side=side_by_side, keep_up=keep_up, plain=plain, as_json=as_json))


@app.command("cancel")
def cancel(ctx: typer.Context, study_id: StudyId, as_json: AsJson = False) -> None:
    """End all runs of a study for good. What they recorded, and their checkpoints, stay.

    Example: offbeat study cancel smoke-20260101-120000-3f9a
    """
    session: Session = ctx.obj
    _said(session, session.client().cancel_study(study_id), as_json=as_json)


def load_study(path: Path) -> StudySpec:
    """The study in a TOML or JSON file ("-": standard input)."""
    tree: dict[str, Any] = read_tree(path, examples="deploy/studies")
    try:
        return StudySpec.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {name}: {problem}" if name else f"  {problem}" for name, problem in explained(error, StudySpec)]
        raise Failure("\n".join([f"{path} is not a valid study", *lines]), code=Code.USAGE) from error


def from_checkout(study: StudySpec) -> StudySpec:
    """`study` with its models' folders, where they are given relative to the checkout, made absolute, so that it runs from any folder."""
    model = Model.model_validate(study.base.get("model", {}))
    tree = study.model_dump(mode="json")
    if _in_checkout(model.path):
        tree["base"]["model"] = model.model_dump(mode="json", exclude_unset=True) | {"path": str(ROOT / model.path)}
    for arm in tree["arms"]:
        own = own_overrides(arm["set"])
        if _in_checkout(path := str(own.get("model.path", ""))):
            arm["set"] = own | {"model.path": str(ROOT / path)}
    return StudySpec.model_validate(tree)


def _in_checkout(path: str) -> bool:
    return bool(path) and not Path(path).exists() and (ROOT / path).exists()


def _narrowed(session: Session, spec: StudySpec, *, arms: str | None, seeds: int | None) -> StudySpec:
    try:
        fewer = spec.narrowed(arms=[name.strip() for name in arms.split(",")] if arms else (), seeds=seeds)
    except ValueError as error:
        raise Failure(f"--arms: {error}", code=Code.USAGE) from error
    left = [claim.id for claim in spec.claims if claim.id not in {kept.id for kept in fewer.claims}]
    if left:
        say(session.err, f"without the arms that they need, these claims are left out: {', '.join(left)}", "yellow")
    return fewer


def _said(session: Session, study: StudyView, *, as_json: bool) -> None:
    if as_json:
        print_json(session.out, study)
    else:
        say(session.out, f"study {study.study_id}: {counts_text(study.counts)}")
