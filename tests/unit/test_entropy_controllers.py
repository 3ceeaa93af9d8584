import json
import math
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from services.contracts.algorithms import (
    AdaptiveRegularisation,
    Bapo,
    Bonus,
    ClipCov,
    EntroPic,
    EntropyAdvantage,
    EntropyControl,
    ForkingTokens,
    KlCov,
    NoControl,
    OneSign,
    PositiveReweighting,
    RandomPositiveClip,
)
from trainer.control import entropy, guard
from trainer.control.actuators import Actuators, Progress, Reading

NOW = Progress(version=0, versions=100, epoch=1, epochs=1)
PAPER = PositiveReweighting(start=0, floor=0, guard=False, lag_scaled=False)
STATELESS = [NoControl(), Bonus(), ClipCov(), KlCov(), EntropyAdvantage(), ForkingTokens(), RandomPositiveClip(), OneSign(), Bapo()]
FOLLOWING = [PositiveReweighting(), AdaptiveRegularisation(), EntroPic()]


def read(nats, *, lag=0.0, reward=0.3, version=0):
    return Reading(version=version, entropy=nats, lag=lag, reward=reward)


def weights(control, readings):
    """lambda after each reading."""
    state, seen = entropy.start(control), []
    for reading in readings:
        state = entropy.update(control, state, reading)
        seen.append(entropy.actuate(control, state, NOW).positive_weight)
    return seen


# -- positive reweighting ----------------------------------------------------------------------------------------------------------------------


def test_the_papers_rule_step_by_step():
    assert entropy.actuate(PAPER, entropy.start(PAPER), NOW).positive_weight == 0
    readings = [read(h) for h in (0.3, 0.2, 0.1, 0.1, 0.1, 0.3)]  # at the target lambda rises
    assert weights(PAPER, readings) == pytest.approx([0.05, 0.1, 0.05, 0, 0, 0.05])
    assert weights(PAPER, [read(1.0)] * 30)[-1] == 1


def test_the_step_is_divided_by_one_and_the_age_of_the_entropy():
    control = PositiveReweighting(start=0.5, step=0.1)
    assert weights(control, [read(1.0, lag=3)]) == pytest.approx([0.525])
    assert weights(control, [read(0.0, lag=0)]) == pytest.approx([0.4])
    assert weights(control, [read(0.0, lag=-1)]) == pytest.approx([0.4])
    assert weights(control.model_copy(update={"lag_scaled": False}), [read(1.0, lag=3)]) == pytest.approx([0.6])


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("stage", Progress(version=0, versions=10, epoch=1, epochs=1), 0),
        ("stage", Progress(version=5, versions=10, epoch=1, epochs=1), 0),
        ("stage", Progress(version=7, versions=10, epoch=1, epochs=1), 0.4),
        ("stage", Progress(version=2, versions=3, epoch=1, epochs=1), 1 / 3),
        ("stage", Progress(version=0, versions=1, epoch=1, epochs=1), 0),
        ("epoch", Progress(version=7, versions=10, epoch=1, epochs=5), 0),
        ("epoch", Progress(version=7, versions=10, epoch=4, epochs=5), 0.75),
        ("epoch", Progress(version=7, versions=10, epoch=5, epochs=5), 1),
        ("epoch", Progress(version=7, versions=10, epoch=1, epochs=1), 1),
        ("constant", Progress(version=7, versions=10, epoch=1, epochs=1), 0.1),
    ],
)
def test_schedules_without_feedback(schedule, progress, expected):
    control = PositiveReweighting(schedule=schedule, start=0.1, floor=0)
    state = entropy.update(control, entropy.start(control), read(0.0, reward=-1.0))
    assert state == {}
    assert entropy.actuate(control, state, progress).positive_weight == pytest.approx(expected)
    floored = control.model_copy(update={"floor": 0.2})
    assert entropy.actuate(floored, state, progress).positive_weight == pytest.approx(max(0.2, expected))


def test_which_tokens_lambda_weighs_is_passed_on():
    assert entropy.actuate(PositiveReweighting(includes_zero=True), {}, NOW) == Actuators(positive_weight=1.0, includes_zero=True)


