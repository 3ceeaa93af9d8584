"""The run spec: what it refuses and how it says so, its descriptions, and its knobs."""

from __future__ import annotations

import math
import tomllib
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from services.contracts.algorithms import Bonus, Clip, EntropyControl, Grpo, PositiveReweighting
from services.contracts.spec import KNOBS, KnobChange, KvPolicy, Order, RunSpec, flatten, knobs_of, spec_at, with_knobs, with_values


def wrong(tree: dict[str, Any]) -> list[tuple[str, str]]:
    """(field, message) of everything that is wrong with `tree`."""
    with pytest.raises(ValidationError) as caught:
        RunSpec.model_validate(tree)
    return [(".".join(str(part) for part in error["loc"]), error["msg"]) for error in caught.value.errors()]


@pytest.mark.parametrize(
    ("tree", "field", "message"),
    [
        ({"batchgroups": 4}, "batchgroups", "Extra inputs are not permitted"),
        ({"staleness": {"max_lags": 4}}, "staleness.max_lags", "Extra inputs are not permitted"),
        ({"versions": "many"}, "versions", "Input should be a valid integer, unable to parse string as an integer"),
        ({"versions": 1.5}, "versions", "Input should be a valid integer, got a number with a fractional part"),
        ({"versions": 0}, "versions", "Input should be greater than or equal to 1"),
        ({"group_size": 1}, "group_size", "Input should be greater than or equal to 2"),
        ({"staleness": 3}, "staleness", "Input should be a valid dictionary or instance of Staleness"),
        ({"staleness": {"order": "random"}}, "staleness.order", "Input should be 'ready' or 'fifo'"),
        ({"temperature": math.nan}, "temperature", "Input should be a finite number"),
        ({"learning_rate": math.inf}, "learning_rate", "Input should be a finite number"),
        ({"rewards": []}, "rewards", "Tuple should have at least 1 item after validation, not 0"),
        ({"name": "../../etc"}, "name", "String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'"),
        (
            {"staleness": {"min_lag": 3, "max_lag": 2}},
            "staleness",
            "Value error, staleness.min_lag (3) is above staleness.max_lag (2): lower min_lag or raise max_lag",
        ),
        ({"batch_groups": 6, "updates_per_batch": 4}, "", "Value error, updates_per_batch (4) must divide batch_groups (6)"),
        (
            {"sampling": {"max_tokens": 128}, "model": {"max_model_len": 128}},
            "",
            "Value error, sampling.max_tokens (128) leaves no room for a prompt in model.max_model_len (128)",
        ),
        (
            {"entropy": {"method": "bapo"}, "clip": {"off": True}},
            "",
            "Value error, entropy.method 'bapo' searches the clip's bounds, which clip.off would switch off: set clip.off = false",
        ),
        (
            {"replay": "r", "evaluation": {"sets": [{"name": "far"}]}},
            "",
            "Value error, a replay generates nothing: set evaluation.sets = [] and leave staleness.target out",
        ),
        (
            {"replay": "r", "staleness": {"target": {"value": 0.02}}},
            "",
            "Value error, a replay generates nothing: set evaluation.sets = [] and leave staleness.target out",
        ),
        (
            {"data": {"source": "jsonl"}},
            "data",
            "Value error, data.path is needed for the source 'jsonl': give the file or folder that holds the prompts",
        ),
    ],
)
def test_what_is_wrong_is_named(tree: dict[str, Any], field: str, message: str) -> None:
    assert wrong(tree) == [(field, message)]


def test_everything_that_is_wrong_is_named_at_once() -> None:
    assert [field for field, _ in wrong({"versions": 0, "clip": {"low": 2}, "nonsense": 1})] == ["versions", "clip.low", "nonsense"]


@pytest.mark.parametrize(
    "tree",
    [
        {"staleness": {"min_lag": 2, "max_lag": 2}},
        {"batch_groups": 6, "updates_per_batch": 3},
        {"sampling": {"max_tokens": 127}, "model": {"max_model_len": 128}},
    ],
)
def test_limits_are_allowed(tree: dict[str, Any]) -> None:
    spec = RunSpec.model_validate(tree)
    assert flatten(tree).items() <= flatten(spec.model_dump()).items()


def test_a_spec_cannot_be_changed_and_survives_json_and_toml() -> None:
    text = 'name = "a"\nversions = 7\n[staleness]\nmin_lag = 1\norder = "fifo"\n[[rewards]]\nname = "math"\nweight = 0.5\n'
    spec = RunSpec.model_validate(tomllib.loads(text))
    assert (spec.staleness.min_lag, spec.staleness.order, spec.rewards[0].weight) == (1, Order.FIFO, 0.5)
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValidationError, match="frozen"):
        spec.versions = 8  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        spec.staleness.max_lag = 8  # type: ignore[misc]


def test_every_field_has_a_description() -> None:
    schema = RunSpec.model_json_schema()
    objects = {"RunSpec": schema} | {name: part for name, part in schema["$defs"].items() if "properties" in part}
    assert objects.keys() >= {"RunSpec", "Model", "Data", "Staleness", "Weights", "Verifier"}

    def described(about: dict[str, Any]) -> bool:
        referred = about.get("$ref", "").removeprefix("#/$defs/")  # pydantic leaves out a description that is word for word that of the field's type
        return bool(about.get("description") or schema["$defs"].get(referred, {}).get("description"))

    assert [f"{name}.{field}" for name, part in objects.items() for field, about in part["properties"].items() if not described(about)] == []


# -- knobs ----------------------------------------------------------------------------------------------------------------------------


