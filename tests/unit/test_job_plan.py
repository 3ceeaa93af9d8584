"""Which Jobs there should be: for any runs and Jobs, and over the life of a small cluster whose control plane crashes and comes in two."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from services.contracts.spec import RunSpec
from services.contracts.states import WANTS_TRAINER, Action, RunState, next_state
from services.control_plane.job_plan import MADE_OF, ONLY_RUN, RUN, BadTemplate, JobPlan, JobTemplate, TrainerJob, job_name, plan_jobs
from services.control_plane.store import Run

SPEC = RunSpec().model_dump_json().encode()
TEMPLATE = "offbeat-trainer"


def run(run_id: str, state: RunState = RunState.QUEUED, *, requeued: int = 0) -> Run:
    return Run(
        run_id=run_id, spec_json=SPEC, name="x", state=state, reason="", created_at=0.0, started_at=None, ended_at=None, trainer=None, version=None,
        superseded=0, unreadable=0, requeued=requeued,
    )  # fmt: skip


def job(of: Run, **fields: bool | str) -> TrainerJob:
    return dataclasses.replace(TrainerJob(job_name(TEMPLATE, of), of.run_id), **fields)


def plan(runs: list[Run], jobs: list[TrainerJob], limit: int = 9) -> tuple[list[str], list[str]]:
    """Runs that get a Job, and runs whose Job is deleted."""
    planned = plan_jobs(runs, jobs, limit=limit, template=TEMPLATE)
    return [r.run_id for r, _ in planned.create], [found.run_id for name in planned.delete for found in jobs if found.name == name]


def test_the_oldest_queued_runs_get_jobs_as_far_as_there_is_room() -> None:
    runs = [run("a"), run("b", RunState.RUNNING), run("c"), run("d")]
    assert plan(runs, [job(runs[1])], limit=3) == (["a", "c"], [])
    assert plan(runs, [job(runs[1]), job(run("old"), over=True)], limit=3) == (["a", "c"], [])
    assert plan(runs, [job(runs[1])], limit=1) == ([], [])
    assert plan(runs, [], limit=0) == ([], [])


def test_a_run_on_the_fleet_has_a_trainer_whoever_started_it() -> None:
    assert plan([run("a", RunState.RUNNING), run("b", RunState.STARTING)], []) == ([], [])


def test_a_run_whose_job_starts_its_trainer_again_gets_no_other() -> None:
    before, queued_again = run("a"), run("a", requeued=3)
    assert plan([queued_again], [job(before)]) == ([], [])


@pytest.mark.parametrize("failure", ["BackoffLimitExceeded: too often", None])
def test_a_run_that_is_queued_again_after_its_job_has_ended_gets_another_one(failure: str | None) -> None:
    before, queued_again = run("a"), run("a", requeued=1)
    assert plan([queued_again], [dataclasses.replace(job(before), over=True, failure=failure)]) == (["a"], [])
    assert job_name(TEMPLATE, before) != job_name(TEMPLATE, queued_again)


def test_a_job_that_ended_before_it_got_its_run_is_not_made_at_once_again() -> None:
    assert plan([run("a")], [job(run("a"), over=True, failure="BackoffLimitExceeded")]) == ([], [])
    assert plan([run("a")], []) == (["a"], []), "once it is forgotten"


@pytest.mark.parametrize("state", sorted(set(RunState) - WANTS_TRAINER))
def test_jobs_that_nobody_wants_are_deleted_unless_their_trainer_is_there_to_end_by_itself(state: RunState) -> None:
    unwanted = run("a", state)
    assert plan([unwanted], [job(unwanted)]) == ([], ["a"])
    assert plan([unwanted], [job(unwanted, ready=True)]) == ([], [])
    assert plan([unwanted], [job(unwanted, over=True)]) == ([], [])


def test_the_job_of_a_run_that_was_forgotten_is_deleted() -> None:
    assert plan([run("a")], [job(run("gone"))]) == (["a"], ["gone"])


RUNS = st.lists(
    st.builds(run, st.sampled_from("abcd"), st.sampled_from(list(RunState)), requeued=st.integers(0, 2)), unique_by=lambda r: r.run_id, max_size=4
)
JOBS = st.lists(
    st.builds(
        lambda of, ready, over: job(of, ready=ready, over=over),
        st.builds(run, st.sampled_from("abcde"), requeued=st.integers(0, 2)), st.booleans(), st.booleans(),
    ),
    unique_by=lambda j: j.name, max_size=6,
)  # fmt: skip


@given(runs=RUNS, jobs=JOBS, limit=st.integers(0, 4))
def test_whatever_there_is_no_run_gets_two_jobs_and_there_are_never_too_many(runs: list[Run], jobs: list[TrainerJob], limit: int) -> None:
    planned = plan_jobs(runs, jobs, limit=limit, template=TEMPLATE)
    active, by_id = [j for j in jobs if not j.over], {r.run_id: r for r in runs}
    created = [r.run_id for r, _ in planned.create]
    assert len(set(created)) == len(created)
    assert not set(created) & {j.run_id for j in active}
    assert not created or len(active) + len(created) <= limit
    assert {name for _, name in planned.create}.isdisjoint(j.name for j in jobs)
    assert all(by_id[run_id].state is RunState.QUEUED for run_id in created)
    assert [r for r in runs if r.run_id in created] == [r for r, _ in planned.create], "oldest first"
    for name in planned.delete:
        (deleted,) = [j for j in active if j.name == name]
        assert not deleted.ready
        assert deleted.run_id not in by_id or by_id[deleted.run_id].state not in WANTS_TRAINER
    made = [*jobs, *(TrainerJob(name, r.run_id) for r, name in planned.create)]
    left = [j for j in made if j.name not in planned.delete]
    again = plan_jobs(runs, left, limit=limit, template=TEMPLATE)
    assert again.delete == ()
    assert not {r.run_id for r, _ in again.create} & set(created), "what is done needs not be done again"


class SmallCluster(RuleBasedStateMachine):
    """Runs move as they may, Jobs start, fail, end and are forgotten, and a control plane acts on what it saw, perhaps only in part."""

    LIMIT = 2

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, Run] = {}
        self.jobs: dict[str, TrainerJob] = {}
        self.late = JobPlan()
        """What another control plane was about to do when it lost the lease."""

    def queued(self) -> list[Run]:
        return [r for r in self.runs.values() if r.state is RunState.QUEUED]

    def create(self, of: Run, name: str) -> None:
        self.jobs.setdefault(name, TrainerJob(name, of.run_id))  # AlreadyExists else

    @rule()
    def submit(self) -> None:
        if len(self.runs) < 4:
            self.runs[f"r{len(self.runs)}"] = run(f"r{len(self.runs)}")

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), action=st.sampled_from([*Action, Action.RESUME, Action.LOSE_TRAINER]))
    def move(self, data: st.DataObject, action: Action) -> None:
        moved = data.draw(st.sampled_from(list(self.runs.values())))
        try:
            state = next_state(moved.state, action)
        except ValueError:
            return
        again = moved.requeued + (state is RunState.QUEUED)
        self.runs[moved.run_id] = dataclasses.replace(moved, state=state, requeued=again)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), what=st.sampled_from(["starts", "ends", "fails"]))
    def job_goes_on(self, data: st.DataObject, what: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.jobs)))
        if not self.jobs[name].over:
            failure = "BackoffLimitExceeded" if what == "fails" else None
            self.jobs[name] = dataclasses.replace(self.jobs[name], ready=what == "starts", over=what != "starts", failure=failure)

    @rule()
    def jobs_that_are_over_are_forgotten(self) -> None:
        self.jobs = {name: found for name, found in self.jobs.items() if not found.over}
        self.late = JobPlan()  # nobody sleeps for that long

    @rule(crash_after=st.integers(0, 3), lease_lost=st.booleans())
    def tick(self, crash_after: int, lease_lost: bool) -> None:
        planned = plan_jobs(list(self.runs.values()), list(self.jobs.values()), limit=self.LIMIT, template=TEMPLATE)
        for of, name in planned.create[:crash_after]:
            self.create(of, name)
        for name in planned.delete[: max(0, crash_after - len(planned.create))]:
            del self.jobs[name]
        if lease_lost:
            self.late = JobPlan(create=planned.create[:crash_after])

    @rule()
    def the_late_one_does_it_too(self) -> None:
        for of, name in self.late.create:
            self.create(of, name)

    @invariant()
    def no_run_has_two(self) -> None:
        active = [found.run_id for found in self.jobs.values() if not found.over]
        assert len(set(active)) == len(active)
        assert len(active) <= self.LIMIT

    def teardown(self) -> None:
        """Left alone, what is queued and could have a Job has one, and no Job is there in vain."""
        self.jobs_that_are_over_are_forgotten()
        for _ in range(2):  # what was deleted leaves room
            self.tick(crash_after=99, lease_lost=False)
        active = {found.run_id for found in self.jobs.values()}
        assert {r.run_id for r in self.queued()} <= active or len(active) == self.LIMIT
        assert all(self.runs[found.run_id].state in WANTS_TRAINER or found.ready for found in self.jobs.values())


def test_over_the_life_of_a_cluster_no_run_has_two_jobs() -> None:
    run_state_machine_as_test(SmallCluster)


def test_names_are_the_same_for_everybody_and_short_enough_for_pods() -> None:
    known = run("Paper-1.5B_x-20261122-104501-3f9a.an_arm.0", requeued=2)
    name = job_name("offbeat-trainer", known)
    assert name == job_name("offbeat-trainer", run(known.run_id, RunState.RUNNING, requeued=2))
    assert name.startswith("offbeat-trainer-paper-1-5b-x-20261122-104501-")
    assert name.endswith("-2")
    for run_id in ("a", "x" * 90, known.run_id, "study-20261122-104501-3f9a.arm.1"):
        for template in ("t", "r" * 48):
            name = job_name(template, run(run_id, requeued=12345))
            assert len(name) <= 57
            assert name.strip("-").replace("-", "").isalnum()
            assert name == name.lower()
    assert job_name("t" * 60, run("a")) != job_name("t" * 60, run("b"))
    assert job_name("t", run("a.b")) != job_name("t", run("a-b"))


MANIFEST = """
apiVersion: batch/v1
kind: Job
metadata: {name: offbeat-trainer, labels: {app: offbeat}}
spec:
  template:
    spec: {restartPolicy: Never, containers: [{name: trainer, image: offbeat/trainer, env: [{name: A, value: b}]}, {name: beside, image: x}]}
