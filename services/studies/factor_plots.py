"""Figures of a study: the entropy at the end against the factors in which its arms differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from services.contracts.study import StudySpec
from services.studies.drawing import END_LABEL, Drawing, annotate, finite, label_text, legend_below, new_figure, open_axes, style, title_axes
from services.studies.factors import FactorLine, lag_and_clip, unit
from services.studies.study_data import RunData, entropy_at_end

ENTROPY_OF = (
    "The final policy's entropy, estimated on fresh samples for the prompts of the first evaluation set in the domain; of a run that was not "
    "evaluated the exact one on its last five batches, which under lag are an older policy's samples."
)


def factor(name: str, lines: Sequence[FactorLine], runs: Sequence[RunData]) -> Drawing | str:
    """Entropy at the end against one factor: a line joins arms that are alike in all else, small points are seeds."""
    figure = new_figure(8, 4.5 + 0.15 * len(lines))
    axes = figure.add_subplot()
    drawn: set[float] = set()
    for at, line in enumerate(lines):
        seeds: dict[float, list[float]] = {}
        for value, arm in line.arms:  # several arms may stand for one value
            if ends := finite([entropy_at_end(run) for run in runs if run.arm == arm]):
                seeds.setdefault(value, []).extend(ends)
        colour, dash, marker = style(at)
        means = [float(np.mean(ends)) for ends in seeds.values()]
        axes.plot(list(seeds), means, color=colour, linestyle=dash, marker=marker, label=label_text(", ".join(arm for _, arm in line.arms)))
        for value, ends in seeds.items():
            axes.plot([value] * len(ends), ends, color=colour, marker=".", linestyle="", alpha=0.6, markersize=5)
        drawn |= set(seeds)
    if len(drawn) < 2:
        return f"Entropy against {name}: fewer than two of its values have a completed run."
    least, greatest = min(drawn), max(drawn)
    if least > 0 and greatest / least >= 8:
        axes.set_xscale("log", base=2)
    elif least == 0 and greatest >= 8:
        axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(sorted(drawn), [f"{value:g}" for value in sorted(drawn)])
    axes.minorticks_off()
    axes.set_xlabel(f"{label_text(name)} ({unit(name)})")
    axes.set_ylabel(END_LABEL)
    open_axes(axes)
    if len(lines) > 1:
        legend_below(figure, axes, columns=1)
    title = f"Entropy at the end against {name}"
    title_axes(axes, title)
    caption = (
        f"{ENTROPY_OF} A line joins the means over seeds of arms that are alike in everything else, and is named by them; small points are seeds."
    )
    return Drawing(f"factor-{name}", title, caption, figure)


def lag_clip(study: StudySpec, runs: Sequence[RunData]) -> Drawing | str:
    """Heat map of the entropy at the end over staleness window and clip bounds, mean over seeds."""
    cells = lag_and_clip(study)
    lags, clips = (sorted({cell[place] for cell in cells}, key=_numbers) for place in (0, 1))
    if len(lags) < 2 or len(clips) < 2:
        return "Heat map of lag and clip: the arms that are alike in all else do not span two windows and two clips."
    table = np.full((len(clips), len(lags)), np.nan)
    for (lag, clip), arms in cells.items():
        if ends := finite([entropy_at_end(run) for run in runs if run.arm in arms]):
            table[clips.index(clip), lags.index(lag)] = float(np.mean(ends))
    if not np.isfinite(table).any():
        return "Heat map of lag and clip: none of its runs has completed."
    figure = new_figure(3.5 + 1.2 * len(lags), 2 + 0.8 * len(clips))
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(table), cmap="cividis", aspect="auto", vmin=0)
    middle = float(np.nanmax(table)) / 2
    annotate(axes, table, lambda value: "white" if value < middle else "black")
    axes.set_xticks(range(len(lags)), lags)
    axes.set_yticks(range(len(clips)), clips)
    axes.set_xlabel("lag window, least-greatest (versions)")
    axes.set_ylabel("clip bounds, low/high (of the ratio)")
    figure.colorbar(image, ax=axes, label=END_LABEL)
    title = "Entropy at the end over lag and clip"
    title_axes(axes, title)
    caption = f"{ENTROPY_OF} Mean over seeds of the arms that are alike in everything else. An empty cell has no completed run."
    return Drawing("lag-clip", title, caption, figure)


def _numbers(label: str) -> tuple[float, ...]:
    """Order of windows and clips: by their numbers, and no clip last."""
    return (math.inf,) if label == "off" else tuple(float(part) for part in label.replace("-", "/").split("/"))
