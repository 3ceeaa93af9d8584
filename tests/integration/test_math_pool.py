"""The real judges, in real workers."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from reward_server.judges import pool as pool_module
from reward_server.judges.pool import JudgePools, WorkerPool
from reward_server.judges.workers import WALL
from reward_server.rubric import Rubric
from reward_server.verifiers.verdict import Tools, Unjudged
from services.contracts.messages import Outcome
from services.contracts.spec import Verifier

BOMB = r"9^{9^{9^{9}}}"


@pytest.fixture(autouse=True)
def _nothing_is_slow(monkeypatch):
    """On a busy machine any request might be."""
    monkeypatch.setattr(pool_module, "SLOW_SECONDS", 1.5)


@pytest.fixture(scope="module")
def pools():
    pools = JudgePools(workers=2)
    yield pools
    pools.close()


@pytest.fixture
def pool():
    pool = WorkerPool("math", workers=1)
    pool.start()
    yield pool
    pool.close()


def math_score(pools, gold, answer, **options):
    rubric = Rubric((Verifier(name="math", options=options),), Tools(pools.ask))
    return rubric.score(f"\\boxed{{{answer}}}", prompt="", answer=gold)


def descendants(parent=None):
    """Templates and workers under a process, this one by default."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if "reward_server.judges.template" in process.cmdline():
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def template_of(pool):
    return pool._template.pid


def workers_of(pool):
    return psutil.Process(template_of(pool)).children()


