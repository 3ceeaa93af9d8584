import pytest

from benchmarks.overlap import Pass, ideal, make_pass, processor_limit, results, rounds
from services.contracts.views import StepView

ZERO = dict.fromkeys(("batch_wait", "train", "publish_prepare", "publish_wait", "publish_deliver", "checkpoint"), 0.0)


def passed(max_lag: int, seconds: float, **phases: float) -> Pass:
    return Pass(max_lag, seconds, tokens=100.0, phases=ZERO | phases, idle={}, cpu={})


def step(version: int, **values: float) -> StepView:
    timed = {f"{name}_seconds": 0.0 for name in ZERO} | {"idle_trainer_seconds": 0.0, "idle_rollout_seconds": 0.0}
    return StepView(version=version, count=1, at=0.0, values=timed | values, lags={}, window=(0, 0), groups=[])


def test_generation_and_training_follow_one_another_in_0_0_and_overlap_elsewhere() -> None:
    synchronous = passed(0, 1.0, batch_wait=0.6, train=0.25, publish_prepare=0.01, publish_deliver=0.1, checkpoint=0.02, publish_wait=0.02)
    assert ideal(0, synchronous) == pytest.approx(0.6 + 0.38)
    assert ideal(1, synchronous) == ideal(4, synchronous) == 0.6
    assert ideal(1, passed(0, 1.0, batch_wait=0.3, train=0.4, publish_deliver=0.1)) == pytest.approx(0.5)


def test_a_pass_is_the_mean_of_its_versions() -> None:
    steps = [
        step(8, seconds=1.0, tokens=90.0, batch_wait_seconds=0.25, train_seconds=0.5, idle_rollout_seconds=0.5),
        step(9, seconds=3.0, tokens=110.0, batch_wait_seconds=0.75, train_seconds=1.5, idle_rollout_seconds=0.0),
    ]
    measured = make_pass(4, steps, {"trainer": 3.0})
    assert (measured.max_lag, measured.seconds, measured.tokens) == (4, 2.0, 100.0)
    assert (measured.generation, measured.training) == (0.5, 1.0)
    assert (measured.idle["idle_rollout"], measured.cpu["trainer"]) == (0.25, 1.5)


def test_each_round_is_held_against_its_own_synchronous_pass() -> None:
    quick = [passed(0, 1.0, batch_wait=0.5, train=0.5), passed(1, 0.5)]
    slow = [passed(1, 2.0), passed(0, 2.0, batch_wait=0.9, train=1.0)]
    slowest = [passed(0, 4.0, batch_wait=1.0, train=3.0), passed(1, 4.0)]
    synchronous, overlapped = results([quick, slow, slowest])
    assert [synchronous.ratio.least, synchronous.ratio.median, synchronous.ratio.greatest] == pytest.approx([0.95, 1.0, 1.0])
    assert [overlapped.ratio.least, overlapped.ratio.median, overlapped.ratio.greatest] == pytest.approx([0.5, 0.75, 1.0])
    assert overlapped.seconds.median == 2.0
    assert overlapped.versions_per_second.median == 0.5
    assert overlapped.tokens_per_second.greatest == 200.0
    assert synchronous.met
    assert not overlapped.met


def test_no_window_always_comes_first() -> None:
    assert rounds([0, 1, 4], 4) == [[0, 1, 4], [1, 4, 0], [4, 0, 1], [0, 1, 4]]


def test_two_cores_take_as_long_as_their_share_of_all_work_or_the_longer_side() -> None:
    cpu = {"rollout": 0.2, "engine": 0.4, "trainer": 0.5, "redis": 0.02, "reward": 0.02, "control-plane": 0.02}
    assert processor_limit(cpu, 2) == pytest.approx(0.6)
    assert processor_limit(cpu | {"trainer": 0.7}, 2) == pytest.approx(0.7)
    assert processor_limit(cpu | {"redis": 0.3}, 2) == pytest.approx(0.72)
    assert processor_limit(cpu | {"redis": 0.3}, 4) == pytest.approx(0.6)
