"""Figures of a study: entropy and reward against what was spent, which is completions, optimiser updates, and KL.

The three axes tell different stories: more updates on a batch cost entropy at equal rollouts, and may cost none at equal updates or at equal KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from services.contracts.study import StudySpec
from services.studies.drawing import COLOURS, Drawing, legend_below, new_figure, open_axes, style
from services.studies.plots import column, trailing_mean
from services.studies.study_data import Axis, RunData, spent
from services.studies.verdicts import claim_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS_A_FIGURE = len(COLOURS)
"""Curves that can be told apart in one figure."""
SMOOTHED = 5
"""Versions in the trailing mean of curves; as many as the reducer `end` averages."""
POINTS = 100
"""Points at which curves are compared at equal KL."""
AXES: dict[Axis, str] = {
    "rollouts": "rollouts (completions)",
    "updates": "optimiser updates (count)",
    "kl": "summed KL(before || after a step) (nats per token)",
}
CURVES: dict[str, str] = {"entropy_nats": "entropy (nats per token)", "reward_mean": "mean reward (score)"}


def arm_groups(study: StudySpec) -> list[tuple[str, list[str]]]:
    """The arms in groups small enough for one figure: all of them, or those of each claim number, without groups that are part of another and those
    that are too many to compare by eye; arms of no such group come last, by the source of their prompts, since tasks have levels of their own."""
    names = [arm.name for arm in study.arms]
    if len(names) <= ARMS_A_FIGURE:
        return [("all", names)]
    groups: dict[str, set[str]] = {}
    for claim in study.claims:
        groups.setdefault(claim_number(claim.id), set()).update(claim.arms)
    small = {name: arms for name, arms in groups.items() if 0 < len(arms) <= ARMS_A_FIGURE}
    kept: dict[str, set[str]] = {}
    for name, arms in small.items():
        if not any(arms < other for other in small.values()) and arms not in kept.values():
            kept[name] = arms
    rest: dict[str, set[str]] = {}
    for arm in set(names).difference(*kept.values()):
        rest.setdefault(study.run(arm, study.seeds[0]).data.source, set()).add(arm)
    for source, left in sorted(rest.items()):
        kept["rest" if len(rest) == 1 else f"rest-{source}"] = left
    chunks = []
    for name, arms in kept.items():
        ordered = sorted(arms, key=names.index)
        parts = [ordered[at : at + ARMS_A_FIGURE] for at in range(0, len(ordered), ARMS_A_FIGURE)]
        chunks += [(name if len(parts) == 1 else f"{name}-{at}", part) for at, part in enumerate(parts, start=1)]
    return chunks


def curves(name: str, arms: Sequence[str], runs: Sequence[RunData]) -> Drawing | str:
    """Entropy and reward of these arms against each axis: mean over seeds, with the band from the least to the greatest."""
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in arms}
    if not any(by_arm.values()):
        return f"Curves of {', '.join(arms)}: no version has been trained yet."
    figure = new_figure(13, 7)
    grid = figure.subplots(len(CURVES), len(AXES), sharey="row", squeeze=False)
    for row, (key, value_label) in enumerate(CURVES.items()):
        for place, (axis, label) in enumerate(AXES.items()):
            for at, arm in enumerate(arms):
                _band(grid[row, place], by_arm[arm], key, axis, at, arm)
            grid[row, place].locator_params(axis="x", nbins=5)
            grid[row, place].set_xlabel(label)
            grid[row, place].set_ylabel(value_label)
            open_axes(grid[row, place])
    legend_below(figure, grid[0, 0], columns=4)
    title = "Entropy and reward"
    if name == "rest" or name.startswith("rest-"):
        title += f", other arms{name.removeprefix('rest').replace('-', ' ', 1)}"
    elif name != "all":
        title += f", arms of {name}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    caption = (
        f"Mean over seeds; the band reaches from the least to the greatest. Each seed is smoothed by a trailing mean of {SMOOTHED} versions. "
        "Against KL a curve ends where the seed of least KL does. It is measured on probe tokens, every few versions, and stands for those up to the "
        "next; of a run without a probe it is the KL of the sampler to the current policy."
    )
    return Drawing(f"curves-{name}", title, caption, figure)


def _band(axes: Axes, runs: Sequence[RunData], key: str, axis: Axis, at: int, arm: str) -> None:
    seeds = [(spent(run, axis), trailing_mean(column(run.steps, key), SMOOTHED)) for run in runs]
    seeds = [(x[known], y[known]) for x, y in seeds if (known := np.isfinite(y)).any()]
    if not seeds:
        return
    if axis == "kl":  # every seed spends its own: compared where all of them have been
        x = np.linspace(max(x[0] for x, _ in seeds), min(x[-1] for x, _ in seeds), POINTS)
        if x[-1] <= x[0]:
            return
        table = np.array([np.interp(x, *curve) for curve in seeds])
    else:
        x = max((x for x, _ in seeds), key=len)
        table = np.full((len(seeds), len(x)), np.nan)
        for row, (_, y) in enumerate(seeds):
            table[row, : len(y)] = y
    colour, dash, marker = style(at)
    every = max(1, len(x) // 6)
    axes.plot(x, np.nanmean(table, axis=0), color=colour, linestyle=dash, marker=marker, markevery=every, markersize=5, linewidth=1.6, label=arm)
    axes.fill_between(x, np.nanmin(table, axis=0), np.nanmax(table, axis=0), color=colour, alpha=0.15, linewidth=0)
