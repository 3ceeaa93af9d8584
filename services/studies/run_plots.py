"""The figures of a run's report, under their headings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.studies import control_plots, entropy_plots, off_policy_plots, step_plots
from services.studies.drawing import Drawing
from services.studies.evaluation_plots import evaluation_figures
from services.studies.run_panels import RunCurves

STEPS: dict[str, tuple[Callable[[RunCurves], Drawing | str], ...]] = {
    "Reward": (step_plots.reward, step_plots.groups, step_plots.lengths),
    "Entropy": (
        entropy_plots.entropy, entropy_plots.budget, entropy_plots.entropy_by_lag, entropy_plots.entropy_by_position, entropy_plots.entropy_by_kind,
        entropy_plots.prompt_entropy,
    ),
    "Control": (control_plots.entropy_control, control_plots.staleness_control),
    "Off-policyness": (
        off_policy_plots.lag, off_policy_plots.kl, off_policy_plots.sample_size, off_policy_plots.off_policy_by_lag,
        off_policy_plots.off_policy_by_entropy,
    ),
    "Clipping": (off_policy_plots.clip, off_policy_plots.clip_by_lag, off_policy_plots.clip_by_entropy),
    "Time": (step_plots.time,),
}  # fmt: skip
EVALUATIONS = "Evaluations"


@dataclass(frozen=True)
class Section:
    """Figures that belong together, with the files that they are in."""

    heading: str
    figures: list[tuple[Drawing, Path]]


def draw_run(folder: Path, run: RunCurves) -> tuple[list[Section], list[str]]:
    """Draw into `folder` all for which there are data; the sections that have a figure, and a sentence on each figure that is left out. Nothing of
    either before the first step."""
    if not run.steps:
        return [], []
    tried = {heading: [figure(run) for figure in figures] for heading, figures in STEPS.items()}
    tried[EVALUATIONS] = evaluation_figures(run)
    sections = [
        Section(heading, [(one, one.save(folder)) for one in figures if isinstance(one, Drawing)])
        for heading, figures in tried.items()
        if any(isinstance(one, Drawing) for one in figures)
    ]
    return sections, [one for figures in tried.values() for one in figures if isinstance(one, str)]
