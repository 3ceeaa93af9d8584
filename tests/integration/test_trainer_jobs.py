"""A Job for each run: the loop over HTTP against a stand-in of the Kubernetes API, with real Redis and, at the end, trainers of one run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CollectorRegistry

from services.contracts.messages import Role, RunEvent
from services.contracts.spec import RunSpec
from services.contracts.states import Action, RunState
from services.contracts.topics import Log
from services.control_plane.__main__ import CANNOT_START, ControlPlane
from services.control_plane.job_plan import ONLY_RUN, BadTemplate, JobTemplate
from services.control_plane.kubernetes import Cluster
from services.control_plane.scheduler import Scheduler
from services.control_plane.store import RunStore
from services.control_plane.trainer_jobs import LONGEST_PAUSE, LOOK_SECONDS, TrainerJobs
from services.runtime.bus import Bus
from services.runtime.fleet import Fleet
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.process import Shutdown
from services.runtime.settings import Settings
from tests.integration.conftest import Stubs, free_port, wait_until
from tests.integration.kubernetes_stand_in import NAMESPACE, KubernetesStandIn
from trainer import __main__ as process
from trainer.ranks import Ranks

MANIFEST = f"""
apiVersion: batch/v1
kind: Job
metadata: {{name: offbeat-trainer, namespace: {NAMESPACE}}}
spec:
  backoffLimit: 6
  template:
    spec: {{restartPolicy: Never, volumes: [{{name: tmp, emptyDir: {{}}}}], containers: [{{name: trainer, image: offbeat/trainer}}]}}
"""


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesStandIn]:
    stand_in = KubernetesStandIn(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(stand_in.kubeconfig))
    with stand_in.up():
        yield stand_in


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "trainer-job.yaml"
    path.write_text(MANIFEST)
    return path


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def loop(kubernetes: KubernetesStandIn, template: Path, store: RunStore, registry: CollectorRegistry) -> TrainerJobs:
    return TrainerJobs(Cluster(JobTemplate.read(template)), store, ControlPlaneMetrics(registry), limit=2)


def told(store: RunStore, run_id: str) -> list[RunEvent]:
    """What the run's events say of Jobs."""
    events = [entry.message(RunEvent) for entry in store.bus.range(run_id, Log.EVENTS)]
    return [event for event in events if event.event.startswith("trainer_job")]


def runs_of(kubernetes: KubernetesStandIn) -> dict[str, str]:
    """Run by Job, as its trainer is told."""
    found = {}
    for name, job in kubernetes.jobs.items():
        (variable,) = [v for v in job["spec"]["template"]["spec"]["containers"][0]["env"] if v["name"] == ONLY_RUN]
        found[name] = variable["value"]
    return found


def test_queued_runs_get_a_job_each_as_far_as_there_is_room(
    loop: TrainerJobs, kubernetes: KubernetesStandIn, store: RunStore, spec: RunSpec, registry: CollectorRegistry
) -> None:
    old, new, late = (store.create(spec)[0].run_id for _ in range(3))
    assert loop.tick() == LOOK_SECONDS
    assert sorted(runs_of(kubernetes).values()) == sorted([old, new])
    job = next(iter(kubernetes.jobs.values()))
    assert job["spec"]["template"]["spec"]["volumes"] == [{"name": "tmp", "emptyDir": {}}], "all of the template is sent"
    assert [event.event for event in told(store, old)] == ["trainer_job_created"]
    assert told(store, old)[0].data["job"] in kubernetes.jobs
    assert told(store, late) == []
    before = dict(kubernetes.jobs)
    loop.tick()
    assert kubernetes.jobs == before
    assert registry.get_sample_value("offbeat_trainer_jobs") == 2
    kubernetes.end(next(name for name, run_id in runs_of(kubernetes).items() if run_id == old), "Complete")
    store.lifecycle(old).move(Action.CANCEL)
    loop.tick()
    assert late in runs_of(kubernetes).values()


