"""Figures of a run's report: lag, distance from the sampler, clipping. Each is a drawing, or a sentence on why there is none."""

from __future__ import annotations

import numpy as np

from services.studies.drawing import Drawing, new_figure, title_axes
from services.studies.plots import SKY, VERMILLION, lag_shares
from services.studies.run_panels import PERCENT, Panel, RunCurves, below_one_another, legend, nothing, over_versions, over_versions_mesh


def lag(run: RunCurves) -> Drawing | str:
    from matplotlib.ticker import MaxNLocator

    title = "Lag of trained tokens"
    lags, shares = lag_shares(run.steps)
    if not lags:
        return nothing(title)
    figure = new_figure(8, 4)
    axes = figure.add_subplot()
    edges = np.arange(lags[0], lags[-1] + 2, dtype=np.float64) - 0.5
    mesh = over_versions_mesh(axes, run, edges, np.where(shares > 0, shares, np.nan), colours="cividis_r", limits=(0, 1))
    figure.colorbar(mesh, ax=axes, label="share of the version's trained tokens (of 1)")
    versions = [step.version for step in run.steps]
    every = max(1, len(versions) // 10)
    for bound, label, beside, colour, dash, marker in ((1, "greatest", 0.5, VERMILLION, "-", "v"), (0, "least", -0.5, SKY, "--", "^")):
        asked = [step.window[bound] + beside for step in run.steps]
        axes.step(versions, asked, where="mid", color=colour, linestyle=dash, marker=marker, markevery=every, label=f"requested, {label}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(-0.8, max(lags[-1], *(step.window[1] for step in run.steps)) + 0.8)
    axes.set_ylabel("lag (versions)")
    axes.set_xlabel("policy version")
    over_versions(axes, run)
    title_axes(axes, title)
    legend(figure, axes)
    caption = "Share of the trained tokens at each lag, with the requested window. A least lag of k is reached one version at a time."
    return Drawing("lag", title, caption, figure)


def kl(run: RunCurves) -> Drawing | str:
    keys = {
        "kl_behaviour_k1_nats": "to the sampler, k1", "kl_behaviour_k3_nats": "to the sampler, k3",
        "kl_proximal_k3_nats": "to the start of the step, k3", "kl_lag_k3_nats": "of the lag alone, k3",
    }  # fmt: skip
    caption = (
        "KL of the sampler, and of the policy at the start of the step, to the current policy; of the lag alone: of the sampler to the policy at the "
        "start of the step. k1 is unbiased, k3 has less variance. Thin: each version; thick: means of the last ten."
    )
    return below_one_another(run, "kl", "KL divergence", caption, Panel("KL (nats per token)", run.lines(keys), smooth="beside"))


def sample_size(run: RunCurves) -> Drawing | str:
    keys = {"ess_share": "of tokens", "ess_completion_share": "of completions, product", "ess_geometric_share": "of completions, geometric mean"}
    caption = (
        "Effective sample size under the weights current / sampler, as a share of what was trained on: of tokens; of completions, whose weight is "
        "the product, or the geometric mean, of their tokens'. 100 % is on-policy. Thin: each version; thick: means of the last ten."
    )
    return below_one_another(
        run, "ess", "Effective sample size", caption, Panel("effective sample size (%)", run.lines(keys, scale=PERCENT), smooth="beside")
    )


def clip(run: RunCurves) -> Drawing | str:
    keys = {
        "clip_up_share": "above the upper bound, advantage > 0", "clip_down_share": "below the lower bound, advantage < 0",
        "clip_mass_share": "gradient mass that clipping takes", "dual_clip_share": "bounded by the dual clip",
        "rejected_share": "rejected by the off-policy correction",
    }  # fmt: skip
    caption = (
        "Share of trained tokens whose importance ratio the clip stopped, by side; and the share of the sum of |w A r| that lies on clipped "
        "tokens. Thin: each version; thick: means of the last ten."
    )
    return below_one_another(run, "clip", "Clipped tokens", caption, Panel("share (%)", run.lines(keys, scale=PERCENT), smooth="beside"))


def off_policy_by_lag(run: RunCurves) -> Drawing | str:
    return _divided(run, "lag", "KL and effective sample size by lag", "of each lag, dark to light as lag grows", _KL_ESS)


def clip_by_lag(run: RunCurves) -> Drawing | str:
    return _divided(run, "lag", "Clipped tokens by lag", "of each lag, dark to light as lag grows", _CLIP)


def off_policy_by_entropy(run: RunCurves) -> Drawing | str:
    return _divided(run, "entropy", "KL and effective sample size by token entropy", "of each fifth by entropy, dark the lowest", _KL_ESS)


def clip_by_entropy(run: RunCurves) -> Drawing | str:
    return _divided(run, "entropy", "Clipped tokens by token entropy", "of each fifth by entropy, dark the lowest", _CLIP)


_KL_ESS = ("kl", {"kl_behaviour_k3_nats": ("KL to the sampler, k3\n(nats per token)", 1.0), "ess_share": ("effective sample size (%)", PERCENT)})
_CLIP = (
    "clip", {"clip_up_share": ("above the bound,\nadvantage > 0 (%)", PERCENT), "clip_down_share": ("below the bound,\nadvantage < 0 (%)", PERCENT)}
)  # fmt: skip


def _divided(run: RunCurves, by: str, title: str, of: str, figure: tuple[str, dict[str, tuple[str, float]]]) -> Drawing | str:
    name, keys = figure
    panels = [Panel(unit, run.divided(key, by, scale=scale), smooth="only", ordered=True) for key, (unit, scale) in keys.items()]
    if max(len(panel.lines) for panel in panels) < 2:
        return nothing(title, f"the trained tokens had one {by}, or it was not measured")
    caption = f"Over the trained tokens {of}; means of the last ten versions."
    return below_one_another(run, f"{name}-{by}", title, caption, *panels)
