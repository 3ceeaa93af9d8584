"""The verifier `code`: what it reads, runs, compares and says, on a sandbox that confines nothing."""

import base64
import json
import math
import os
import pickle
import re
import threading
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_server.sandbox.jobs import Cause, Reply
from reward_server.verifiers import VERIFIERS, check_options
from reward_server.verifiers.code.compare import same, same_output
from reward_server.verifiers.code.extraction import last_block
from reward_server.verifiers.code.languages import LANGUAGES
from reward_server.verifiers.code.records import read, unpacked
from reward_server.verifiers.code.task import CallTest, ExaminedTest, ProgramTest
from reward_server.verifiers.verdict import Tools, Unjudged, Verdict
from services.contracts.messages import Outcome
from tests.unit.fake_sandbox import FakeSandbox

PYTHON = frozenset({"python", "py"})


def no_judge(judge, request):
    raise AssertionError(f"{judge} was asked {request}")


def score(text, answer, *, sandbox=None, prompt="", **options):
    sandbox = sandbox or FakeSandbox()
    tools = Tools(no_judge, sandbox=lambda: sandbox)
    verdict = VERIFIERS["code"].score(text, prompt=prompt, answer=answer, options=check_options("code", options), tools=tools)
    assert sandbox.open_now == 0, "a session was left open"
    return verdict


def fenced(code):
    return f"Here it is:\n```python\n{code}\n```\nDone."


def calls(*tests, function="f"):
    return {"function": function, "calls": [{"args": list(args), "expected": expected} for args, expected in tests]}


# extraction


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```python\na\n```", "a"),
        ("```py\na\n\nb\n```", "a\n\nb"),
        ("```\na\n```", "a"),
        ("```python\na\n```\n```python\nb\n```", "b"),
        ("```python\na\n```\nprints\n```\n1\n```", "a"),
        ("```python\na\n```\n```bash\npip\n```", "a"),
        ("  ```Python \n  a\n  ```", "  a"),
        ('```python title="a.py" {1}\na\n```', "a"),
        ("```pythonic\na\n```", None),
        ("```python\na", None),
        ("```python\na\n```\n```python\nb", "a"),
        ("```bash\na\n```", None),
        ("a", None),
        ("", None),
        ("```python\n```", ""),
        ("```" * 1000, None),
    ],
)
def test_the_solution_is_the_last_closed_block_of_its_language(text, found):
    assert last_block(text, PYTHON) == found


def test_thinking_is_no_solution_and_options_say_what_is():
    record = calls(((1,), 2))
    right = "def f(x): return x + 1"
    assert score(f"<think>{fenced('def f(x): return 0')}</think>{fenced(right)}", record).score == 1.0
    assert score(f"<think>{fenced(right)}", record) == Verdict(0.0, detail="no code")
    assert score(right, record) == Verdict(0.0, detail="no code")
    assert score(right, record, extract="fenced_or_all").score == 1.0
    assert score(right, record, extract="all").score == 1.0
    assert score(fenced(right), record, extract="fenced_or_all").score == 1.0


# comparison


@pytest.mark.parametrize(
    ("got", "wanted", "equal"),
    [
        (1, 1.0, True), (True, 1, True), (None, None, True), (None, 0, False), ("a", "a", True), ("a", b"a", False), ("1", 1, False),
        (math.nan, math.nan, True), (math.nan, 1.0, False), ([math.nan], [math.nan], True), (math.inf, math.inf, True), (math.inf, -math.inf, False),
        ([1, 2], [1, 2], True), ([1, 2], [2, 1], False), ([1], [1, 1], False), ((1, 2), (1, 2), True), ((1, 2), [1, 2], False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True), ({"a": 1}, {"a": 1, "b": 2}, False), ({1: "a"}, {"1": "a"}, False),
        ({1, 2}, {2, 1}, True), ({1, 2}, [1, 2], False), (frozenset({1}), {1}, True), ({"a": (1, [2])}, {"a": (1, [2])}, True),
        (0.1 + 0.2, 0.3, False), (10**400, 1.5, False),
    ],
)  # fmt: skip
def test_values_are_compared_as_python_does_but_nan_is_nan(got, wanted, equal):
    assert same(got, wanted) is equal
    assert same(wanted, got) is equal


