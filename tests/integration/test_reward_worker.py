"""The reward worker on a real store: every group is scored once, and a verifier that fails is never a reward of 0."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry
from pydantic import JsonValue

from reward_server import worker as worker_module
from reward_server.judges.pool import JudgePools
from reward_server.scoring import Scoring
from reward_server.scoring_threads import ScoringThreads
from reward_server.verifiers.verdict import Tools, Unjudged
from reward_server.worker import RewardWorker
from services.contracts.messages import CompletionGroup, DeadLetter, Member, Outcome, PromptGroup, Role, ScoredGroup
from services.contracts.spec import RunSpec, Verifier
from services.contracts.topics import ACTIVE, Log, RunKeys, Work
from services.runtime.bus import Bus, Entry
from services.runtime.fleet import Fleet
from services.runtime.ledger import Ledger, Place
from services.runtime.metrics import RewardMetrics
from services.runtime.process import IdleClock, Shutdown
from tests.integration.conftest import wait_until
from tests.integration.real_store import TRAINER, open_run
from tests.unit.sample_messages import completion, prompt_group

SUM = RunSpec(group_size=2, max_attempts=3)
MATH = RunSpec(group_size=2, max_attempts=3, rewards=(Verifier(name="math"),))


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "CLAIM_MS", 20)
    monkeypatch.setattr(worker_module, "HOUSEKEEPING_SECONDS", 0.05)
    monkeypatch.setattr(worker_module, "RECLAIM_MS", 60_000)


@dataclass
class Judges(JudgePools):
    """Judges in this process: each call takes what `verdicts` has next, or says that the answer is right."""

    verdicts: list[Unjudged] = field(default_factory=list)
    asked: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    at_once: int = 0
    most_at_once: int = 0
    delay: float = 0.0
    seen: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.gate.set()
        self.count = threading.Lock()

    def ask(self, judge: str, request: JsonValue) -> JsonValue:
        with self.count:
            self.asked += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.gate.wait(10)
        time.sleep(self.delay)
        self.seen.append(str(request))
        with self.count:
            self.at_once -= 1
            if self.verdicts:
                raise self.verdicts.pop(0)
        return "right"


@dataclass
class Serving:
    worker: RewardWorker
    judges: Judges
    thread: threading.Thread
    shutdown: Shutdown

    def stop(self) -> None:
        self.shutdown.ask()
        self.thread.join(10)
        assert not self.thread.is_alive()

    def counted(self, name: str, *labels: str) -> float:
        return getattr(self.worker.metrics, name).labels(*labels)._value.get()


@contextlib.contextmanager
def serving(bus: Bus, *, name: str = "reward-0", threads: int = 2, judges: Judges | None = None) -> Iterator[Serving]:
    judges, shutdown = judges or Judges(), Shutdown()
    pool = ScoringThreads(threads)
    scoring = Scoring(Tools(ask=judges.ask), pool, RewardMetrics(CollectorRegistry()))
    worker = RewardWorker(bus, scoring=scoring, member=name, idle=IdleClock())
    thread = threading.Thread(target=worker.run, args=(shutdown,), daemon=True)
    thread.start()
    here = Serving(worker, judges, thread, shutdown)
    try:
        yield here
    finally:
        judges.gate.set()
        here.stop()
        pool.close()


def run_of(bus: Bus, spec: RunSpec = SUM, run_id: str = "r") -> Ledger:
    ledger = open_run(bus, run_id, spec)
    ledger.announce(0, trainer=TRAINER)
    return ledger


def generate(ledger: Ledger, index: int, *texts: str, answer: JsonValue = "7") -> CompletionGroup:
    """Completions with these texts, on the stream."""
    ledger.issue(prompt_group(index, run_id=ledger.run_id, group_size=len(texts), answer=answer))
    (entry,) = [entry for entry in ledger.bus.range(ledger.run_id, Work.PROMPTS) if entry.index == index]
    attempt = ledger.start(index, held=0, max_attempts=5)
    assert isinstance(attempt, int)
    done = CompletionGroup(
        group=entry.message(PromptGroup), completions=tuple(completion(text=text) for text in texts), server="s", attempt=attempt, started_at=1.0
    )
    assert ledger.finish(entry, done)
    return done


def scored(ledger: Ledger) -> dict[int, ScoredGroup]:
    groups = [entry.message(ScoredGroup) for entry in ledger.bus.range(ledger.run_id, Work.SCORED)]
    assert len({group.group.index for group in groups}) == len(groups), "no group twice"
    return {group.group.index: group for group in groups}


def has_scored(ledger: Ledger, *indices: int) -> Callable[[], bool]:
    return lambda: scored(ledger).keys() >= set(indices)


def letters(ledger: Ledger) -> list[DeadLetter]:
    return [entry.message(DeadLetter) for entry in ledger.bus.range(ledger.run_id, Log.DEAD)]


# -- work -----------------------------------------------------------------------------------------------------------------------------


def test_a_group_gets_a_reward_for_each_completion_with_its_breakdown(bus: Bus) -> None:
    ledger = run_of(
        bus, RunSpec(group_size=3, rewards=(Verifier(name="sum_to_target", weight=2.0), Verifier(name="format", options={"pattern": ".*4"})))
    )
    done = generate(ledger, 0, "3+4", "1+1", "seven")
    with serving(bus) as here:
        wait_until(has_scored(ledger, 0))
        assert [here.counted("verifications", verifier, "ok", "") for verifier in ("sum_to_target", "format")] == [3, 3]
    result = scored(ledger)[0]
    assert (result.completed, result.server) == (done, "reward-0")
    assert result.rewards == [3.0, 0.0, 0.0]
    assert [(part.verifier, part.weight, part.score) for part in result.scores[0].parts] == [("sum_to_target", 2.0, 1.0), ("format", 1.0, 1.0)]
    assert ledger.bus.range("r", Work.COMPLETIONS) == []
    assert ledger.conservation().scored == 1


def test_all_active_runs_are_served_and_one_that_ends_is_left_alone(bus: Bus) -> None:
    one, two = run_of(bus), run_of(bus, MATH, "s")
    with serving(bus):
        generate(one, 0, "3+4", "1+1")
        generate(two, 0, r"\boxed{x}", r"\boxed{y}", answer="z")
        wait_until(has_scored(one, 0))
        wait_until(has_scored(two, 0))
        assert scored(two)[0].rewards == [1.0, 1.0]
        one.close()
        bus.redis.srem(ACTIVE, "r")
        generate(two, 1, r"\boxed{x}", answer="z")
        wait_until(has_scored(two, 1))
        late = run_of(bus, SUM, "t")
        generate(late, 0, "3+4", "2")
        wait_until(has_scored(late, 0))


def test_runs_that_end_while_they_are_served_are_no_error(bus: Bus) -> None:
    ledger, other = run_of(bus, MATH), run_of(bus, SUM, "s")
    with serving(bus) as here:
        here.judges.gate.clear()
        generate(ledger, 0, r"\boxed{x}", r"\boxed{y}", answer="z")
        wait_until(lambda: here.judges.asked)
        ledger.close()
        time.sleep(0.15)  # signs of life for an entry that is gone
        here.judges.gate.set()
        wait_until(lambda: here.counted("groups", "superseded") == 1)
        generate(other, 0, "3+4", "2")
        wait_until(has_scored(other, 0))


def test_no_more_groups_are_scored_at_once_than_there_are_threads(bus: Bus) -> None:
    ledger = run_of(bus, MATH)
    for index in range(8):
        generate(ledger, index, rf"\boxed{{x_{index}}}", answer="z")
    with serving(bus, threads=3) as here:
        here.judges.gate.clear()
        wait_until(lambda: here.judges.at_once == 3)
        time.sleep(0.1)
        assert len(bus.own("r", Work.COMPLETIONS, "reward-0")) == 3, "what it cannot score yet it leaves to others"
        here.judges.gate.set()
        wait_until(has_scored(ledger, *range(8)))
        assert here.judges.most_at_once == 3


def test_two_servers_share_the_work(bus: Bus) -> None:
    ledger = run_of(bus, MATH)
    for index in range(6):
        generate(ledger, index, rf"\boxed{{x_{index}}}", answer="z")
    with serving(bus, name="a", threads=1) as a, serving(bus, name="b", threads=1) as b:
        a.judges.gate.clear()
        b.judges.gate.clear()
        wait_until(lambda: a.judges.at_once == b.judges.at_once == 1)
        a.judges.gate.set()
        b.judges.gate.set()
        wait_until(has_scored(ledger, *range(6)))
    assert {group.server for group in scored(ledger).values()} == {"a", "b"}
    assert ledger.conservation().scored == 6


def test_what_the_dead_left_behind_is_scored(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "RECLAIM_MS", 150)
    ledger = run_of(bus)
    generate(ledger, 0, "3+4", "1")
    assert len(bus.claim(["r"], Work.COMPLETIONS, "dead", count=5, block_ms=None)) == 1
    with serving(bus):
        wait_until(has_scored(ledger, 0))


def test_a_server_that_is_asked_to_end_ends_what_it_holds(bus: Bus) -> None:
    ledger = run_of(bus, MATH)
    generate(ledger, 0, r"\boxed{x}", answer="z")
    judges = Judges()
    judges.gate.clear()
    with serving(bus, threads=1, judges=judges) as here:  # one thread: while it is busy, no other group is taken
        wait_until(lambda: judges.asked)
        here.shutdown.ask()
        generate(ledger, 1, r"\boxed{y}", answer="z")
        here.judges.gate.set()
        here.stop()
    assert scored(ledger).keys() == {0}
    assert {row.index: row.place for row in ledger.rows()} == {0: Place.SCORED, 1: Place.GENERATED}


def test_completions_of_an_attempt_that_was_superseded_are_dropped(bus: Bus) -> None:
    ledger = run_of(bus)
    done = generate(ledger, 0, "3+4", "1")
    stream = RunKeys("r").stream(Work.COMPLETIONS)
    copy = bus.range("r", Work.COMPLETIONS)[0]
    bus.redis.xadd(stream, copy.fields)
    with serving(bus) as here:
        wait_until(has_scored(ledger, 0))
        wait_until(lambda: here.counted("groups", "superseded") == 1)
    assert scored(ledger)[0].completed == done
    assert bus.range("r", Work.COMPLETIONS) == []


def test_idle_time_is_what_is_spent_without_work(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "RECLAIM_MS", 100)
    ledger = run_of(bus, MATH)
    with serving(bus) as here:
        wait_until(lambda: here.worker.idle.total > 0.1)
        here.judges.gate.clear()
        generate(ledger, 0, r"\boxed{x}", answer="z")
        bus.claim(["r"], Work.COMPLETIONS, "dead", count=1, block_ms=None)  # it comes by way of the dead, or straight
        wait_until(lambda: here.judges.asked)
        before = here.worker.idle.total
        time.sleep(0.3)
        assert here.worker.idle.total - before < 0.1


# -- failure --------------------------------------------------------------------------------------------------------------------------


def test_a_verifier_that_fails_once_is_asked_again(bus: Bus) -> None:
    ledger = run_of(bus, MATH)
    generate(ledger, 0, r"\boxed{x}", r"\boxed{y}", answer="z")
    with serving(bus, judges=Judges(verdicts=[Unjudged(Outcome.ERROR, "the worker died twice")])) as here:
        wait_until(has_scored(ledger, 0))
        assert here.counted("groups", "failed") == 1
        assert here.counted("verifications", "math", "error", "") == 1
    assert scored(ledger)[0].rewards == [1.0, 1.0]
    assert letters(ledger) == []


@pytest.mark.parametrize("outcome", [Outcome.TIMEOUT, Outcome.LIMIT, Outcome.ERROR])
def test_a_group_that_cannot_be_scored_becomes_a_dead_letter_and_never_a_reward_of_0(bus: Bus, outcome: Outcome) -> None:
    ledger = run_of(bus, MATH)
    done = generate(ledger, 0, r"\boxed{x}", r"\boxed{y}", answer="z")
    generate(ledger, 1, "7", "7", answer="7")
    verdicts = [Unjudged(outcome, "a bomb")] * 2 * MATH.max_attempts
    with serving(bus, judges=Judges(verdicts=verdicts)) as here:
        wait_until(lambda: letters(ledger))
        wait_until(has_scored(ledger, 1))
        assert here.counted("groups", "failed") == MATH.max_attempts
        assert here.counted("dead_letters", "completions") == 1
    (letter,) = letters(ledger)
    assert (letter.stream, letter.reason, letter.group) == ("completions", f"could not be scored in 3 tries: math: {outcome}: a bomb", done.group)
    assert scored(ledger).keys() == {1}
    assert (ledger.conservation().dead, ledger.conservation().holds) == (1, True)


def test_an_answer_that_is_no_answer_is_no_reward_of_0(bus: Bus) -> None:
    ledger = run_of(bus)
    generate(ledger, 0, "3+4", "1", answer={"not": "a number"})
    with serving(bus):
        wait_until(lambda: letters(ledger))
    assert "sum_to_target: unverifiable" in letters(ledger)[0].reason
    assert scored(ledger) == {}


def test_a_score_for_time_outs_is_a_reward_where_the_run_sets_one(bus: Bus) -> None:
    ledger = run_of(bus, RunSpec(group_size=2, rewards=(Verifier(name="math", options={"timeout_score": -0.5}),)))
    generate(ledger, 0, r"\boxed{x}", r"\boxed{y}", answer="z")
    with serving(bus, judges=Judges(verdicts=[Unjudged(Outcome.TIMEOUT, "slow")])) as here:
        wait_until(has_scored(ledger, 0))
        assert [here.counted("verifications", "math", outcome, "") for outcome in ("timeout", "ok")] == [1, 1]
    assert sorted(scored(ledger)[0].rewards) == [-0.5, 1.0]


def test_a_run_whose_verifiers_do_not_exist_fails_loudly(bus: Bus) -> None:
    """It was submitted while no reward server was there to check them."""
    ledger, other = run_of(bus, RunSpec(rewards=(Verifier(name="maths"),))), run_of(bus, SUM, "s")
    done = generate(ledger, 0, "3+4", "1")
    generate(other, 0, "3+4", "1")
    with serving(bus):
        wait_until(lambda: letters(ledger))
        wait_until(has_scored(other, 0))
    (letter,) = letters(ledger)
    assert letter.reason.startswith("no rubric can be made: there is no verifier 'maths': did you mean 'math'?")
    assert letter.group == done.group


def test_garbage_is_put_aside_and_the_work_goes_on(bus: Bus) -> None:
    ledger = run_of(bus)
    stream = RunKeys("r").stream(Work.COMPLETIONS)
    bus.redis.xadd(stream, {"data": b"\xffgarbage"})
    bus.redis.xadd(stream, {"index": 5, "data": b"\x91" * 100_000})
    bus.redis.xadd(stream, {"no": "data"})
    generate(ledger, 0, "3+4", "1")
    with serving(bus) as here:
        wait_until(has_scored(ledger, 0))
        wait_until(lambda: len(letters(ledger)) == 3)
        assert here.counted("dead_letters", "completions") == 3
    assert [letter.group for letter in letters(ledger)] == [None] * 3
    assert bus.range("r", Work.COMPLETIONS) == []
    assert (ledger.conservation().dead, ledger.conservation().holds) == (0, True)


def test_a_fault_of_ours_leaves_the_group_for_another_try(bus: Bus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(worker_module, "RECLAIM_MS", 100)
    ledger, faults = run_of(bus), [RuntimeError("a bug")]
    real = Ledger.score

    def score(self: Ledger, entry: Entry, result: ScoredGroup) -> bool:
        if faults:
            raise faults.pop()
        return real(self, entry, result)

    monkeypatch.setattr(Ledger, "score", score)
    generate(ledger, 0, "3+4", "1")
    with serving(bus):
        wait_until(has_scored(ledger, 0))
    assert any(record.message == "scoring failed" for record in caplog.records)


def test_a_fault_of_ours_that_stays_makes_a_dead_letter(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Ledger, entry: Entry, result: ScoredGroup) -> bool:
        raise RuntimeError("a bug \ud800")

    monkeypatch.setattr(Ledger, "score", broken)
    ledger = run_of(bus)
    generate(ledger, 0, "3+4", "1")
    with serving(bus) as here:
        wait_until(lambda: letters(ledger))
    (letter,) = letters(ledger)
    assert "could not be scored in 3 tries: a fault of the reward server: RuntimeError: 'a bug \\ud800'" in letter.reason
    assert here.counted("groups", "failed") == 3
    assert (ledger.conservation().dead, ledger.conservation().holds) == (1, True)


# -- several servers, several runs ----------------------------------------------------------------------------------------------------


def test_a_group_that_one_server_cannot_score_is_tried_by_another(bus: Bus) -> None:
    ledger = run_of(bus, MATH)
    broken = Judges(verdicts=[Unjudged(Outcome.ERROR, "broken")] * 100)
    fleet = Fleet(bus)

    def beat(name: str) -> None:
        fleet.beat(Member(member_id=name, role=Role.REWARD, url="http://127.0.0.1:1", pid=1, host="h", ready=True, started_at=0.0))

    beat("broken")
    beat("whole")
    with serving(bus, name="broken", judges=broken) as here:
        wait_until(lambda: not here.worker._alone)
        generate(ledger, 0, r"\boxed{x}", answer="z")
        wait_until(lambda: here.counted("groups", "failed") == 1)
        with serving(bus, name="whole"):
            wait_until(has_scored(ledger, 0))
        assert here.counted("groups", "failed") == 1, "it has not tried again by itself, though it looks every 50 ms"
    assert (scored(ledger)[0].server, letters(ledger)) == ("whole", [])


def test_a_run_with_slow_verifiers_does_not_hold_up_another(bus: Bus) -> None:
    """Its groups fill the threads and the streams; the other run's are judged meanwhile."""
    slow, quick = run_of(bus, MATH, "slow"), run_of(bus, SUM, "quick")
    for index in range(12):
        generate(slow, index, *[rf"\boxed{{x_{index}}}"] * 2, answer="z")
    with serving(bus, threads=2) as here:
        here.judges.delay = 0.2
        wait_until(lambda: here.judges.asked >= 2)
        for index in range(12):
            generate(quick, index, "3+4", "1")
        wait_until(has_scored(quick, *range(12)), seconds=30)
        assert len(scored(slow)) < 12
        assert len(bus.own("slow", Work.COMPLETIONS, "reward-0")) <= 2, "what it cannot score yet it leaves to others"
        wait_until(has_scored(slow, *range(12)), seconds=60)


