"""The training loop, as the algorithm reads.

                 completions            scored                    weights of v + 1
    rollout servers ------> reward servers ------> [ trainer ] ------------------> rollout servers

    consumes     scored groups                produces  versions, steps, checkpoints
    waits for    a batch whose lags keep the window; leave to let servers load
    unblocked by reward servers

The synchronous algorithm is this same loop with the window {0, 0}.
"""

from __future__ import annotations

import contextlib
import logging

from services.contracts.spec import RunSpec
from services.contracts.states import Action
from trainer.feed import Batch
from trainer.session import Interrupted, Session
from trainer.step import StepResult

log = logging.getLogger(__name__)


def train(run: Session) -> None:
    """Take the run from where it stands to its last version, or to the next version boundary when it is paused, cancelled or handed over."""
    try:
        catch_up(run)
        run.begin()
        for version in range(run.announced, run.spec.versions):
            spec = run.spec_at(version)
            batch = run.next_batch(version, spec)
            run.probe(version)
            result = improve(run, batch, spec, version)
            run.publish(version + 1, batch, result, spec)
            run.checkpoint(due=True)
        run.finish()
        run.lifecycle.move(Action.COMPLETE, holder=run.settings.member)
    except Interrupted as why:
        log.info("interrupted", extra={"why": str(why), "version": run.version})
        if not why.trained:
            with contextlib.suppress(Interrupted):  # a full disk: that has paused the run, if it was not stopped already
                run.checkpoint()


def improve(run: Session, batch: Batch, spec: RunSpec, version: int) -> StepResult:
    """One step of the policy, and of the controllers around it."""
    actuators = run.control.actuate(spec, version)
    result = run.step(batch, spec, version, actuators)
    run.control.observe(spec, version, result.values)
    return result


def catch_up(run: Session) -> None:
    """Train again on the recorded batches between the last checkpoint and the announced version: the same version comes out, and no group is lost."""
    for version in range(run.version, run.announced):
        batch = run.planned_batch(version)
        improve(run, batch, run.spec_at(version), version)
    run.version = run.announced
