import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.contracts.algorithms import Bonus, EntropyControl, NoControl, OneSign, PositiveReweighting
from services.contracts.measures import STEP_KEYS
from services.contracts.problems import explained
from services.contracts.spec import RunSpec
from services.contracts.study import CONTROL_KEYS, Arm, Budget, StudySpec, metric_parts, own_overrides
from services.contracts.topics import StudyKeys
from trainer.control import entropy
from trainer.control.actuators import Progress, Reading

STUDIES = Path(__file__).resolve().parents[2] / "deploy" / "studies"
SET = {"name": "in", "data": {"source": "sum_to_target"}}


def tree(**changes: Any) -> dict[str, Any]:
    return {
        "name": "s", "seeds": [0, 1, 2, 3, 4], "budget": {"rollouts": 1280}, "base": {"evaluation": {"sets": [SET]}},
        "arms": [{"name": "n1"}, {"name": "n4", "set": {"updates_per_batch": 4}}],
        "claims": [{"id": "F1", "text": "less", "metric": "steps.entropy_nats.end", "arms": ["n1", "n4"], "direction": "greater"}],
    } | changes  # fmt: skip


def study(**changes: Any) -> StudySpec:
    return StudySpec.model_validate(tree(**changes))


def with_arms(*arms: dict[str, Any]) -> StudySpec:
    return study(arms=list(arms), claims=[])


def claim(**changes: Any) -> dict[str, Any]:
    return tree()["claims"][0] | changes


def faults(**changes: Any) -> dict[str, str]:
    """What is wrong with the study, by field."""
    with pytest.raises(ValidationError) as error:
        study(**changes)
    return dict(explained(error.value, StudySpec))


# -- arms -----------------------------------------------------------------------------------------------------------------------------------


def test_an_arm_is_the_base_with_its_overrides():
    spec = study(base={"clip": {"low": 0.1}, "evaluation": {"sets": [SET]}})
    assert spec.run("n1", 3).updates_per_batch == 1
    run = spec.run("n4", 3)
    assert (run.updates_per_batch, run.clip.low, run.seed, run.name) == (4, 0.1, 3, "s-n4-3")
    assert run.labels == {"study": "s", "arm": "n4", "seed": "3"}
    assert RunSpec.model_validate(run.model_dump(mode="json")) == run


def test_the_runs_of_a_seed_differ_in_nothing_but_the_arm():
    spec = study()
    for seed in spec.seeds:
        one, other = (spec.run(arm, seed).model_dump(exclude={"name", "labels", "updates_per_batch"}) for arm in ("n1", "n4"))
        assert one == other


def test_overrides_may_be_dotted_or_nested():
    dotted, nested = ({"clip.high": 0.28, "staleness.max_lag": 4}, {"clip": {"high": 0.28}, "staleness": {"max_lag": 4}})
    spec = with_arms({"name": "a", "set": dotted}, {"name": "b", "set": nested})
    assert spec.overrides("a") == spec.overrides("b") == dotted


def test_an_arm_like_another_starts_from_its_overrides_and_its_own_count_last():
    spec = with_arms(
        {"name": "a", "set": {"updates_per_batch": 4, "clip": {"high": 0.3}}},
        {"name": "b", "like": "a", "set": {"clip": {"low": 0.1}}},
        {"name": "c", "like": "b", "set": {"clip.high": 0.5}},
    )
    run = spec.run("c", 0)
    assert (run.updates_per_batch, run.clip.low, run.clip.high) == (4, 0.1, 0.5)


def test_another_variant_starts_a_section_anew():
    spec = with_arms(
        {"name": "a", "set": {"entropy": {"method": "one_sign", "sign": "negative"}}},
        {"name": "b", "like": "a", "set": {"entropy": {"method": "bonus", "coefficient": 0.1}}},
        {"name": "c", "like": "b", "set": {"entropy.coefficient": 0.2}},
        {"name": "d", "like": "c", "set": {"entropy.method": "none"}},
    )
    controls = [spec.run(arm, 0).entropy for arm in "abcd"]
    assert controls == [OneSign(sign="negative"), Bonus(coefficient=0.1), Bonus(coefficient=0.2), NoControl()]


