import subprocess
import sys
import time

import pytest

from reward_server.rubric import Rubric
from reward_server.verifiers.verdict import Tools, Unjudged
from services.contracts.messages import Outcome, Score
from services.contracts.spec import RunSpec, Verifier


def right(judge, request):
    return "right"


def failing(outcome):
    def ask(judge, request):
        raise Unjudged(outcome, "because")

    return ask


def verifier(name, weight=1.0, **options):
    return Verifier(name=name, weight=weight, options=options)


def test_the_reward_is_the_weighted_sum_and_keeps_its_parts():
    rubric = Rubric((verifier("math", 2.0), verifier("format", 0.5, boxed=True), verifier("format", -0.25, pattern=".*42.*")), Tools(right))
    score = rubric.score(r"\boxed{42}", prompt="", answer="42")
    assert score.reward == 2.25
    assert [(part.verifier, part.weight, part.score, part.outcome) for part in score.parts] == [
        ("math", 2.0, 1.0, Outcome.OK),
        ("format", 0.5, 1.0, Outcome.OK),
        ("format", -0.25, 1.0, Outcome.OK),
    ]
    assert score.seconds >= 0
    assert rubric.score(r"\boxed{41}", prompt="", answer="42").reward == 0.5


@pytest.mark.parametrize("outcome", [Outcome.TIMEOUT, Outcome.LIMIT, Outcome.ERROR, Outcome.UNVERIFIABLE])
def test_one_failed_verifier_leaves_no_reward_but_the_other_parts(outcome):
    score = Rubric((verifier("format", boxed=True), verifier("math")), Tools(failing(outcome))).score(r"\boxed{x}", prompt="", answer="y")
    assert score.reward is None
    assert [part.score for part in score.parts] == [1.0, None]
    assert (score.parts[1].outcome, score.parts[1].detail) == (outcome, "because")


@pytest.mark.parametrize(("outcome", "reward"), [(Outcome.TIMEOUT, -0.5), (Outcome.LIMIT, -0.5), (Outcome.ERROR, None), (Outcome.UNVERIFIABLE, None)])
def test_timeout_score_speaks_for_time_and_memory_only(outcome, reward):
    score = Rubric((verifier("math", timeout_score=-0.5),), Tools(failing(outcome))).score(r"\boxed{x}", prompt="", answer="y")
    assert score.reward == reward
    assert score.parts[0].outcome is outcome


def test_a_verifier_that_raises_is_an_error_and_not_a_reward_of_0(caplog):
    def broken(judge, request):
        raise KeyError("a fault of ours")

    score = Rubric((verifier("math"),), Tools(broken)).score(r"\boxed{x}", prompt="", answer="y")
    assert (score.reward, score.parts[0].outcome, score.parts[0].detail) == (None, Outcome.ERROR, "KeyError in the verifier")
    assert score.parts[0].cause == "verifier"
    assert "the verifier math raised" in caplog.text


def test_a_rubric_of_unknown_verifiers_or_options_is_refused():
    with pytest.raises(ValueError, match="did you mean 'sum_to_target'"):
        Rubric((verifier("sum_to_traget"),), Tools(right))
    with pytest.raises(ValueError, match="Options are: none"):
        Rubric((verifier("sum_to_target", strict=True),), Tools(right))


def counting(asked, word="right"):
    def ask(judge, request):
        asked.append(judge)
        return word

    return Tools(ask)


def gated(name, gate, reward=0.0, weight=1.0, **options):
    return Verifier(name=name, gate=gate, gate_reward=reward, weight=weight, options=options)


def test_a_score_below_its_gate_decides_alone_and_spares_the_rest():
    asked = []
    rubric = Rubric((verifier("math"), gated("format", 1.0, -0.5, boxed=True)), counting(asked))
    failed = rubric.score("x", prompt="", answer="y")
    assert (failed.reward, asked) == (-0.5, [])
    assert [part.verifier for part in failed.parts] == ["format"]
    assert failed.parts[0].detail == "0 boxes; below its gate: the reward is -0.5"
    passed = rubric.score(r"\boxed{x}", prompt="", answer="y")
    assert (passed.reward, asked) == (2.0, ["math"])
    assert [part.verifier for part in passed.parts] == ["math", "format"]


def test_cheap_gates_come_before_those_of_judges():
    asked = []
    rubric = Rubric((gated("math", 1.0, -1.0), gated("format", 1.0, -0.5, boxed=True)), counting(asked, "wrong"))
    assert (rubric.score(r"\boxed{x}\boxed{x}", prompt="", answer="y").reward, asked) == (-0.5, [])
    assert (rubric.score(r"\boxed{x}", prompt="", answer="y").reward, asked) == (-1.0, ["math"])


def test_a_score_at_its_gate_passes():
    rubric = Rubric((gated("length", 0.5, -1.0, most=10, fade=10),), Tools(right))
    assert rubric.score("x" * 15, prompt="", answer=None).reward == 0.5
    assert rubric.score("x" * 16, prompt="", answer=None).reward == -1.0


def test_a_gate_that_could_not_be_judged_decides_nothing_but_another_may():
    broken = Tools(failing(Outcome.ERROR))
    rubric = Rubric((gated("math", 1.0), verifier("exact")), broken)
    score = rubric.score(r"\boxed{x}", prompt="", answer="y")
    assert (score.reward, [part.score for part in score.parts]) == (None, [None, 0.0])
    other = Rubric((gated("math", 1.0), gated("reasoning_gym", 1.0, -0.25, task="t")), broken)
    assert other.score(r"\boxed{x}", prompt="", answer="y").reward == -0.25


