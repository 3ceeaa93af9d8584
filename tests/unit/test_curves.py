import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.contracts.measures import REDUCERS, RUN_KEYS, STEP_KEYS
from services.studies.curves import Curve, at_kl, auc, budget_fit, floor, half_life, log_slope, reduced, reward_entropy_fit, run_values

drawn_curves = st.dictionaries(st.integers(0, 60), st.floats(-1e3, 1e3), min_size=1, max_size=30).map(
    lambda by_version: Curve.of([(version, {"x": value}) for version, value in by_version.items()], "x")
)


def curve(values, versions=None):
    versions = range(len(values)) if versions is None else versions
    return Curve.of([(version, {"x": value}) for version, value in zip(versions, values, strict=True)], "x")


def test_curve_is_in_order_and_without_what_is_not_known():
    steps = [(3, {"x": 3.0}), (1, {"x": 1.0}), (2, {"x": None}), (4, {}), (5, {"x": math.nan}), (6, {"x": math.inf}), (3, {"x": 30.0})]
    made = Curve.of(steps, "x")
    assert made.versions.tolist() == [1, 3]
    assert made.values.tolist() == [1, 30]
    assert len(Curve.of(steps, "y")) == 0


def test_reducers_of_a_run_of_twelve_versions_by_hand():
    squares = curve([float(v * v) for v in range(12)])
    by_hand = {
        "first": (0 + 1 + 4 + 9 + 16) / 5,
        "end": (49 + 64 + 81 + 100 + 121) / 5,
        "mid": (9 + 16 + 25 + 36 + 49) / 5,  # around 5.5: 3 to 7
        "change": 83 - 6,
        "mean": 506 / 12,
        "last_third": (64 + 81 + 100 + 121) / 4,
        "slope": 11.0,  # of v^2 on v over 0..11
        "min": 0,
        "max": 121,
    }
    assert by_hand.keys() == REDUCERS.keys()
    assert {reducer: reduced(squares, reducer) for reducer in REDUCERS} == pytest.approx(by_hand)


def test_reducers_of_evaluations_take_single_ones():
    evaluations = curve([5.0, 1.0, 2.0, 9.0], versions=[0, 10, 20, 25])
    assert [reduced(evaluations, reducer, width=1) for reducer in ("first", "mid", "end", "change")] == [5, 1, 9, 4]


def test_five_versions_are_versions_not_points():
    every_third = curve([1.0, 2.0, 4.0, 8.0, 16.0], versions=[0, 3, 6, 9, 12])
    assert reduced(every_third, "first") == 1.5  # versions 0 to 4
    assert reduced(every_third, "end") == 12  # 8 to 12
    assert reduced(every_third, "mid") == 4  # 4 to 8


def test_nothing_comes_of_nothing_and_of_one_point_no_slope():
    assert all(reduced(curve([]), reducer) is None for reducer in REDUCERS)
    assert reduced(curve([2.0]), "slope") is None
    assert reduced(curve([2.0]), "change") == 0


@pytest.mark.parametrize("reducer", ["median", "at_kl_", "at_kl_5x"])
def test_unknown_reducer_is_refused(reducer):
    with pytest.raises(ValueError, match="no reducer"):
        reduced(curve([1.0]), reducer, kl=curve([1.0]))


def test_value_at_a_summed_kl_is_interpolated():
    entropy = curve([10.0, 9.0, 7.0, 4.0])
    kl = curve([0.01, 0.01, 0.02, 0.04])  # sums 0.01 0.02 0.04 0.08
    assert reduced(entropy, "at_kl_20m", kl=kl) == 9
    assert reduced(entropy, "at_kl_30m", kl=kl) == pytest.approx(8)  # half-way from version 1 to 2
    assert reduced(entropy, "at_kl_50m", kl=kl) == pytest.approx(7 - 3 / 4)
    assert reduced(entropy, "at_kl_5m", kl=kl) == 10
    assert reduced(entropy, "at_kl_81m", kl=kl) is None
    assert reduced(entropy, "at_kl_2e-2", kl=kl) == 9
    assert at_kl(curve([10.0, 8.0], versions=[0, 2]), kl, 0.02) == pytest.approx(9), "between evaluations too"
    assert at_kl(curve([10.0, 8.0]), kl, 0.08) is None, "the curve ended before"
    with pytest.raises(ValueError, match="needs the curve of the KL"):
        reduced(entropy, "at_kl_5m")