def test_a_job_that_is_there_already_is_taken_for_made(
    loop: TrainerJobs, kubernetes: KubernetesStandIn, store: RunStore, spec: RunSpec, template: Path
) -> None:
    """By another control plane, or by this one before it crashed: here neither sees it among the Jobs."""
    run_id = store.create(spec)[0].run_id
    loop.tick()
    (name,) = kubernetes.jobs
    kubernetes.jobs[name]["metadata"]["labels"] = {}
    again = TrainerJobs(Cluster(JobTemplate.read(template)), store, ControlPlaneMetrics(CollectorRegistry()), limit=2)
    assert again.tick() == LOOK_SECONDS
    assert list(kubernetes.jobs) == [name]
    assert [event.event for event in told(store, run_id)] == ["trainer_job_created"]


def test_the_job_that_another_control_plane_makes_meanwhile_is_not_taken_for_nobodys(
    loop: TrainerJobs, kubernetes: KubernetesStandIn, store: RunStore, spec: RunSpec
) -> None:
    def elsewhere() -> None:
        kubernetes.while_listing = None
        run_id = store.create(spec)[0].run_id
        kubernetes.jobs["theirs"] = loop.cluster.template.of_run(run_id, "theirs")

    kubernetes.while_listing = elsewhere
    loop.tick()
    assert list(kubernetes.jobs) == ["theirs"]


def test_a_job_that_is_gone_is_none_to_delete(loop: TrainerJobs, kubernetes: KubernetesStandIn, store: RunStore, spec: RunSpec) -> None:
    run_id = store.create(spec)[0].run_id
    loop.tick()
    kubernetes.delete_first = True
    store.lifecycle(run_id).move(Action.CANCEL)
    assert loop.tick() == LOOK_SECONDS
    assert kubernetes.jobs == {}


def test_a_run_that_is_resumed_gets_a_new_job_and_one_that_is_cancelled_loses_it(
    loop: TrainerJobs, kubernetes: KubernetesStandIn, store: RunStore, spec: RunSpec
) -> None:
    run_id = store.create(spec)[0].run_id
    loop.tick()
    (first,) = kubernetes.jobs
    store.lifecycle(run_id).move(Action.PAUSE)
    loop.tick()
    assert kubernetes.jobs == {}
    assert ("delete", {"propagationPolicy": "Background"}) in kubernetes.asked
    store.lifecycle(run_id).move(Action.RESUME)
    loop.tick()
    (second,) = kubernetes.jobs
    assert first != second
    kubernetes.set_status(second, active=1, ready=1)
    store.lifecycle(run_id).move(Action.CANCEL)
    loop.tick()
    assert list(kubernetes.jobs) == [second], "its trainer is there, and ends by itself"
    kubernetes.set_status(second, active=1, ready=0)
    loop.tick()
    assert kubernetes.jobs == {}