def test_tolerance_and_tuples_are_what_the_options_say():
    assert same([0.1 + 0.2, {"a": 1e9}], [0.3, {"a": 1e9 + 1}], tolerance=1e-6)
    assert not same(0.1, 0.2, tolerance=1e-3)
    assert not same(10**400, 1.5, tolerance=1e-3)
    assert same([(1, 2)], [[1, 2]], tuples_are_lists=True)
    assert not same([(1, 2)], [[1, 3]], tuples_are_lists=True)


def test_what_is_nested_too_deep_is_not_the_same_and_does_not_raise():
    deep = other = None
    for _ in range(100_000):
        deep, other = [deep], [other]
    assert same(deep, other) is False


@pytest.mark.parametrize(
    ("got", "wanted", "tolerance", "equal"),
    [
        ("1 2\n", "1 2", 0, True), ("1 2  \r\n3\n\n\n", "1 2\n3", 0, True), (" 1", "1", 0, False), ("1\n\n2", "1\n2", 0, False), ("", "\n", 0, True),
        ("1", "1.0", 0, False), ("0.30000001 x", "0.3  x", 1e-6, True), ("0.31", "0.3", 1e-6, False), ("a 1", "b 1", 1e-6, False),
        ("nan", "1", 0.5, False), ("1_0", "10", 0.5, False), ("1 2", "1", 0.5, False), ("1" * 500, "2" * 500, 0.1, False),
        ("1e5", "100000", 1e-9, True),
    ],
)  # fmt: skip
def test_output_is_compared_by_lines_and_with_a_tolerance_by_words(got, wanted, tolerance, equal):
    assert same_output(got, wanted, tolerance=tolerance) is equal


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(plain)
def test_every_value_is_the_same_as_itself_even_with_nan_in_it(value):
    assert same(value, json.loads(json.dumps(value)))


# records


def packed(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\ndef helper(x):\n    return x\n\ndef f(a: int, b=0) -> List[int]:\n    """Add."""\n',
    "entry_point": "f",
    "canonical_solution": "    return [helper(a) + b]\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == [3], 'no'\n    assert [5] == candidate(5)\n    assert True, 'edge'\n",
}


def test_a_human_eval_record_of_plain_asserts_becomes_calls():
    task = read(HUMAN_EVAL)
    assert task.tests == (CallTest("f", [1, 2], {}, ([3],)), CallTest("f", [5], {}, ([5],)))
    assert "def helper" in task.preamble
    assert "def f" not in task.preamble


def test_a_human_eval_record_with_a_loop_is_examined_as_a_whole():
    record = HUMAN_EVAL | {
        "test": "def check(candidate):\n    assert candidate(1) == [1]\n    for i in range(3):\n        assert candidate(i) == [i]\n"
    }
    (test,) = read(record).tests
    assert isinstance(test, ExaminedTest)
    assert test.functions == {"candidate": "f"}
    assert test.source.endswith("check(candidate)\n")


def test_an_mbpp_record_is_a_test_for_each_assert():
    record = {
        "test_list": ["assert f((1, 2), x={'a': {1}}) == (2, 1)", "assert abs(f(1) - 2) < 1e-3"],
        "challenge_test_list": ["assert set(f(2)) == {g(3)}"],
        "test_setup_code": "def twice(x):\n    return 2 * x",
        "test_imports": ["import math"],
    }
    first, second, third = read(record).tests
    assert first == CallTest("f", [(1, 2)], {"x": {"a": {1}}}, ((2, 1),))
    assert isinstance(second, ExaminedTest)
    assert isinstance(third, ExaminedTest)
    assert third.functions == {"f": "f", "g": "g"}
    assert third.setup == "import math\ndef twice(x):\n    return 2 * x"


