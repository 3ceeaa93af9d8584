"""The verifier `code` on the real sandbox: formats, forged verdicts, limits, C++, and every example of the registry that can be run here."""

import base64
import importlib.util
import json
import pickle
import shutil
import zlib

import pytest

if importlib.util.find_spec("reward_server.sandbox.supervisor") is None:
    pytest.skip("there is no sandbox yet", allow_module_level=True)

from reward_server.judges.pool import JudgePools
from reward_server.rubric import Rubric
from reward_server.sandbox.jobs import Tier
from reward_server.sandbox.supervisor import CodeSandbox, SandboxOptions
from reward_server.verifiers import VERIFIERS, check_options
from reward_server.verifiers.verdict import Tools
from services.contracts.messages import Outcome
from services.contracts.spec import Verifier


@pytest.fixture(scope="module")
def tools():
    pools, sandbox = JudgePools(workers=1), CodeSandbox(SandboxOptions(sessions=2))
    yield Tools(pools.ask, sandbox=lambda: sandbox)
    pools.close()
    sandbox.close()


@pytest.fixture
def score(tools):
    def score(text, answer, *, prompt="", **options):
        # a busy machine: what is no test of time has plenty
        checked = check_options("code", {"seconds_per_test": 20, "seconds": 60} | options)
        return VERIFIERS["code"].score(text, prompt=prompt, answer=answer, options=checked, tools=tools)

    return score


def fenced(code, language="python"):
    return f"```{language}\n{code}\n```"


CALLS = {"function": "f", "calls": [{"args": [3, [1, 2]], "expected": [3, 1, 2]}, {"args": [0, []], "expected": [0]}]}
RIGHT = "def f(x, xs):\n    return [x, *xs]"


def test_right_and_wrong_functions(score):
    verdict = score(fenced(RIGHT), CALLS)
    assert (verdict.score, verdict.outcome, verdict.tier in set(Tier)) == (1.0, Outcome.OK, True)
    assert score(fenced("def f(x, xs):\n    return [x]"), CALLS, credit="share").score == 0.5
    assert score(fenced("def f(x, xs):\n    return (x, *xs)"), CALLS).score == 0.0
    assert score(fenced("def g(x, xs):\n    return [x, *xs]"), CALLS).score == 0.0
    assert "SyntaxError" in score(fenced("def f(x"), CALLS).detail


def test_plain_data_of_every_kind_goes_in_and_comes_out(score):
    values = ["(1, 'a')", "{1: (2, 3)}", "{1, 2}", "b'\\x00'", "None", "[1.5, True, -7]", "'\\u00e9\\x00'", "1" * 31, "1e400", "[[(), {}]]"]
    record = {"test_list": [f"assert f({value}) == {value}" for value in values]}
    assert score(fenced("def f(x): return x"), record, credit="share").score == 1.0


def test_programs(score):
    record = {"programs": [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "40 2\n", "stdout": "42"}]}
    code = "import sys\na, b = map(int, sys.stdin.read().split())\nif __name__ == '__main__':\n    print(a + b)"
    assert score(fenced(code), record).score == 1.0
    assert score(fenced("print(3)"), record, credit="share").score == 0.5
    assert score(fenced(code + "\nraise ValueError('late')"), record).score == 0.0
    assert score(fenced(code + "\nraise SystemExit(0)"), record).score == 1.0


HUMAN_EVAL = {
    "prompt": 'def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\n\ndef root(xs):\n    """A root of a + b x."""\n',
    "entry_point": "root",
    "canonical_solution": "    return -xs[0] / xs[1]\n",
    "test": "import random\ndef check(candidate):\n    for _ in range(20):\n        xs = [random.randint(-9, 9), random.randint(1, 9)]\n"
    "        assert abs(poly(xs, candidate(list(xs)))) < 1e-6\n",
}


def test_human_eval_with_a_test_that_calls_in_a_loop(score):
    completion = VERIFIERS["code"].gold(HUMAN_EVAL, check_options("code", {}))
    assert score(completion, HUMAN_EVAL).score == 1.0
    assert score(fenced("return -xs[0] / xs[1]"), HUMAN_EVAL).score == 1.0
    wrong = score(fenced("def root(xs): return 0"), HUMAN_EVAL)
    assert (wrong.score, "AssertionError" in wrong.detail) == (0.0, True)


def test_mbpp_and_live_code_bench(score):
    mbpp = {"test_list": ["assert set(f([1, 2])) == {1, 2}", "assert f([3]) == [3]"], "challenge_test_list": ["assert len(f([])) == 0"]}
    assert score(fenced("def f(xs): return sorted(xs)"), mbpp).score == 1.0
    private = base64.b64encode(zlib.compress(pickle.dumps(json.dumps([{"input": "[1]\n2", "output": "[1, 2]", "testtype": "functional"}])))).decode()
    lcb = {"public_test_cases": "[]", "private_test_cases": private, "metadata": json.dumps({"func_name": "add"})}
    assert (
        score(fenced("class Solution:\n    def add(self, xs: List[int], x: int) -> List[int]:\n        return (*xs, math.floor(x))"), lcb).score
        == 1.0
    )


