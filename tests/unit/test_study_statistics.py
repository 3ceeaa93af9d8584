import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from services.contracts.states import RunState
from services.studies import paired_statistics
from services.studies.claims import claim_values, in_words
from services.studies.paired_statistics import clustered_spearman, effect_size, least_p, paired, sign_flip_p, spearman
from services.studies.study_data import by_arm_and_seed, entropy_at_end, metric, spent, total
from tests.unit.synthetic_study import a_claim, a_run, a_study, level, runs_at


def test_interval_is_that_of_a_paired_t_test():
    before, after = np.array([1.0, 2.0, 4.0, 3.0, 2.5]), np.array([0.7, 1.9, 3.1, 2.8, 2.1])
    reference = stats.ttest_rel(before, after).confidence_interval(0.95)
    got = paired((before - after).tolist())
    assert (got.n, got.mean) == (5, pytest.approx(0.38))
    assert (got.low, got.high) == (pytest.approx(reference.low), pytest.approx(reference.high))
    assert got.sd == pytest.approx(stats.tstd(before - after))
    assert effect_size((before - after).tolist()) == pytest.approx(0.38 / stats.tstd(before - after))


def test_there_is_no_interval_below_three_seeds_and_none_of_zero_width_is_lost():
    assert (paired([1.0]).sd, paired([1.0]).low) == (None, None)
    assert paired([1.0, 3.0]).sd == pytest.approx(math.sqrt(2))
    assert (paired([1.0, 3.0]).low, paired([1.0, 3.0]).high) == (None, None)
    assert (paired([2.0, 2.0, 2.0]).low, paired([2.0, 2.0, 2.0]).high) == (2.0, 2.0)
    assert effect_size([2.0, 2.0, 2.0]) is None


def brute_force_p(differences, alternative):
    observed, extreme, every = math.fsum(differences), 0, 0
    for signs in itertools.product((1, -1), repeat=len(differences)):
        flipped = math.fsum(sign * d for sign, d in zip(signs, differences, strict=True))
        every += 1
        extreme += {"greater": flipped >= observed, "less": flipped <= observed, "two-sided": abs(flipped) >= abs(observed)}[alternative]
    return extreme / every


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8), st.sampled_from(["greater", "less", "two-sided"]))
def test_sign_flip_p_is_that_of_brute_force_ties_included(differences, alternative):
    assert sign_flip_p([d / 8 for d in differences], alternative) == brute_force_p([d / 8 for d in differences], alternative)


def test_sign_flip_p_by_hand():
    assert sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0], "greater") == 1 / 32
    assert sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0], "less") == 1.0
    assert sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0], "two-sided") == 2 / 32
    assert sign_flip_p([-1.0, 2.0, 3.0, 4.0, 5.0], "greater") == 2 / 32
    assert sign_flip_p([0.0, 0.0, 0.0], "greater") == 1.0
    assert sign_flip_p([0.1, 0.2, 0.3], "less") == 1.0
    assert sign_flip_p([0.1, 0.2, -0.3], "greater") == 5 / 8  # 0.1 + 0.2 - 0.3 is not 0 in floating point, and ties with its mirror image
    assert (least_p(5, "greater"), least_p(3, "two-sided")) == (1 / 32, 1 / 4)


def test_past_fifteen_seeds_signs_are_drawn_and_p_is_never_zero():
    many = [1.0] * 20
    assert sign_flip_p(many, "greater") == 1 / 10_001
    weak = [1.0] * 12 + [-1.0] * 8
    exact = sum(math.comb(20, k) for k in range(12, 21)) / 2**20
    assert sign_flip_p(weak, "greater") == pytest.approx(exact, abs=0.015)
    assert sign_flip_p(weak, "greater") == sign_flip_p(weak, "greater")


def test_spearman_is_that_of_scipy_and_none_where_one_side_is_constant():
    pairs = [(1.0, 3.0), (2.0, 1.0), (2.0, 4.0), (5.0, 9.0), (0.0, 1.0)]
    assert spearman(pairs) == pytest.approx(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    assert spearman([(1.0, 1.0), (2.0, 2.0), (3.0, 4.0), (4.0, 3.0)]) == 0.8
    assert spearman([(1.0, 5.0), (2.0, 5.0), (3.0, 5.0)]) is None
    assert spearman([(1.0, 1.0), (2.0, 2.0)]) is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)), min_size=3, max_size=8))
def test_weights_stand_for_pairs_that_are_there_several_times(weighted):
    repeated = [(x, y) for x, y, times in weighted for _ in range(times)]
    weights = np.array([[times for _, _, times in weighted]], dtype=np.float64)
    if len(repeated) >= 3:
        got = paired_statistics._weighted_spearman(np.array([(x, y) for x, y, _ in weighted], dtype=np.float64), weights)[0]
        sides = list(zip(*repeated, strict=True))
        constant = any(len(set(side)) == 1 for side in sides)
        assert math.isnan(got) if constant else got == pytest.approx(stats.spearmanr(*sides).statistic)