def test_an_arm_may_be_like_a_later_one():
    assert with_arms({"name": "a", "like": "b"}, {"name": "b", "set": {"updates_per_batch": 2}}).run("a", 0).updates_per_batch == 2


# -- budgets --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "updates_per_batch", "versions"),
    [
        ({"rollouts": 1280}, 1, 10),
        ({"rollouts": 1281}, 1, 11),
        ({"rollouts": 1}, 1, 1),
        ({"updates": 40}, 1, 40),
        ({"updates": 40}, 4, 10),
        ({"updates": 41}, 4, 11),
        ({"rollouts": 1280, "updates": 20}, 4, 5),
        ({"rollouts": 1280, "updates": 400}, 4, 10),
    ],
)
def test_a_budget_pays_for_versions(budget: dict[str, int], updates_per_batch: int, versions: int):
    assert Budget(**budget).versions(RunSpec(updates_per_batch=updates_per_batch)) == versions


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from([1, 2, 4, 8, 16]))
def test_of_two_budgets_the_one_that_ends_first_counts(rollouts: int, updates: int, per_batch: int):
    spec = RunSpec(updates_per_batch=per_batch)
    both = Budget(rollouts=rollouts, updates=updates).versions(spec)
    assert both == min(Budget(rollouts=rollouts).versions(spec), Budget(updates=updates).versions(spec))
    assert (both - 1) * spec.batch_groups * spec.group_size < rollouts
    assert (both - 1) * per_batch < updates


def test_an_arms_own_budget_goes_before_the_studys_and_is_not_inherited():
    spec = with_arms({"name": "a", "budget": {"updates": 3}}, {"name": "b", "like": "a"})
    assert (spec.run("a", 0).versions, spec.run("b", 0).versions) == (3, 10)


