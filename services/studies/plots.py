"""The plots of a run, as PNG files. matplotlib is imported when the first is drawn; without pyplot it needs no display and has no global state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from services.contracts.views import EventView, StepView

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = NDArray[np.float64]
Smooth = Literal["no", "beside", "only"]

# Okabe and Ito's palette: told apart with every common kind of colour blindness.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#767676"
SMOOTHED_OVER = 10
"""Versions in the trailing mean of smoothed curves; as many as the summary's first and last mean."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at a version: a vertical line in every plot."""

    version: int
    kind: str
    """`knobs`, `back` or `trouble`."""


@dataclass(frozen=True)
class Plot:
    """One plot: its file's name, title and words for those who cannot see it."""

    name: str
    title: str
    caption: str
    draw: Callable[[Axes, Sequence[StepView]], None]


_MARK_STYLES: dict[str, tuple[str, str, str]] = {
    "knobs": (PURPLE, "--", "knobs changed"),
    "back": (ORANGE, ":", "resumed or joined"),
    "trouble": (VERMILLION, "-.", "trouble"),
}


def column(steps: Sequence[StepView], key: str) -> Values:
    """(steps,) the values under `key`; NaN where a step has none."""
    return np.array([math.nan if (value := step.values.get(key)) is None else value for step in steps], dtype=np.float64)


def trailing_mean(values: Values, width: int = SMOOTHED_OVER) -> Values:
    """(n,) mean of each value and the up to width - 1 before it; NaNs are left out, and all NaN gives NaN."""
    known = np.isfinite(values)
    sums, counts = np.cumsum(np.where(known, values, 0.0)), np.cumsum(known)
    sums[width:], counts[width:] = sums[width:] - sums[:-width], counts[width:] - counts[:-width]
    means: Values = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
    return means


def lag_shares(steps: Sequence[StepView]) -> tuple[list[int], Values]:
    """The lags that occur, from least to greatest without gaps, and the (lags, steps) share of each step's trained tokens that had them."""
    seen = [lag for step in steps for lag in step.lags]
    if not seen:
        return [], np.zeros((0, len(steps)))
    lags = list(range(min(seen), max(seen) + 1))
    counts = np.array([[step.lags.get(lag, 0) for step in steps] for lag in lags], dtype=np.float64)
    totals = counts.sum(axis=0)
    return lags, np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)


def marks_of(events: Sequence[EventView]) -> list[Mark]:
    """The events that explain a bend in a curve."""
    found: set[tuple[int, str]] = set()
    for event in events:
        kind = _kind(event.event)
        first_join = event.event == "server_admitted" and event.version == 0
        if kind is not None and event.version is not None and not first_join:
            found.add((event.version, kind))
    return [Mark(version, kind) for version, kind in sorted(found)]


def _kind(event: str) -> str | None:
    if event.startswith("knob"):
        return "knobs"
    if any(word in event for word in ("resumed", "admitted")):
        return "back"
    if any(word in event for word in ("fenced", "lost", "failed")):
        return "trouble"
    return None


def draw_all(folder: Path, steps: Sequence[StepView], marks: Sequence[Mark]) -> list[tuple[Plot, Path]]:
    """Draw every plot into `folder`, in the order in which a reader wants them; nothing when there are no steps."""
    from matplotlib.figure import Figure

    if not steps:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for plot in PLOTS:
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot()
        plot.draw(axes, steps)
        _finish(axes, plot, steps, marks)
        path = folder / f"{plot.name}.png"
        figure.savefig(path, dpi=120)
        drawn.append((plot, path))
    return drawn


def _finish(axes: Axes, plot: Plot, steps: Sequence[StepView], marks: Sequence[Mark]) -> None:
    from matplotlib.ticker import MaxNLocator

    first, last = steps[0].version, steps[-1].version
    labelled: set[str] = set()
    for mark in marks:
        if not first <= mark.version <= last + 1:
            continue
        color, style, label = _MARK_STYLES[mark.kind]
        axes.axvline(mark.version, color=color, linestyle=style, linewidth=1.2, label="_" if mark.kind in labelled else label)
        labelled.add(mark.kind)
    axes.set_title(plot.title, loc="left", fontsize=11)
    axes.set_xlabel("policy version")
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if not axes.has_data():
        axes.text(0.5, 0.5, "not measured in this run", transform=axes.transAxes, ha="center", va="center", color=GREY)


def _line(
    axes: Axes, steps: Sequence[StepView], key: str, label: str, color: str, *, smooth: Smooth = "no", scale: float = 1.0, style: str = "-"
) -> None:
    """One key over versions, left out when no step has it. `beside`: each version as points behind the trailing mean; `only`: that mean alone."""
    values = column(steps, key) * scale
    known = int(np.isfinite(values).sum())
    if not known:
        return
    versions = [step.version for step in steps]
    if smooth == "beside":
        axes.plot(versions, values, color=color, alpha=0.35, linewidth=0.8, marker=".", markersize=3, label=f"{label}, each version")
        axes.plot(versions, trailing_mean(values), color=color, linewidth=2, label=f"{label}, mean of {SMOOTHED_OVER}")
        return
    shown = values if smooth == "no" else trailing_mean(values)
    axes.plot(versions, shown, color=color, linewidth=1.4, linestyle=style, marker="." if known < 40 else None, markersize=4, label=label)