def test_a_raised_floor_and_a_changed_target_act_at_once():
    state = {"positive_weight": 0.1}
    assert entropy.actuate(PAPER.model_copy(update={"floor": 0.4}), state, NOW).positive_weight == 0.4
    for target, expected in ((0.1, 0.15), (0.9, 0.05)):
        changed = PAPER.model_copy(update={"target": target})
        assert entropy.actuate(changed, entropy.update(changed, state, read(0.5)), NOW).positive_weight == pytest.approx(expected)


def test_while_the_guard_is_awake_lambda_rises_by_whole_steps_below_the_target():
    control = PositiveReweighting(start=0.5, floor=0.2, target=0.8)
    good, bad = [read(0.4, lag=4)] * 10, [read(0.4, lag=4, reward=0.1)] * 8
    state = entropy.start(control)
    before = after = 0.0
    for reading in good + bad:
        before = state["positive_weight"]
        state = entropy.update(control, state, reading)
        after = state["positive_weight"]
    assert guard.awake(state)
    assert after == pytest.approx(before + 0.05)
    assert weights(control.model_copy(update={"guard": False}), good + bad)[-1] == pytest.approx(0.5 - 18 * 0.01)


# -- the others --------------------------------------------------------------------------------------------------------------------------------


def test_the_bonus_grows_below_the_target_and_is_off_above_it():
    control = AdaptiveRegularisation(target=0.5, step=1e-3, greatest=2.5e-3)
    state, seen = entropy.start(control), []
    for nats in (0.4, 0.4, 0.4, 0.4, 0.6, 0.4, 0.5):
        state = entropy.update(control, state, read(nats))
        seen.append(entropy.actuate(control, state, NOW).entropy_coefficient)
    assert seen == pytest.approx([1e-3, 2e-3, 2.5e-3, 2.5e-3, 0, 2.5e-3, 0])
    assert state["coefficient"] == pytest.approx(1.5e-3)
    assert entropy.actuate(AdaptiveRegularisation(start=1e-3), {}, NOW) == Actuators()  # nothing was measured yet


def test_the_gate_of_the_bonus_follows_a_changed_target_at_once():
    low, high = (AdaptiveRegularisation(target=t, start=1e-3) for t in (0.3, 0.9))
    state = entropy.update(low, entropy.start(low), read(0.6))
    assert entropy.actuate(low, state, NOW).entropy_coefficient == 0
    assert entropy.actuate(high, state, NOW).entropy_coefficient == pytest.approx(9e-4)


def test_a_static_bonus_and_methods_of_the_loss_have_no_state():
    for control in STATELESS:
        assert entropy.start(control) == {}
        assert entropy.update(control, {}, read(0.1)) == {}
        expected = Actuators(entropy_coefficient=1e-3) if isinstance(control, Bonus) else Actuators()
        assert entropy.actuate(control, {}, NOW) == expected


def test_alpha_is_the_clipped_sum_of_error_and_its_integral():
    control = EntroPic(target=0.5, proportional=1, integral=0.1)
    state = entropy.start(control)
    assert entropy.actuate(control, state, NOW) == Actuators(threshold=0.95)
    state = entropy.update(control, state, read(0.3))
    assert entropy.actuate(control, state, NOW).high_probability == pytest.approx(-0.22)
    state = entropy.update(control, state, read(0.6))
    assert entropy.actuate(control, state, NOW).high_probability == pytest.approx(0.1 - 0.01)
    assert entropy.actuate(control.model_copy(update={"target": 0.4}), state, NOW).high_probability == pytest.approx(0.2 - 0.01)
    for nats, bound in ((9.0, 1), (0.0, -1)):
        steep = EntroPic(target=0.5, proportional=10)
        assert entropy.actuate(steep, entropy.update(steep, {}, read(nats)), NOW).high_probability == bound


def test_the_integral_does_not_wind_up_while_alpha_is_at_its_bound():
    control = EntroPic(target=0.5, proportional=1, integral=0.1)
    state = entropy.start(control)
    for _ in range(1000):
        state = entropy.update(control, state, read(3.0))
    assert state["error_sum"] == 0  # 2.5 nats above, alpha was at its bound from the first version on
    for _ in range(1000):
        state = entropy.update(control, state, read(0.6))
    assert control.integral * state["error_sum"] == pytest.approx(0.9, abs=0.02)
    state = entropy.update(control, state, read(0.4))
    assert entropy.actuate(control, state, NOW).high_probability < 0.85