"""


def read(folder: Path, text: str) -> JobTemplate:
    (folder / "job.yaml").write_text(text)
    return JobTemplate.read(folder / "job.yaml")


def test_a_job_is_its_template_with_the_run_in_it(tmp_path: Path) -> None:
    template = read(tmp_path, MANIFEST)
    made = template.of_run("s" * 62 + ".arm.0", "name")
    assert made["metadata"] == {
        "name": "name", "labels": {"app": "offbeat", MADE_OF: "offbeat-trainer", RUN: "s" * 62}, "annotations": {RUN: "s" * 62 + ".arm.0"},
    }  # fmt: skip
    pod = made["spec"]["template"]
    assert pod["metadata"]["labels"][RUN] == "s" * 62
    first, second = pod["spec"]["containers"]
    assert first["env"] == [{"name": "A", "value": "b"}, {"name": ONLY_RUN, "value": "s" * 62 + ".arm.0"}]
    assert "env" not in second
    assert template.manifest == yaml.safe_load(MANIFEST), "the next one is made of the same"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (MANIFEST.replace("batch/v1", "v1"), "is no Job of batch/v1"),
        (MANIFEST.replace("kind: Job", "kind: CronJob"), "is no Job of batch/v1"),
        (MANIFEST.replace("containers:", "initContainers:"), "is no Job of batch/v1"),
        (MANIFEST.replace("name: A", f"name: {ONLY_RUN}"), f"sets {ONLY_RUN}"),
        ("a: [", "cannot read the template"),
        ("", "is no Job of batch/v1"),
    ],
)
def test_a_template_that_is_none_is_refused_with_the_reason(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(BadTemplate, match=complaint):
        read(tmp_path, text)


def test_a_template_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadTemplate, match="cannot read the template"):
        JobTemplate.read(tmp_path / "none.yaml")
