import pytest

from benchmarks.measures import PARTS, Cost, costs, measuring
from trainer import step


def test_a_part_costs_what_it_adds_to_the_step_of_its_own_round() -> None:
    rounds = [{"none": base, "drift": base * share, "all": 2 * base} for base, share in ((1.0, 1.1), (2.0, 1.3), (4.0, 1.2))]
    found = costs(rounds)
    assert set(found) == {"drift", "all"}
    assert (found["drift"].milliseconds, found["drift"].share) == pytest.approx((600, 0.2))
    assert (found["drift"].least, found["drift"].greatest) == pytest.approx((0.15, 0.25))
    assert found["all"] == Cost(2000.0, 1.0, 1.0, 1.0)


def test_only_the_parts_that_are_asked_for_are_measured_and_the_step_is_as_before_after_it() -> None:
    names = ("update_measures", "mismatch_measures", "_group_measures", "realised_change", "forward")
    before = {name: getattr(step, name) for name in names}

    def changed() -> set[str]:
        return {name for name in names if getattr(step, name) is not before[name]}

    with measuring():
        assert changed() == set(names)
    with measuring("probe", "drift"):
        assert changed() == {"update_measures", "mismatch_measures", "_group_measures", "realised_change"}
    with measuring(*PARTS):
        assert changed() == {"realised_change"}, "it is timed apart, since it is not of every step"
    assert changed() == set()
