"""JSON Lines that a command reads, sends off in batches and gets results of: bad lines keep their numbers, an interruption leaves whole results."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from services.cli.session import Code, Failure
from services.client import ApiError
from services.contracts.views import ProblemDocument

T = TypeVar("T")
R = TypeVar("R")

ITEMS = 64
"""Lines of one request."""
BYTES = 2 << 20
"""Of one request, save for a line that is longer."""
AT_ONCE = 4
"""Requests under way."""
REFUSALS = (400, 413, 422)
"""What is the fault of something in the request."""


@dataclass(frozen=True)
class Line:
    """A line of a file: what it holds, or what is wrong with it."""

    number: int
    size: int
    item: dict[str, Any] | None
    problem: str = ""


def lines_of(path: Path, fields: Sequence[str], *, required: str) -> Iterator[Line]:
    """The lines that are not blank, with those of the fields that they have."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw)
            except (ValueError, RecursionError) as error:
                yield Line(number, len(raw), None, f"not JSON: {error}")
                continue
            if not isinstance(row, dict):
                yield Line(number, len(raw), None, "not a JSON object")
            elif required not in row:
                yield Line(number, len(raw), None, f"no field {required!r}: it has {', '.join(map(repr, sorted(row))) or 'none'}")
            else:
                yield Line(number, len(raw), {name: row[name] for name in fields if name in row and row[name] is not None})


def batches_of(lines: Iterator[Line]) -> Iterator[list[Line]]:
    batch: list[Line] = []
    for line in lines:
        if batch and (len(batch) == ITEMS or sum(one.size for one in batch) + line.size > BYTES):
            yield batch
            batch = []
        batch.append(line)
    if batch:
        yield batch


def side_by_side(batches: Iterator[T], do: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Each batch with its result, in order, a bounded number of them under way."""
    under_way: deque[tuple[T, Future[R]]] = deque()
    executor = ThreadPoolExecutor(AT_ONCE)
    try:
        for batch in batches:
            under_way.append((batch, executor.submit(do, batch)))
            if len(under_way) >= 2 * AT_ONCE:
                first, future = under_way.popleft()
                yield first, future.result()
        while under_way:
            first, future = under_way.popleft()
            yield first, future.result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def line_by_line(batch: list[Line], ask: Callable[[list[Line]], list[R]], *, refused: Callable[[ProblemDocument], R]) -> list[R]:
    """`ask(batch)`; where the server refuses the request each line by itself, so that one takes no other with it."""
    try:
        return ask(batch)
    except ApiError as error:
        if error.status not in REFUSALS:
            raise
        if len(batch) > 1:
            return [result for line in batch for result in line_by_line([line], ask, refused=refused)]
        return [refused(error.problem)]


@contextlib.contextmanager
def progress(console: Console, path: Path) -> Iterator[Callable[[list[Line]], None]]:
    """A bar over the bytes of a file, where the output is a terminal; the function that advances it by a batch."""
    columns = (TextColumn("judging"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("judging", total=path.stat().st_size)
        yield lambda batch: bar.advance(task, sum(line.size for line in batch))


def last_result(out: Path | None, *, of: Path, resume: bool, force: bool) -> int:
    """The last line of `of` of which `out` has a result, where it is gone on with; what an interruption left half written is cut off."""
    if out is None:
        if resume:
            raise Failure("--resume goes on with a file: name it with --out", code=Code.USAGE)
        return 0
    if out.is_dir() or not out.parent.is_dir():
        raise Failure(f"cannot write {out}: {'it is a folder' if out.is_dir() else 'its folder is not there'}", code=Code.USAGE)
    if not out.exists():
        return 0
    if out.samefile(of):
        raise Failure(f"{out} is what is to be judged: name another file with --out", code=Code.USAGE)
    if not resume:
        if force:
            return 0
        raise Failure(f"{out} is there: --resume goes on with it, --force writes over it", code=Code.USAGE)
    last, whole = 0, 0
    with out.open("rb") as file:
        for raw in file:
            try:
                number = json.loads(raw)["line"] if raw.endswith(b"\n") else None
            except (ValueError, KeyError, TypeError) as error:
                raise Failure(f"{out} holds other things than results: name another file with --out", code=Code.USAGE) from error
            if number is None:
                break
            last, whole = number, whole + len(raw)
    os.truncate(out, whole)
    return last


def refuse_unreadable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}", code=Code.USAGE) from error
