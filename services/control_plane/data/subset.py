"""A part of a source: the prompts whose ids a file names, one a line."""

from __future__ import annotations

from array import array
from pathlib import Path

from services.control_plane.data.rows import Source
from services.runtime.tokenizer import DataError, PromptItem

SHOWN = 80
"""Characters of an id that an error quotes."""


class Subset:
    """Some places of a source, in its order."""

    def __init__(self, source: Source, places: array[int]) -> None:
        self._source, self._places = source, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> PromptItem:
        return self._source[self._places[index]]

    def item_id(self, index: int) -> str:
        return self._source.item_id(self._places[index])


def only(source: Source, path: Path) -> Source:
    """The prompts of `source` that the file names; blank lines are skipped. Raises DataError for an id that is not there or comes twice."""
    lines = read_ids(path)
    places, found = array("Q"), set()
    for place in range(len(source)):
        if (item_id := source.item_id(place)) in lines:
            places.append(place)
            found.add(item_id)
    for item_id, number in lines.items():
        if item_id not in found:
            raise DataError(
                f"data.ids: {path}, line {number}: the source has no prompt {item_id[:SHOWN]!r} among its {len(source)} (the first is"
                f" {source.item_id(0)[:SHOWN]!r}): make the file for this source, size and seed with `offbeat data subset`"
            )
    return Subset(source, places)


def read_ids(path: Path) -> dict[str, int]:
    """The ids in a file with the line of each. Raises DataError."""
    if not path.is_file():
        raise DataError(f"data.ids: {path} is no file: give one with a prompt id a line (a relative path starts at {Path.cwd()})")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data.ids: {path} is not UTF-8 text (byte {error.start})") from None
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        item_id = line.strip()
        if item_id in lines:
            raise DataError(f"data.ids: {path}, line {number}: {item_id[:SHOWN]!r} is on line {lines[item_id]} too: remove one")
        if item_id:
            lines[item_id] = number
    if not lines:
        raise DataError(f"data.ids: {path} names no prompt: give it at least one id")
    return lines
