"""How much the answers to one prompt differ. Answers are token ids without the end of the sequence, or final answers as text.

The n-gram measures cost time linear in the answers' length; `jaccard_distance` and `self_bleu` compare answers with each other and so take the first
`COMPARED` or `BLEU_ANSWERS` of them, which are as good as any: samples of one prompt are exchangeable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

Answers = Sequence[tuple[int, ...]]

ORDERS = (1, 2, 3, 4)
"""n of distinct-n."""
GRAM = 3
"""n of the n-grams that the Jaccard distance compares."""
COMPARED = 16
"""Answers of a prompt that the Jaccard distance compares."""
BLEU_ANSWERS, BLEU_PROMPTS = 8, 64
"""Answers of a prompt, and prompts, on which self-BLEU is taken."""


def grams(tokens: tuple[int, ...], n: int) -> list[tuple[int, ...]]:
    """The n-grams of an answer in order; none of one that is shorter."""
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def distinct(answers: Answers, n: int) -> float | None:
    """distinct-n: different n-grams of all the answers over n-grams of all the answers, 0 to 1; None where no answer has n tokens
    (Li et al., arXiv 1510.03055)."""
    found = [gram for tokens in answers for gram in grams(tokens, n)]
    return len(set(found)) / len(found) if found else None


def ngram_diversity(answers: Answers) -> float | None:
    """Mean of distinct-1 to distinct-4 over those that there are. The n-gram diversity score of Shaib et al. (arXiv 2403.00553) is their sum."""
    shares = [share for n in ORDERS if (share := distinct(answers, n)) is not None]
    return sum(shares) / len(shares) if shares else None


def jaccard_distance(answers: Answers) -> float | None:
    """Mean over pairs of answers of 1 - |A and B| / |A or B| for their sets of 3-grams, 0 to 1; None for a single answer. A shorter answer is one
    gram as a whole: two short ones are at distance 0 if equal, else 1."""
    sets = [set(grams(tokens, GRAM)) or {tokens} for tokens in answers[:COMPARED]]
    distances = [1 - len(one & other) / len(one | other) for one, other in combinations(sets, 2)]
    return sum(distances) / len(distances) if distances else None


def self_bleu(answers: Answers) -> float | None:
    """Mean over answers of the BLEU-4 of each against the others, 0 to 1; the lower, the more diverse; None for a single answer (Zhu et al., arXiv
    1802.01886). Smoothing is method 1 of Chen and Cherry (W14-3346) with 0.1; an answer of fewer than four tokens is judged by the n-grams that it
    has, and an empty one counts as one token of its own kind."""
    from sacrebleu.metrics.bleu import BLEU

    lines = [" ".join(map(str, tokens)) or "-" for tokens in answers[:BLEU_ANSWERS]]
    if len(lines) < 2:
        return None
    bleu = BLEU(smooth_method="floor", smooth_value=0.1, effective_order=True, tokenize="none", force=True)
    scores = [bleu.sentence_score(line, lines[:at] + lines[at + 1 :]).score / 100 for at, line in enumerate(lines)]
    return min(1.0, sum(scores) / len(scores))


def answer_entropy(finals: Sequence[str]) -> float:
    """Entropy of the final answers' shares among the samples, nats: 0 where all agree, log of their number where all differ. Its exponential is the
    effective number of answers."""
    from scipy.stats import entropy

    return float(entropy(list(Counter(finals).values())))
