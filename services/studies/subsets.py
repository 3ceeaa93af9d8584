"""Subsets of a data set, for the diversity of the training prompts as a factor. Pure functions of embeddings, sizes and seeds.

By clusters, a subset is less diverse than a random one of its size: the prompts are clustered by k-means and the largest clusters are taken whole, as
in arXiv 2511.05993 (1,000 clusters of about 17,000 prompts, in the policy's own mean-pooled last hidden states); the last one taken is cut to the
size by a random draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

LEAST_CLUSTERS, MOST_CLUSTERS = 8, 1000
PROMPTS_PER_CLUSTER = 17


@dataclass(frozen=True)
class Subset:
    """Chosen places of a source."""

    places: list[int]
    """Ascending."""
    clusters: int | None = None
    """Clusters that were made."""
    touched: int | None = None
    """Clusters that the chosen prompts come from."""


def default_clusters(prompts: int) -> int:
    """The paper's number for a data set of the paper's size, fewer for a smaller one; one cluster alone would be a random draw."""
    return max(LEAST_CLUSTERS, min(MOST_CLUSTERS, prompts // PROMPTS_PER_CLUSTER))


def at_random(prompts: int, size: int, *, seed: int) -> Subset:
    """`size` of `prompts` places; with equal seeds a smaller subset lies within a larger one."""
    return Subset(sorted(np.random.default_rng(seed).permutation(prompts)[:size].tolist()))


def by_clusters(embeddings_PD: NDArray[np.float32], size: int, *, clusters: int, seed: int) -> Subset:
    """`size` places from the largest of `clusters` clusters, fewer where fewer embeddings differ; with equal seeds a smaller subset lies within a
    larger one."""
    distinct = len(np.unique(embeddings_PD, axis=0))
    made = min(clusters, distinct)
    label_P = KMeans(made, random_state=seed, n_init=4).fit_predict(embeddings_PD)
    counts = np.bincount(label_P, minlength=made)
    rank_P = np.argsort(np.argsort(-counts, kind="stable"))[label_P]
    shuffled = np.random.default_rng(seed).permutation(len(label_P))
    chosen = shuffled[np.argsort(rank_P[shuffled], kind="stable")][:size]
    return Subset(sorted(chosen.tolist()), made, len(set(label_P[chosen].tolist())))
