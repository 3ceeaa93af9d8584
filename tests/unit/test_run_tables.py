"""The tables of a run's report, by value."""

from __future__ import annotations

import math

import pytest

from services.contracts.measures import EVALUATION_KEYS, RUN_KEYS, STEP_KEYS
from services.contracts.views import EvaluationView, StepView
from services.studies.run_tables import UNDEFINED, UNITS, evaluation_measurements, outcomes, step_measurements


def steps_of(*values: dict[str, float | None]) -> list[StepView]:
    return [StepView(version=version, count=1, at=0.0, values=measured, lags={}, window=(0, 0), groups=[]) for version, measured in enumerate(values)]


def told(*values: dict[str, float | None]) -> dict[str, str]:
    return {one.key: one.value for one in outcomes(steps_of(*values))}


def collapse(version: int, *, sign: float = -1.0) -> dict[str, float | None]:
    """Entropy halves every ten versions; the reward is 2 + sign * 0.5 exp(entropy)."""
    entropy = 2.0 ** (-version / 10)
    return {
        "entropy_nats": entropy, "reward_mean": 2.0 + sign * 0.5 * math.exp(entropy), "entropy_change_predicted": -entropy,
        "entropy_change_realised": -0.25 * entropy,
    }  # fmt: skip


def test_what_a_run_came_to_has_every_key_with_its_meaning_and_unit() -> None:
    rows = outcomes(steps_of(*(collapse(v) for v in range(40))))
    assert [(row.key, row.meaning) for row in rows] == list(RUN_KEYS.items())
    values = {row.key: row.value for row in rows}
    assert values["entropy_half_life"] == "version 12"
    assert values["entropy_log_slope"] == f"{-math.log(2) / 10:.4f} per version"
    assert values["fit_a"] == "0.5000 reward per unit of exp(entropy)"
    assert values["fit_ceiling"] == "1.5000 reward, extrapolated with R² = 1.00"
    assert values["budget_slope"] == "0.2500 nats per token, per predicted unit"
    assert values["budget_r2"] == "1.0000 of 1"
    assert set(UNITS) == set(RUN_KEYS)


def test_a_ceiling_of_a_reward_that_rose_with_entropy_is_called_none() -> None:
    rising = [collapse(v, sign=1.0) for v in reversed(range(40))]
    assert "no ceiling, since a is negative" in told(*rising)["fit_ceiling"]


def test_what_is_not_defined_says_why() -> None:
    values = told(*({"entropy_nats": 1.0 + 0.001 * v, "reward_mean": 0.5} for v in range(5)))
    assert values["entropy_half_life"] == "not reached: the entropy stayed above half of its start"
    assert (
        values["fit_r2"]
        == values["fit_ceiling"]
        == "not defined: fewer than 6 blocks of 5 versions up to the peak of the reward, or they do not differ"
    )
    assert values["budget_slope"].startswith("not defined: fewer than 3 versions measured both changes")
    assert values["entropy_floor"] == "1.0020 nats per token"
    assert told({"entropy_nats": 1.0})["entropy_auc"] == "not defined: it takes two versions"
    assert told({"entropy_nats": 1.0})["entropy_log_slope"].startswith("not defined: the last fifth")


@pytest.mark.parametrize("values", [(), ({"reward_mean": 1.0},)])
def test_a_run_that_measured_no_entropy_says_so(values: tuple[dict[str, float | None], ...]) -> None:
    found = told(*values)
    assert found["entropy_half_life"] == found["entropy_floor"] == found["fit_a"] == "not defined: no entropy was measured"


def test_whatever_may_be_missing_has_its_words() -> None:
    """The floor is there wherever one entropy is."""
    assert set(RUN_KEYS) - set(UNDEFINED) == {"entropy_floor"}


def test_every_key_that_was_measured_is_in_the_table_in_the_order_of_the_catalogue() -> None:
    measured: dict[str, float | None] = dict.fromkeys(reversed([*STEP_KEYS, "entropy_nats/lag/4-7", "entropy_nats/lag/2-3", "new_key"]), 1.0)
    keys = [row.key for row in step_measurements(steps_of(measured, {}))]
    assert keys[:3] == ["entropy_nats", "entropy_nats/lag/2-3", "entropy_nats/lag/4-7"]
    assert [key for key in keys if "/" not in key] == [*STEP_KEYS, "new_key"]


def test_a_measurement_has_its_ends_and_its_extremes() -> None:
    values = [{"kl_behaviour_k3_nats": float(v) if v != 3 else None} for v in range(25)]
    (row,) = step_measurements(steps_of(*values, {"reward_mean": math.inf}))
    assert (row.key, row.meaning) == ("kl_behaviour_k3_nats", STEP_KEYS["kl_behaviour_k3_nats"])
    assert (row.first, row.last, row.least, row.greatest) == ("5.2000", "19.5000", "0.0000", "24.0000")


def test_evaluations_are_told_by_set() -> None:
    def evaluation(version: int, name: str, **values: float | None) -> EvaluationView:
        return EvaluationView(
            name=name, domain="in", version=version, at=0.0, prompts=1, samples=2, temperature=1.0, top_p=1.0, max_tokens=8, values=values
        )

    tables = evaluation_measurements([evaluation(0, "a", pass_at_1=0.25), evaluation(0, "b", distinct_3=0.5), evaluation(4, "a", pass_at_1=0.75)])
    assert list(tables) == ["a", "b"]
    (row,) = tables["a"]
    assert (row.key, row.meaning, row.first, row.last) == ("pass_at_1", EVALUATION_KEYS["pass_at_1"], "0.2500", "0.7500")
    assert [(row.key, row.first, row.last) for row in tables["b"]] == [("distinct_3", "0.5000", "0.5000")]