def test_bootstrap_draws_whole_seeds():
    """Seeds that are all alike leave nothing to chance, however little their runs correlate; seeds that differ give a wide interval."""
    runs = [(1.0, 2.0), (2.0, 1.0), (3.0, 4.0), (4.0, 3.0)]
    assert clustered_spearman(dict.fromkeys(range(5), runs)) == (0.6, 0.6, 0.6)
    up, down = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)], [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]
    rho, low, high = clustered_spearman({0: up, 1: down, 2: up, 3: down})
    assert (rho, low, high) == (0.0, -1.0, 1.0)
    assert clustered_spearman({0: up, 1: down}) == (0.0, None, None)
    assert clustered_spearman({}) == (None, None, None)


FOUR = (
    {"name": "a"},
    {"name": "b", "set": {"updates_per_batch": 2}},
    {"name": "c", "set": {"updates_per_batch": 4}},
    {"name": "d", "set": {"clip.low": 0.1}},
)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"statistic": "level", "arms": ["b"]}, 0.75),
        ({"statistic": "difference", "arms": ["a", "b"]}, 0.25),
        ({"statistic": "ratio", "arms": ["a", "b"]}, 1 / 0.75),
        ({"statistic": "interaction", "arms": ["a", "b", "c", "d"]}, (1.0 - 0.75) - (0.25 - 0.5)),
        ({"statistic": "monotone", "arms": ["a", "b", "c", "d"]}, -0.8),
        ({"statistic": "monotone", "arms": ["a", "b", "d", "c"]}, -1.0),
        ({"statistic": "spread", "arms": ["b", "c", "d"]}, 0.5),
        ({"statistic": "spearman", "arms": ["a", "b", "c", "d"], "against": "steps.reward_mean.end"}, -1.0),
        ({"statistic": "spearman", "arms": [], "against": "evaluation.held.distinct_3.end"}, 1.0),
        ({"statistic": "difference", "arms": ["a", "b"], "minus": "steps.entropy_nats.first"}, 0.0),
    ],
)
def test_each_statistic_by_value(fields, expected):
    claim = a_claim(**fields)
    study = a_study(claim, arms=FOUR, seeds=1)
    values = claim_values(claim, study, runs_at(study, {"a": [1.0], "b": [0.75], "c": [0.25], "d": [0.5]}))
    assert values.per_seed == {0: pytest.approx(expected)}
    assert values.excluded == ()


def test_pooled_correlation_spans_the_runs_of_all_seeds():
    claim = a_claim(statistic="spearman", arms=[], against="steps.reward_mean.end")
    study = a_study(claim, arms=FOUR, seeds=3)
    values = claim_values(
        claim, study, runs_at(study, {arm.name: [1.0 - 0.2 * at + 0.01 * seed for seed in range(3)] for at, arm in enumerate(study.arms)})
    )
    assert values.pooled == (-1.0, -1.0, -1.0)
    assert values.per_seed == {0: -1.0, 1: -1.0, 2: -1.0}


def test_seeds_without_all_that_a_claim_needs_are_left_out_with_the_reason():
    claim = a_claim()
    study = a_study(claim, seeds=6)
    runs = runs_at(study, {"n1": [1.0] * 6, "n4": [0.5, None]})
    runs.append(a_run(study, "n4", 2, level(0.5), state=RunState.FAILED, reason="out of\nmemory"))
    runs.append(a_run(study, "n4", 3, level(0.5), state=RunState.RUNNING))
    runs.append(a_run(study, "n4", 4, level(math.nan)))
    values = claim_values(claim, study, runs)
    assert values.per_seed == {0: 0.5}
    assert values.excluded == (
        "seed 1: n4 has no steps.entropy_nats.end", "seed 2: n4 failed (out of⏎memory)", "seed 3: n4 is running",
        "seed 4: n4 has no steps.entropy_nats.end", "seed 5: n4 was not run",
    )  # fmt: skip


def test_pooled_correlation_leaves_out_single_runs_and_keeps_their_seed():
    claim = a_claim(statistic="spearman", arms=[], against="steps.reward_mean.end")
    study = a_study(claim, arms=FOUR, seeds=2)
    values = claim_values(claim, study, runs_at(study, {"a": [1.0, 1.0], "b": [0.7, 0.7], "c": [0.5], "d": [None]}))
    assert values.per_seed == {0: -1.0}
    assert values.excluded == (
        "seed 0: d has no steps.entropy_nats.end", "seed 1: c was not run", "seed 1: d was not run", "seed 1: 2 runs, and a rank correlation needs 3"
    )  # fmt: skip


