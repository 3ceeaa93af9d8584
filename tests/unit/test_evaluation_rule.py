"""When a run is evaluated, and as what its fleet sees an evaluation set."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from services.contracts.evaluation import due, passed_over, set_spec
from services.contracts.spec import EvaluationSet, RunSpec, Verifier
from services.contracts.topics import Log, RunKeys, Work, evaluation_id, parent_of, run_of


def spec_of(*, every: int = 0, versions: int = 10, **one: Any) -> RunSpec:
    return RunSpec.model_validate({"versions": versions, "evaluation": {"every": every, "sets": [{"name": "far"} | one]}})


@pytest.mark.parametrize(
    ("every", "versions", "expected"),
    [(0, 10, [0, 10]), (1, 3, [0, 1, 2, 3]), (4, 10, [0, 4, 8, 10]), (5, 10, [0, 5, 10]), (20, 10, [0, 10]), (0, 1, [0, 1])],
)
def test_the_first_the_last_and_each_so_many_versions_are_evaluated(every: int, versions: int, expected: list[int]) -> None:
    spec = spec_of(every=every, versions=versions)
    assert [version for version in range(versions + 1) if due(spec, version)] == expected


def test_an_evaluation_is_passed_over_when_those_before_took_more_than_their_share() -> None:
    spec = spec_of(every=2)
    spec = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"max_share": 0.25})})
    assert not passed_over(spec, 4, waited=25.0, elapsed=100.0)
    assert passed_over(spec, 4, waited=25.1, elapsed=100.0)
    assert not passed_over(spec, 3, waited=99.0, elapsed=100.0), "it is not due"
    assert not passed_over(spec, 0, waited=99.0, elapsed=100.0)
    assert not passed_over(spec, 10, waited=99.0, elapsed=100.0), "what a run has come to is always evaluated"


def test_a_share_of_1_passes_none_over() -> None:
    spec = spec_of(every=1)
    spec = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"max_share": 1.0})})
    assert not any(passed_over(spec, version, waited=100.0, elapsed=100.0) for version in range(11))


def test_without_a_set_nothing_is_due() -> None:
    spec = RunSpec.model_validate({"versions": 4, "evaluation": {"every": 1}})
    assert not any(due(spec, version) for version in range(5))


def test_a_set_has_its_own_data_rubric_and_sampling_and_the_run_s_where_it_says_nothing() -> None:
    run = spec_of(data={"source": "jsonl", "path": "far.jsonl"}, samples=16, temperature=0.6, top_p=0.95, max_tokens=32)
    own = set_spec(run, run.evaluation.sets[0])
    assert (own.data.path, own.group_size, own.temperature, own.sampling.top_p, own.sampling.max_tokens) == ("far.jsonl", 16, 0.6, 0.95, 32)
    assert own.rewards == run.rewards
    assert own.evaluation.sets == ()
    run = spec_of(rewards=[{"name": "math"}])
    own = set_spec(run, run.evaluation.sets[0])
    assert own.rewards == (Verifier(name="math"),)
    assert own.sampling.max_tokens == run.sampling.max_tokens


def test_fewer_samples_than_the_training_s_estimator_needs_are_no_fault() -> None:
    run = RunSpec.model_validate(
        {"group_size": 8, "advantage": {"estimator": "pass_at_k", "k": 8}, "evaluation": {"sets": [{"name": "far", "samples": 2}]}}
    )
    assert set_spec(run, run.evaluation.sets[0]).group_size == 2


def test_completions_that_leave_no_room_for_a_prompt_are_refused() -> None:
    run = spec_of(max_tokens=128)
    with pytest.raises(ValidationError, match="leaves no room for a prompt"):
        set_spec(run, run.evaluation.sets[0])


def test_seeds_depend_on_the_run_s_seed_and_the_set_alone() -> None:
    one, other = EvaluationSet(name="a"), EvaluationSet(name="b")
    zero, more = RunSpec(seed=0), RunSpec(seed=0, learning_rate=0.1, group_size=4, temperature=0.5)
    assert set_spec(zero, one).seed == set_spec(more, one).seed
    seeds = {set_spec(RunSpec(seed=seed), each).seed for seed in range(50) for each in (one, other)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_the_id_of_a_set_names_its_run_and_is_read_back_from_its_streams() -> None:
    child = evaluation_id("demo-20261122-104501-3f9a", "far_out")
    assert parent_of(child) == "demo-20261122-104501-3f9a"
    assert parent_of("demo-20261122-104501-3f9a") is None
    assert [run_of(RunKeys(child).stream(topic)) for topic in (*Work, *Log)] == [child] * 9