def test_every_knob_is_a_field_of_some_spec_that_its_value_can_be_written_back_to() -> None:
    specs = [
        RunSpec(),
        RunSpec.model_validate({"staleness": {"target": {"value": 0.1}}}),
        RunSpec.model_validate({"advantage": {"estimator": "w_reinforce"}}),
    ]
    specs += [RunSpec(entropy=variant()) for variant in get_args(get_args(EntropyControl)[0])]
    assert set().union(*(knobs_of(spec) for spec in specs)) == KNOBS
    for spec in specs:
        assert with_knobs(spec, knobs_of(spec)) == spec


def test_a_section_with_variants_starts_anew_when_its_tag_changes_and_keeps_the_rest_when_it_does_not() -> None:
    spec = with_values(RunSpec(), {"entropy.method": "positive_reweighting", "entropy.target": 0.6, "entropy.floor": 0.1})
    assert isinstance(spec.entropy, PositiveReweighting)
    assert (spec.entropy.target, spec.entropy.floor, spec.entropy.step) == (0.6, 0.1, 0.05)
    again = with_values(spec, {"entropy.method": "positive_reweighting", "entropy.target": 0.4}).entropy
    assert isinstance(again, PositiveReweighting)
    assert (again.target, again.floor) == (0.4, 0.1)
    assert with_values(spec, {"entropy.method": "none"}) == RunSpec()
    assert with_values(spec, {"entropy.method": "bonus", "entropy.coefficient": 0.01}).entropy == Bonus(coefficient=0.01)


def test_a_section_with_variants_that_names_none_is_of_the_default_one_and_takes_no_field_of_another() -> None:
    assert RunSpec.model_validate({"advantage": {"normalise": "none"}}).advantage == Grpo(normalise="none")
    with pytest.raises(ValidationError, match="Extra inputs"):
        RunSpec.model_validate({"entropy": {"method": "bonus", "target": 0.2}})
    with pytest.raises(ValidationError, match="Extra inputs"):
        with_knobs(RunSpec(), {"entropy.target": 0.2})


def test_a_knob_change_leaves_the_rest_as_it_is() -> None:
    before = RunSpec(seed=5, clip=Clip(low=0.1, high=0.3))
    after = with_knobs(before, {"clip.high": 0.4, "staleness.max_lag": 5, "kv_policy": "keep"})
    assert (after.clip, after.staleness.max_lag, after.kv_policy) == (Clip(low=0.1, high=0.4), 5, KvPolicy.KEEP)
    assert with_knobs(after, {"clip.high": 0.3, "staleness.max_lag": 2, "kv_policy": "recompute"}) == before


def test_what_is_no_knob_is_named() -> None:
    with pytest.raises(ValueError, match=r"^seed, staleness: not a knob; knobs are advantage\.weight, clip\.high, clip\.low, "):
        with_knobs(RunSpec(), {"temperature": 0.5, "staleness": {"max_lag": 3}, "seed": 3})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"staleness.min_lag": 3}, r"staleness\.min_lag \(3\) is above staleness\.max_lag \(2\)"),
        ({"updates_per_batch": 3}, r"updates_per_batch \(3\) must divide batch_groups \(16\)"),
        ({"temperature": 0}, "greater than 0"),
        ({"clip.off": "perhaps"}, "valid boolean"),
    ],
)
def test_a_change_must_leave_a_valid_spec(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        with_knobs(RunSpec(), values)


def test_two_changes_that_hold_only_together_are_one() -> None:
    assert with_knobs(RunSpec(), {"staleness.min_lag": 5, "staleness.max_lag": 6}).staleness.min_lag == 5


def test_changes_hold_from_their_version_in_the_order_in_which_they_were_made() -> None:
    spec = RunSpec(temperature=1.0)
    changes = [
        KnobChange(version=3, values={"temperature": 0.5, "clip.low": 0.1}),
        KnobChange(version=3, values={"temperature": 0.6}),  # the later one of a version counts
        KnobChange(version=6, values={"clip.low": 0.2}),
    ]
    assert spec_at(spec, changes, 2) is spec
    assert [(s.temperature, s.clip.low) for s in (spec_at(spec, changes, v) for v in (3, 5, 6, 99))] == [
        (0.6, 0.1),
        (0.6, 0.1),
        (0.6, 0.2),
        (0.6, 0.2),
    ]


def test_changes_that_are_valid_only_together_hold_together() -> None:
    changes = [KnobChange(version=1, values={"staleness.max_lag": 6}), KnobChange(version=2, values={"staleness.min_lag": 4})]
    assert (spec_at(RunSpec(), changes, 2).staleness.min_lag, spec_at(RunSpec(), changes, 2).staleness.max_lag) == (4, 6)


def test_values_by_dotted_name() -> None:
    assert flatten({"clip": {"low": 0.1}, "a.b": 1, "rewards": [{"name": "math"}]}) == {"clip.low": 0.1, "a.b": 1, "rewards": [{"name": "math"}]}
    assert with_values(RunSpec(), {"data.options.min_target": 5}).data.options == {"min_target": 5}
    with pytest.raises(ValueError, match=r"rewards\.weight: rewards has no fields"):
        with_values(RunSpec(), {"rewards.weight": 2})
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        with_values(RunSpec(), {"clip.lower": 0.1})


def test_weights_travel_as_the_run_says_and_else_as_the_deployment_says() -> None:
    assert [RunSpec().weights.transport_where(deployed) for deployed in ("shm", "nccl")] == ["shm", "nccl"]
    assert with_values(RunSpec(), {"weights.transport": "gloo"}).weights.transport_where("nccl") == "gloo"