def kill(pid):
    """And wait until it is dead: a process that has only been sent the signal can still be given work."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("gold", "answer", "reward"),
    [
        ("x^2+2x+1", "(x+1)^2", 1.0),
        ("x^2+2x+1", "(x+2)^2", 0.0),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", 1.0),
        ("1/3", "0.333333", 1.0),
        ("1/3", "0.33", 0.0),
        ("42", "x=42", 1.0),
        (r"\{1,2\}", "2,1", 1.0),
        ("(1,2)", "(2,1)", 0.0),
        ("[0,1)", "[0,1]", 0.0),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}", 0.0),
        (r"0.\overline{3}", "0", 0.0),
        ("0.0000001", "0", 0.0),
        ("5", r"\ud800", 0.0),
        ("5", "\x00", 0.0),
        ("5", r"\frac{", 0.0),
        (r"5 \text{ cm}", r"5 \text{ m}", 1.0),
        ("10", r"10\%", 1.0),
        ("6", "x=5=6", 1.0),
        ("blue", "red", 0.0),
    ],
)
def test_math_verify_decides_what_exact_arithmetic_cannot(pools, gold, answer, reward):
    score = math_score(pools, gold, answer)
    assert (score.reward, score.parts[0].outcome) == (reward, Outcome.OK)


def test_a_gold_answer_that_cannot_be_read_gives_no_reward(pools):
    score = math_score(pools, r"\sqrt{2", "3")
    assert (score.reward, score.parts[0].outcome) == (None, Outcome.UNVERIFIABLE)


@pytest.mark.parametrize("bomb", [BOMB, "(10^9)!", "(" * 300 + "1" + ")" * 300])
def test_a_bomb_is_a_timeout_of_about_a_second_and_never_a_wrong_answer(pools, bomb):
    """A second of the processor's time: more of the wall's on a busy machine."""
    assert math_score(pools, "x+1", "1+x").reward == 1.0
    began = time.monotonic()
    score = math_score(pools, "7", bomb)
    assert (score.reward, score.parts[0].outcome) == (None, Outcome.TIMEOUT)
    assert 0.9 < time.monotonic() - began < WALL + pool_module.GRACE_SECONDS + 1
    assert math_score(pools, "x+1", "1+x").reward == 1.0


def test_a_bomb_scores_what_the_options_say(pools):
    score = math_score(pools, "7", BOMB, timeout_score=0)
    assert (score.reward, score.parts[0].outcome) == (0.0, Outcome.TIMEOUT)


def test_many_threads_get_their_own_answers(pools):
    with ThreadPoolExecutor(6) as executor:
        rewards = list(executor.map(lambda n: math_score(pools, f"x+{n // 2}", f"{n // 4 * 2 + n % 4 // 2}+x+{n % 2}").reward, range(80)))
    assert rewards == [float(n % 2 == 0) for n in range(80)]


def test_decisions_are_kept_and_timeouts_are_not(pool):
    assert pool.ask(["x+1", "1+x"]) == pool.ask(["x+1", "1+x"]) == "right"
    assert pool.stats()[3:] == (1, 1)
    for _ in range(2):
        with pytest.raises(Unjudged):
            pool.ask(["7", BOMB])
    assert pool.stats().timeouts == 2


def test_memory_is_a_limit_and_not_a_wrong_answer(pool):
    long = [r"\sqrt{2", "x" * 7_000_000]
    assert pool.ask(["2x", "x"]) == "wrong"
    usual = workers_of(pool)[0].memory_info().rss
    assert pool.ask(long) == "unverifiable"
    with pytest.raises(Unjudged, match="more than") as failure:
        pool.ask(["2x", "x" * 9_000_000])
    assert failure.value.outcome is Outcome.LIMIT
    pool = WorkerPool("math", workers=1, memory_bytes=usual + (10 << 20))
    try:
        assert pool.ask(["2x", "x"]) == "wrong"
        with pytest.raises(Unjudged) as failure:
            pool.ask(long)
        assert (failure.value.outcome, failure.value.detail) == (Outcome.LIMIT, "memory")
        assert pool.ask(["2x", "x+x"]) == "right"
        assert pool.stats().forks == 2
    finally:
        pool.close()


def test_workers_are_recycled():
    pool = WorkerPool("math", workers=1, recycle=2)
    try:
        assert [pool.ask(["2x", f"{n}x"]) for n in range(1, 6)] == ["wrong", "right", "wrong", "wrong", "wrong"]
        assert pool.stats().forks == 3
        assert pool.stats().deaths == 0
    finally:
        pool.close()


def test_a_worker_killed_at_work_is_replaced_and_the_answer_tried_once_more(pool):
    asked = ThreadPoolExecutor(1).submit(pool.ask, ["7", BOMB])
    wait_until(lambda: workers_of(pool))
    first = workers_of(pool)[0]
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(Unjudged) as failure:
        asked.result(10)
    assert failure.value.outcome is Outcome.TIMEOUT  # the second try ran into its time, as a bomb does
    assert pool.stats()[:3] == (2, 1, 1)


def test_an_answer_whose_workers_are_killed_twice_is_an_error(pool):
    asked = ThreadPoolExecutor(1).submit(pool.ask, ["7", BOMB])
    killed = set()
    while len(killed) < 2:
        wait_until(lambda: [w for w in workers_of(pool) if w.pid not in killed])
        for worker in workers_of(pool):
            if worker.pid not in killed:
                os.kill(worker.pid, signal.SIGKILL)
                killed.add(worker.pid)
    with pytest.raises(Unjudged, match="died twice") as failure:
        asked.result(10)
    assert failure.value.outcome is Outcome.ERROR
    assert pool.ask(["2x", "x+x"]) == "right"


def test_workers_and_templates_that_die_while_idle_are_replaced_unnoticed(pool):
    assert pool.ask(["2x", "x+x"]) == "right"
    kill(workers_of(pool)[0].pid)
    assert pool.ask(["2x", "3x-x"]) == "right"
    orphan = workers_of(pool)[0].pid
    kill(template_of(pool))
    wait_until(lambda: not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE)
    assert pool.ask(["2x", "4x-2x"]) == "right"
    assert pool.stats()[:3] == (3, 0, 0)


def test_workers_know_nothing_of_the_servers_environment_or_descriptors(monkeypatch):
    monkeypatch.setenv("OFFBEAT_SECRET", "secret")
    pool = WorkerPool("math", workers=1)
    try:
        pool.ask(["x", "x+0"])
        worker = workers_of(pool)[0]
        assert "OFFBEAT_SECRET" not in worker.environ()
        targets = sorted(os.readlink(f"/proc/{worker.pid}/fd/{fd}").partition(":")[0] for fd in os.listdir(f"/proc/{worker.pid}/fd"))
        assert targets == ["/dev/null"] * 3 + ["socket"]
    finally:
        pool.close()


def test_closing_ends_every_process_and_refuses_who_still_waits():
    before = set(descendants())
    pool = WorkerPool("math", workers=1)
    with ThreadPoolExecutor(3) as executor:
        asked = [executor.submit(pool.ask, ["7", f"{BOMB}+{n}"]) for n in range(3)]
        wait_until(lambda: pool.stats().forks == 1)
        pool.close()
        outcomes = sorted(future.exception(10).outcome for future in asked)
    assert outcomes == [Outcome.ERROR, Outcome.ERROR, Outcome.TIMEOUT]
    wait_until(lambda: set(descendants()) <= before)
    with pytest.raises(Unjudged, match="stopping"):
        pool.ask(["x", "x+0"])


def test_no_process_outlives_a_server_that_is_killed():
    code = f"""