# -- what is refused ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"budget": {"rollouts": 0}}, "budget.rollouts", "greater than or equal to 1 (got 0)"),
        ({"budget": {"updates": 0}}, "budget.updates", "greater than or equal to 1 (got 0)"),
        ({"budget": {}}, "budget", "without a budget no run would end"),
        ({"seeds": []}, "seeds", "at least 1 item"),
        ({"seeds": [0, 1, 0]}, "seeds", "0 given twice"),
        ({"seeds": [-1]}, "seeds.0", "greater than or equal to 0"),
        ({"arms": []}, "arms", "at least 1 item"),
        ({"arms": [{"name": "n1"}, {"name": "n1"}]}, "arms", "n1 given twice"),
        ({"arms": [{"name": "no good"}]}, "arms.0.name", "pattern"),
        ({"arms": [{"name": "n1", "like": "n9"}]}, "arms.n1.like", "there is no arm 'n9'; there are n1"),
        ({"arms": [{"name": "n1", "set": {"clip.high": 0.3, "clip": {"high": 0.2}}}]}, "arms.n1.set", "clip.high is in conflict with itself"),
        ({"arms": [{"name": "n1", "set": {"clip": 1, "clip.high": 0.2}}]}, "arms.n1.set", "clip.high is in conflict with clip"),
        ({"arms": [{"name": "n1", "set": {"clip.hihg": 0.3}}]}, "arms.n1.set.clip.hihg", "did you mean 'high'?"),
        ({"arms": [{"name": "n1", "set": {"clip.high": -1}}]}, "arms.n1.set.clip.high", "greater than or equal to 0 (got -1)"),
        ({"arms": [{"name": "n1", "set": {"entropy.method": "bonsu"}}]}, "arms.n1.set.entropy.method", "did you mean 'bonus'?"),
        ({"arms": [{"name": "n1", "set": {"updates_per_batch": 3}}]}, "arms.n1.set", "must divide batch_groups"),
        ({"arms": [{"name": "n1", "set": {"seed": 3}}]}, "arms.n1.set.seed", "the study's seeds decide it"),
        ({"arms": [{"name": "n1", "set": {"versions": 3}}]}, "arms.n1.set.versions", "give the arm its own"),
        ({"arms": [{"name": "n1", "set": {"labels": {"arm": "x"}}}]}, "arms.n1.set.labels.arm", "the study sets it"),
        ({"base": {"versions": 9}}, "base.versions", "the budget decides it"),
        ({"base": {"leaning_rate": 1}}, "base.leaning_rate", "did you mean 'learning_rate'?"),
        ({"base": {"loss": {"kind": "gspo", "dual_clip": 3}}}, "base.loss.dual_clip", "There are: normaliser, kind, low, high"),
        ({"base": {"staleness": {"min_lag": 3, "max_lag": 1}}}, "base.staleness", "lower min_lag or raise max_lag"),
        ({"armz": []}, "armz", "did you mean 'arms'?"),
        ({"name": ""}, "name", "at least 1 character"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_with_the_field(changes: dict[str, Any], field: str, said: str):
    found = faults(**{"claims": []} | changes)
    assert list(found) == [field]
    assert said in found[field]


def test_arms_that_are_like_each_other_in_a_circle_are_refused():
    found = faults(arms=[{"name": "a", "like": "b"}, {"name": "b", "like": "a"}], claims=[])
    assert found["arms.a.like"] == "a -> b -> a goes round in a circle"


def test_all_arms_that_are_wrong_are_named_at_once():
    found = faults(arms=[{"name": "a", "set": {"clip.low": 2}}, {"name": "b", "like": "z"}, {"name": "c"}], claims=[])
    assert set(found) == {"arms.a.set.clip.low", "arms.b.like"}


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"arms": ["n1", "n9"]}, "claims.F1.arms", "there is no arm n9; there are n1, n4"),
        ({"arms": ["n1"]}, "claims.0", "takes 2 arms, not 1"),
        ({"arms": ["n1", "n4"], "statistic": "interaction"}, "claims.0", "takes 4 arms, not 2"),
        ({"metric": "steps.entrpy_nats.end"}, "claims.F1.metric", "no step measures 'entrpy_nats'"),
        ({"metric": "steps.entropy_nats/lag/9.end"}, "claims.F1.metric", "no step measures"),
        ({"metric": "steps.entropy_nats.ende"}, "claims.F1.metric", "no reducer 'ende'; there are first, end"),
        ({"metric": "entropy_nats"}, "claims.F1.metric", "write steps.KEY.REDUCER, evaluation.SET.KEY.REDUCER or run.KEY"),
        ({"metric": "evaluation.out.reward_mean.end"}, "claims.F1.metric", "the runs of arm 'n1' have no evaluation set 'out'; they have in"),
        ({"metric": "evaluation.in.reward.end"}, "claims.F1.metric", "no evaluation measures 'reward'"),
        ({"metric": "evaluation.in.pass_at_32.end"}, "claims.F1.metric", "'n1' have 16 samples of each prompt of 'in', too few for pass_at_32"),
        ({"metric": "steps.prompt_entropy_out_nats.end"}, "claims.F1.metric", "an evaluation set of the domain 'out'"),
        ({"metric": "run.half_life"}, "claims.F1.metric", "a run has no 'half_life'"),
        ({"minus": "steps.nothing.end"}, "claims.F1.minus", "no step measures 'nothing'"),
        ({"against": "steps.reward_mean.end"}, "claims.0", "`against` belongs to the statistic `spearman`"),
        ({"statistic": "spearman", "arms": []}, "claims.0", "`against` belongs to the statistic `spearman`, which needs it"),
        (
            {"statistic": "spearman", "against": "steps.reward_mean.end", "arms": ["n1", "n4"]},
            "claims.0", "a rank correlation over 2 of the arms says nothing",
        ),
        ({"direction": "within"}, "claims.0", "the direction `within` needs low < high"),
        ({"direction": "within", "low": 2.0, "high": 1.0}, "claims.0", "needs low < high"),
        ({"direction": "up"}, "claims.0.direction", "'greater', 'less', 'within' or 'two-sided'"),
    ],
)  # fmt: skip
def test_a_claim_that_cannot_be_decided_is_refused_with_the_field(changes: dict[str, Any], field: str, said: str):
    found = faults(claims=[claim(**changes)])
    assert list(found) == [field]
    assert said in found[field]


