"""How often k samples hold a right answer, and how often the majority of the samples is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb

KS = (1, 2, 4, 8, 16, 32, 64)
"""The k for which pass@k is reported."""


def pass_at_k(*, samples: int, correct: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a correct one: 1 - C(n - c, k) / C(n, k), for k <= n. Unbiased for the
    probability that k fresh samples do (Chen et al., arXiv 2107.03374)."""
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(
            f"pass@{k} of {samples} samples with {correct} correct: k must be 1 to the samples, and no more can be correct than there are"
        )
    return 1 - comb(samples - correct, k) / comb(samples, k)


def majority_at_k(finals: Sequence[str], correct: Sequence[bool]) -> float:
    """Is the final answer that most samples give correct? Of answers that tie, the share that is; of an answer that was scored now right, now wrong,
    the share of its samples that was right. (Self-consistency, Wang et al., arXiv 2203.11171.)"""
    votes = Counter(finals)
    most = max(votes.values())
    tied = [final for final, count in votes.items() if count == most]
    right = Counter(final for final, yes in zip(finals, correct, strict=True) if yes)
    return sum(right[final] / most for final in tied) / len(tied)
