"""A study's numbers as files: one row a run with its settings and metrics, and one row a run and version with all that was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from services.contracts.study import StudySpec
from services.studies.curves import run_values
from services.studies.factors import arm_settings
from services.studies.study_data import RunData, metric, spent
from services.studies.tables import Cell, columns_of, write_csv, write_parquet

STEP_REDUCERS = ("first", "end", "mean")
EVALUATION_REDUCERS = ("first", "end")


def run_rows(study: StudySpec, runs: Sequence[RunData]) -> list[dict[str, Cell]]:
    """One row a run: what it is, its arm's settings and factors, the metrics of the claims, and the first, end and mean of all that it measured."""
    settings = arm_settings(study)
    named = list(dict.fromkeys(name for claim in study.claims for name in claim.metrics))
    rows = []
    for run in runs:
        row: dict[str, Cell] = {
            "run_id": run.run_id, "arm": run.arm, "seed": run.seed, "state": run.state.value, "reason": run.reason,
            "versions": run.spec.versions, "trained": sum(step.count for step in run.steps),
        }  # fmt: skip
        row |= {f"set.{name}": _cell(value) for name, value in settings[run.arm].items()}
        row |= {f"factor.{name}": value for name, value in study.arm(run.arm).factors.items()}
        keys = sorted({key for step in run.steps for key in step.values if "/" not in key})
        evaluated = sorted({(one.name, key) for one in run.evaluations for key in one.values})
        names = [f"steps.{key}.{reducer}" for key in keys for reducer in STEP_REDUCERS]
        names += [f"evaluation.{name}.{key}.{reducer}" for name, key in evaluated for reducer in EVALUATION_REDUCERS]
        row |= {f"run.{key}": value for key, value in run_values((step.version, step.values) for step in run.steps).items()}
        row |= {name: metric(run, name) for name in dict.fromkeys([*named, *names])}
        rows.append(row)
    return rows


def step_rows(runs: Sequence[RunData]) -> list[dict[str, Cell]]:
    """One row a run and version: what was spent by then, and every measurement, those by bins included."""
    rows: list[dict[str, Cell]] = []
    for run in runs:
        axes = {f"spent.{axis}": spent(run, axis).tolist() for axis in ("rollouts", "updates", "kl")}
        for at, step in enumerate(run.steps):
            own: dict[str, Cell] = {"run_id": run.run_id, "arm": run.arm, "seed": run.seed, "version": step.version}
            rows.append(own | {name: values[at] for name, values in axes.items()} | dict(step.values))
    return rows


def write_tables(folder: Path, name: str, rows: Sequence[Mapping[str, Cell]]) -> list[Path]:
    """NAME.csv and NAME.parquet."""
    paths, columns = [folder / f"{name}.csv", folder / f"{name}.parquet"], columns_of(rows)
    write_csv(paths[0], rows, columns)
    write_parquet(paths[1], rows, columns)
    return paths


def _cell(value: JsonValue) -> Cell:
    return json.dumps(value) if isinstance(value, list | dict | bool) else value