def test_an_evaluation_set_goes_before_the_training_groups_of_its_run(bus: Bus) -> None:
    training, evaluation = run_of(bus, MATH, "r"), run_of(bus, MATH, "r~held")
    for index in range(6):
        generate(training, index, rf"\boxed{{x_{index}}}", answer="z")
    order: list[str] = []
    judges = Judges()
    judges.gate.clear()
    with serving(bus, threads=1, judges=judges):
        wait_until(lambda: judges.at_once == 1)
        for index in range(3):
            generate(evaluation, index, rf"\boxed{{y_{index}}}", answer="z")
        judges.seen = order
        judges.gate.set()
        wait_until(has_scored(training, *range(6)), seconds=30)
        wait_until(has_scored(evaluation, *range(3)), seconds=30)
    assert max(i for i, text in enumerate(order) if "y_" in text) <= 4


def test_what_is_not_done_when_the_process_must_end_is_handed_back(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "DRAIN_SECONDS", 0.2)
    ledger = run_of(bus, MATH)
    generate(ledger, 0, r"\boxed{x}", answer="z")
    with serving(bus) as here:
        here.judges.gate.clear()
        wait_until(lambda: here.judges.asked)
        here.stop()
        (entry,) = bus.reclaim("r", Work.COMPLETIONS, "other", idle_ms=60_000, count=5)
        assert entry.index == 0
        here.judges.gate.set()
    assert ledger.conservation().generated + ledger.conservation().scored == 1