@settings(deadline=None)
@given(drawn_curves)
def test_averages_lie_between_least_and_greatest(drawn):
    least, greatest = drawn.values.min() - 1e-6, drawn.values.max() + 1e-6
    for reducer in ("first", "mid", "end", "mean", "last_third"):
        assert least <= reduced(drawn, reducer) <= greatest
    assert least <= floor(drawn) <= greatest
    assert len(drawn) < 2 or least <= auc(drawn) <= greatest


@settings(deadline=None)
@given(drawn_curves, st.floats(-5, 5), st.floats(-5, 5))
def test_reducers_follow_a_change_of_scale(drawn, scale, shift):
    scaled = Curve(drawn.versions, scale * drawn.values + shift)
    for reducer in ("first", "mid", "end", "mean", "last_third"):
        assert reduced(scaled, reducer) == pytest.approx(scale * reduced(drawn, reducer) + shift, abs=1e-6)
    assert reduced(scaled, "change") == pytest.approx(scale * reduced(drawn, "change"), abs=1e-6)


def test_half_life_is_the_first_version_at_half_the_start():
    assert half_life(curve([2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.01, 1.0, 1.2, 0.5], versions=range(10, 20))) == 17
    assert half_life(curve([2.0] * 5 + [1.1] * 5)) is None
    assert half_life(curve([])) is None


def test_half_life_and_log_slope_of_an_exponential_decay():
    decay = curve([2.0 ** (-version / 20) for version in range(101)])
    start = sum(decay.values[:5]) / 5
    assert half_life(decay) == math.ceil(20 - 20 * math.log2(start))
    assert log_slope(decay) == pytest.approx(-math.log(2) / 20)


def test_log_slope_reads_the_last_fifth_only_and_skips_zero():
    values = [5.0] * 80 + [math.exp(-0.1 * version) for version in range(21)]
    assert log_slope(curve(values)) == pytest.approx(-0.1)
    values[90] = 0.0
    assert log_slope(curve(values)) == pytest.approx(-0.1)
    assert log_slope(curve([0.0, 0.0])) is None
    assert log_slope(curve([])) is None


def test_auc_does_not_depend_on_the_spacing_of_points():
    assert auc(curve([4.0, 3.0, 2.0, 1.0, 0.0])) == 2
    assert auc(curve([4.0, 3.0, 0.0], versions=[0, 1, 4])) == 2
    assert auc(curve([4.0])) is None


def test_floor_is_the_least_mean_of_five_points_in_a_row():
    assert floor(curve([9.0, 8.0, 1.0, 8.0, 9.0, 4.0, 4.0, 4.0, 4.0, 4.0, 9.0])) == 4
    assert floor(curve([1.0, 3.0])) == 2
    assert floor(curve([])) is None


def test_planted_law_is_found_up_to_the_peak_and_what_comes_after_is_not_read():
    falling = np.linspace(1.1, 0.3, 40)
    law = 0.9 - 0.25 * np.exp(falling)
    entropy = curve([*falling, *np.linspace(0.29, 0.05, 20)])
    reward = curve([*law, *np.linspace(law[-1], 0.0, 21)[1:]])
    fit = reward_entropy_fit(entropy, reward)
    assert fit is not None
    assert fit.blocks == 8
    assert (fit.a, fit.b, fit.ceiling, fit.r2) == pytest.approx((0.25, 0.9, 0.65, 1))


def test_law_with_noise_is_fitted_by_least_squares():
    rng = np.random.default_rng(1)
    h = np.linspace(1.1, 0.3, 60)
    r = 0.9 - 0.25 * np.exp(h) + rng.normal(0, 0.02, 60)
    fit = reward_entropy_fit(curve(h), curve(r))
    x, y = (values.reshape(-1, 5).mean(axis=1)[: fit.blocks] for values in (np.exp(h), r))
    slope, constant = np.polyfit(x, y, 1)
    residual = y - slope * x - constant
    assert (fit.a, fit.b) == pytest.approx((-slope, constant))
    assert fit.ceiling == pytest.approx(constant + slope)
    assert fit.r2 == pytest.approx(1 - residual @ residual / ((y - y.mean()) @ (y - y.mean())))