def _reward(axes: Axes, steps: Sequence[StepView]) -> None:
    _line(axes, steps, "reward_mean", "reward", BLUE, smooth="beside")
    axes.set_ylabel("mean reward")


def _entropy(axes: Axes, steps: Sequence[StepView]) -> None:
    _line(axes, steps, "entropy_nats", "exact", BLUE)
    _line(axes, steps, "entropy_positive_nats", "exact, advantage > 0", GREEN)
    _line(axes, steps, "entropy_negative_nats", "exact, advantage < 0", VERMILLION)
    _line(axes, steps, "entropy_estimate_nats", "estimate, mean of -logp", BLACK, style=":")
    axes.set_ylabel("entropy (nats per token)")


def _lag(axes: Axes, steps: Sequence[StepView]) -> None:
    from matplotlib.ticker import MaxNLocator

    lags, shares = lag_shares(steps)
    axes.set_ylabel("lag (versions)")
    if not lags:
        return
    versions = np.array([step.version for step in steps], dtype=np.float64)
    edges = np.append(versions - 0.5, versions[-1] + 0.5)
    mesh = axes.pcolormesh(edges, np.arange(lags[0], lags[-1] + 2) - 0.5, np.where(shares > 0, shares, np.nan), cmap="cividis_r", vmin=0, vmax=1)
    axes.figure.colorbar(mesh, ax=axes, label="share of the version's trained tokens", location="bottom", shrink=0.6, aspect=40)
    axes.step(versions, [step.window[1] + 0.5 for step in steps], where="mid", color=VERMILLION, linewidth=1.6, label="requested, greatest")
    axes.step(versions, [step.window[0] - 0.5 for step in steps], where="mid", color=SKY, linewidth=1.6, linestyle="--", label="requested, least")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    greatest = max(lags[-1], *(step.window[1] for step in steps))
    axes.set_ylim(-0.8, greatest + 0.8)


def _kl(axes: Axes, steps: Sequence[StepView]) -> None:
    _line(axes, steps, "kl_behaviour_k1_nats", "to the sampler, k1", SKY)
    _line(axes, steps, "kl_behaviour_k3_nats", "to the sampler, k3", BLUE)
    _line(axes, steps, "kl_proximal_k3_nats", "to the start of the step, k3", ORANGE)
    axes.set_ylabel("KL (nats per token)")


def _clip(axes: Axes, steps: Sequence[StepView]) -> None:
    _line(axes, steps, "clip_up_share", "above the upper bound, advantage > 0", VERMILLION, scale=100)
    _line(axes, steps, "clip_down_share", "below the lower bound, advantage < 0", BLUE, scale=100)
    axes.set_ylabel("clipped tokens (%)")


def _idle(axes: Axes, steps: Sequence[StepView]) -> None:
    # Servers tell how long they were idle with a heartbeat a second, which is longer than a short version: single versions mean nothing.
    curves = (("seconds", "whole version", GREY), ("idle_trainer_seconds", "trainer", BLUE), ("idle_rollout_seconds", "rollout servers", VERMILLION))
    for key, label, color in (*curves, ("idle_reward_seconds", "reward servers", GREEN)):
        _line(axes, steps, key, label, color, smooth="only", style=":" if key == "seconds" else "-")
    axes.set_ylabel("time (s per version)")
    if axes.has_data():
        axes.set_ylim(bottom=0)


PLOTS: tuple[Plot, ...] = (
    Plot("reward", "Reward", "Mean reward of the completions trained on, each version and the mean of the last ten.", _reward),
    Plot(
        "entropy",
        "Policy entropy, over the whole vocabulary",
        "Exact entropy of the next-token distribution over trained tokens, also by the advantage's sign; dotted: the estimate, mean of -logp.",
        _entropy,
    ),
    Plot(
        "lag",
        "Lag of trained tokens",
        "Share of the trained tokens at each lag, with the requested window. A least lag of k is reached one version at a time.",
        _lag,
    ),
    Plot(
        "kl",
        "KL divergence",
        "KL of the sampler, and of the policy at the start of the step, to the current policy; k1 is unbiased, k3 has less variance.",
        _kl,
    ),
    Plot("clip", "Clipped tokens", "Share of trained tokens whose importance ratio the clip stopped, by side.", _clip),
    Plot(
        "idle",
        "Time without work",
        "Seconds for which each kind of process waited while one version was made, beside the version's own length; means of the last ten.",
        _idle,
    ),
)
