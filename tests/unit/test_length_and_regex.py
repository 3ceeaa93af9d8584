"""The verifiers `length`, `regex` and `verifiers`, and the examples of all."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from reward_server.rubric import Rubric
from reward_server.verifiers import VERIFIERS, check_options, library_rubric
from reward_server.verifiers.verdict import Tools, Unjudged, Verdict
from services.contracts.messages import Outcome
from services.contracts.spec import Verifier
from tests.unit.fake_sandbox import FakeSandbox


def no_judge(judge, request):
    raise AssertionError(f"{judge} was asked {request}")


def score(verifier, text, answer=None, *, prompt="", tools=None, **options):
    return VERIFIERS[verifier].score(text, prompt=prompt, answer=answer, options=check_options(verifier, options), tools=tools or Tools(no_judge))


# length


@pytest.mark.parametrize(
    ("length", "value"), [(0, 0.0), (5, 0.5), (9, 0.9), (10, 1.0), (15, 1.0), (20, 1.0), (21, 0.9), (25, 0.5), (30, 0.0), (3_000_000, 0.0)]
)
def test_length_scores_1_in_the_window_and_falls_beyond_it(length, value):
    assert score("length", "x" * length, least=10, most=20, fade=10) == Verdict(pytest.approx(value), detail=f"{length} characters")
    assert score("length", "x" * length, least=10, most=20).score == float(10 <= length <= 20)


def test_length_counts_what_it_is_told_to(tmp_path):
    text = "<think>one two three</think>four five"
    assert score("length", text, unit="words", most=4).detail == "4 words"
    assert score("length", text, unit="words", part="answer").detail == "2 words"
    assert score("length", text, unit="words", part="thinking").detail == "3 words"
    assert score("length", "a b</think>c", prompt="<think>", unit="words", part="thinking").detail == "2 words"
    assert score("length", "a b", unit="words", part="thinking").detail == "0 words"
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert score("length", "one, \ud800 two", unit="tokens", tokenizer=str(path)).detail == "4 tokens"
    with pytest.raises(Unjudged, match="no tokenizer") as failure:
        score("length", "a", unit="tokens", tokenizer=str(tmp_path / "elsewhere"))
    assert failure.value.outcome is Outcome.ERROR


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"least": 3, "most": 2}, "above most"),
        ({"unit": "tokens"}, "give a tokenizer"),
        ({"tokenizer": "x"}, "give a tokenizer"),
        ({"least": -1}, "least"),
    ],
)
def test_length_refuses_windows_that_make_no_sense(options, why):
    with pytest.raises(ValueError, match=why):
        check_options("length", options)


# regex


@pytest.mark.parametrize(
    ("text", "answer", "options", "value"),
    [
        ("the cat sat", "c.t", {}, 1.0),
        ("the dog sat", "c.t", {}, 0.0),
        ("the cat sat", "c.t", {"match": "whole"}, 0.0),
        ("a\nb", "a.b", {"match": "whole"}, 1.0),
        ("CAT", "cat", {}, 0.0),
        ("CAT", "cat", {"ignore_case": True}, 1.0),
        ("<think>cat</think>dog", "cat", {}, 0.0),
        ("<think>cat</think>dog", "cat", {"thinking": True}, 1.0),
        ("cat", None, {"pattern": "cat"}, 1.0),
        ("x = 1, x = 42", "42", {"pattern": r"x = (\d+)", "captures_answer": True}, 1.0),
        ("x = 42, x = 1", "42", {"pattern": r"x = (\d+)", "captures_answer": True}, 0.0),
        ("x = 42", 42, {"pattern": r"x = (\d+)", "captures_answer": True}, 1.0),
        ("x is: Paris ", "paris", {"pattern": "IS:(.*)", "captures_answer": True, "ignore_case": True}, 1.0),
        ("y", "42", {"pattern": r"x = (\d+)|y", "captures_answer": True}, 0.0),
        ("", "", {}, 1.0),
        ("\x00\ud800", "\\x00", {}, 1.0),
    ],
)
def test_regex_is_found_or_captures_the_answer(text, answer, options, value):
    verdict = score("regex", text, answer, **options)
    assert (verdict.score, verdict.outcome) == (value, Outcome.OK)


@pytest.mark.parametrize(
    ("answer", "options"), [("(", {}), (None, {}), (5, {}), ("a" * 20_000, {}), (None, {"pattern": "(a)", "captures_answer": True})]
)
def test_regex_without_a_usable_answer_is_unverifiable(answer, options):
    assert score("regex", "a", answer, **options)[:2] == (None, Outcome.UNVERIFIABLE)


SLOW = "(a|aa|x|xx)*c|(x?){40}q(x*)*$"


@pytest.mark.parametrize("options", [{}, {"pattern": SLOW, "captures_answer": True}])
def test_a_pattern_that_takes_too_long_is_a_timeout_and_no_score(options):
    with pytest.raises(Unjudged) as failure:
        score("regex", "x" * 60 + "z", SLOW, **options)
    assert failure.value.outcome is Outcome.TIMEOUT


def test_regex_refuses_options_that_make_no_sense():
    with pytest.raises(ValueError, match="not a regular expression"):
        check_options("regex", {"pattern": "("})
    for options in ({"captures_answer": True}, {"captures_answer": True, "pattern": "a"}):
        with pytest.raises(ValueError, match="needs a pattern with a group"):
            check_options("regex", options)


# the library `verifiers`, of which a small copy stands in: what it is asked and gives is its own

LIBRARY = {
    "verifiers/__init__.py": """
        import importlib
        def __getattr__(name):
            return importlib.import_module('verifiers.envs').SingleTurnEnv
    """,
    "verifiers/envs.py": "import tempfile\ntempfile.gettempdir()\nclass SingleTurnEnv:\n    pass\n",
    "verifiers/types.py": "class State(dict):\n    pass\n",
    "verifiers/utils/__init__.py": "",
    "verifiers/utils/env_utils.py": """
        import logging
        import tempfile
        class Rubric:
            async def score_rollout(self, state):
                if state['answer'] is None or state['answer'] == 'raise':
                    raise RuntimeError('no')
                try:
                    reward = float(state['completion'][-1]['content'].count(state['answer']))
                except TypeError as error:
                    logging.getLogger('verifiers.rubrics.rubric.Rubric').error('Error calling reward function: %s', error)
                    reward = 0.0
                state['reward'], state['metrics'] = reward * state['info'].get('weight', 1), {'count': reward}
        class Environment:
            rubric = Rubric()
        def load_environment(env_id="mine", **args):
            if env_id == 'gone':
                raise ImportError('not there')
            tempfile.gettempdir()
            return Environment()
    """,
}
ASK = """
import json, resource, sys
from reward_server.verifiers import library_rubric
library_rubric._warm()
assert "verifiers.envs" in sys.modules, "what every environment needs is imported before workers are forked"
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # as in a worker
print(json.dumps([library_rubric._decide(request) for request in json.load(sys.stdin)]))
"""


def asked(tmp_path, *requests):
    for name, source in LIBRARY.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    done = subprocess.run(
        [sys.executable, "-c", ASK], input=json.dumps(requests), env={**os.environ, "PYTHONPATH": f"{tmp_path}:."}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_environments_rubric_judges_and_its_faults_are_no_zeros(tmp_path):
    def request(answer, environment="mine", info=None):
        return {
            "environment": environment, "args": {}, "prompt": "?", "completion": "a b a", "row": {"answer": answer, "info": info or {}},
        }  # fmt: skip

    replies = asked(
        tmp_path,
        request("a"),
        request("a", info={"weight": 0.5}),
        request(None),
        request("raise"),
        request("a", environment="gone"),
        request("b", environment="verifiers.utils.env_utils:load_environment"),
        request({"no": "text"}),
    )
    assert replies[0] == {"reward": 2.0, "metrics": {"count": 2.0}}
    assert replies[1]["reward"] == 1.0
    assert replies[2] == "the rubric raised RuntimeError: no"
    assert replies[3] == "the rubric raised RuntimeError: no"
    assert replies[4] == "the environment 'gone' cannot be loaded: ImportError: not there"
    assert replies[5]["reward"] == 1.0
    assert replies[6].startswith("a reward function raised: Error calling reward function")


def test_the_library_is_asked_with_the_row_and_its_word_is_the_score(monkeypatch):
    requests = []

    def ask(judge, request):
        requests.append((judge, request))
        return {"reward": 0.75, "metrics": {}} if request["row"]["answer"] == "4" else "the rubric raised"

    monkeypatch.setattr(library_rubric, "installed", lambda: True)
    row = {"answer": "4", "info": {"level": 3}}
    assert score("verifiers", "4", row, prompt="2+2", environment="sums", args={"n": 1}, tools=Tools(ask)).score == 0.75
    assert score("verifiers", "4", "4", environment="sums", tools=Tools(ask)).score == 0.75
    assert requests[0] == ("verifiers", {"environment": "sums", "args": {"n": 1}, "prompt": "2+2", "completion": "4", "row": row})
    assert requests[1][1]["row"] == {"answer": "4", "info": {}}
    with pytest.raises(Unjudged) as failure:
        score("verifiers", "4", "5", environment="sums", tools=Tools(ask))
    assert (failure.value.outcome, failure.value.cause) == (Outcome.ERROR, "library")


@pytest.mark.parametrize("name", ["os:system", "subprocess:run", "a:b:load_environment", ":load_environment", "", "a b"])
def test_no_function_but_one_that_loads_an_environment_can_be_named(name):
    with pytest.raises(ValueError, match="pattern"):
        check_options("verifiers", {"environment": name})


def test_without_the_library_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr(library_rubric, "installed", lambda: False)
    with pytest.raises(Unjudged, match="pip install 'verifiers>=") as failure:
        score("verifiers", "4", "4", environment="sums")
    assert (failure.value.outcome, failure.value.cause) == (Outcome.ERROR, "library")


# examples


def examples():
    for name, verifier in VERIFIERS.items():
        assert verifier.examples, f"{name} has no example"
        for i, example in enumerate(verifier.examples):
            if verifier.needs in ("", "sandbox") and (verifier.judge is None or name == "math"):
                yield pytest.param(name, example, id=f"{name} {i}")


@pytest.mark.parametrize(("name", "example"), list(examples()))
def test_the_examples_are_true(name, example):
    """Those of judges and the sandbox are run for real by the integration tests; here math-verify's word is taken from the example."""
    tools = Tools(lambda judge, request: "right" if example.score else "wrong", sandbox=FakeSandbox)
    if "while True" in example.completion:
        pytest.skip("needs a sandbox that stops it")
    rubric = Rubric((Verifier(name=name, options=dict(example.options)),), tools)
    assert rubric.score(example.completion, prompt=example.prompt, answer=example.answer).reward == example.score


def test_gold_answers_score_1_where_they_can_be_made():
    golds = [
        ("math", "0.5", {}), ("math", 42, {"extract": "last"}), ("math", "-7/3", {}), ("math", "a\n#### 7", {}), ("sum_to_target", 1, {}),
        ("sum_to_target", 17, {}), ("sum_to_target", "900", {}), ("exact", "Paris", {}), ("exact", 68.0, {"strip": False}),
    ]  # fmt: skip
    for name, answer, options in golds:
        completion = VERIFIERS[name].gold(answer, check_options(name, options))
        assert score(name, completion, answer, **options).score == 1.0, (name, answer)
    assert VERIFIERS["math"].gold(None, check_options("math", {})) is None
    assert VERIFIERS["sum_to_target"].gold(0, check_options("sum_to_target", {})) is None
    assert VERIFIERS["exact"].gold(True, check_options("exact", {})) is None
    entry = {"answer": "12", "metadata": {}}
    assert VERIFIERS["reasoning_gym"].gold(entry, check_options("reasoning_gym", {})) == "<answer>12</answer>"
    assert VERIFIERS["reasoning_gym"].gold(entry, check_options("reasoning_gym", {"extract": "whole"})) == "12"
    assert VERIFIERS["length"].gold is None
