"""`offbeat replay`: train again on what a run has recorded, with another loss, clip or controller."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.attended import make_report, show
from services.cli.output import AsJson, as_data, print_json, say
from services.cli.runs import Plain, RunId, watch_run
from services.cli.session import Session
from services.cli.specs import Sets, assignments
from services.contracts.views import StepView

CAUTION = (
    "The recorded groups were sampled by the policies of the other run. Wherever this replay's policy departs from them its data are off-policy:"
    " compare trends with care where ESS is low."
)


def replay(
    ctx: typer.Context,
    run_id: RunId,
    sets: Sets = None,
    no_watch: Annotated[bool, typer.Option("--no-watch", help="Print the new run's id and do not follow it.")] = False,
    plain: Plain = False,
    as_json: AsJson = False,
) -> None:
    """What if: train again on the groups that a run has recorded, with some fields of its spec changed. Nothing is generated.

    Example: offbeat replay demo-20260101-120000-3f9a --set clip.high=0.4 --set entropy.method=bonus
    """
    session: Session = ctx.obj
    client = session.client()
    run = client.replay_run(run_id, assignments(sets or ()))
    if no_watch:
        if as_json:
            print_json(session.out, as_data(run) | {"caution": CAUTION})
        else:
            say(session.out, run.run_id)
            say(session.err, CAUTION, "yellow")
        return

    def caution() -> str:
        return f"{CAUTION} {ess_in_words(client.steps(run.run_id).steps)}"

    say(session.err, f"run {run.run_id} replays {run_id}", "dim")
    code = watch_run(session, client, run.run_id, plain=plain, as_json=as_json, beside=lambda: {"caution": caution()})
    if not as_json:
        stack = session.stack()
        if stack is not None:
            show(session, make_report(client, run.run_id, stack.data / run.run_id), as_json=False)
        say(session.out, caution())
    raise typer.Exit(code)


def ess_in_words(steps: list[StepView]) -> str:
    """The effective sample size of a replay's steps, in a sentence."""
    shares = [share for step in steps if (share := step.values.get("ess_share")) is not None]
    if not shares:
        return "ESS was not measured."
    return f"ESS as a share of the tokens: mean {sum(shares) / len(shares):.3f}, least {min(shares):.3f}, last {shares[-1]:.3f}."
