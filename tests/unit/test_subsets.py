import numpy as np
import pytest

from services.studies.subsets import at_random, by_clusters, default_clusters

CENTRES = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
SIZES = (40, 25, 15, 8)


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points around four centres, in a shuffled order, and the centre of each."""
    draw = np.random.default_rng(seed)
    of_P = draw.permutation(np.repeat(np.arange(4), SIZES))
    return (CENTRES[of_P] + draw.normal(scale=0.3, size=(len(of_P), 2))).astype(np.float32), of_P


def spread(points: np.ndarray) -> float:
    """Mean distance of two different points."""
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    return distances.sum() / (len(points) * (len(points) - 1))


def test_the_largest_of_planted_clusters_are_taken_whole():
    points, of_P = planted()
    chosen = by_clusters(points, 65, clusters=4, seed=0)
    assert chosen.places == np.flatnonzero(of_P <= 1).tolist()
    assert (chosen.clusters, chosen.touched) == (4, 2)


def test_the_last_cluster_is_cut_to_the_size_by_a_seeded_draw():
    points, of_P = planted()
    first, again, other = (by_clusters(points, 50, clusters=4, seed=seed).places for seed in (0, 0, 1))
    assert first == again != other
    for places in (first, other):
        assert np.bincount(of_P[places], minlength=4).tolist() == [40, 10, 0, 0]


@pytest.mark.parametrize("size", [1, 39, 40, 41, 87, 88])
def test_sizes_are_exact_and_places_ascend_without_repetition(size):
    points, _ = planted()
    for places in (by_clusters(points, size, clusters=4, seed=3).places, at_random(88, size, seed=3).places):
        assert len(places) == size
        assert places == sorted(set(places))
        assert 0 <= places[0] <= places[-1] < 88


def test_random_subsets_repeat_with_their_seed_and_take_every_place_alike():
    assert at_random(100, 10, seed=1) == at_random(100, 10, seed=1) != at_random(100, 10, seed=2)
    counts = np.bincount(np.concatenate([at_random(20, 5, seed=seed).places for seed in range(2000)]), minlength=20)
    assert ((counts - 500) ** 2 / (500 * 0.75)).sum() < 43.8  # about chi squared with 19 degrees of freedom, p = 0.001


def test_a_smaller_subset_lies_within_a_larger_one():
    points, _ = planted()
    for choose in (lambda size: at_random(88, size, seed=5), lambda size: by_clusters(points, size, clusters=4, seed=5)):
        assert set(choose(20).places) < set(choose(50).places)


def test_clusters_are_less_diverse_than_a_random_draw_of_the_same_size():
    points, _ = planted()
    for seed in range(5):
        drawn = spread(points[at_random(88, 30, seed=seed).places])
        assert spread(points[by_clusters(points, 30, clusters=4, seed=seed).places]) < 0.2 * drawn


def test_equal_embeddings_make_no_more_clusters_than_there_are_different_ones():
    points = np.repeat(CENTRES, 5, axis=0).astype(np.float32)
    chosen = by_clusters(points, 7, clusters=10, seed=0)
    assert (len(chosen.places), chosen.clusters, chosen.touched) == (7, 4, 2)


@pytest.mark.parametrize(("prompts", "clusters"), [(1, 8), (33, 8), (340, 20), (17_000, 1000), (100_000, 1000)])
def test_the_number_of_clusters_follows_the_papers(prompts, clusters):
    assert default_clusters(prompts) == clusters
