"""What commands print: tables for people, JSON for programs. Whatever comes from elsewhere is made harmless first."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.studies.display import one_line

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text for people.")]


UNBOUNDED = 1000
"""Columns of an output that is no terminal: nothing in it is wrapped or cut."""


def console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else UNBOUNDED)


def as_data(value: object) -> Any:
    """`value` as what JSON can hold; bytes become hexadecimal text."""
    if isinstance(value, BaseModel):
        return as_data(value.model_dump(mode="python"))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_data(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): as_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_data(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def print_json(console: Console, value: object, *, indent: int | None = 2) -> None:
    """One JSON document, escaped to ASCII, so that nothing in it can reach the terminal."""
    console.print(Text(json.dumps(as_data(value), indent=indent)), soft_wrap=True, highlight=False)


def say(console: Console, text: str, style: str = "") -> None:
    """A line for people; may be wider than the terminal."""
    console.print(Text(text, style=style), soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table of harmless cells; None shows as "-"."""
    grid = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        grid.add_column(name, overflow="fold")
    for row in rows:
        grid.add_row(*(Text("-" if cell is None else one_line(str(cell))) for cell in row))
    return grid


def pairs(rows: Iterable[tuple[str, object]]) -> Table:
    """Labels and values, a pair a line."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in rows:
        grid.add_row(label, Text("-" if value is None else one_line(str(value))))
    return grid


def clock(at: float | None) -> str:
    """Local date and time of a moment."""
    return "-" if at is None else datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