@pytest.mark.parametrize("pack", [json.dumps, packed])
def test_live_code_bench_tests_are_read_as_json_or_packed(pack):
    functional = [{"input": "[1, 2]\n3", "output": "[[1, 3]]", "testtype": "functional"}]
    record = {"public_test_cases": json.dumps(functional), "private_test_cases": pack(functional), "metadata": '{"func_name": "add"}'}
    assert read(record).tests == (CallTest("add", [[1, 2], 3], {}, ([[1, 3]],)),) * 2
    stdin = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
    assert (
        read({"public_test_cases": json.dumps(stdin), "private_test_cases": pack(stdin), "metadata": "{}"}).tests
        == (ProgramTest("1 2\n", "3\n"),) * 2
    )


def test_apps_taco_and_code_contests_records_are_read():
    assert read({"input_output": json.dumps({"inputs": ["1\n", ["2", "3"]], "outputs": ["2\n", ["4", "5"]]})}).tests == (
        ProgramTest("1\n", "2\n"),
        ProgramTest("2\n3", "4\n5"),
    )
    assert read({"inputs": [[1, [2]]], "outputs": [[3]], "fn_name": "f"}).tests == (CallTest("f", [1, [2]], {}, ([3], 3)),)
    contests = {"public_tests": {"input": ["1"], "output": ["2"]}, "private_tests": {"input": [], "output": []}}
    assert read(contests).tests == (ProgramTest("1", "2"),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("length", [1, 300, 70_000])
def test_packed_texts_of_every_protocol_are_read_without_being_unpickled(monkeypatch, protocol, length):
    tests = json.dumps([{"input": "\u00e9" * length, "output": "1"}], ensure_ascii=False)
    text = base64.b64encode(zlib.compress(pickle.dumps(tests, protocol))).decode()
    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(pickle, "loads", None)
    assert unpacked(text) == json.loads(tests)


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch /tmp/pwned-by-pickle",))


def test_a_packed_object_is_refused_and_never_made():
    huge_memo = b"\x80\x04r\xff\xff\xff\x7f."  # makes the unpickler reserve gigabytes
    for evil in (Bomb(), [1], {"a": Bomb()}, 5, b"bytes", ("a", "b"), huge_memo, b"", b"\x80\x04.", pickle.dumps("a")[:-1], b"\x8d" + b"\xff" * 8):
        data = evil if isinstance(evil, bytes) and evil != b"bytes" else pickle.dumps(evil)
        text = base64.b64encode(zlib.compress(data)).decode()
        with pytest.raises(ValueError, match=r"packed"):
            unpacked(text)
    assert not os.path.exists("/tmp/pwned-by-pickle")


def test_a_packed_bomb_is_refused():
    text = base64.b64encode(zlib.compress(b"0" * (80 << 20), 9)).decode()
    with pytest.raises(ValueError, match="packed"):
        unpacked(text)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (None, "must be a record"),
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "must be a record"),
        ({}, "none of calls"),
        ({"calls": []}, "name the function|0 tests"),
        ({"function": "f", "calls": [{"args": [1]}]}, "expected: Field required"),
        ({"function": "f", "calls": [{"expected": 1, "exepcted": 2}]}, "exepcted"),
        ({"function": "__import__('os')", "calls": [{"expected": 1}]}, "name the function"),
        ({"programs": [{"stdin": "a\x00", "stdout": ""}]}, "NUL"),
        ({"programs": [{"stdin": "\ud800", "stdout": ""}]}, "Unicode"),
        ({"programs": [{"stdout": "1"}] * 1001}, "1001 tests"),
        ({"test": "def check(c): pass", "entry_point": "a b"}, "name the function"),
        ({"test": "def chek(c): pass", "entry_point": "f"}, "must define check"),
        ({"test": "def check(c:", "entry_point": "f"}, "not Python"),
        ({"test_list": ["assert 1 =="]}, "not Python"),
        ({"test_list": ["assert 1 == 1"]}, "must call a function"),
        ({"test_list": []}, "must call a function"),
        ({"public_test_cases": "not json"}, "neither JSON nor packed"),
        ({"public_test_cases": "5"}, "must be a list"),
        ({"public_test_cases": [{"input": "1", "output": "2", "testtype": "functional"}]}, "name the function"),
        ({"input_output": "{"}, "not valid JSON"),
        ({"input_output": ""}, "not valid JSON"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs with 0 outputs"),
        ({"inputs": [1], "outputs": [1]}, "texts or lists of lines"),
    ],
)
def test_a_record_that_makes_no_sense_is_unverifiable(answer, why):
    sandbox = FakeSandbox()
    verdict = score(fenced("def f(x): return x"), answer, sandbox=sandbox)
    assert (verdict.score, verdict.outcome) == (None, Outcome.UNVERIFIABLE)
    assert re.search(why, verdict.detail), verdict.detail
    assert sandbox.sessions == []


