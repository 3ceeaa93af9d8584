"""The figures of a run's report: panels of lines over policy versions, with what happened to the run as vertical lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from services.contracts.measures import BINS
from services.contracts.spec import RunSpec
from services.contracts.views import EvaluationView, StepView
from services.studies.curves import Values
from services.studies.drawing import Drawing, label_text, legend_below, new_figure, open_axes, style, title_axes
from services.studies.plots import MARK_STYLES, Mark, column, trailing_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

Smooth = Literal["no", "beside", "only"]
"""`beside`: each version, thin, behind the trailing mean; `only`: that mean alone."""
PERCENT = 100.0
BIN_LABELS: dict[str, str] = {"lag": "lag {}", "entropy": "entropy {}", "clip": "clip: {}", "correct": "{} completions"}
"""Labels of bins, by the way to divide."""
POINTS = 40
"""Points of a line up to which each has its marker."""
LONG_LABEL = 26
"""Letters of a label that leave room for two columns of the legend."""


@dataclass(frozen=True)
class Line:
    """A quantity over versions, both (n,): NaN where it was not measured."""

    label: str
    versions: Values
    values: Values


@dataclass(frozen=True)
class Panel:
    """Lines that share an axis."""

    unit: str
    """What its values are, with their unit."""
    lines: Sequence[Line]
    title: str = ""
    smooth: Smooth = "no"
    ordered: bool = False
    """Whether the lines are steps of one quantity: their colours go from dark to light, then."""


@dataclass(frozen=True)
class RunCurves:
    """What a run measured, and what happened to it."""

    spec: RunSpec
    steps: Sequence[StepView]
    """In order of versions."""
    evaluations: Sequence[EvaluationView] = ()
    """In order of versions."""
    marks: Sequence[Mark] = ()

    def lines(self, keys: Mapping[str, str], *, scale: float = 1.0) -> list[Line]:
        """Those of the steps' keys that were measured, under their labels, times `scale`."""
        versions = np.array([step.version for step in self.steps], dtype=np.float64)
        table = {key: column(self.steps, key) * scale for key in keys}
        return [Line(keys[key], versions, values) for key, values in table.items() if np.isfinite(values).any()]

    def divided(self, key: str, by: str, *, scale: float = 1.0) -> list[Line]:
        """The key in each bin of BINS[by] that was measured."""
        return self.lines({f"{key}/{by}/{name}": BIN_LABELS[by].format(name) for name in BINS[by]}, scale=scale)

    def evaluated(self, name: str, keys: Mapping[str, str]) -> list[Line]:
        """Those of the evaluations' keys that were measured on the set of that name."""
        found = [one for one in self.evaluations if one.name == name]
        versions = np.array([one.version for one in found], dtype=np.float64)
        table = {key: np.array([np.nan if (value := one.values.get(key)) is None else value for one in found], dtype=np.float64) for key in keys}
        return [Line(keys[key], versions, values) for key, values in table.items() if np.isfinite(values).any()]

    def sets(self) -> dict[str, str]:
        """The evaluation sets that were evaluated, with their domain."""
        return {one.name: one.domain for one in self.evaluations}


def below_one_another(run: RunCurves, name: str, title: str, caption: str, *panels: Panel) -> Drawing | str:
    """One figure of the panels that have a line, or a sentence that there is none."""
    shown = [panel for panel in panels if panel.lines]
    if not shown:
        return nothing(title)
    figure = new_figure(8, 4 if len(shown) == 1 else 1 + 2.6 * len(shown))
    grid = figure.subplots(len(shown), 1, sharex=True, squeeze=False)
    _draw(figure, list(grid[:, 0]), shown, run)
    grid[-1, 0].set_xlabel("policy version")
    _entitle(figure, grid[0, 0], title, panels=shown)
    return Drawing(name, title, caption, figure)