def test_a_raised_integral_gain_does_not_leave_a_sum_that_was_built_up_under_a_small_one():
    low, high = (EntroPic(target=0.5, proportional=0, integral=k) for k in (0.01, 1.0))
    state = entropy.start(low)
    for _ in range(1000):
        state = entropy.update(low, state, read(0.6))
    assert state["error_sum"] == pytest.approx(100, abs=0.2)
    for _ in range(11):
        state = entropy.update(high, state, read(0.3))
    assert entropy.actuate(high, state, NOW).high_probability < -0.9


# -- whatever the readings ---------------------------------------------------------------------------------------------------------------------

numbers = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([-1.0, math.nan, math.inf, -math.inf]))
readings = st.lists(st.builds(Reading, version=st.integers(0, 1000), entropy=numbers, lag=numbers, reward=numbers), max_size=40)
shares = st.floats(0, 1)
controls = st.one_of(
    st.builds(
        PositiveReweighting, schedule=st.sampled_from(["entropy", "stage", "epoch", "constant"]), target=st.floats(0, 5), step=st.floats(1e-3, 1),
        start=shares, floor=shares, guard=st.booleans(), lag_scaled=st.booleans(), guard_drop=st.floats(0.01, 2),
    ),
    st.builds(AdaptiveRegularisation, target=st.floats(0, 5), step=st.floats(1e-6, 1), start=st.floats(0, 1), greatest=st.floats(1e-6, 1)),
    st.builds(EntroPic, target=st.floats(0, 5), proportional=st.floats(0, 100), integral=st.floats(0, 100)),
    st.sampled_from(STATELESS),
)  # fmt: skip
progresses = st.builds(
    lambda version, more, epoch, more_epochs: Progress(version=version, versions=version + more, epoch=epoch, epochs=epoch + more_epochs),
    st.integers(0, 100), st.integers(1, 100), st.integers(1, 9), st.integers(0, 9),
)  # fmt: skip


@given(control=controls, seen=readings, progress=progresses)
def test_what_is_actuated_is_bounded_and_the_state_is_json(control, seen, progress):
    state = entropy.start(control)
    for reading in seen:
        state = entropy.update(control, state, reading)
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    actuated = entropy.actuate(control, state, progress)
    floor = control.floor if isinstance(control, PositiveReweighting) else 1.0
    assert floor <= actuated.positive_weight <= 1
    greatest = {AdaptiveRegularisation: "greatest", Bonus: "coefficient"}.get(type(control))
    assert 0 <= actuated.entropy_coefficient <= (getattr(control, greatest) if greatest else 0)
    assert abs(actuated.high_probability) <= isinstance(control, EntroPic)
    assert all(math.isfinite(value) for value in entropy.shown(control, state, progress).values())


@given(control=controls, seen=readings, reading=readings.filter(bool))
def test_an_update_is_pure(control, seen, reading):
    state = entropy.start(control)
    for earlier in seen:
        state = entropy.update(control, state, earlier)
    kept = dict(state)
    first, second = (entropy.update(control, state, reading[0]) for _ in range(2))
    assert state == kept
    assert first == second


@given(control=controls, seen=readings, step=st.floats(0.01, 1))
def test_lambda_comes_back_from_any_past_in_as_many_versions_as_it_has_steps(control, seen, step):
    control = PositiveReweighting(step=step, guard=False, lag_scaled=False, target=0.5)
    state = entropy.start(control)
    for reading in seen:
        state = entropy.update(control, state, reading)
    for _ in range(math.ceil((1 - control.floor) / step)):
        state = entropy.update(control, state, read(0.6))
    assert entropy.actuate(control, state, NOW).positive_weight == pytest.approx(1)