# verdicts


def test_calls_are_scored_all_or_nothing_or_by_share():
    record = calls(((1,), 2), ((2,), 3), ((3,), 5))
    code = fenced("def f(x): return x + 1")
    sandbox = FakeSandbox()
    assert score(code, record, sandbox=sandbox) == Verdict(0.0, detail="passes 2 of 3; test 3 returned '4'", tier="landlock")
    assert len(sandbox.sessions) == 1
    assert score(code, record, credit="share").score == pytest.approx(2 / 3)
    assert score(code, calls(((1,), 2), ((2,), 3))) == Verdict(1.0, detail="passes 2 of 2", tier="landlock")
    assert score(code, json.dumps(record), credit="share").score == pytest.approx(2 / 3)


def test_the_first_failure_ends_the_tests_unless_shares_count():
    record = calls(((1,), 0), ((2,), 3), ((3,), 4))
    for credit, asked in (("all", 1), ("share", 3)):
        sandbox = FakeSandbox()
        score(fenced("def f(x): return x + 1"), record, sandbox=sandbox, credit=credit)
        assert sum(isinstance(told, tuple) for told in sandbox.sessions[0].told) == asked


def test_what_is_expected_never_gets_into_a_session_with_the_solution():
    secret = "the-expected-value"
    records = [
        calls((("a",), secret)),
        {"programs": [{"stdin": "a", "stdout": secret}]},
        {"test_list": [f"assert f('a') == '{secret}'", f"assert f('a') + '' == '{secret}'"]},
        HUMAN_EVAL | {"test": f"def check(candidate):\n    for _ in range(2):\n        assert candidate('a') == '{secret}'\n"},
    ]
    for record in records:
        sandbox = FakeSandbox()
        score(fenced(f"def f(x): return {secret[:3]!r} + {secret[3:]!r}\nprint(f(0))"), record, sandbox=sandbox, credit="share")
        with_solution = [session for session in sandbox.sessions if any("def f" in str(told) for told in session.told)]
        assert len(with_solution) == 1
        assert secret not in repr(with_solution[0].told)


def test_keyword_arguments_and_methods_are_called():
    record = {"function": "A.f", "calls": [{"args": [1], "kwargs": {"y": 2}, "expected": 3}]}
    assert score(fenced("class A:\n    def f(self, x, *, y): return x + y"), record).score == 1.0
    leetcode = {"public_test_cases": [{"input": "[1]\n2", "output": "[1, 2]", "testtype": "functional"}], "metadata": {"func_name": "add"}}
    assert score(fenced("class Solution:\n    def add(self, xs: List[int], x: int): return (*xs, x)"), leetcode).score == 1.0
    assert score(fenced("def add(xs, x): return xs + [x]"), leetcode).score == 1.0
    assert score(fenced("def add(xs, x): return (*xs, x)"), leetcode, tuples_are_lists=False).score == 0.0


