"""Prompts: where they come from, and in which order a run issues them. Nothing here imports PyTorch.

The order needs no state but one integer, the issue index n: its epoch is n // len(source), and the seed gives each epoch a permutation of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from services.contracts.spec import Data
from services.control_plane.data.files import open_huggingface, open_jsonl, open_parquet
from services.control_plane.data.order import shuffled_index
from services.control_plane.data.procedural import REASONING_GYM, open_addition, open_functions, open_reasoning_gym, open_sum_to_target
from services.control_plane.data.rows import Source
from services.control_plane.data.subset import only
from services.runtime.tokenizer import DataError, PromptItem

__all__ = ["DataError", "PromptItem", "Source", "issue", "open_source", "shuffled_index"]

SOURCES: dict[str, Callable[[Data, int], Source]] = {
    "sum_to_target": open_sum_to_target,
    "addition": open_addition,
    "functions": open_functions,
    "jsonl": open_jsonl,
    "parquet": open_parquet,
    "huggingface": open_huggingface,
}


def open_source(data: Data, *, seed: int) -> Source:
    """The data source that `data` describes, checked as far as it can be before a run starts. Raises DataError, which says what to change."""
    if data.source.startswith(REASONING_GYM):
        source = open_reasoning_gym(data, seed)
    elif data.source in SOURCES:
        source = SOURCES[data.source](data, seed)
    else:
        near = difflib.get_close_matches(data.source, [*SOURCES, f"{REASONING_GYM}TASK"], n=1)
        raise DataError(
            f"data.source {data.source!r} is unknown{f'; did you mean {near[0]!r}?' if near else ''}: use {', '.join(SOURCES)} or {REASONING_GYM}TASK"
        )
    if len(source) == 0:
        raise DataError(f"the data source {data.source!r}{f' ({data.path})' if data.path else ''} is empty: give it at least one prompt")
    return source if data.ids is None else only(source, Path(data.ids))


def issue(source: Source, n: int, *, seed: int) -> PromptItem:
    """The prompt of the run's n-th group: a pure function of the source, n and the seed, so that a cursor is n alone."""
    return source[shuffled_index(n, size=len(source), seed=seed)]