@given(seen=readings, gains=st.tuples(st.floats(0.1, 10), st.floats(0.01, 1)))
def test_the_sign_of_alpha_comes_back_from_any_past(seen, gains):
    control = EntroPic(target=0.5, proportional=gains[0], integral=gains[1])
    state = entropy.start(control)
    for reading in seen:
        state = entropy.update(control, state, reading)
    for _ in range(math.ceil(1 / (gains[1] * 0.3)) + 1):
        state = entropy.update(control, state, read(0.2))
    assert entropy.actuate(control, state, NOW).high_probability < 0


@pytest.mark.parametrize("control", FOLLOWING, ids=lambda c: c.method)
def test_an_empty_step_changes_nothing_and_a_missing_name_starts_anew(control):
    state = entropy.update(control, entropy.start(control), read(0.1))
    assert entropy.update(control, state, read(math.nan, reward=math.nan)) == state
    assert entropy.update(control, {}, read(0.1)) == state


def test_what_is_shown_is_what_the_method_has():
    assert entropy.shown(NoControl(), {}, NOW) == {}
    assert entropy.shown(Bonus(coefficient=0.01), {}, NOW) == {"control_coefficient": 0.01}
    assert entropy.shown(PositiveReweighting(schedule="constant", start=0.3), {}, NOW) == {"control_weight": 0.3}
    control = PositiveReweighting(target=0.5)
    assert entropy.shown(control, entropy.start(control), NOW) == {"control_weight": 1.0, "control_guard": 0.0, "control_target_nats": 0.5}
    shown = entropy.shown(control, entropy.update(control, {}, read(0.4)), NOW)
    assert shown == pytest.approx({"control_weight": 0.95, "control_guard": 0.0, "control_target_nats": 0.5, "control_error_nats": -0.1})
    pi = EntroPic(target=0.5)
    assert entropy.shown(pi, entropy.update(pi, {}, read(0.4)), NOW).keys() == {"control_coefficient", "control_target_nats", "control_error_nats"}


def test_every_method_of_the_spec_is_known_here():
    tags = TypeAdapter(EntropyControl).json_schema()["discriminator"]["mapping"].keys()
    assert {control.method for control in [*STATELESS, *FOLLOWING]} == set(tags)


# -- closed loops ------------------------------------------------------------------------------------------------------------------------------


class ToyPolicy:
    """Entropy and skill under a weight on positive tokens, as a small model trained on sums showed them.

    Positive tokens build skill and take entropy. Negative ones give entropy while there is skill, take skill, and take entropy once it is lost:
    what is left to suppress is then what little the policy still knew.
    """

    def __init__(self, seed: int) -> None:
        self.rng, self.nats, self.skill = random.Random(seed), 1.13, 0.2

    def train(self, weight: float) -> Reading:
        self.nats *= 1 - 0.02 * weight + 0.1 * (1 - weight) * (self.skill - 0.2)
        self.skill = max(0.0, self.skill + 0.4 * weight * (0.35 - self.skill) - 0.03 * (1 - weight) * self.skill)
        return read(self.nats + self.rng.gauss(0, 0.02), reward=self.skill + self.rng.gauss(0, 0.02))


def guided(control, seed, versions=240):
    """lambda, true entropy and skill at each version of a run of the toy policy."""
    policy, state, trace = ToyPolicy(seed), entropy.start(control), []
    for version in range(versions):
        weight = entropy.actuate(control, state, replace(NOW, version=version)).positive_weight
        state = entropy.update(control, state, policy.train(weight))
        trace.append((weight, policy.nats, policy.skill))
    return trace


def test_negatives_alone_keep_the_toy_policys_entropy_and_then_lower_it():
    trace = guided(PositiveReweighting(schedule="constant", start=0, floor=0), seed=0)
    half = guided(PositiveReweighting(schedule="constant", start=1), seed=0, versions=60)
    assert trace[10][1] > 0.95 * 1.13 > half[10][1]
    assert trace[-1][1] < 0.3
    assert trace[-1][2] < 0.01 < 0.3 < half[-1][2]


@pytest.mark.parametrize("seed", range(5))
def test_the_papers_setting_latches_up_at_lambda_zero(seed):
    trace = guided(PAPER.model_copy(update={"target": 0.8}), seed)
    latched = trace[-100:]
    assert max(weight for weight, _, _ in trace) == 1  # it did regulate from above
    assert {weight for weight, _, _ in latched} == {0.0}
    assert latched[-1][1] < 0.5 * latched[0][1] < 0.4  # entropy goes on falling, far below its target
    assert latched[-1][2] < 0.02