@pytest.mark.parametrize(
    ("switch", "metric"),
    [
        ("prompt_entropy_every", "steps.prompt_entropy_in_nats.end"),
        ("probe_tokens", "steps.entropy_change_realised.mean"),
        ("probe_tokens", "steps.kl_step_k3_nats.mean"),
        ("probe_tokens", "run.budget_slope"),
    ],
)
def test_a_claim_on_what_an_arm_has_switched_off_is_refused(switch: str, metric: str):
    assert study(claims=[claim(metric=metric)])
    arms = [{"name": "n1"}, {"name": "n4", "set": {f"measure.{switch}": 0}}]
    assert (
        f"the runs of arm 'n4' do not measure it: it needs measure.{switch} above 0"
        in faults(arms=arms, claims=[claim(metric=metric)])["claims.F1.metric"]
    )


@pytest.mark.parametrize(
    ("key", "has", "has_not"),
    [
        ("control_weight", {"method": "positive_reweighting", "schedule": "stage"}, {"method": "bonus"}),
        ("control_guard", {"method": "positive_reweighting"}, {"method": "positive_reweighting", "guard": False}),
        ("control_guard", {"method": "positive_reweighting"}, {"method": "positive_reweighting", "schedule": "stage"}),
        ("control_coefficient", {"method": "bonus"}, {"method": "positive_reweighting"}),
        ("control_target_nats", {"method": "adaptive_regularisation"}, {"method": "bonus"}),
        ("control_error_nats", {"method": "entropic"}, {"method": "positive_reweighting", "schedule": "stage"}),
    ],
)
def test_a_claim_on_a_controller_that_an_arm_has_not_is_refused(key: str, has: dict[str, Any], has_not: dict[str, Any]):
    on_it = claim(metric=f"steps.{key}.mean")
    assert study(arms=[{"name": name, "set": {"entropy": has}} for name in ("n1", "n4")], claims=[on_it])
    arms = [{"name": "n1", "set": {"entropy": has}}, {"name": "n4", "set": {"entropy": has_not}}]
    assert f"the runs of arm 'n4' do not have it: entropy.method {has_not['method']!r}" in faults(arms=arms, claims=[on_it])["claims.F1.metric"]


@pytest.mark.parametrize(
    "settings",
    [*(variant() for variant in get_args(get_args(EntropyControl)[0])), PositiveReweighting(schedule="stage"), PositiveReweighting(guard=False)],
)
def test_a_claim_may_be_on_what_the_controllers_show(settings: EntropyControl):
    state = entropy.update(settings, entropy.start(settings), Reading(version=0, entropy=1.0, lag=0.0, reward=0.5))
    shown = entropy.shown(settings, state, Progress(version=1, versions=10, epoch=1, epochs=1))
    assert shown.keys() == {key for key, has in CONTROL_KEYS.items() if has(settings)}
    assert set(CONTROL_KEYS) == {key for key in STEP_KEYS if key.startswith("control_")}


@pytest.mark.parametrize("key", ["staleness_target", "staleness_wish_versions"])
def test_a_claim_on_a_staleness_loop_that_an_arm_has_not_is_refused(key: str):
    loop = {"staleness": {"min_lag": 0, "target": {"value": 0.01}}}
    on_it = claim(metric=f"steps.{key}.mean")
    assert study(arms=[{"name": name, "set": loop} for name in ("n1", "n4")], claims=[on_it])
    assert "they have no staleness.target" in faults(arms=[{"name": "n1", "set": loop}, {"name": "n4"}], claims=[on_it])["claims.F1.metric"]


