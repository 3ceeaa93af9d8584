import math

import pytest

from trainer.schedules import learning_rate_factor


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_factors_of_a_run_of_seven_versions_with_three_of_warm_up(schedule, expected):
    factors = [learning_rate_factor(schedule, v, versions=7, warmup=3) for v in range(7)]
    assert factors == pytest.approx(expected, abs=1e-12)


def test_without_warm_up_the_first_step_is_whole():
    assert learning_rate_factor("linear", 0, versions=10, warmup=0) == 1.0


def test_past_the_end_and_with_nothing_but_warm_up_the_factor_stays_in_bounds():
    assert learning_rate_factor("linear", 12, versions=10, warmup=0) == 0.0
    assert learning_rate_factor("cosine", 99, versions=10, warmup=2) == pytest.approx(0.0)
    assert learning_rate_factor("linear", 3, versions=3, warmup=10) == pytest.approx(4 / 11)
    assert learning_rate_factor("linear", 10, versions=10, warmup=10) == 1.0