import threading
from reward_server.judges.pool import WorkerPool
pool = WorkerPool("math", workers=2)
pool.start()
def work():
    try:
        pool.ask(["7", {BOMB!r}])
    except Exception:
        pass
    work()
for _ in range(2):
    threading.Thread(target=work).start()
print("working", flush=True)
"""
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline() == "working\n"
        wait_until(lambda: len(descendants(server.pid)) == 3)
        left = descendants(server.pid)
    finally:
        server.kill()
        server.wait()
    wait_until(lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in left))


def test_reasoning_gyms_own_scorers_judge(pools):
    rubric = Rubric((Verifier(name="reasoning_gym"),), Tools(pools.ask))

    def reward(answer, gold, task, **metadata):
        entry = {"answer": gold, "metadata": {"source_dataset": task, **metadata}}
        score = rubric.score(f"so <answer>{answer}</answer>", prompt="", answer=entry)
        return score.reward, score.parts[0].outcome

    assert reward("12", "12", "chain_sum") == (1.0, Outcome.OK)
    assert reward("13", "12", "chain_sum") == (0.0, Outcome.OK)
    assert reward("3*(4+5)", "", "countdown", numbers=[3, 4, 5], target=27) == (1.0, Outcome.OK)
    assert reward("3*(4+4)", "", "countdown", numbers=[3, 4, 5], target=27) == (0.05, Outcome.OK)
    assert reward("9**9**9**9", "", "countdown", numbers=[3, 4, 5], target=27) == (None, Outcome.TIMEOUT)
    assert reward("[[1]]", "[[1]]", "arc_agi", output=[[1]])[1] is Outcome.OK
    assert reward("garbage", "2 \u00d7 3", "prime_factorization") == (0.0, Outcome.OK)
    assert reward("12", "12", "no_such_task") == (None, Outcome.UNVERIFIABLE)
    assert reward("3*4", "", "countdown") == (0.01, Outcome.OK)


def test_answers_that_are_python_programs_are_not_run(pools, tmp_path):
    rubric = Rubric((Verifier(name="reasoning_gym"),), Tools(pools.ask))
    mark = tmp_path / "mark"
    attack = f"__import__('os').mkdir('{mark}')"
    for task, metadata in (
        ("countdown", {"numbers": [1], "target": 1}),
        ("puzzle24", {}),
        ("simple_integration", {"variable": "x", "integrand": "x"}),
        ("intermediate_integration", {"variable": "x", "integrand": "x"}),
        ("polynomial_multiplication", {}),
        ("n_queens", {"valid_answers": ["Q"]}),
        ("spiral_matrix", {}),
        ("string_insertion", {}),
        ("binary_matrix", {}),
    ):
        score = rubric.score(f"<answer>{attack}</answer>", prompt="", answer={"answer": "1", "metadata": {"source_dataset": task, **metadata}})
        assert score.parts[0].outcome is Outcome.OK
        assert score.reward < 0.1
    assert not mark.exists()
    board = rubric.score(
        "<answer>[['Q']]</answer>", prompt="", answer={"answer": "Q", "metadata": {"source_dataset": "n_queens", "valid_answers": ["Q"]}}
    )
    assert board.reward == 0.5


def test_entries_that_are_python_programs_are_not_run_and_no_task_hides_behind_another(pools, tmp_path):
    mark = tmp_path / "mark"
    attack = f"__import__('os').mkdir('{mark}')"
    entries = [
        ("bitwise_arithmetic", {"answer": "0x1", "metadata": {"problem": attack}}),
        ("simple_integration", {"answer": "x", "metadata": {"variable": "x", "integrand": attack}}),
        ("intermediate_integration", {"answer": "x", "metadata": {"variable": "x", "integrand": attack}}),
        ("polynomial_multiplication", {"answer": attack, "metadata": {}}),
        ("number_sorting", {"answer": attack, "metadata": {"direction": "ascending"}}),
    ]
    for task, entry in entries:
        text = "<answer>[1]</answer>" if task == "number_sorting" else "<answer>1</answer>"
        score = Rubric((Verifier(name="reasoning_gym", options={"task": task}),), Tools(pools.ask)).score(text, prompt="", answer=entry)
        unverifiable = (None, Outcome.UNVERIFIABLE) if task != "number_sorting" else (0.0, Outcome.OK)  # whose scorer takes any exception for a 0
        assert (score.reward, score.parts[0].outcome) == unverifiable, task
    hidden = {"task": "composite", "config": {"datasets": [{"name": "countdown", "weight": 1, "config": {}}]}}
    entry = {"answer": "1", "metadata": {"source_dataset": "countdown", "numbers": [1], "target": 1}}
    rubric = Rubric((Verifier(name="reasoning_gym", options=hidden),), Tools(pools.ask))
    score = rubric.score(f"<answer>{attack}</answer>", prompt="", answer=entry)
    assert (score.reward, score.parts[0].outcome) == (None, Outcome.UNVERIFIABLE)
    assert not mark.exists()
    bits = {"answer": "0x2", "metadata": {"source_dataset": "bitwise_arithmetic", "problem": "(0x1 << 0x1)"}}
    assert Rubric((Verifier(name="reasoning_gym"),), Tools(pools.ask)).score("<answer>0x2</answer>", prompt="", answer=bits).reward == 1.0


def test_a_bomb_does_not_delay_another_judge(pools):
    math_score(pools, "x", "x+0")
    pools.start("reasoning_gym")
    rubric = Rubric((Verifier(name="reasoning_gym", options={"task": "chain_sum"}),), Tools(pools.ask))
    bombs = [threading.Thread(target=math_score, args=(pools, "7", f"{BOMB}+{n}")) for n in range(2)]
    for bomb in bombs:
        bomb.start()
    began = time.monotonic()
    assert rubric.score("<answer>12</answer>", prompt="", answer="12").reward == 1.0
    assert time.monotonic() - began < 0.9
    for bomb in bombs:
        bomb.join()


def test_a_slow_request_makes_way_for_others_and_closing_waits_for_it(monkeypatch):
    monkeypatch.setattr(pool_module, "SLOW_SECONDS", 0.05)
    pool = WorkerPool("math", workers=1)
    pool._seconds = 4.0  # of the processor's time: the bombs outlast the request beside them on a busy machine too
    pool.start()
    with ThreadPoolExecutor(3) as executor:
        bombs = [executor.submit(pool.ask, ["7", f"{BOMB}+{n}"]) for n in range(2)]
        wait_until(lambda: pool.stats().forks == 2)
        assert pool.ask(["x+1", "1+x"]) == "right"
        assert not any(bomb.done() for bomb in bombs), "it did not wait for either"
        assert any(worker.nice() > os.getpriority(os.PRIO_PROCESS, 0) for worker in workers_of(pool)) or os.getpriority(os.PRIO_PROCESS, 0) == 19
        pool.close()
        assert [bomb.exception(0).outcome for bomb in bombs] == [Outcome.TIMEOUT] * 2


def test_no_more_requests_are_slow_at_once_than_may_be(monkeypatch):
    monkeypatch.setattr(pool_module, "SLOW_SECONDS", 0.02)
    monkeypatch.setattr(pool_module, "SLOW_WORKERS", 2)
    pool = WorkerPool("math", workers=1)
    try:
        pool.start()
        with ThreadPoolExecutor(6) as executor:
            bombs = [executor.submit(pool.ask, ["7", f"{BOMB}+{n}"]) for n in range(6)]
            most = 0
            while not all(bomb.done() for bomb in bombs):
                most = max(most, len(workers_of(pool)))
                time.sleep(0.02)
        assert most <= 3
        assert [bomb.exception(0).outcome for bomb in bombs] == [Outcome.TIMEOUT] * 6
    finally:
        pool.close()