@pytest.mark.parametrize("seed", range(10))
def test_law_shows_through_the_noise_of_the_batches_reward(seed):
    h = np.linspace(1.17, 0.8, 120)
    r = 1.2 - 0.25 * np.exp(h) + np.random.default_rng(seed).normal(0, 0.04, 120)
    fit = reward_entropy_fit(curve(h), curve(r))
    assert fit.r2 > 0.9
    assert fit.a == pytest.approx(0.25, abs=0.05)
    assert np.corrcoef(np.exp(h), r)[0, 1] ** 2 < 0.85, "single versions do not show it"


def test_blocks_are_five_versions_whatever_is_missing_of_them():
    h = np.linspace(1.1, 0.3, 40)
    law = 0.9 - 0.25 * np.exp(h)
    kept = [version for version in range(40) if version not in (3, *range(10, 15), 22)]
    assert reward_entropy_fit(curve(h[kept], versions=kept), curve(law)).blocks == 7
    assert reward_entropy_fit(curve(h[:34]), curve(law)).blocks == 6, "the run ended within the seventh"


def test_law_is_not_fitted_to_few_blocks_nor_without_spread():
    h = np.linspace(1.0, 0.5, 30)
    assert reward_entropy_fit(curve(h[:29]), curve(1 - h[:29])) is None
    assert reward_entropy_fit(curve(h), curve(h)) is None, "the reward only falls"
    assert reward_entropy_fit(curve(np.full(30, 0.7)), curve(1 - h)) is None
    assert reward_entropy_fit(curve(h), curve(np.full(30, 0.5))) is None
    assert reward_entropy_fit(curve(h), curve(1 - h, versions=range(100, 130))) is None, "no version in common"
    assert reward_entropy_fit(curve(h), curve(1 - h)).blocks == 6


def test_budget_is_fitted_over_the_versions_that_have_both():
    predicted = curve([1.0, 2.0, 3.0, 4.0, 50.0], versions=[0, 1, 2, 3, 9])
    realised = curve([2.0, 4.0, 5.0, 8.0, -7.0], versions=[0, 1, 2, 3, 8])
    fit = budget_fit(predicted, realised)
    assert fit.n == 4
    assert fit.slope == pytest.approx(1.9)
    assert fit.r2 == pytest.approx(1.9**2 * 5 / 18.75)
    assert budget_fit(curve([1.0, 2.0]), curve([1.0, 2.0])) is None
    assert budget_fit(curve([1.0, 1.0, 1.0]), curve([1.0, 2.0, 3.0])) is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=3, max_size=20), st.integers(1, 5))
def test_budget_fit_is_bounded_and_scales(pairs, scale):
    x, y = curve([float(a) for a, _ in pairs]), curve([float(b) for _, b in pairs])
    fit = budget_fit(x, y)
    assume(fit is not None)
    assert 0 <= fit.r2 <= 1 + 1e-12
    other = budget_fit(x, Curve(y.versions, scale * y.values))
    assert (other.slope, other.r2) == pytest.approx((scale * fit.slope, fit.r2))


def test_run_values_of_a_planted_run():
    def values_at(version):
        h = 1.2 * 0.96**version
        predicted = math.sin(version)
        return {
            "entropy_nats": h,
            "reward_mean": 0.8 - 0.2 * math.exp(h),
            "entropy_change_predicted": predicted if version % 2 else None,
            "entropy_change_realised": 0.5 * predicted,
        }

    values = run_values([(version, values_at(version)) for version in range(50)])
    assert values.keys() == RUN_KEYS.keys()
    assert {"entropy_nats", "reward_mean", "entropy_change_predicted", "entropy_change_realised"} <= STEP_KEYS.keys()
    assert values["entropy_log_slope"] == pytest.approx(math.log(0.96))
    assert values["entropy_half_life"] == 19  # 0.96^19 < mean(0.96^0..4) / 2 < 0.96^18
    assert values["entropy_floor"] == pytest.approx(1.2 * sum(0.96**v for v in range(45, 50)) / 5)
    assert (values["fit_a"], values["fit_ceiling"], values["fit_r2"]) == pytest.approx((0.2, 0.6, 1))
    assert (values["budget_slope"], values["budget_r2"]) == pytest.approx((0.5, 1))


def test_what_a_run_has_not_measured_is_left_out():
    assert run_values([]) == {}
    assert run_values([(0, {"entropy_nats": 1.0}), (1, {"entropy_nats": math.nan})]) == {"entropy_floor": 1.0}