def test_a_ratio_to_zero_is_left_out():
    claim = a_claim(statistic="ratio", threshold=1.0)
    study = a_study(claim, seeds=2)
    values = claim_values(claim, study, runs_at(study, {"n1": [1.0, 1.0], "n4": [0.0, 0.5]}))
    assert values.per_seed == {1: 2.0}
    assert values.excluded == ("seed 0: the ratio is not defined (the second arm has 0)",)


def test_metrics_of_steps_evaluations_and_whole_runs():
    study = a_study(seeds=1)
    run = a_run(study, "n4", 0, lambda version: 1.0 - 0.05 * version)
    assert metric(run, "steps.entropy_nats.end") == pytest.approx(1.0 - 0.05 * 17)
    assert metric(run, "steps.entropy_nats.at_kl_55m") == pytest.approx(1.0 - 0.05 * 4.5)
    assert metric(run, "evaluation.held.correct_mean.first") == pytest.approx(0.4)
    assert metric(run, "evaluation.other.correct_mean.change") == pytest.approx(0.1 * 0.05 * 19)
    assert metric(run, "run.entropy_half_life") == 11.0  # half of the first five versions' mean, 0.45, is reached at 1 - 0.05 v
    assert metric(run, "run.budget_slope") == pytest.approx(0.9)
    assert [metric(run, name) for name in ("steps.lag_mean.end", "evaluation.held.self_bleu.end", "evaluation.none.correct_mean.end")] == [None] * 3


def test_what_a_run_has_spent():
    study = a_study(seeds=1)
    run = a_run(study, "n4", 0, level(1.0), versions=3)
    assert spent(run, "rollouts").tolist() == [128.0, 256.0, 384.0]
    assert spent(run, "updates").tolist() == [4.0, 8.0, 12.0]
    assert spent(run, "kl").tolist() == pytest.approx([0.01, 0.02, 0.03])
    assert total(run, "entropy_change_realised") == pytest.approx(-0.27)
    assert total(run, "lag_mean") is None


def test_what_a_probe_measured_of_the_kl_stands_for_the_versions_up_to_the_next():
    run = a_run(a_study(seeds=1), "n1", 0, lambda version: 1.0 - 0.1 * version, versions=6)
    for version, kl in ((1, 0.1), (4, 0.3)):
        run.steps[version].values["kl_step_k3_nats"] = kl
    assert spent(run, "kl").tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.7, 1.0])
    assert metric(run, "steps.entropy_nats.at_kl_300m") == pytest.approx(0.8)
    assert metric(run, "steps.entropy_nats.at_kl_550m") == pytest.approx(0.65), "half-way from version 3 to 4"


def test_without_a_probe_the_kl_to_the_sampler_is_summed():
    run = a_run(a_study(seeds=1), "n1", 0, level(1.0), versions=3)
    run.steps[1].values["kl_behaviour_k3_nats"] = None
    assert spent(run, "kl").tolist() == pytest.approx([0.01, 0.01, 0.02])


def test_entropy_at_the_end_is_that_of_the_final_policy_where_it_was_evaluated():
    run = a_run(a_study(seeds=1), "n1", 0, lambda version: 1.0 - 0.01 * version)
    assert entropy_at_end(run) == pytest.approx(1.0 - 0.01 * 17), "no estimate: the last batches"
    for one in run.evaluations:
        one.values["entropy_estimate_nats"] = (0.5 if one.name == "held" else 9.0) + 0.01 * one.version
    assert entropy_at_end(run) == pytest.approx(0.69)
    early = [one for one in run.evaluations if one.version == 0]
    assert entropy_at_end(replace(run, evaluations=early)) == pytest.approx(1.0 - 0.01 * 17), "the last version's is missing"


def test_of_several_runs_of_an_arm_and_seed_the_completed_one_counts():
    study = a_study(seeds=1)
    done, failed = a_run(study, "n1", 0, level(1.0)), a_run(study, "n1", 0, level(2.0), state=RunState.FAILED)
    assert by_arm_and_seed([done, failed])["n1", 0] is done


def test_claims_read_as_formulas():
    told = in_words(a_claim(statistic="interaction", arms=["a", "b", "c", "d"], direction="less", threshold=0.25))
    assert told == "steps.entropy_nats.end: (a - b) - (c - d) < 0.25"
    assert in_words(a_claim(minus="run.entropy_floor", direction="within", low=-1, high=1)).endswith("end - run.entropy_floor: n1 - n4 in [-1, 1]")
    assert in_words(a_claim(statistic="spearman", arms=[], against="run.fit_r2", direction="two-sided")).endswith("run.fit_r2 over all arms ≠ 0")


def test_bootstrap_is_repeatable(monkeypatch):
    monkeypatch.setattr(paired_statistics, "RESAMPLES", 50)
    clusters = {seed: [(float(a), math.sin(7.0 * a + seed)) for a in range(5)] for seed in range(4)}
    assert clustered_spearman(clusters) == clustered_spearman(clusters)