def test_a_job_that_kubernetes_gives_up_is_told_of_once_and_replaced_when_the_run_was_queued_again(
    loop: TrainerJobs, kubernetes: KubernetesStandIn, store: RunStore, spec: RunSpec, registry: CollectorRegistry
) -> None:
    run_id = store.create(spec)[0].run_id
    loop.tick()
    (first,) = kubernetes.jobs
    kubernetes.end(first, "Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
    for _ in range(3):
        loop.tick()
    assert list(kubernetes.jobs) == [first], "it never had its run: another one would fare no better"
    created, failed = told(store, run_id)
    assert failed.event == "trainer_job_failed"
    assert "BackoffLimitExceeded: Job has reached the specified backoff limit. Another one follows" in failed.text
    assert registry.get_sample_value("offbeat_trainer_job_failures_total", {"reason": "given_up"}) == 1
    lifecycle = store.lifecycle(run_id)
    lifecycle.move(Action.ASSIGN, trainer="t")
    lifecycle.move(Action.LOSE_TRAINER)
    loop.tick()
    assert set(kubernetes.jobs) - {first} == {created.data["job"].removesuffix("-0") + "-1"}  # type: ignore[union-attr]


@pytest.mark.parametrize(("what", "said"), [("create", "cannot create"), ("quota", "exceeded quota"), ("list", "cannot list")])
def test_a_refusal_is_told_once_with_its_reason_and_tried_again(
    loop: TrainerJobs, kubernetes: KubernetesStandIn, store: RunStore, spec: RunSpec, what: str, said: str, registry: CollectorRegistry
) -> None:
    run_id = store.create(spec)[0].run_id
    kubernetes.forbidden, kubernetes.quota = ({what} - {"quota"}, 0 if what == "quota" else 99)
    pauses = [loop.tick() for _ in range(6)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE
    (refused,) = told(store, run_id)
    assert refused.event == "trainer_job_refused"
    assert said in refused.text
    assert refused.data["status"] == 403
    assert registry.get_sample_value("offbeat_trainer_job_failures_total", {"reason": "refused"}) == 6
    kubernetes.forbidden, kubernetes.quota = set(), 99
    assert loop.tick() == LOOK_SECONDS
    assert [event.event for event in told(store, run_id)] == ["trainer_job_refused", "trainer_job_created"]


def test_a_delete_that_is_refused_keeps_nobody_from_a_job(loop: TrainerJobs, kubernetes: KubernetesStandIn, store: RunStore, spec: RunSpec) -> None:
    unwanted = store.create(spec)[0].run_id
    loop.tick()
    store.lifecycle(unwanted).move(Action.CANCEL)
    wanted = store.create(spec)[0].run_id
    kubernetes.forbidden = {"delete"}
    assert loop.tick() > LOOK_SECONDS
    assert sorted(runs_of(kubernetes).values()) == sorted([unwanted, wanted])


GARBAGE = {
    "a proxy that knows of nothing": PlainTextResponse("no healthy upstream", 503),
    "an error without a type": Response(status_code=500, headers={}),
    "an overloaded server": Response('{"kind": "Status", "code": 429, "message": "slow down"}', 429, media_type="application/json"),
    "a page for people": PlainTextResponse("<html>Sign in</html>", 200),
    "an error that is no JSON": Response("{", 500, media_type="application/json"),
}


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=GARBAGE)
def test_an_api_server_that_answers_nonsense_is_waited_for(
    loop: TrainerJobs, kubernetes: KubernetesStandIn, store: RunStore, spec: RunSpec, answer: Response, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = store.create(spec)[0].run_id
    kubernetes.broken = answer
    with caplog.at_level(logging.INFO, "services.control_plane.trainer_jobs"):
        assert [loop.tick() for _ in range(3)] == [2 * LOOK_SECONDS, 4 * LOOK_SECONDS, 8 * LOOK_SECONDS]
        assert len(caplog.records) == 1, "said once"
        assert told(store, run_id) == []
        kubernetes.broken = None
        assert loop.tick() == LOOK_SECONDS
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert list(runs_of(kubernetes).values()) == [run_id]


def test_an_api_server_that_is_away_is_waited_for(
    tmp_path: Path, template: Path, store: RunStore, spec: RunSpec, monkeypatch: pytest.MonkeyPatch, registry: CollectorRegistry
) -> None:
    run_id = store.create(spec)[0].run_id
    stand_in = KubernetesStandIn(tmp_path)
    loop = TrainerJobs(Cluster(JobTemplate.read(template)), store, ControlPlaneMetrics(registry), limit=2)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert loop.tick() == 2 * LOOK_SECONDS, "no configuration"
    monkeypatch.setenv("KUBECONFIG", str(stand_in.kubeconfig))
    assert loop.tick() == 4 * LOOK_SECONDS, "nobody listens"
    with stand_in.up():
        assert loop.tick() == LOOK_SECONDS
    assert list(runs_of(stand_in).values()) == [run_id]
    assert loop.tick() == 2 * LOOK_SECONDS, "away again"
    with stand_in.up():
        assert loop.tick() == LOOK_SECONDS
    assert registry.get_sample_value("offbeat_trainer_job_failures_total", {"reason": "unreachable"}) == 3


def test_a_token_that_was_rotated_is_read_again(loop: TrainerJobs, kubernetes: KubernetesStandIn, store: RunStore, spec: RunSpec) -> None:
    loop.tick()
    kubernetes.give_token("second")
    assert loop.tick() == LOOK_SECONDS, "the old one lives a while yet"
    kubernetes.tokens = {"second"}
    run_id = store.create(spec)[0].run_id
    assert loop.tick() == LOOK_SECONDS
    assert list(runs_of(kubernetes).values()) == [run_id]


def test_jobs_of_others_are_left_alone(loop: TrainerJobs, kubernetes: KubernetesStandIn) -> None:
    kubernetes.jobs["theirs"] = {"metadata": {"name": "theirs", "labels": {"offbeat/template": "another-trainer"}}}
    loop.tick()
    assert list(kubernetes.jobs) == ["theirs"]


# -- the control plane ------------------------------------------------------------------------------------------------------------------


def settings(redis_url: str, folder: Path, **fields: Any) -> Settings:
    for name in ("token", "cluster-token"):
        (folder / name).write_text("a-token-of-sixteen-and-more")
    return Settings(redis_url=redis_url, token_file=folder / "token", cluster_token_file=folder / "cluster-token", **fields)


def test_a_control_plane_makes_jobs_where_it_has_a_template(redis_url: str, tmp_path: Path, template: Path) -> None:
    def loops(**fields: Any) -> list[str]:
        return [loop.name for loop in ControlPlane(settings(redis_url, tmp_path, **fields)).loops]

    assert loops(trainer_job_template=template) == [*loops(), "trainer jobs"]
    template.write_text(MANIFEST.replace("backoffLimit: 6", "backoffLimit: six"))
    with pytest.raises(BadTemplate, match="Expected `int"):
        loops(trainer_job_template=template)


def test_a_control_plane_with_a_template_that_is_none_does_not_start(redis_url: str, tmp_path: Path) -> None:
    needed = settings(redis_url, tmp_path)
    environment = {
        "OFFBEAT_REDIS_URL": redis_url, "OFFBEAT_TOKEN_FILE": str(needed.token_file), "OFFBEAT_CLUSTER_TOKEN_FILE": str(needed.cluster_token_file),
        "OFFBEAT_TRAINER_JOB_TEMPLATE": str(tmp_path / "none.yaml"),
    }  # fmt: skip
    argv = [sys.executable, "-m", "services.control_plane"]
    ended = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == CANNOT_START
    assert "cannot read the template" in ended.stdout + ended.stderr


def test_whoever_is_not_on_kubernetes_loads_no_client_of_it() -> None:
    program = "import sys, services.control_plane.__main__; sys.exit('lightkube' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == 0


# -- trainers of one run ----------------------------------------------------------------------------------------------------------------


class PinnedTrainer:
    """The trainer process of a Job, in a thread, without a model: to train is to run and to wait until it may end."""

    def __init__(self, redis_url: str, member: str, only_run: str) -> None:
        self.settings, self.shutdown = Settings(redis_url=redis_url, member=member, trainer_run=only_run), Shutdown()
        self.trainer = process.Trainer(self.settings, CollectorRegistry(), self.shutdown, Ranks())
        self.status: int | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.status = self.trainer.run()

    def ended(self) -> int | None:
        self.thread.join(timeout=30)
        return self.status


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set it, and what is being trained completes."""
    may_complete = threading.Event()

    def session(bus: Bus, run_id: str, *, settings: Settings, shutdown: Shutdown, **_: Any) -> Any:
        lifecycle = RunStore(bus).lifecycle(run_id)
        lifecycle.move(Action.START, holder=settings.member)
        return SimpleNamespace(announced=0, version=0, close=lambda: None, lifecycle=lifecycle, shutdown=shutdown, member=settings.member)

    def train(session: Any) -> None:
        while not session.shutdown.asked and session.lifecycle.state() is RunState.RUNNING:
            if may_complete.wait(0.05):
                session.lifecycle.move(Action.COMPLETE, holder=session.member)

    monkeypatch.setattr(process, "Session", session)
    monkeypatch.setattr(process, "train", train)
    return may_complete


def test_a_queued_run_gets_a_job_whose_trainer_takes_that_run_and_ends_with_it(
    loop: TrainerJobs, kubernetes: KubernetesStandIn, bus: Bus, redis_url: str, store: RunStore, spec: RunSpec, stubs: Stubs, trained: threading.Event
) -> None:
    scheduler = Scheduler(store, Fleet(bus), ControlPlaneMetrics(CollectorRegistry()), settle=0.0)
    old, new = store.create(spec)[0].run_id, store.create(spec)[0].run_id
    loop.tick()
    of = {run_id: name for name, run_id in runs_of(kubernetes).items()}
    stubs.beat("s1", Role.ROLLOUT)
    stubs.beat("s2", Role.ROLLOUT)

    second = PinnedTrainer(redis_url, f"{of[new]}-pod", runs_of(kubernetes)[of[new]])
    wait_until(lambda: [m.only_run for m in Fleet(bus).members(role=Role.TRAINER)] == [new], seconds=30)
    scheduler.tick()
    assert store.get(old).state is RunState.QUEUED, "the older one waits for the trainer of its own"
    wait_until(lambda: store.get(new).state is RunState.RUNNING, seconds=30)

    first = PinnedTrainer(redis_url, f"{of[old]}-pod", runs_of(kubernetes)[of[old]])
    for server in ("s1", "s2"):
        stubs.beat(server, Role.ROLLOUT)
    wait_until(lambda: len(Fleet(bus).members(role=Role.TRAINER)) == 2, seconds=30)
    trained.set()
    assert second.ended() == 0
    assert store.get(new).state is RunState.COMPLETED
    stubs.work()
    scheduler.tick()  # its servers are free again
    stubs.work()
    scheduler.tick()
    wait_until(lambda: store.get(old).state is RunState.COMPLETED, seconds=30)
    assert first.ended() == 0
    assert store.get(old).trainer == f"{of[old]}-pod"
    assert [m.member_id for m in Fleet(bus).members(role=Role.TRAINER)] == []


@pytest.mark.parametrize("action", [Action.PAUSE, Action.CANCEL, Action.FAIL])
def test_a_trainer_whose_run_leaves_it_before_it_began_ends_in_order(
    redis_url: str, store: RunStore, spec: RunSpec, action: Action, trained: threading.Event
) -> None:
    run_id = store.create(spec)[0].run_id
    waiting = PinnedTrainer(redis_url, "t", run_id)
    wait_until(lambda: waiting.trainer.connected, seconds=30)
    assert waiting.status is None
    store.lifecycle(run_id).move(action)
    assert waiting.ended() == 0


def test_a_trainer_that_is_asked_to_end_before_its_run_is_over_says_so(
    bus: Bus, redis_url: str, store: RunStore, spec: RunSpec, trained: threading.Event
) -> None:
    run_id = store.create(spec)[0].run_id
    waiting = PinnedTrainer(redis_url, "t", run_id)
    wait_until(lambda: waiting.trainer.connected, seconds=30)
    waiting.shutdown.ask()
    assert waiting.ended() == process.UNFINISHED
    lifecycle = store.lifecycle(run_id)
    busy = PinnedTrainer(redis_url, "u", run_id)
    lifecycle.move(Action.ASSIGN, trainer="u")
    Fleet(bus).assign("u", run_id)
    wait_until(lambda: lifecycle.state() is RunState.RUNNING, seconds=30)
    busy.shutdown.ask()
    assert busy.ended() == process.UNFINISHED


def test_a_process_tells_whoever_started_it_whether_its_run_is_over(bus: Bus, redis_url: str, store: RunStore, spec: RunSpec, tmp_path: Path) -> None:
    (tmp_path / "cluster-token").write_text("a-token-of-sixteen-and-more")
    run_id = store.create(spec)[0].run_id
    told = {"OFFBEAT_REDIS_URL": redis_url, "OFFBEAT_CLUSTER_TOKEN_FILE": str(tmp_path / "cluster-token"), "OFFBEAT_PORT": str(free_port())}
    trainer = subprocess.Popen([sys.executable, "-m", "trainer"], env=os.environ | told | {"OFFBEAT_MEMBER": "pod", ONLY_RUN: run_id})
    try:
        wait_until(lambda: [m.only_run for m in Fleet(bus).members(role=Role.TRAINER)] == [run_id], seconds=120)
        trainer.terminate()
        assert trainer.wait(timeout=60) == process.UNFINISHED
    finally:
        trainer.kill()
        trainer.wait()


def test_a_trainer_of_a_run_that_nobody_knows_ends(redis_url: str, trained: threading.Event) -> None:
    assert PinnedTrainer(redis_url, "t", "gone").ended() == 0
