"""The figures of a study: all of them in order, and those that span all its arms or claims."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.contracts.states import RunState
from services.contracts.study import StudySpec
from services.studies.correlations import Correlation
from services.studies.curve_plots import arm_groups, curves
from services.studies.drawing import Drawing, annotate, finite, legend_below, new_figure, open_axes, title_axes
from services.studies.factor_plots import factor, lag_clip
from services.studies.factors import factor_lines
from services.studies.plots import BLACK, BLUE, GREY, VERMILLION
from services.studies.study_data import RunData, by_arm_and_seed, total
from services.studies.verdicts import Decision, Verdict, interval_text

PREDICTED = {"entropy_change_predicted_positive": "advantage > 0", "entropy_change_predicted_negative": "advantage < 0"}
REALISED = "entropy_change_realised"
FOREST = {Decision.HOLDS: (BLUE, "o"), Decision.DOES_NOT_HOLD: (VERMILLION, "X"), Decision.NOT_SEPARABLE: (GREY, "s")}


def drawings(
    study: StudySpec, runs: Sequence[RunData], verdicts: Sequence[Verdict], correlated: Sequence[Correlation]
) -> tuple[list[Drawing], list[str]]:
    """All figures for which there are data, in the order in which a reader wants them, and a sentence on each that is left out. Failed and cancelled
    runs are in no figure; those that go on are in the curves only."""
    known = [run for run in by_arm_and_seed(runs).values() if run.state not in (RunState.FAILED, RunState.CANCELLED) and run.steps]
    done = [run for run in known if run.state is RunState.COMPLETED]
    tried = [
        forest(verdicts),
        *(curves(name, arms, known) for name, arms in arm_groups(study)),
        *(factor(name, lines, done) for name, lines in factor_lines(study).items()),
        lag_clip(study, done),
        budget(study, done),
        correlation_map(correlated),
    ]
    return [one for one in tried if isinstance(one, Drawing)], [one for one in tried if isinstance(one, str)]


def budget(study: StudySpec, runs: Sequence[RunData]) -> Drawing | str:
    """Signed entropy budget by arm: what tokens of either sign of advantage were predicted to change, beside what changed on the probe."""
    sums: dict[str, dict[str, float]] = {}
    for arm in reversed([arm.name for arm in study.arms]):
        own = [run for run in runs if run.arm == arm]
        totals = {key: finite([total(run, key) for run in own]) for key in (*PREDICTED, REALISED)}
        if any(totals[key] for key in PREDICTED):
            sums[arm] = {key: float(np.mean(values)) for key, values in totals.items() if values}
    if not sums:
        return "Entropy budget: no completed run measured the predicted changes."
    figure = new_figure(11, 2 + 0.35 * len(sums))
    predicted, realised = figure.subplots(1, 2, sharey=True)
    arms = list(sums)
    up = down = np.zeros(len(arms))
    for (key, label), colour, hatch in zip(PREDICTED.items(), (VERMILLION, BLUE), ("//", ".."), strict=True):
        values = np.array([own.get(key, 0.0) for own in sums.values()])
        from_ = np.where(values > 0, up, down)
        predicted.barh(arms, values, left=from_, color=colour, alpha=0.8, hatch=hatch, edgecolor="white", label=label)
        up, down = up + np.maximum(values, 0), down + np.minimum(values, 0)
    net = [sum(own.get(key, 0.0) for key in PREDICTED) for own in sums.values()]
    predicted.plot(net, arms, color=BLACK, marker="D", markerfacecolor="white", linestyle="", label="net")
    realised.barh(arms, [own.get(REALISED, np.nan) for own in sums.values()], color=GREY)
    predicted.set_xlabel("predicted change, summed over the run\n(nats per unit step of the logits)")
    realised.set_xlabel("realised change, summed over the run\n(nats per token)")
    for axes in (predicted, realised):
        axes.axvline(0, color=BLACK, linewidth=1)
        axes.margins(y=0.02)
        axes.set_ylabel("arm (name)")
        open_axes(axes)
    predicted.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    title = "Signed entropy budget"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    caption = (
        "What tokens of positive and of negative advantage are predicted to add to entropy, to first order in a step on the logits, stacked; beside "
        "it the change that was measured on probe tokens (versions without a probe count as the mean of the others); sums over the run, mean over "
        "seeds. Signs compare, levels do not: the units differ, and the prediction is the mean over a version's updates, however many they are."
    )
    return Drawing("budget", title, caption, figure)


def correlation_map(correlated: Sequence[Correlation]) -> Drawing | str:
    """Spearman's correlations of the entropy at the end with diversity, calibration and accuracy on each evaluation set."""
    if not correlated:
        return "Correlations with evaluations: fewer than three completed runs were evaluated."
    names, keys = sorted({one.name for one in correlated}), list(dict.fromkeys(one.key for one in correlated))
    table = np.full((len(keys), len(names)), np.nan)
    for one in correlated:
        table[keys.index(one.key), names.index(one.name)] = one.rho
    figure = new_figure(5.5 + 1.2 * len(names), 3 + 0.25 * len(keys))
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(table), cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
    annotate(axes, table, lambda value: "white" if abs(value) > 0.7 else "black", "{:+.2f}")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(keys)), keys)
    axes.set_xlabel("evaluation set (name)")
    axes.set_ylabel("last evaluation (key)")
    figure.colorbar(image, ax=axes, label="rank correlation with entropy\nat the end (no unit)")
    title = "What goes with entropy"
    title_axes(axes, title)
    caption = (
        "Spearman's rank correlation over all completed runs that evaluate on the set, of all arms and seeds, with the entropy at the end: the final "
        "policy's, estimated on fresh samples for the prompts of the first set in the domain. The table has the intervals."
    )
    return Drawing("correlations", title, caption, figure)


