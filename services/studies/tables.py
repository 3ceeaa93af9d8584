"""Tables as files: CSV for people and spreadsheets, Parquet for programs."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

Cell = str | int | float | None


def columns_of(rows: Iterable[Mapping[str, Cell]]) -> dict[str, type | None]:
    """One column for each key of any row, in the order in which they come up; their types are left open."""
    return dict.fromkeys(key for row in rows for key in row)


def write_csv(path: Path, rows: Iterable[Mapping[str, Cell]], columns: Collection[str], *, digits: int = 9) -> None:
    """A cell that a row lacks is empty. Rows are written as they come. `digits` of a float: nine halve the file, seventeen are all."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({key: _csv_cell(value, digits) for key, value in row.items()} for row in rows)


def write_parquet(path: Path, rows: Sequence[Mapping[str, Cell]], columns: Mapping[str, type | None]) -> None:
    """A cell that a row lacks is null. A column has the type that is given, or else the one of its values: text where any is text, else numbers."""
    import pyarrow
    from pyarrow import parquet

    names = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    table = {}
    for column, given in columns.items():
        values = [row.get(column) for row in rows]
        kind = given or next((kind for kind in (str, float, int) if any(isinstance(value, kind) for value in values)), float)
        table[column] = pyarrow.array([None if value is None else kind(value) for value in values], names[kind])
    parquet.write_table(pyarrow.table(table), path, compression="zstd")


def _csv_cell(value: Cell, digits: int) -> Cell:
    """A text that a spreadsheet would run as a formula, as text."""
    if isinstance(value, float):
        return f"{value:.{digits}g}" if digits < 17 else repr(value)
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
