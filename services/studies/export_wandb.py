"""What is recorded of a run as a run of Weights & Biases, sent there or, offline, written to a folder that `wandb sync` sends later."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from pathlib import Path

from services.studies.export_files import Recorded


class Refused(RuntimeError):
    """Weights & Biases did not take the run; the text says why."""


def export_wandb(folder: Path, recorded: Recorded, *, project: str, offline: bool) -> None:
    """The run keeps its id and name, the spec is its config, its step is the version. Measurements of evaluations are evaluation/SET/NAME."""
    if offline:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its reports of errors would be sent all the same
    import wandb

    run = recorded.run
    settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True)
    rows: dict[int, dict[str, float]] = defaultdict(dict)
    for step in recorded.steps:
        rows[step.version] |= {"at": step.at, **_finite(step.values)}
    for one in recorded.evaluations:
        rows[one.version] |= {f"evaluation/{one.name}/{name}": value for name, value in _finite(one.values).items()}
    try:
        with wandb.init(
            project=project, id=run.run_id, name=run.name, config=run.spec.model_dump(mode="json"), dir=folder, resume="never",
            mode="offline" if offline else "online", settings=settings,
        ) as sent:  # fmt: skip
            for version, row in sorted(rows.items()):
                sent.log(row, step=version)
            sent.summary.update({"state": run.state.value, "reason": run.reason})
    except wandb.Error as error:
        raise Refused(f"Weights & Biases did not take run {run.run_id}: {error}") from error
    finally:
        wandb.teardown()  # what was logged last may be written only now


def _finite(values: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