def forest(verdicts: Sequence[Verdict]) -> Drawing | str:
    """All claims in one picture, each on a scale of its own: its threshold is at 0, the furthest end of its interval at 1 or -1."""
    rows = [(verdict, *scaled(verdict)) for verdict in reversed(verdicts) if verdict.decision is not Decision.NO_DATA]
    if not rows:
        return "All claims in one picture: none has data."
    figure = new_figure(10, 1.6 + 0.32 * len(rows))
    axes = figure.add_subplot()
    for y, (verdict, effect, low, high) in enumerate(rows):
        colour, marker = FOREST[verdict.decision]
        axes.plot([low, high], [y, y], color=colour, linewidth=2)
        axes.plot([effect], [y], color=colour, marker=marker, linestyle="", markersize=7)
        axes.text(1.08, y, f"{interval_text(verdict)}, n = {verdict.n}", va="center", fontsize=8)
    for decision, (colour, marker) in FOREST.items():
        axes.plot([], [], color=colour, marker=marker, label=decision.value)
    axes.axvline(0, color=BLACK, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [verdict.claim.id for verdict, *_ in rows])
    axes.set_xlim(-1.06, 1.06)
    axes.set_ylim(-0.8, len(rows) - 0.2)
    axes.set_xlabel("distance from the threshold, positive as claimed (share of the claim's furthest end)")
    axes.set_ylabel("claim (id)")
    open_axes(axes)
    legend_below(figure, axes, columns=3)
    title = "All claims"
    title_axes(axes, title)
    caption = (
        "Effect and 95 % interval less the claim's threshold, each claim scaled by its own furthest end; right of the line is as claimed. Of "
        "two-sided claims the sign is the measured one; of `within` it is the distance inside the nearer bound. A point without a line has fewer "
        "than three seeds and no interval. The numbers at the right are in the metric's own unit."
    )
    return Drawing("claims", title, caption, figure)


def scaled(verdict: Verdict) -> tuple[float, float, float]:
    """(effect, low, high) as distances from the threshold, positive as claimed, divided by the greatest of them."""
    claim, effect = verdict.claim, verdict.effect or 0.0
    low, high = (effect if end is None else end for end in (verdict.low, verdict.high))
    if claim.direction == "within" and claim.low is not None and claim.high is not None:
        inside = min(effect - claim.low, claim.high - effect)
        ends = [inside, inside - (high - low) / 2, inside + (high - low) / 2]
    else:
        sign = -1.0 if claim.direction == "less" else 1.0
        ends = [sign * (value - claim.threshold) for value in (effect, low, high)]
    scale = max(map(abs, ends)) or 1.0
    return ends[0] / scale, ends[1] / scale, ends[2] / scale
