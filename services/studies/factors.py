"""The factors of a study: in what its arms differ, and which arms are alike in all else, so that one factor's effect can be read."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import JsonValue

from services.contracts.spec import flatten
from services.contracts.study import StudySpec

Settings = dict[str, JsonValue]

LAG = "staleness.lag"
"""min_lag and max_lag as one factor, where all arms have an exact window {k, k}."""
WINDOW = ("staleness.min_lag", "staleness.max_lag")
CLIP = ("clip.low", "clip.high", "clip.off")

UNITS = {
    LAG: "versions", "staleness.min_lag": "versions", "staleness.max_lag": "versions", "updates_per_batch": "optimiser updates per batch",
    "clip.low": "ratio", "clip.high": "ratio", "entropy.target": "nats per token", "learning_rate": "per update", "group_size": "completions",
    "batch_groups": "groups", "sampling.max_tokens": "tokens", "data.size": "prompts", "correction.truncation": "ratio", "versions": "count",
    "prompts": "count",
}  # fmt: skip


@dataclass(frozen=True)
class FactorLine:
    """Arms that differ in one factor only."""

    arms: tuple[tuple[float, str], ...]
    """(value of the factor, arm), in rising order."""


def unit(factor: str) -> str:
    return UNITS.get(factor, "as set")


def arm_settings(study: StudySpec) -> dict[str, Settings]:
    """Arm -> dotted name -> value of every field in which some arm differs from the base run, the arm's own budget included."""
    trees: dict[str, Settings] = {arm.name: flatten(study.run(arm.name, study.seeds[0]).model_dump(mode="json")) for arm in study.arms}
    varied = sorted({name for arm in study.arms for name in study.overrides(arm.name)})
    settings = {arm: {name: tree[name] for name in varied if name in tree} for arm, tree in trees.items()}
    if any(name in varied for name in WINDOW) and all(tree[WINDOW[0]] == tree[WINDOW[1]] for tree in trees.values()):
        settings = {
            arm: {name: value for name, value in own.items() if name not in WINDOW} | {LAG: trees[arm][WINDOW[0]]} for arm, own in settings.items()
        }
    if any(arm.budget is not None for arm in study.arms):
        for arm in study.arms:
            settings[arm.name]["versions"] = trees[arm.name]["versions"]
    return settings


def factor_lines(study: StudySpec) -> dict[str, list[FactorLine]]:
    """Factor -> lines of two or more arms that differ in it alone. What an arm says of itself in `factors` counts beside what it sets; arms of
    different length are never alike."""
    settings = arm_settings(study)
    lengths: dict[str, Settings] = {arm: {"versions": own["versions"]} if "versions" in own else {} for arm, own in settings.items()}
    declared: dict[str, Settings] = {arm.name: {**lengths[arm.name], **arm.factors} for arm in study.arms if arm.factors}
    found: dict[str, list[FactorLine]] = {}
    for arms in (declared, settings):
        for factor in sorted({name for own in arms.values() for name in own}):
            if lines := _lines(factor, arms):
                found.setdefault(factor, lines)
    return found


def _lines(factor: str, arms: dict[str, Settings]) -> list[FactorLine]:
    alike: dict[tuple[tuple[str, str], ...], list[tuple[float, str]]] = {}
    for arm, own in arms.items():
        value = own.get(factor)
        if isinstance(value, int | float) and not isinstance(value, bool):
            rest = tuple(sorted((name, str(other)) for name, other in own.items() if name != factor))
            alike.setdefault(rest, []).append((float(value), arm))
    return [FactorLine(tuple(sorted(points))) for points in alike.values() if len({value for value, _ in points}) > 1]


def lag_and_clip(study: StudySpec) -> dict[tuple[str, str], list[str]]:
    """(lag window, clip bounds) -> arms, for the arms that are alike in all else; of several such sets, one that spans both if there is one, and then
    the one with the most cells. Windows read "k" where exact, "least-greatest" otherwise; bounds "low/high" or "off"."""
    settings = arm_settings(study)
    sets: dict[tuple[tuple[str, str], ...], dict[tuple[str, str], list[str]]] = {}
    for arm in study.arms:
        spec = study.run(arm.name, study.seeds[0])
        window, clip = spec.staleness, spec.clip
        lag = str(window.max_lag) if window.min_lag == window.max_lag else f"{window.min_lag}-{window.max_lag}"
        bounds = "off" if clip.off else f"{clip.low:g}/{clip.high:g}"
        rest = tuple(sorted((name, str(value)) for name, value in settings[arm.name].items() if name not in (LAG, *WINDOW, *CLIP)))
        sets.setdefault(rest, {}).setdefault((lag, bounds), []).append(arm.name)
    return max(sets.values(), key=lambda cells: (all(len({cell[place] for cell in cells}) > 1 for place in (0, 1)), len(cells)))