def test_a_claim_on_all_arms_needs_three_that_have_all_it_names():
    arms: list[dict[str, Any]] = [{"name": f"n{at}", "set": {"clip.high": 0.2 + at / 10}} for at in range(4)]
    on_all = claim(statistic="spearman", metric="steps.entropy_nats.end", against="steps.entropy_change_realised.mean", arms=[])
    arms[0]["set"]["measure.probe_tokens"] = 0
    assert study(arms=arms, claims=[on_all])
    arms[2]["set"]["measure.probe_tokens"] = 0
    said = faults(arms=arms, claims=[on_all])
    assert list(said) == ["claims.F1.against"]
    assert "needs 3, and 2 of 4 have what the claim names: the runs of arm 'n0' do not measure it" in said["claims.F1.against"]
    assert "and 2 of 2 have" in faults(arms=arms[:2], claims=[on_all | {"against": "steps.reward_mean.end"}])["claims.F1.metric"]


def test_an_evaluation_set_counts_in_the_arms_that_a_claim_names():
    arms = [{"name": "n1"}, {"name": "n4", "set": {"evaluation": {"sets": [SET | {"name": "other"}]}}}]
    on_other = {"metric": "evaluation.other.reward_mean.end", "statistic": "level"}
    assert study(arms=arms, claims=[claim(**on_other, arms=["n4"])])
    assert "arm 'n1' have no evaluation set 'other'" in faults(arms=arms, claims=[claim(**on_other, arms=["n1"])])["claims.F1.metric"]


@pytest.mark.parametrize(
    ("metric", "parts"),
    [
        ("steps.entropy_nats.end", ["steps", "entropy_nats", "end"]),
        ("steps.entropy_nats/lag/2-3.mean", ["steps", "entropy_nats/lag/2-3", "mean"]),
        ("steps.entropy_nats.at_kl_50m", ["steps", "entropy_nats", "at_kl_50m"]),
        ("evaluation.in.pass_at_8.change", ["evaluation", "in", "pass_at_8", "change"]),
        ("run.budget_slope", ["run", "budget_slope"]),
    ],
)
def test_the_grammar_of_metrics(metric: str, parts: list[str]):
    assert metric_parts(metric) == parts


# -- what is warned of ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "said"),
    [([7], "no effect has an interval"), ([0, 1], "there are 2, with which no claim is decided"), ([0, 1, 2], "p cannot be below 0.05")],
)
def test_few_seeds_are_warned_of_and_run_all_the_same(seeds: list[int], said: str):
    (warning,) = study(seeds=seeds).warnings
    assert warning.startswith("seeds: ")
    assert said in warning


def test_five_seeds_need_no_warning():
    assert study().warnings == ()


def test_arms_that_are_the_same_run_are_warned_of():
    spec = with_arms({"name": "a"}, {"name": "b", "set": {"updates_per_batch": 1}}, {"name": "c", "set": {"updates_per_batch": 2}})
    assert spec.warnings == ("arms: a and b are the same run under different names",)


# -- cells, ids and parts of a study --------------------------------------------------------------------------------------------------------


def test_the_runs_are_ordered_seed_by_seed():
    assert study(seeds=[5, 3]).cells() == [("n1", 5), ("n4", 5), ("n1", 3), ("n4", 3)]


def test_each_run_of_each_study_has_an_id_of_its_own():
    arms, keys = ("a", "a.1", "a-1", "1", "a.1.1"), StudyKeys("s-20261122-104501-3f9a")
    ids = [keys.run_id(arm, seed) for arm in arms for seed in (0, 1, 11)]
    assert len(set(ids)) == len(ids)


