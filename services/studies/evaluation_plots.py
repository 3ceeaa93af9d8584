"""Figures of a run's report: what the evaluations measured, a panel for each set."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from services.studies.drawing import Drawing
from services.studies.run_panels import Panel, RunCurves, below_one_another, nothing, side_by_side

SETS_A_FIGURE = 3
DIVERSITY = {
    "distinct_3": "distinct-3", "ngram_diversity": "n-gram diversity", "jaccard_distance": "Jaccard distance",
    "self_bleu": "self-BLEU (lower: more diverse)",
}  # fmt: skip
ANSWERS = {"unique_correct": "different correct answers", "effective_answers": "effective answers, exp of their entropy"}
CALIBRATION = {"ece": "ECE", "brier": "Brier score", "auroc": "AUROC", "gap": "over-confidence gap"}
CONFIDENCES = {"consistency": "self-consistency", "likelihood": "likelihood"}


def evaluation_figures(run: RunCurves) -> list[Drawing | str]:
    """All of them; a run with many evaluation sets has several figures of a kind."""
    if not run.evaluations:
        return [nothing("Evaluations", "the run has no evaluation yet, or no sets")]
    return [*_passes(run), *_diversity(run), *_calibration(run), lengths(run)]


def lengths(run: RunCurves) -> Drawing | str:
    """One figure for all sets: a line for each."""
    labels = {name: f"{name} ({domain} of domain)" for name, domain in run.sets().items()}
    means, cut = ([line for name in labels for line in run.evaluated(name, {key: labels[name]})] for key in ("length_mean", "truncated_share"))
    caption = "Mean length of the answers, and the share of them that were cut off at the longest length allowed."
    return below_one_another(
        run, "evaluation-length", "Length of answers", caption, Panel("length (tokens)", means), Panel("truncated (share of 1)", cut)
    )


def _passes(run: RunCurves) -> list[Drawing | str]:
    measured = {key for one in run.evaluations for key in one.values}
    ks = sorted(int(found[1]) for key in measured if (found := re.fullmatch(r"pass_at_(\d+)", key)))
    keys = {f"pass_at_{k}": f"pass@{k}" for k in ks} | {"majority_at_k": "maj@k"}
    caption = "Chance that one of k samples is correct, unbiased, mean over prompts; maj@k: that the most frequent answer is. "
    return _by_set(run, "pass", "pass@k", caption, [("chance (of 1)", keys)])


def _diversity(run: RunCurves) -> list[Drawing | str]:
    caption = (
        "Of a prompt's answers, mean over prompts: different 3-grams over all, the mean of that for 1- to 4-grams, the distance of two answers, and "
        "BLEU against the others; below, the number of different correct answers, and the effective number of answers."
    )
    return _by_set(run, "diversity", "Diversity of answers", caption, [("diversity (of 1)", DIVERSITY), ("answers (count)", ANSWERS)])


def _calibration(run: RunCurves) -> list[Drawing | str]:
    rows = [(f"{words} (of 1)", {f"{prefix}_{key}": label for key, label in CALIBRATION.items()}) for prefix, words in CONFIDENCES.items()]
    caption = (
        "Of two confidences: the share of the prompt's samples with the same final answer, and exp of the mean log-probability of the answer's "
        "tokens. ECE and Brier: lower is better; AUROC: 0.5 is chance; a gap above 0 is over-confident."
    )
    return _by_set(run, "calibration", "Calibration", caption, rows)


def _by_set(run: RunCurves, name: str, title: str, caption: str, rows: Sequence[tuple[str, Mapping[str, str]]]) -> list[Drawing | str]:
    """Figures of a column for each set and a row for each axis, (unit, keys)."""
    sets = list(run.sets().items())
    figures = []
    for at in range(0, len(sets), SETS_A_FIGURE):
        part = sets[at : at + SETS_A_FIGURE]
        table = [
            [Panel(unit, run.evaluated(one, keys), title=f"{one} ({domain} of domain)" if row == 0 else "") for one, domain in part]
            for row, (unit, keys) in enumerate(rows)
        ]
        figures.append(side_by_side(run, name if at == 0 else f"{name}-{at // SETS_A_FIGURE + 1}", title, caption.strip(), table))
    return figures
