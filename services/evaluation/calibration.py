"""Does a policy's confidence in its answers say how often they are right?

Two confidences of an answer:

    consistency:  the share of the prompt's samples that give the same final answer; a probability, and the main one
    likelihood:   exp(mean logp of the answer's tokens); nearly a function of the entropy, so that its level says little and its changes more
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

BINS = 10
"""Bins of the calibration error."""


def consistency(finals: Sequence[str]) -> list[float]:
    """For each of a prompt's samples, the share of all of them that give its final answer."""
    votes = Counter(finals)
    return [votes[final] / len(finals) for final in finals]


def likelihood(logps: Sequence[float]) -> float:
    """exp(mean logp) of an answer's tokens, 0 to 1: its probability, normalised by its length."""
    return min(1.0, math.exp(sum(logps) / len(logps)))


def expected_calibration_error(confidence: Sequence[float], correct: Sequence[bool]) -> float:
    """sum_b n_b / n * |accuracy_b - mean confidence_b| over ten bins b of equal mass, as far as ties allow: equal confidences share a bin. The bins
    are those of scikit-learn's calibration_curve(strategy="quantile"), which does not return n_b. (Guo et al., arXiv 1706.04599; Nixon et al.,
    arXiv 1904.01685, for equal mass.)"""
    c, y = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    edges = np.percentile(c, np.linspace(0, 100, BINS + 1))
    gap_sums = np.bincount(np.searchsorted(edges[1:-1], c), weights=y - c)
    return float(np.abs(gap_sums).sum() / len(c))


def calibration(confidence: Sequence[float], correct: Sequence[bool]) -> dict[str, float]:
    """Of answers with these confidences (0 to 1): `ece`; `brier`: mean (confidence - correct)^2; `auroc`: chance that a right answer has more
    confidence than a wrong one, ties half; `gap`: mean confidence - accuracy, positive where the policy is over-confident; `confidence_wrong`: mean
    confidence of wrong answers. The last but one needs a right and a wrong answer, the last a wrong one; without answers there is nothing."""
    if not confidence:
        return {}
    from sklearn.metrics import brier_score_loss, roc_auc_score

    c, y = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.int64)
    values = {
        "ece": expected_calibration_error(confidence, correct),
        "brier": float(brier_score_loss(y, c, pos_label=1)),
        "gap": float(c.mean() - y.mean()),
    }
    if 0 < y.sum() < len(y):
        values["auroc"] = float(roc_auc_score(y, c))
    if y.sum() < len(y):
        values["confidence_wrong"] = float(c[y == 0].mean())
    return values
