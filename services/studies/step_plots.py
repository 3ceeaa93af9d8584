"""Figures of a run's report: rewards, completions and time. Each is a drawing, or a sentence on why there is none."""

from __future__ import annotations

from services.studies.drawing import Drawing
from services.studies.run_panels import PERCENT, Panel, RunCurves, below_one_another

WAITING = {"trainer": "trainer", "rollout": "rollout servers", "reward": "reward servers"}


def reward(run: RunCurves) -> Drawing | str:
    caption = "Mean reward of the completions trained on; thin: each version; thick: the mean of the last ten."
    return below_one_another(run, "reward", "Reward", caption, Panel("mean reward (score)", run.lines({"reward_mean": "reward"}), smooth="beside"))


def groups(run: RunCurves) -> Drawing | str:
    shares = {"zero_signal_share": "rewards all equal", "all_right_share": "all correct", "all_wrong_share": "all wrong"}
    caption = "Share of the groups from which nothing can be learnt, since their rewards are all equal; means of the last ten versions."
    panel = Panel("groups (%)", run.lines(shares, scale=PERCENT), smooth="only")
    return below_one_another(run, "groups", "Groups without signal", caption, panel)


def lengths(run: RunCurves) -> Drawing | str:
    caption = "Mean length of the completions trained on, and the share of them that were cut off; means of the last ten versions."
    return below_one_another(
        run, "lengths", "Length of completions", caption,
        Panel("length (tokens)", run.lines({"completion_tokens_mean": "mean length"}), smooth="only"),
        Panel("truncated (%)", run.lines({"truncated_share": "cut off"}, scale=PERCENT), smooth="only"),
    )  # fmt: skip


def time(run: RunCurves) -> Drawing | str:
    # Servers tell how long they were idle with a heartbeat a second, which is longer than a short version: single versions mean nothing.
    keys = {"seconds": "whole version"} | {f"idle_{role}_seconds": who for role, who in WAITING.items()}
    caption = "Seconds for which each kind of process waited while one version was made, beside the version's own length; means of the last ten."
    return below_one_another(run, "idle", "Time without work", caption, Panel("time (s per version)", run.lines(keys), smooth="only"))