def test_a_study_of_some_arms_keeps_their_overrides_and_the_claims_on_them():
    arms = [{"name": "a", "set": {"clip.high": 0.3}}, {"name": "b", "like": "a", "set": {"updates_per_batch": 2}}, {"name": "c", "like": "b"}]
    claims = [claim(id=name, arms=list(of)) for name, of in (("F1", "ab"), ("F2", "bc"))]
    claims.append(claim(id="F3", statistic="spearman", against="steps.reward_mean.end", arms=[]))
    spec = study(arms=arms, claims=claims)
    fewer = spec.narrowed(arms=["b", "c"])
    assert [arm.name for arm in fewer.arms] == ["b", "c"]
    assert [one.id for one in fewer.claims] == ["F2"], "a rank correlation over two arms says nothing"
    assert spec.narrowed(arms=["a", "b", "c"]) == spec
    assert fewer.arm("b") == Arm(name="b", set={"clip.high": 0.3, "updates_per_batch": 2})
    assert all(fewer.run(arm, 1) == spec.run(arm, 1) for arm in ("b", "c"))


def test_a_study_of_fewer_or_more_seeds():
    spec = study(seeds=[4, 0])
    assert spec.narrowed(seeds=1).seeds == (4,)
    assert spec.narrowed(seeds=5).seeds == (4, 0, 1, 2, 3)
    assert spec.narrowed() == spec


def test_an_arm_that_is_not_there_cannot_be_chosen():
    with pytest.raises(ValueError, match="there is no arm n9; there are n1, n4"):
        study().narrowed(arms=["n1", "n9"])


def test_a_study_survives_the_wire():
    spec = study(seeds=[0])
    assert spec.run("n4", 0).updates_per_batch == 4
    assert StudySpec.model_validate_json(spec.model_dump_json()) == spec


@given(st.dictionaries(st.sampled_from(["clip.low", "clip.high", "updates_per_batch"]), st.integers(0, 9)))
def test_dotted_and_nested_overrides_are_the_same(values: dict[str, int]):
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, _, field = name.partition(".")
        if field:
            nested.setdefault(section, {})[field] = value
        else:
            nested[section] = value
    assert own_overrides(nested) == own_overrides(values) == values


# -- the studies that ship ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_study_file_is_a_valid_study(path: Path):
    spec = StudySpec.model_validate(tomllib.loads(path.read_text()))
    assert spec.claims
    assert {name for one in spec.claims for name in one.arms} <= {arm.name for arm in spec.arms}
    assert not [warning for warning in spec.warnings if warning.startswith("arms: ")]


def test_the_smoke_study_is_small():
    spec = StudySpec.model_validate(tomllib.loads((STUDIES / "smoke.toml").read_text()))
    assert (len(spec.arms), len(spec.seeds)) == (3, 2)
    assert {spec.run(*cell).versions for cell in spec.cells()} == {20}
    assert [one.domain for one in spec.run("n1", 0).evaluation.sets] == ["in", "out"]
    assert spec.run("n4-positive", 0).entropy == OneSign(sign="positive")


def test_the_study_for_a_gpu_host_is_the_papers_at_its_size():
    spec = StudySpec.model_validate(tomllib.loads((STUDIES / "paper-1.5b.toml").read_text()))
    run = spec.run("n1", 0)
    assert (run.model.path, run.model.dtype, run.data.source) == ("Qwen/Qwen2.5-Math-1.5B", "bfloat16", "huggingface")
    assert (run.batch_groups, run.group_size, run.learning_rate, run.versions) == (64, 8, 1e-6, 150)
    assert [verifier.name for verifier in run.rewards] == ["math"]
    assert [spec.run(arm, 0).updates_per_batch for arm in ("n1", "n2", "n4", "n8")] == [1, 2, 4, 8]
    assert spec.run("n4-equal-updates", 0).versions * 4 == pytest.approx(spec.run("n1", 0).versions, abs=4)
    assert {one.id.split(".")[0] for one in spec.claims} == {"F1", "F1b", *(f"F{n}" for n in range(2, 18))}
    falls = next(one for one in spec.claims if one.id == "F13.pass-k")
    assert (falls.direction, falls.metric) == ("less", "evaluation.math500.pass_at_8.change")
    assert next(one.samples for one in run.evaluation.sets if one.name == "math500") >= 2 * 8, "of fewer samples pass@8 is mostly noise"
