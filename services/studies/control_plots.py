"""Figures of a run's report: what the controllers of entropy and of staleness saw and did."""

from __future__ import annotations

import numpy as np

from services.studies.curves import Values
from services.studies.drawing import Drawing
from services.studies.plots import column
from services.studies.run_panels import Line, Panel, RunCurves, below_one_another, nothing

SLOPE_OVER = 20
"""Versions of the straight line whose slope stands for the staleness controller's own, which averages over as many."""
MEASURES: dict[str, tuple[str, str]] = {
    "kl": ("kl_behaviour_k3_nats", "KL to the sampler, k3\n(nats per token)"),
    "ess": ("ess_share", "effective sample size\n(share of 1)"),
}


def entropy_control(run: RunCurves) -> Drawing | str:
    title = "Entropy control"
    actuated = run.lines({"control_weight": "weight of positive tokens", "control_coefficient": "coefficient"})
    if not actuated:
        return nothing(title, "the run has no controller that acts between steps")
    held = run.lines({"control_target_nats": "target"})
    caption = (
        "The measured entropy, with the target if one is held, and what the controller set for the step: the weight of the loss of tokens with "
        "positive advantage, or the coefficient of its term in the loss; and whether the reward guard is awake."
    )
    return below_one_another(
        run, "control-entropy", title, caption,
        Panel("entropy (nats per token)", [*run.lines({"entropy_nats": "measured"}), *held]),
        Panel("actuator (factor, no unit)", actuated),
        Panel("reward guard (1: awake)", run.lines({"control_guard": "reward guard"})),
    )  # fmt: skip


def staleness_control(run: RunCurves) -> Drawing | str:
    title = "Staleness control"
    wish, held = run.lines({"staleness_wish_versions": "asked for"}), run.lines({"staleness_target": "target"})
    target = run.spec.staleness.target
    if not wish or target is None:
        return nothing(title, "the run has no staleness.target")
    if target.metric == "entropy_slope":
        measured, unit = [entropy_slope(run)], "slope of entropy\n(nats per token and version)"
    else:
        key, unit = MEASURES[target.metric]
        measured = run.lines({key: "measured"})
    versions = np.array([step.version for step in run.steps], dtype=np.float64)
    greatest = Line("max_lag in force", versions, np.array([step.window[1] for step in run.steps], dtype=np.float64))
    caption = "What is held, with its target; and the greatest lag that is allowed, that the controller asks for, and the mean that tokens had."
    return below_one_another(
        run, "control-staleness", title, caption,
        Panel(unit, [*measured, *held]),
        Panel("lag (versions)", [greatest, *wish, *run.lines({"lag_mean": "mean lag of tokens"})]),
    )  # fmt: skip


def entropy_slope(run: RunCurves) -> Line:
    """Slope of a straight line through the entropy of each version and the SLOPE_OVER - 1 before it, from the first that has so many."""
    entropy = column(run.steps, "entropy_nats")
    known = np.isfinite(entropy)
    versions = np.array([step.version for step in run.steps], dtype=np.float64)[known]
    return Line(f"measured, over {SLOPE_OVER} versions", versions[SLOPE_OVER - 1 :], _slopes(versions, entropy[known]))


def _slopes(x: Values, y: Values) -> Values:
    if len(x) < SLOPE_OVER:
        return np.zeros(0)
    at, of = (np.lib.stride_tricks.sliding_window_view(values, SLOPE_OVER) for values in (x, y))
    from_middle = at - at.mean(axis=1, keepdims=True)
    slopes: Values = (from_middle * of).sum(axis=1) / (from_middle**2).sum(axis=1)
    return slopes