def test_parts_and_the_reward_are_held_within_their_bounds():
    three = Verifier(name="length", weight=2.0, least=0.25, most=0.75, options={"most": 10, "fade": 10})
    for length, part, reward in ((5, 0.75, 1.5), (15, 0.5, 1.0), (100, 0.25, 0.5)):
        score = Rubric((three,), Tools(right)).score("x" * length, prompt="", answer=None)
        assert (score.parts[0].score, score.reward) == (part, reward)
    assert Rubric((three,), Tools(right), least=0.75, most=1.25).score("x", prompt="", answer=None).reward == 1.25
    assert Rubric((three,), Tools(right), least=0.75, most=1.25).score("x" * 100, prompt="", answer=None).reward == 0.75
    with pytest.raises(ValueError, match="above most"):
        Verifier(name="length", least=1.0, most=0.0)
    with pytest.raises(ValueError, match="above reward_most"):
        RunSpec(reward_least=1.0, reward_most=0.0)


def test_a_part_says_outcome_cause_tier_and_seconds():
    def ask(judge, request):
        raise Unjudged(Outcome.LIMIT, "because", cause="memory", tier="landlock")

    (part,) = Rubric((verifier("math"),), Tools(ask)).score(r"\boxed{x}", prompt="", answer="y").parts
    assert (part.said, part.tier, part.detail, part.seconds > 0) == ("limit:memory", "landlock", "because", True)


@pytest.mark.parametrize("figure", [1e10, -1e300, float("inf"), float("nan")])
def test_a_score_beyond_all_bounds_is_a_fault_and_no_reward(figure):
    tools = Tools(right, post=lambda url, body, *, seconds, attempts: b'{"score": %s}' % repr(figure).encode())
    score = Rubric((Verifier(name="remote", most=1.0, options={"url": "http://a"}),), tools).score("x", prompt="", answer="y")
    assert (score.reward, score.parts[0].outcome) == (None, Outcome.ERROR)


def test_no_weights_and_scores_overflow():
    tools = Tools(right, post=lambda url, body, *, seconds, attempts: b'{"score": 1e9}')
    heaviest = Verifier(name="remote", weight=1e6, options={"url": "http://a"})
    assert Rubric((heaviest,) * 64, tools).score("x", prompt="", answer="y").reward == 6.4e16
    with pytest.raises(ValueError, match="less than or equal to 1000000"):
        Verifier(name="math", weight=1e300)


def test_details_are_bounded_and_valid_unicode_wherever_they_come_from():
    def wordy(judge, request):
        raise Unjudged(Outcome.ERROR, "\ud800" * 5000, cause="library")

    (part,) = Rubric((verifier("math"),), Tools(wordy)).score(r"\boxed{x}", prompt="", answer="y").parts
    assert part.detail == "\\ud800" * 2000
    assert part.model_dump_json()


def test_a_judge_that_says_what_it_should_not_is_an_error_and_no_wrong_answer():
    (part,) = Rubric((verifier("math"),), Tools(lambda judge, request: "perhaps")).score(r"\boxed{x}", prompt="", answer="y").parts
    assert (part.score, part.said) == (None, "error:verifier")


BAD = {
    "empty": "",
    "nul": "\x00" * 100,
    "surrogates": "\ud800\\boxed{\udfff}<answer>\ud800</answer>",
    "megabytes": "a" * 3_000_000,
    "megabytes of digits": "1" * 3_000_000,
    "ten thousand boxes": "\\boxed{1}" * 10_000,
    "open boxes": "\\boxed{" * 100_000,
    "open tags": "<answer>" * 100_000,
    "dollars": "$" * 100_000,
    "thinking": "<think>" * 100_000,
    "control": "\x1b[2J\r\n\u202e",
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("answer", ["5", None, {"answer": "5", "metadata": {"source_dataset": "chain_sum"}}])
def test_bad_model_output_has_a_clear_outcome_and_costs_little(name, answer):
    rubric = Rubric(
        (
            verifier("math", extract="last"),
            verifier("sum_to_target"),
            verifier("reasoning_gym"),
            verifier("code"),
            verifier("regex"),
            verifier("length", most=10, fade=10),
            verifier("exact"),
            verifier("instructions"),
            verifier("format", boxed=True),
            verifier("format", pattern=r"(<think>.*</think>)?.*\\boxed\{.*\}", timeout_score=0),
        ),
        Tools(lambda judge, request: 0.0 if judge == "reasoning_gym" else "wrong"),
    )
    began = time.process_time()
    score = rubric.score(BAD[name], prompt="", answer=answer)
    assert time.process_time() - began < 2
    assert score == Score.model_validate_json(score.model_dump_json())
    for part in score.parts:
        assert part.outcome in (Outcome.OK, Outcome.UNVERIFIABLE, Outcome.TIMEOUT)
        assert (part.score is None) == (part.outcome is Outcome.UNVERIFIABLE)
        assert part.detail
    judged = {"5": {"math", "sum_to_target", "exact", "regex"}, None: set()}.get(
        answer if not isinstance(answer, dict) else 0, {"math", "reasoning_gym"}
    )
    assert {part.verifier for part in score.parts if part.outcome is Outcome.OK} - {"format", "length"} == judged


def test_the_server_imports_without_torch_or_the_judges_libraries():
    code = (
        "import reward_server.rubric, reward_server.judges.pool, sys; print(*({'torch', 'sympy', 'math_verify', 'reasoning_gym'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
