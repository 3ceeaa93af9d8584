"""What is recorded of a run as files of rows: JSON lines, CSV and Parquet, each with steps, evaluations, events and samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from services.contracts.views import EvaluationView, EventView, RunView, SampleView, StepView
from services.studies.export_rows import (
    COMPLETION_COLUMNS,
    COUNTS_PER_TOKEN,
    EVALUATION_COLUMNS,
    EVENT_COLUMNS,
    NUMBERS_PER_TOKEN,
    STEP_COLUMNS,
    completion_rows,
    evaluation_rows,
    event_rows,
    step_rows,
)
from services.studies.tables import Cell, columns_of, write_csv, write_parquet

ALL_DIGITS = 17
ROW_GROUP, TOKENS = 4_096, 1 << 20
"""Completions, and tokens of them, that are in memory at a time, and in a row group of Parquet. A token takes some 100 bytes."""


@dataclass(frozen=True)
class Recorded:
    """All that is recorded of a run, in order of versions."""

    run: RunView
    steps: Sequence[StepView]
    evaluations: Sequence[EvaluationView]
    events: Sequence[EventView]
    samples: Callable[[], Iterator[SampleView]]
    """Newest first. They may be larger than memory."""


def write_json_lines(path: Path, rows: Iterable[BaseModel]) -> int:
    """A line a row, in ASCII; how many there were."""
    count = 0
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps(row.model_dump(mode="json")) + "\n")
            count += 1
    return count


def export_json_lines(folder: Path, recorded: Recorded) -> None:
    """As the API answers them; one line of samples is a group with its completions."""
    write_json_lines(folder / "steps.jsonl", recorded.steps)
    write_json_lines(folder / "evaluations.jsonl", recorded.evaluations)
    write_json_lines(folder / "events.jsonl", recorded.events)
    write_json_lines(folder / "samples.jsonl", recorded.samples())


def export_csv(folder: Path, recorded: Recorded) -> None:
    for name, (rows, columns) in _tables(recorded).items():
        write_csv(folder / f"{name}.csv", rows, columns, digits=ALL_DIGITS)
    completions = completion_rows(recorded.samples())
    lists_as_text = (row | {key: json.dumps(value) for key, value in row.items() if isinstance(value, list)} for row in completions)
    write_csv(folder / "samples.csv", lists_as_text, COMPLETION_COLUMNS, digits=ALL_DIGITS)


def export_parquet(folder: Path, recorded: Recorded) -> None:
    for name, (rows, columns) in _tables(recorded).items():
        write_parquet(folder / f"{name}.parquet", rows, columns)
    _write_completions(folder / "samples.parquet", completion_rows(recorded.samples()))


def _tables(recorded: Recorded) -> dict[str, tuple[list[dict[str, Cell]], dict[str, type | None]]]:
    """Rows and columns by name."""
    run_id = recorded.run.run_id
    steps, evaluations = step_rows(run_id, recorded.steps), evaluation_rows(run_id, recorded.evaluations)
    return {
        "steps": (steps, columns_of(steps) | STEP_COLUMNS),
        "evaluations": (evaluations, columns_of(evaluations) | EVALUATION_COLUMNS),
        "events": (event_rows(recorded.events), dict(EVENT_COLUMNS)),
    }


def _write_completions(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """With a schema of its own, so that the files of all runs have the same one; only so many rows are in memory at a time."""
    import pyarrow
    from pyarrow import parquet

    kinds = dict.fromkeys(("index", "completion", "trained_version", "issued_version", "max_lag", "attempt"), pyarrow.int64())
    kinds |= dict.fromkeys(("reward", "advantage"), pyarrow.float64())
    kinds |= dict.fromkeys(COUNTS_PER_TOKEN, pyarrow.list_(pyarrow.int32())) | dict.fromkeys(NUMBERS_PER_TOKEN, pyarrow.list_(pyarrow.float32()))
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in COMPLETION_COLUMNS])
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in _row_groups(rows):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))


def _row_groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    tokens = 0
    for row in rows:
        group.append(row)
        tokens += len(row["tokens"])
        if len(group) == ROW_GROUP or tokens >= TOKENS:
            yield group
            group, tokens = [], 0
    if group:
        yield group