def test_programs_read_and_print():
    record = {"programs": [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 6\n", "stdout": "12\n"}]}
    code = fenced("a, b = map(int, input().split())\nprint(a + b)")
    assert score(code, record, credit="share") == Verdict(0.5, detail="passes 1 of 2; test 2 printed '11\\n'", tier="landlock")
    failing = fenced("print(input()); raise ValueError('no')")
    assert "ended with 'ValueError: no'" in score(failing, record).detail


def test_a_human_eval_completion_may_be_the_body_alone():
    assert score("    return [helper(a) + b]\n", HUMAN_EVAL, extract="all").score == 1.0
    assert score(fenced("return [helper(a) + b]"), HUMAN_EVAL).score == 1.0
    assert score(fenced("def f(a, b=0):\n    return [helper(a) + b]"), HUMAN_EVAL).score == 1.0
    assert score(fenced("def f(a, b=0):\n    return [helper(a) - b]"), HUMAN_EVAL).score == 0.0


EXAMINED = {
    "test_list": ["assert sorted(f(3)) == [0, 1, 2]", "assert f(2) is not None and twice(len(f(2))) == 4", "assert f(0) == []"],
    "test_setup_code": "def twice(x):\n    return 2 * x",
}


def test_asserts_that_are_no_plain_calls_are_examined_in_a_session_of_their_own():
    sandbox = FakeSandbox()
    assert score(fenced("def f(n): return list(range(n))"), EXAMINED, sandbox=sandbox) == Verdict(1.0, detail="passes 3 of 3", tier="landlock")
    assert len(sandbox.sessions) == 3  # the solution's, and one for each examination
    assert sandbox.most_open == 2
    assert score(fenced("def f(n): return [0] * n"), EXAMINED, credit="share").score == pytest.approx(2 / 3)


def test_what_the_solution_raises_is_raised_in_the_test():
    record = {
        "test_list": [
            "try:\n    f(0)\n    assert False\nexcept ZeroDivisionError as error:\n    assert 'division' in str(error)",
            "try:\n    f('')\nexcept Exception as error:\n    assert type(error).__name__ == 'SolutionFailed'",
        ]
    }
    assert score(fenced("class Own(Exception): pass\ndef f(x):\n    if x == '': raise Own\n    return 1 / x"), record).score == 1.0
    assert score(fenced("def f(x): return 1"), record, credit="share").score == 0.5


def test_a_test_whose_set_up_fails_says_nothing_of_the_solution():
    record = {"test_list": ["assert [f(1)] == [2]"], "test_setup_code": "root = Node(1)"}
    with pytest.raises(Unjudged, match="NameError") as failure:
        score(fenced("def f(x): return 2"), record)
    assert failure.value.outcome is Outcome.UNVERIFIABLE


def test_examinations_of_many_threads_never_wait_for_each_other():
    sandbox = FakeSandbox(places=2)
    verdicts = []
    threads = [
        threading.Thread(target=lambda: verdicts.append(VERIFIERS["code"].score(
            fenced("def f(n): return list(range(n))"), prompt="", answer=EXAMINED, options=check_options("code", {}),
            tools=Tools(no_judge, sandbox=lambda: sandbox),
        ).score))
        for _ in range(6)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert verdicts == [1.0] * 6


# limits and faults


def test_a_stopped_test_is_failed_and_the_next_gets_a_fresh_session():
    code = fenced("def f(x):\n    if x == 1: stop('memory')\n    if x == 2: stop(None)\n    return x")
    sandbox = FakeSandbox()
    record = calls(((0,), 0), ((1,), 1), ((2,), 2), ((3,), 3))
    assert score(code, record, sandbox=sandbox, credit="share") == Verdict(
        0.5, Outcome.LIMIT, "passes 2 of 4; test 2 stopped by memory", cause="memory", tier="landlock"
    )
    assert len(sandbox.sessions) == 3
    died = score(code, calls(((2,), 2)))
    assert (died.score, died.outcome, died.detail) == (0.0, Outcome.OK, "passes 0 of 1; test 1 the process ended")


@pytest.mark.parametrize(
    ("causes", "outcome", "cause"),
    [
        (["time", "time", "memory"], Outcome.TIMEOUT, ""),
        (["output", "memory", "output"], Outcome.LIMIT, "output"),
        (["cpu"], Outcome.LIMIT, "cpu"),
        (["processes"], Outcome.LIMIT, "processes"),
    ],
)
def test_the_limit_that_was_hit_most_is_the_outcome_beside_a_score(causes, outcome, cause):
    record = calls(*(((name,), 1) for name in causes), (("none",), 1))
    code = fenced("def f(x):\n    if x != 'none': stop(x)\n    return 1")
    verdict = score(code, record, credit="share")
    assert (verdict.score, verdict.outcome, verdict.cause) == (1 / (len(causes) + 1), outcome, cause)


@pytest.mark.parametrize(("kills", "expected"), [(1, (1.0, Outcome.OK, "")), (2, (0.0, Outcome.LIMIT, "memory"))])
@pytest.mark.parametrize("answer", [calls(((2,), 4), ((3,), 6)), {"test_list": ["for x in range(3): assert f(x) == 2 * x"]}])
def test_a_solution_that_is_killed_from_outside_is_tried_once_more(answer, kills, expected):
    verdict = score(fenced("def f(x): return 2 * x"), answer, sandbox=FakeSandbox(kills=kills))
    assert (verdict.score, verdict.outcome, verdict.cause) == expected


def test_the_second_try_has_only_the_time_that_is_left():
    sandbox = FakeSandbox(kills=1)
    score(fenced("import time\ntime.sleep(0.2)\ndef f(x): return x"), calls(((2,), 2)), sandbox=sandbox, seconds=10)
    first, second = (session.limits.seconds for session in sandbox.sessions)
    assert second <= first - 0.2


def test_code_that_does_not_load_fails_every_test_at_once():
    sandbox = FakeSandbox()
    verdict = score(fenced("def f(x) return x"), calls(((1,), 1), ((2,), 2)), sandbox=sandbox, credit="share")
    assert (verdict.score, verdict.outcome) == (0.0, Outcome.OK)
    assert 'test 1 does not load: "SyntaxError' in verdict.detail
    assert len(sandbox.sessions) == 1
    stopped = score(fenced("stop('time')"), calls(((1,), 1), ((2,), 2)), credit="share")
    assert (stopped.score, stopped.outcome, stopped.detail) == (0.0, Outcome.TIMEOUT, "passes 0 of 2; test 1 stopped by time")


def test_tests_beyond_the_total_time_are_not_reached_and_not_passed():
    code = fenced("import time\ndef f(x):\n    time.sleep(0.12)\n    return x")
    verdict = score(code, calls(*(((i,), i) for i in range(20))), credit="share", seconds=0.3, seconds_per_test=10)
    assert 0 < verdict.score < 0.5
    assert verdict.outcome is Outcome.TIMEOUT
    assert "not reached in 0.3 s" in verdict.detail


def test_sessions_are_given_the_limits_of_the_options():
    sandbox = FakeSandbox()
    score(fenced("def f(x): return x"), calls(((1,), 1)), sandbox=sandbox, memory_mb=100, seconds=7)
    (session,) = sandbox.sessions
    assert (session.limits.memory_bytes, session.limits.commands, session.limits.processes) == (100 << 20, False, 1)
    assert 7 <= session.limits.seconds <= 8


def test_without_a_sandbox_there_is_no_score():
    for refuses_after in (0, 1):
        with pytest.raises(Unjudged) as failure:
            score(
                fenced("def f(x):\n    if x: stop('time')"),
                calls(((1,), 1), ((0,), 0)),
                sandbox=FakeSandbox(refuses_after=refuses_after),
                credit="share",
            )
        assert (failure.value.outcome, failure.value.cause, failure.value.tier) == (Outcome.ERROR, "sandbox", "landlock")
    with pytest.raises(Unjudged, match="no sandbox") as failure:
        VERIFIERS["code"].score(fenced("a"), prompt="", answer=calls(((1,), 1)), options=check_options("code", {}), tools=Tools(no_judge))
    assert failure.value.cause == "sandbox"


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("", "no code"),
        ("```python\n\n```", "no code"),
        ("\x00" * 1000, "no code"),
        ("`" * 3_000_000, "no code"),
        ("```python\n" * 300_000, "no code"),
        ("```python\nx = '\ud800'\n```", "not valid Unicode"),
        ("```python\nx = '\x00'\n```", "NUL"),
        (f"```python\n{'a' * 300_000}\n```", "longer than"),
    ],
)
def test_bad_completions_are_0_with_a_reason_and_never_run(text, detail):
    sandbox = FakeSandbox()
    verdict = score(text, calls(((1,), 1)), sandbox=sandbox)
    assert (verdict.score, verdict.outcome) == (0.0, Outcome.OK)
    assert detail in verdict.detail
    assert sandbox.sessions == []


# other languages

CPP = "```cpp\nint main() {}\n```"
SUMS = {"programs": [{"stdin": "1 2", "stdout": "3"}, {"stdin": "3 4", "stdout": "7"}]}


@pytest.fixture
def all_tools(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")


@pytest.mark.usefixtures("all_tools")
def test_cpp_is_written_built_once_and_run_for_each_test():
    sandbox = FakeSandbox()
    sandbox.commands = [Reply(), Reply(output="3\n"), Reply(output="8\n")]
    verdict = score(CPP, SUMS, sandbox=sandbox, language="cpp", credit="share")
    assert verdict == Verdict(0.5, detail="passes 1 of 2; test 2 printed '8\\n'", tier="landlock")
    (session,) = sandbox.sessions
    build = list(LANGUAGES["cpp"].commands.build[0])
    assert session.told == [("main.cpp", b"int main() {}"), (build, ""), (["./main"], "1 2"), (["./main"], "3 4")]
    assert session.limits.commands


@pytest.mark.usefixtures("all_tools")
def test_what_does_not_build_fails_every_test():
    sandbox = FakeSandbox()
    sandbox.commands = [Reply(error="main.cpp:1: error: expected ';'", exit_code=1)]
    verdict = score(CPP, SUMS, sandbox=sandbox, language="cpp")
    assert (verdict.score, verdict.outcome) == (0.0, Outcome.OK)
    assert "does not build: \"main.cpp:1: error: expected ';'\"" in verdict.detail


@pytest.mark.usefixtures("all_tools")
def test_a_language_may_be_given_by_its_commands():
    sandbox = FakeSandbox()
    sandbox.commands = [Reply(output="3"), Reply(exit_code=1)]
    commands = {"file": "main.rb", "run": ["ruby", "main.rb"], "tags": ["ruby"]}
    verdict = score("```ruby\nputs 3\n```", SUMS, sandbox=sandbox, commands=commands, credit="share")
    assert verdict.detail == "passes 1 of 2; test 2 ended with 'exit code 1'"


def test_a_missing_tool_chain_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(Unjudged, match=r"apt-get install g\+\+") as failure:
        score(CPP, SUMS, language="cpp")
    assert (failure.value.outcome, failure.value.cause) == (Outcome.ERROR, "tool_chain")


def test_calls_are_for_python_only():
    assert score(CPP, calls(((1,), 1)), language="cpp").outcome is Outcome.UNVERIFIABLE
    with pytest.raises(ValueError, match="either a language or its commands"):
        check_options("code", {"language": "cpp", "commands": {"file": "a", "run": ["a"]}})
    with pytest.raises(ValueError, match="file"):
        check_options("code", {"commands": {"file": "../a", "run": ["a"]}})


# gold answers


def test_a_records_own_solution_is_its_gold_completion_and_passes():
    records = [
        calls(((1,), 2)) | {"solution": "def f(x): return x + 1"},
        HUMAN_EVAL,
        {"test_list": ["assert f(1) == 2"], "code": "def f(x):\r\n  return x + 1"},
        {"input_output": '{"inputs": ["1"], "outputs": ["2"]}', "solutions": '["print(int(input()) + 1)"]'},
    ]
    for record in records:
        completion = VERIFIERS["code"].gold(record, check_options("code", {}))
        assert score(completion, record).score == 1.0
    assert VERIFIERS["code"].gold(calls(((1,), 2)), check_options("code", {})) is None
    assert VERIFIERS["code"].gold("no record", check_options("code", {})) is None
    cpp = check_options("code", {"language": "cpp"})
    assert VERIFIERS["code"].gold(records[-1], cpp) is None, "Python is no solution in C++"
    assert VERIFIERS["code"].gold({**SUMS, "solution": "int main() {}"}, cpp) == "```\nint main() {}\n```"


def test_limits_that_can_stop_a_session_all_have_an_outcome():
    for cause in Cause:
        assert score(fenced(f"stop('{cause}')"), calls(((1,), 1))).outcome in (Outcome.TIMEOUT, Outcome.LIMIT)
