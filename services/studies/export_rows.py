"""What is recorded of a run as rows of tables: one a version, an evaluation, an event, a completion. Each names its run, so that tables add up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from services.contracts.views import EvaluationView, EventView, SampleView, StepView
from services.studies.tables import Cell

STEP_COLUMNS: dict[str, type | None] = {"run_id": str, "version": int, "at": float, "min_lag": int, "max_lag": int, "groups": int}
EVALUATION_COLUMNS: dict[str, type | None] = {
    "run_id": str, "name": str, "domain": str, "version": int, "at": float, "prompts": int, "samples": int, "temperature": float, "top_p": float,
    "max_tokens": int,
}  # fmt: skip
EVENT_COLUMNS: dict[str, type | None] = {
    "run_id": str,
    "id": str,
    "at": float,
    "version": int,
    "event": str,
    "severity": str,
    "text": str,
    "data": str,
}
"""Columns that are there whatever was measured."""
COMPLETION_COLUMNS = (
    "run_id", "index", "completion", "trained_version", "issued_version", "max_lag", "prompt_id", "prompt", "answer", "server", "attempt", "text",
    "finish", "reward", "advantage", "parts", "tokens", "versions", "lags", "entropies", "log_ratios",
)  # fmt: skip
COUNTS_PER_TOKEN = ("tokens", "versions", "lags")
NUMBERS_PER_TOKEN = ("entropies", "log_ratios")
"""Columns of a completion with one value for each of its tokens."""


def step_rows(run_id: str, steps: Sequence[StepView]) -> list[dict[str, Cell]]:
    """A row a version: what it measured by its name in the step record, and trained tokens by lag as lag_0_tokens, lag_1_tokens ..."""
    names = sorted({name for step in steps for name in step.values})
    lags = sorted({lag for step in steps for lag in step.lags})
    rows = []
    for step in steps:
        row: dict[str, Cell] = {"run_id": run_id, "version": step.version, "at": step.at, "min_lag": step.window[0], "max_lag": step.window[1]}
        row |= {"groups": len(step.groups)} | {name: step.values.get(name) for name in names}
        rows.append(row | {f"lag_{lag}_tokens": step.lags.get(lag, 0) for lag in lags})
    return rows


def evaluation_rows(run_id: str, evaluations: Sequence[EvaluationView]) -> list[dict[str, Cell]]:
    """A row a version and set: how it was sampled, and what was measured."""
    names = sorted({name for one in evaluations for name in one.values})
    return [
        {"run_id": run_id, **one.model_dump(exclude={"values"}), **{name: one.values.get(name) for name in names}} for one in evaluations
    ]  # fmt: skip


def event_rows(events: Sequence[EventView]) -> list[dict[str, Cell]]:
    """A row an event; its particulars as JSON."""
    return [
        {
            "run_id": one.run_id, "id": one.id, "at": one.at, "version": one.version, "event": one.event, "severity": one.severity.value,
            "text": one.text, "data": json.dumps(one.data),
        }
        for one in events
    ]  # fmt: skip


def completion_rows(samples: Iterable[SampleView]) -> Iterator[dict[str, Any]]:
    """A row a completion, with COMPLETION_COLUMNS; those per token are lists, the answer and the verifiers' parts are JSON."""
    for sample in samples:
        group = sample.model_dump(mode="json", exclude={"completions"})
        for place, completion in enumerate(sample.completions):
            told = group | completion.model_dump(mode="json") | {"completion": place}
            yield {name: told[name] for name in COMPLETION_COLUMNS} | {name: json.dumps(told[name]) for name in ("answer", "parts")}
