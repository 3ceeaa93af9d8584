"""Gauges of measurements: labels out of keys, and series that vanish with what they show."""

from __future__ import annotations

from itertools import chain

import pytest
from prometheus_client import CollectorRegistry

from services.contracts.measures import BINNED, BINS, STEP_KEYS
from services.runtime.metrics import ControlPlaneMetrics, Latest, TrainerMetrics, step_labels


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def series(registry: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    """Values by the labels of a metric's series, as a scrape sees them."""
    return {tuple(s.labels.values()): s.value for family in registry.collect() if family.name == name for s in family.samples}


def a_gauge(registry: CollectorRegistry) -> Latest:
    return Latest("offbeat_test", "A test", ["run", "set"], ["name"], registry)


def test_a_step_s_key_becomes_name_division_and_bin() -> None:
    assert step_labels("entropy_nats") == ("entropy_nats", "", "")
    assert step_labels("entropy_nats/lag/2-3") == ("entropy_nats", "lag", "2-3")
    assert step_labels("ess_share/lag/32+") == ("ess_share", "lag", "32+")


def test_every_key_of_the_catalogue_has_labels_of_its_own() -> None:
    divided = {f"{key}/{by}/{name}": (key, by, name) for key, ways in BINNED.items() for by in ways for name in BINS[by]}
    expected = divided | {key: (key, "", "") for key in STEP_KEYS}
    assert {key: step_labels(key) for key in expected} == expected
    assert len(set(expected.values())) == len(expected)


def test_what_was_not_measured_again_is_not_shown(registry: CollectorRegistry) -> None:
    gauge = a_gauge(registry)
    gauge.show(("r", "near"), {("a",): 1.0, ("b",): 2.0})
    gauge.show(("r", "far"), {("a",): 3.0})
    gauge.show(("r", "near"), {("b",): 4.0})
    assert series(registry, "offbeat_test") == {("r", "near", "b"): 4.0, ("r", "far", "a"): 3.0}


def test_a_run_that_is_forgotten_takes_all_its_series_and_no_other_s(registry: CollectorRegistry) -> None:
    gauge = a_gauge(registry)
    for run in ("r", "r2", "r3"):
        for name in ("near", "far"):
            gauge.show((run, name), {("a",): 1.0})
    gauge.forget("r")
    assert set(series(registry, "offbeat_test")) == {(run, name, "a") for run in ("r2", "r3") for name in ("near", "far")}
    gauge.keep({"r3", "unknown"})
    assert set(series(registry, "offbeat_test")) == {("r3", "near", "a"), ("r3", "far", "a")}
    gauge.forget("unknown")
    assert len(series(registry, "offbeat_test")) == 2


def test_what_is_shown_does_not_change_with_what_was_given(registry: CollectorRegistry) -> None:
    gauge, given = a_gauge(registry), {("a",): 1.0}
    gauge.show(("r", "near"), given)
    given[("b",)] = 2.0
    assert series(registry, "offbeat_test") == {("r", "near", "a"): 1.0}


def test_a_trainer_that_lets_go_of_a_run_shows_what_it_counted_and_nothing_that_it_measured(registry: CollectorRegistry) -> None:
    metrics = TrainerMetrics(registry)
    for run in ("r", "other"):
        metrics.version.labels(run).set(3)
        metrics.step.show((run,), {step_labels("entropy_nats/lag/2-3"): 0.5})
        metrics.window.labels(run, "max").set(2)
        metrics.entropy.labels(run).set(0.5)
        metrics.reward.labels(run).set(0.25)
        metrics.tokens.labels(run).inc(100)
        metrics.lag.add(run, {1: 100})
    metrics.canary.labels("rollout-0").set(1e-6)
    metrics.let_go("r")
    of_run = {s.name for family in registry.collect() for s in family.samples if s.labels.get("run") == "r" and not s.name.endswith("_created")}
    assert of_run == {"offbeat_trainer_tokens_total"} | {f"offbeat_trainer_lag_versions_{part}" for part in ("bucket", "count", "sum")}
    assert series(registry, "offbeat_trainer_canary_difference") == {}
    assert series(registry, "offbeat_trainer_step") == {("other", "entropy_nats", "lag", "2-3"): 0.5}
    labels = {"run": "other", "name": "entropy_nats", "by": "lag", "bin": "2-3"}
    assert registry.get_sample_value("offbeat_trainer_step", labels) == 0.5


def test_evaluations_and_runs_have_the_labels_that_join_them(registry: CollectorRegistry) -> None:
    metrics = ControlPlaneMetrics(registry)
    metrics.info.show((), {("r", "n1", "paper", "N1", "3"): 1.0})
    metrics.evaluation.show(("r", "held"), {("in", "pass_at_1"): 0.25})
    metrics.evaluation_version.show(("r", "held"), {(): 40})
    found = {s.name: (s.labels, s.value) for s in chain.from_iterable(family.samples for family in registry.collect()) if "run" in s.labels}
    assert found == {
        "offbeat_run_info": ({"run": "r", "name": "n1", "study": "paper", "arm": "N1", "seed": "3"}, 1.0),
        "offbeat_evaluation": ({"run": "r", "set": "held", "domain": "in", "name": "pass_at_1"}, 0.25),
        "offbeat_evaluation_version": ({"run": "r", "set": "held"}, 40.0),
    }


def test_a_control_plane_tells_of_runs_and_fleet_only_while_it_dispatches(registry: CollectorRegistry) -> None:
    metrics, holds = ControlPlaneMetrics(registry), [True]
    metrics.show_while(lambda: holds[0])
    metrics.runs.labels("running").set(1)
    metrics.members.labels("trainer").set(1)
    for gauge in (metrics.queue, metrics.conservation):
        gauge.labels("r", "queued").set(2)
    metrics.broken.labels("r").set(1)
    metrics.info.show((), {("r", "n1", "", "", "0"): 1.0})
    metrics.evaluation.show(("r", "held"), {("in", "pass_at_1"): 0.25})
    metrics.evaluation_version.show(("r", "held"), {(): 40})
    metrics.trainer_jobs.set(1)
    metrics.requests.labels("GET", "/v1/runs", "200").observe(0.1)

    def told() -> set[str]:
        return {family.name for family in registry.collect() if family.samples}

    of_runs = {f"offbeat_{name}" for name in ("runs", "fleet_members", "queue_groups", "groups", "conservation_broken", "run_info", "evaluation",
                                              "evaluation_version", "trainer_jobs")}  # fmt: skip
    whole = told()
    assert whole >= of_runs | {"offbeat_http_request_seconds", "offbeat_store_away"}
    holds[0] = False
    assert told() == whole - of_runs
    holds[0] = True
    assert told() == whole
