"""Sources that read what is on disk: JSON Lines, Parquet, and data sets of the `datasets` library."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from pydantic import ValidationError

from services.contracts.section import Section
from services.contracts.spec import Data
from services.control_plane.data.order import drawn
from services.control_plane.data.rows import Source, item_from_row
from services.runtime.tokenizer import DataError, PromptItem

if TYPE_CHECKING:
    import pyarrow


class JsonLines:
    """Rows of a file with one JSON object a line; blank lines are skipped. Those that are used are checked when it is opened; only their offsets are
    kept."""

    def __init__(self, data: Data, path: Path, *, seed: int) -> None:
        self._data, self._path = data, path
        self._offsets, self._lines = array("Q"), array("Q")
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    if data.size is None:
                        self._item(line, number)
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)
        if data.size is not None:
            places = drawn(data.size, of=len(self), seed=seed)
            self._offsets, self._lines = (array("Q", (values[place] for place in places)) for values in (self._offsets, self._lines))
            for index in range(len(self)):
                self[index]

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> PromptItem:
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            return self._item(file.readline(), self._lines[index])

    def item_id(self, index: int) -> str:
        return self._id(self._lines[index])

    def _id(self, number: int) -> str:
        return f"{self._path.name}:{number}"

    def _item(self, line: bytes, number: int) -> PromptItem:
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{self._path}, line {number} is not JSON ({error}): correct or remove the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{self._path}, line {number} is not a JSON object: every line must be one, with the prompt and the answer as fields")
        return item_from_row(row, self._data, item_id=self._id(number))


class Columns:
    """Rows of an Arrow table, of which only the columns of prompts and answers are kept. Their types are checked when it is opened."""

    def __init__(self, data: Data, table: pyarrow.Table, *, name: str, seed: int) -> None:
        self._data, self._name = data, name
        for field, setting in ((data.prompt_field, "prompt_field"), (data.answer_field, "answer_field")):
            if field not in table.column_names:
                raise DataError(f"{name} has no field {field!r}: set data.{setting} to one of those there ({', '.join(sorted(table.column_names))})")
        self._rows = drawn(data.size, of=table.num_rows, seed=seed)
        self._table = table.select(list(dict.fromkeys((data.prompt_field, data.answer_field))))
        if len(self._rows) < table.num_rows:
            self._table = self._table.take(self._rows)
        for field in self._table.column_names:
            column = self._table[field]
            if column.null_count:
                row = self._rows[column.is_null().index(True).as_py()]
                raise DataError(f"{name}, row {row}: {field!r} is null: give it a value, or remove the row")
        if len(self):
            self[0]  # a column has one type: what is wrong with it shows in any row

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> PromptItem:
        (row,) = self._table.slice(index, 1).to_pylist()
        return item_from_row(row, self._data, item_id=self.item_id(index))

    def item_id(self, index: int) -> str:
        return f"{self._name}:{self._rows[index]}"


class HubOptions(Section):
    """`data.options` of the source `huggingface`."""

    config: str | None = None
    """Configuration of a data set that has several, such as "main"."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""


def open_jsonl(data: Data, seed: int) -> Source:
    return JsonLines(data, _existing(data, kind="file"), seed=seed)


def open_parquet(data: Data, seed: int) -> Source:
    """A Parquet file, or a folder of them."""
    path = _existing(data, kind="file or folder")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError("the source 'parquet' needs the package pyarrow: install it") from None
    try:
        table = pyarrow.parquet.read_table(path, columns=_known_columns(pyarrow.parquet.read_schema(path), data) if path.is_file() else None)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {error}") from None
    return Columns(data, table, name=path.name, seed=seed)


def open_huggingface(data: Data, seed: int) -> Source:
    """A folder made by `save_to_disk`, a folder of data files, or a data set by its name on the hub, from the cache where it is there."""
    assert data.path is not None  # checked by the spec
    try:
        import datasets
    except ImportError:
        raise DataError("the source 'huggingface' needs the package datasets: install it") from None
    try:
        options = HubOptions.model_validate(data.options)
    except ValidationError as error:
        raise DataError(options_error(error)) from None
    folder = Path(data.path)
    saved = any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
    try:
        loaded = datasets.load_from_disk(folder) if saved else datasets.load_dataset(data.path, options.config, revision=options.revision)
    except ConnectionError as error:
        reason = f"no such folder, not in the local cache, and the hub cannot be reached ({error})"
        raise DataError(f"data set {data.path!r} cannot be loaded: {reason}; save it to disk first, then give that folder") from None
    except IndexError:  # what the library raises on a saved data set without rows
        raise DataError(f"data set {data.path!r} is empty: give it at least one prompt") from None
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"data set {data.path!r} cannot be loaded: {error}") from None
    if isinstance(loaded, dict):
        if data.split not in loaded:
            raise DataError(f"data set {data.path!r} has no split {data.split!r}: set data.split to one of {', '.join(loaded)}")
        loaded = loaded[data.split]
    return Columns(data, loaded.with_format("arrow")[:], name=f"{folder.name}/{data.split}", seed=seed)


def options_error(error: ValidationError) -> str:
    """pydantic's findings on `data.options` in one line."""
    return "; ".join(
        f"{'.'.join(map(str, ('data.options', *found['loc'])))}: {found['msg'].removeprefix('Value error, ')}" for found in error.errors()
    )


def _existing(data: Data, *, kind: Literal["file", "file or folder"]) -> Path:
    assert data.path is not None  # checked by the spec
    path = Path(data.path)
    if not path.exists():
        raise DataError(f"data.path: {path} is not there: give the {kind} that holds the prompts (a relative path starts at {Path.cwd()})")
    if kind == "file" and path.is_dir():
        raise DataError(f"data.path: {path} is a folder: give the file in it that holds the prompts")
    return path


def _known_columns(schema: Any, data: Data) -> list[str] | None:
    """The columns to read; None, for all, when one of them is not there, so that the error can name those that are."""
    wanted = list(dict.fromkeys((data.prompt_field, data.answer_field)))
    return wanted if set(wanted) <= set(schema.names) else None