FORGERIES = {
    "exit 0": "import sys\nsys.exit(0)",
    "hard exit 0": "import os\nos._exit(0)",
    "exit in the function": "def f(x, xs):\n    import os\n    os._exit(0)",
    "equal to all": "class A:\n    def __eq__(self, other): return True\ndef f(x, xs): return A()",
    "list equal to all": "class A(list):\n    def __eq__(self, other): return True\n    __ne__ = lambda *a: False\ndef f(x, xs): return A()",
    "int that lies": "class A(int):\n    def __eq__(self, other): return True\ndef f(x, xs): return [A(9), 1, 2]",
    "printed passes": "print('PASSED', 1.0, True)\ndef f(x, xs):\n    print('[3, 1, 2]')",
    "poisoned json": "import json\njson.dumps = lambda *a, **k: '[3, 1, 2]'\njson.loads = lambda *a, **k: True\ndef f(x, xs): return None",
    "poisoned builtins": "import builtins\nbuiltins.all = builtins.any = builtins.isinstance = lambda *a: True\ndef f(x, xs): return 0",
    "at exit": "import atexit\natexit.register(lambda: print('[3, 1, 2]'))\ndef f(x, xs): return 0",
    "looks at its callers": "import sys\ndef f(x, xs):\n    frame = sys._getframe()\n    while frame.f_back: frame = frame.f_back\n"
    "    return repr(frame.f_globals)[:200]",
    "looks for what is expected": "import gc\ndef f(x, xs):\n    wanted = [x, *(i + 0 for i in xs)]\n"
    "    return next((o for o in gc.get_objects() if type(o) is list and o == wanted and o is not wanted), None)",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_verdicts_cannot_be_forged(score, name):
    verdict = score(fenced(FORGERIES[name]), CALLS, credit="share")
    assert verdict.score == 0.0, verdict


def test_a_forged_verdict_in_an_examined_test(score):
    for code in (
        "def root(xs):\n    import os\n    os._exit(0)",
        "class A(float):\n    def __abs__(self): return 0\ndef root(xs): return A(9)",
        "AssertionError = None",
    ):
        assert score(fenced(code), HUMAN_EVAL).score == 0.0


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def f(x, xs):\n    while True: pass", ("timeout", "limit:cpu")),
        ("import time\ndef f(x, xs):\n    time.sleep(100)", ("timeout",)),
        ("def f(x, xs):\n    return [0] * 10**9", ("limit:memory", "ok")),
        ("def f(x, xs):\n    while True: print('x' * 10**6)", ("limit:output", "timeout")),
    ],
)
def test_limits_cost_the_test_and_not_the_verdict(score, code, said):
    verdict = score(fenced(f"{code}\n"), CALLS, credit="share", seconds_per_test=1.5, seconds=8, memory_mb=256)
    assert verdict.score == 0.0
    assert (f"{verdict.outcome}:{verdict.cause}" if verdict.cause else verdict.outcome.value) in said, verdict


def test_after_a_stopped_test_the_next_ones_are_judged(score):
    record = {"function": "f", "calls": [{"args": [i], "expected": i} for i in range(4)]}
    verdict = score(fenced("import os\ndef f(x):\n    if x == 1: os._exit(0)\n    return x"), record, credit="share")
    assert (verdict.score, verdict.outcome) == (0.75, Outcome.OK)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_cpp_is_compiled_and_run(score):
    record = {"programs": [{"stdin": "1 2", "stdout": "3\n"}, {"stdin": "20 22", "stdout": "42\n"}]}
    code = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }"
    options = {"language": "cpp", "build_seconds": 120, "memory_mb": 1024}
    verdict = score(fenced(code, "cpp"), record, **options)
    assert verdict.score == 1.0, verdict
    broken = score(fenced(code.replace(";", "", 1), "cpp"), record, **options)
    assert (broken.score, "does not build" in broken.detail) == (0.0, True)
    crash = score(fenced("int main() { int *p = nullptr; return *p; }", "cpp"), record, **options)
    assert crash.score == 0.0


def examples():
    for name, verifier in VERIFIERS.items():
        for i, example in enumerate(verifier.examples):
            if verifier.needs not in ("service", "verifiers"):  # those need something that is the user's
                yield pytest.param(name, example, id=f"{name} {i}")


@pytest.mark.parametrize(("name", "example"), list(examples()))
def test_the_examples_are_true(tools, name, example):
    if name == "reasoning_gym" and importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed")
    rubric = Rubric((Verifier(name=name, options=dict(example.options)),), tools)
    assert rubric.score(example.completion, prompt=example.prompt, answer=example.answer).reward == example.score
