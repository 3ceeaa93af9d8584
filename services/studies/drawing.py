"""What the figures of a study have in common. Colours are Okabe and Ito's, and no curve is told by its colour alone: dashes and markers differ too.

matplotlib is imported when the first figure is drawn; without pyplot it needs no display and has no global state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from services.studies.curves import Values
from services.studies.display import one_line
from services.studies.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK, GREY)
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
END_LABEL = "entropy at the end (nats per token)"


@dataclass(frozen=True)
class Drawing:
    """A figure with its words."""

    name: str
    """Of its file, without the suffix."""
    title: str
    caption: str
    figure: Figure

    def save(self, folder: Path) -> Path:
        path = folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', self.name)}.png"
        self.figure.savefig(path, dpi=120)
        return path


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def style(at: int) -> tuple[str, str, str]:
    """Colour, line style and marker of the curve at this place."""
    return COLOURS[at % len(COLOURS)], DASHES[at % len(DASHES)], MARKERS[at % len(MARKERS)]


def label_text(text: str) -> str:
    """A user's text as a label: on one line, and no formula, however many dollars it has."""
    return one_line(text, 110).replace("$", r"\$")


def title_axes(axes: Axes, title: str) -> None:
    axes.set_title(label_text(title), loc="left", fontsize=11)


def open_axes(axes: Axes) -> None:
    """Without a frame at the top and at the right."""
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, *axes: Axes, columns: int) -> None:
    """The legend of the axes below the figure, each label once, if anything has one."""
    found = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    if found:
        figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def annotate(axes: Axes, table: Values, colour: Callable[[float], str], form: str = "{:.2f}") -> None:
    """Each cell of a heat map with its number."""
    for (row, place), value in np.ndenumerate(table):
        if np.isfinite(value):
            axes.text(place, row, form.format(value), ha="center", va="center", color=colour(float(value)), fontsize=8)


def finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
