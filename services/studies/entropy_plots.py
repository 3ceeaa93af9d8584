"""Figures of a run's report: the entropy of the policy. Each is a drawing, or a sentence on why there is none."""

from __future__ import annotations

import numpy as np

from services.contracts.measures import BINS
from services.studies.drawing import Drawing, new_figure, title_axes
from services.studies.plots import BLACK, BLUE, GREY, VERMILLION, column
from services.studies.run_panels import Panel, RunCurves, below_one_another, legend, nothing, over_versions, over_versions_mesh

ENTROPY = "entropy (nats per token)"
PARTS = {"entropy_change_predicted_positive": "advantage > 0", "entropy_change_predicted_negative": "advantage < 0"}
NET, REALISED = "entropy_change_predicted", "entropy_change_realised"


def entropy(run: RunCurves) -> Drawing | str:
    keys = {
        "entropy_nats": "exact", "entropy_positive_nats": "exact, advantage > 0", "entropy_negative_nats": "exact, advantage < 0",
        "entropy_estimate_nats": "estimate, mean of -logp",
    }  # fmt: skip
    caption = "Exact entropy of the next-token distribution over trained tokens, also by the advantage's sign; and the estimate, mean of -logp."
    return below_one_another(run, "entropy", "Policy entropy, over the whole vocabulary", caption, Panel(ENTROPY, run.lines(keys)))


def entropy_by_lag(run: RunCurves) -> Drawing | str:
    title = "Entropy by lag"
    lines = run.divided("entropy_nats", "lag")
    if len(lines) < 2:
        return nothing(title, "the trained tokens had one lag, or it was not measured")
    caption = "Exact entropy over the trained tokens of each lag, dark to light as lag grows; means of the last ten versions."
    return below_one_another(run, "entropy-lag", title, caption, Panel(ENTROPY, lines, smooth="only", ordered=True))


def entropy_by_position(run: RunCurves) -> Drawing | str:
    title = "Entropy by place in the completion"
    table = np.array([column(run.steps, f"entropy_nats/position/{decile}") for decile in BINS["position"]])
    if not np.isfinite(table).any():
        return nothing(title)
    figure = new_figure(8, 4)
    axes = figure.add_subplot()
    mesh = over_versions_mesh(axes, run, np.linspace(0, 100, len(table) + 1), table)
    figure.colorbar(mesh, ax=axes, label=ENTROPY)
    axes.set_ylabel("place in the completion (% of its length)")
    axes.set_xlabel("policy version")
    over_versions(axes, run)
    title_axes(axes, title)
    legend(figure, axes)
    caption = "Exact entropy over the trained tokens of each tenth of their completions, from the first to the last."
    return Drawing("entropy-position", title, caption, figure)


def entropy_by_kind(run: RunCurves) -> Drawing | str:
    """By the clip's side and by correctness, on axes of their own: their bins overlap."""
    caption = (
        "Exact entropy over the trained tokens that clipping keeps, and that lie beyond the upper or the lower bound; and over those of right and of "
        "wrong completions. Means of the last ten versions."
    )
    return below_one_another(
        run, "entropy-kind", "Entropy by clip and by correctness", caption,
        Panel(ENTROPY, run.divided("entropy_nats", "clip"), title="by clip", smooth="only"),
        Panel(ENTROPY, run.divided("entropy_nats", "correct"), title="by correctness", smooth="only"),
    )  # fmt: skip


def budget(run: RunCurves) -> Drawing | str:
    """The signed parts stacked, from 0 up or down, above the change on the probe: two axes, since the units differ."""
    title = "Signed entropy budget"
    parts = {key: column(run.steps, key) for key in PARTS}
    if not any(np.isfinite(values).any() for values in parts.values()):
        return nothing(title)
    versions = np.array([step.version for step in run.steps], dtype=np.float64)
    realised = column(run.steps, REALISED)
    known = np.isfinite(realised)
    figure = new_figure(8, 6.2 if known.any() else 4)
    grid = figure.subplots(1 + bool(known.any()), 1, sharex=True, squeeze=False)[:, 0]
    up = down = np.zeros(len(versions))
    for (key, values), colour, hatch in zip(parts.items(), (VERMILLION, BLUE), ("//", ".."), strict=True):
        values = np.nan_to_num(values)
        base = np.where(values > 0, up, down)
        drawn = {"step": "mid", "facecolor": colour, "alpha": 0.8, "hatch": hatch, "edgecolor": "white", "linewidth": 0.0, "label": PARTS[key]}
        grid[0].fill_between(versions, base, base + values, **drawn)
        up, down = up + np.maximum(values, 0), down + np.minimum(values, 0)
    grid[0].plot(versions, column(run.steps, NET), color=BLACK, linewidth=1.2, label="net")
    grid[0].set_ylabel("predicted change\n(nats per unit step of the logits)")
    if known.any():
        grid[1].vlines(versions[known], 0, realised[known], color=GREY)
        grid[1].plot(versions[known], realised[known], color=GREY, marker="o", markersize=3, linestyle="", label="realised")
        grid[1].set_ylabel("realised change\n(nats per token)")
    for axes in grid:
        axes.axhline(0, color=BLACK, linewidth=0.8)
        over_versions(axes, run)
    grid[-1].set_xlabel("policy version")
    title_axes(grid[0], title)
    legend(figure, *grid)
    caption = (
        "What the tokens of positive and of negative advantage are predicted to add to entropy, to first order in a step on the logits, stacked; "
        "below it the change that was measured on probe tokens. Signs compare, levels do not: the units differ."
    )
    return Drawing("budget", title, caption, figure)


def prompt_entropy(run: RunCurves) -> Drawing | str:
    keys = {"prompt_entropy_in_nats": "in the domain of training", "prompt_entropy_out_nats": "out of it"}
    caption = "Exact entropy of the next token over the prompts of the evaluation sets, without sampling: the same prompts at every version."
    return below_one_another(run, "prompt-entropy", "Prompt entropy", caption, Panel(ENTROPY, run.lines(keys)))
