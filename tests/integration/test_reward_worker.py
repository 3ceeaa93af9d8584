"""The reward worker on a real store: every group is scored once, and a verifier that fails is never a reward of 0."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from pydantic import JsonValue

from reward_server import worker as worker_module
from reward_server.app import create_app
from reward_server.judges.pool import JudgePools
from reward_server.verifiers.verdict import Unjudged
from reward_server.worker import RewardWorker
from services.contracts.messages import CompletionGroup, DeadLetter, Outcome, PromptGroup, ScoredGroup
from services.contracts.spec import RunSpec, Verifier
from services.contracts.topics import ACTIVE, Log, RunKeys, Work
from services.runtime.bus import Bus, Entry
from services.runtime.ledger import Ledger, Place
from services.runtime.metrics import RewardMetrics
from services.runtime.process import IdleClock, Shutdown
from tests.integration.conftest import CLUSTER_TOKEN, wait_until
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
    worker = RewardWorker(bus, pools=judges, member=name, threads=threads, metrics=RewardMetrics(CollectorRegistry()), idle=IdleClock())
    thread = threading.Thread(target=worker.run, args=(shutdown,), daemon=True)
    thread.start()
    here = Serving(worker, judges, thread, shutdown)
    try:
        yield here
    finally:
        judges.gate.set()
        here.stop()


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
        assert [here.counted("verifications", verifier, "ok") for verifier in ("sum_to_target", "format")] == [3, 3]
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
    with serving(bus) as here:
        here.judges.gate.clear()
        wait_until(lambda: here.judges.asked)
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
        assert here.counted("verifications", "math", "error") == 1
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
        assert [here.counted("verifications", "math", outcome) for outcome in ("timeout", "ok")] == [1, 1]
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


# -- routes ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def http() -> Iterator[TestClient]:
    pools = JudgePools()
    app = create_app(pools=pools, cluster_token=CLUSTER_TOKEN, registry=CollectorRegistry(), ready=lambda: "waits for Redis")
    with TestClient(app, headers={"Authorization": f"Bearer {CLUSTER_TOKEN}"}) as client:
        yield client
    pools.close()


def test_one_completion_is_judged_over_http_as_on_the_stream(http: TestClient) -> None:
    rewards = [{"name": "sum_to_target", "weight": 2.0}, {"name": "format", "options": {"pattern": "[0-9+]*"}}]
    answer = http.post("/v1/score", json={"rewards": rewards, "completion": "3+4", "answer": 7}).json()
    assert answer["reward"] == 3.0
    assert [(part["verifier"], part["score"], part["outcome"]) for part in answer["parts"]] == [("sum_to_target", 1.0, "ok"), ("format", 1.0, "ok")]
    unverifiable = http.post("/v1/score", json={"rewards": rewards, "completion": "3+4", "answer": None}).json()
    assert (unverifiable["reward"], [part["score"] for part in unverifiable["parts"]]) == (None, [None, 1.0])


@pytest.mark.parametrize("path", ["/v1/rubric/check", "/v1/score"])
def test_each_wrong_verifier_of_a_rubric_is_named(http: TestClient, path: str) -> None:
    rewards: list[dict[str, Any]] = [
        {"name": "sum_to_target"},
        {"name": "maths"},
        {"name": "format", "options": {"boxed": True, "patern": "x"}},
        {"name": "format", "options": {"pattern": "("}},
    ]
    answer = http.post(path, json={"rewards": rewards, "completion": "x"} if path == "/v1/score" else {"rewards": rewards})
    assert (answer.status_code, answer.json()["title"]) == (422, "Invalid rubric")
    errors = {error["field"]: error["problem"] for error in answer.json()["errors"]}
    assert errors.keys() == {"rewards.1", "rewards.2", "rewards.3"}
    assert "did you mean 'math'?" in errors["rewards.1"]
    assert "patern: Extra inputs are not permitted" in errors["rewards.2"]
    assert "Options are: " in errors["rewards.2"]
    assert "not a regular expression" in errors["rewards.3"]


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"rewards": []}, {"rewards"}),
        ({}, {"rewards"}),
        ({"rewards": [{"weight": 1.0}]}, {"rewards.0.name"}),
        ({"rewards": [{"name": "math", "weight": "heavy"}], "extra": 1}, {"extra", "rewards.0.weight"}),
    ],
)
def test_each_wrong_field_of_a_request_is_named(http: TestClient, body: dict[str, Any], fields: set[str]) -> None:
    answer = http.post("/v1/rubric/check", json=body)
    assert answer.status_code == 422
    assert {error["field"] for error in answer.json()["errors"]} >= fields


def test_a_good_rubric_is_good_and_the_verifiers_are_told(http: TestClient) -> None:
    assert http.post("/v1/rubric/check", json={"rewards": [{"name": "format", "options": {"boxed": True}}]}).json() == {"status": "ok"}
    told = {verifier["name"]: verifier["options"] for verifier in http.get("/v1/verifiers").json()}
    assert told.keys() == {"math", "sum_to_target", "reasoning_gym", "exact", "format", "instructions"}
    assert "pattern" in told["format"]["properties"]


def test_the_routes_are_for_the_fleet_only(http: TestClient) -> None:
    bare = {"Authorization": ""}
    assert http.post("/v1/score", json={}, headers=bare).status_code == 401
    assert http.post("/v1/rubric/check", json={}, headers=bare).status_code == 401
    assert http.get("/v1/verifiers", headers=bare).status_code == 401
    assert http.get("/healthz", headers=bare).status_code == 200
    assert http.get("/readyz", headers=bare).json()["detail"] == "waits for Redis"