@pytest.mark.parametrize("target", [0.8, 0.6, 0.4])
@pytest.mark.parametrize("seed", range(5))
def test_the_shipped_defaults_regulate_where_it_latched_up(seed, target):
    trace = guided(PositiveReweighting(target=target), seed)
    assert statistics.fmean(nats for _, nats, _ in trace[-80:]) == pytest.approx(target, abs=0.113)
    assert trace[-1][2] > 0.2


@pytest.mark.parametrize("seed", range(5))
def test_the_guard_alone_ends_the_latch_up(seed):
    trace = guided(PAPER.model_copy(update={"target": 0.8, "guard": True}), seed)
    assert max(weight for weight, _, _ in trace[-60:]) > 0.2
    assert trace[-1][1] > 0.4
    assert trace[-1][2] > 0.15


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), start=shares, floor=st.floats(0.15, 0.4), target=st.floats(0.3, 1.0), step=st.floats(0.01, 0.2))
def test_with_floor_and_guard_there_is_no_latch_up(seed, start, floor, target, step):
    trace = guided(PositiveReweighting(start=start, floor=floor, target=target, step=step), seed, versions=300)
    assert trace[-1][2] > 0.15
    assert trace[-1][1] > 0.1


def swing(control, seed, lag):
    """Standard deviation of entropy under a loop that sees it `lag` versions late; entropy relaxes towards 1.2 - 0.8 lambda."""
    rng, state, true = random.Random(seed), entropy.start(control), [1.0] * (lag + 1)
    for _ in range(400):
        weight = entropy.actuate(control, state, NOW).positive_weight
        true.append(true[-1] + 0.2 * (1.2 - 0.8 * weight - true[-1]))
        state = entropy.update(control, state, read(true[-1 - lag] + rng.gauss(0, 0.005), lag=float(lag)))
    return statistics.pstdev(true[-200:]), statistics.fmean(true[-200:])


@pytest.mark.parametrize("lag", [4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_scaling_the_step_by_the_lag_calms_the_limit_cycle(seed, lag):
    control = PositiveReweighting(target=0.8, floor=0, guard=False)
    scaled, mean = swing(control, seed, lag)
    whole, _ = swing(control.model_copy(update={"lag_scaled": False}), seed, lag)
    assert scaled < 0.5 * whole
    assert mean == pytest.approx(0.8, abs=0.03)


def settled(control, drift):
    """Mean entropy that a policy comes to which loses `drift` nats a version by itself and 0.1 alpha by control."""
    rng, state, nats = random.Random(0), entropy.start(control), 1.0
    seen = []
    for _ in range(600):
        nats += -drift - 0.1 * entropy.actuate(control, state, NOW).high_probability
        state = entropy.update(control, state, read(nats + rng.gauss(0, 0.01)))
        seen.append(nats)
    return statistics.fmean(seen[-100:])


@pytest.mark.parametrize("drift", [0.02, -0.03])
def test_the_integral_removes_the_steady_error_that_the_proportional_part_leaves(drift):
    pi = EntroPic(target=0.8, proportional=1, integral=0.05)
    assert settled(pi.model_copy(update={"integral": 0.0}), drift) == pytest.approx(0.8 - drift / 0.1, abs=0.01)
    assert settled(pi, drift) == pytest.approx(0.8, abs=0.01)


def test_the_adaptive_bonus_holds_a_policy_that_would_collapse():
    def last(control):
        state, nats = entropy.start(control), 1.0
        seen = []
        for _ in range(400):
            nats = max(0.0, nats - 0.01 * nats + entropy.actuate(control, state, NOW).entropy_coefficient)
            state = entropy.update(control, state, read(nats))
            seen.append(nats)
        return statistics.fmean(seen[-100:])

    assert last(AdaptiveRegularisation(target=0.6, step=1e-3, greatest=0.05)) == pytest.approx(0.6, abs=0.05)
    assert last(NoControl()) < 0.05