def side_by_side(run: RunCurves, name: str, title: str, caption: str, rows: Sequence[Sequence[Panel]]) -> Drawing | str:
    """One figure of a table of panels, those of a row on the same scale, or a sentence that none has a line."""
    shown = [row for row in rows if any(panel.lines for panel in row)]
    if not shown:
        return nothing(title)
    figure = new_figure(max(8, 4 * len(shown[0])), 1 + 3 * len(shown))
    grid = figure.subplots(len(shown), len(shown[0]), sharex=True, sharey="row", squeeze=False)
    _draw(figure, list(grid.flat), [panel for row in shown for panel in row], run)
    for axes in grid[-1]:
        axes.set_xlabel("policy version")
    figure.suptitle(label_text(title), x=0.01, ha="left", fontsize=11)
    return Drawing(name, title, caption, figure)


def nothing(title: str, why: str = "not measured") -> str:
    """The sentence on a figure that is left out."""
    return f"{title}: {why}."


def over_versions(axes: Axes, run: RunCurves) -> None:
    """What every axes of versions has: whole numbers, the events, no frame."""
    from matplotlib.ticker import MaxNLocator

    versions = [*(step.version for step in run.steps), *(one.version for one in run.evaluations)]
    first, last = min(versions), max(versions)
    for mark in run.marks:
        if first <= mark.version <= last + 1:
            colour, dash, label = MARK_STYLES[mark.kind]
            axes.axvline(mark.version, color=colour, linestyle=dash, linewidth=1.2, label=label)
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    open_axes(axes)


def over_versions_mesh(
    axes: Axes, run: RunCurves, edges: Values, table: Values, *, colours: str = "cividis", limits: tuple[float, float] | None = None
) -> QuadMesh:
    """A heat map of (rows, steps), with the (rows + 1,) edges of its rows; versions without a step stay empty."""
    first, last = run.steps[0].version, run.steps[-1].version
    whole = np.full((len(table), last - first + 1), np.nan)
    whole[:, [step.version - first for step in run.steps]] = table
    least, greatest = limits or (None, None)
    return axes.pcolormesh(np.arange(first, last + 2) - 0.5, edges, whole, cmap=colours, vmin=least, vmax=greatest)


def legend(figure: Figure, *axes: Axes) -> None:
    labels = [label for one in axes for label in one.get_legend_handles_labels()[1]]
    legend_below(figure, *axes, columns=2 if any(len(label) > LONG_LABEL for label in labels) else 4)


def _draw(figure: Figure, grid: Sequence[Axes], panels: Sequence[Panel], run: RunCurves) -> None:
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    for axes, panel in zip(grid, panels, strict=True):
        for line in panel.lines:
            at = labels.index(line.label)
            colour, dash, marker = style(at)
            if panel.ordered:
                colour, dash = _shade(at, len(labels)), "-"
            _plot(axes, line, panel.smooth, colour, dash, marker)
        if panel.title:
            title_axes(axes, panel.title)
        axes.set_ylabel(panel.unit)
        over_versions(axes, run)
    legend(figure, *grid)


def _plot(axes: Axes, line: Line, smooth: Smooth, colour: str, dash: str, marker: str) -> None:
    """What is measured every few versions is joined over those between; a trailing mean ends where none of its versions measured anything."""
    if smooth == "beside":
        axes.plot(line.versions, line.values, color=colour, alpha=0.35, linewidth=0.8)
    values = line.values if smooth == "no" else trailing_mean(line.values)
    known = np.flatnonzero(np.isfinite(values))
    places = known[:: 1 if len(known) <= POINTS else len(known) // 10]
    x, y = line.versions, values
    if smooth == "no":
        x, y, places = x[known], y[known], np.searchsorted(known, places)
    axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.5, marker=marker, markevery=places.tolist(), markersize=4, label=label_text(line.label))


def _shade(at: int, of: int) -> str:
    """Of a scale from dark to light that is told apart with every common kind of colour blindness; its lightest part is too pale for a line."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["cividis"](0.85 * at / max(1, of - 1)))


def _entitle(figure: Figure, first: Axes, title: str, *, panels: Sequence[Panel]) -> None:
    if len(panels) == 1 and not panels[0].title:
        title_axes(first, title)
    else:
        figure.suptitle(label_text(title), x=0.01, ha="left", fontsize=11)
