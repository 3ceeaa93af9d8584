"""The loop that makes a Kubernetes Job for each run that wants a trainer.

    consumes     run states, the Jobs that there are
    produces     Jobs, and an event in the run for each that was made, refused or given up
    waits for    a queued run
    unblocked by a run that is submitted, resumed or lost; a Job that ends and leaves room

`plan_jobs` decides. A Job's name follows from the run and from how often it was queued: after a crash between making a Job and telling of it, or with
two control planes for a moment, the second one finds that it is there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from services.contracts.messages import Severity
from services.contracts.states import RunState
from services.control_plane.job_plan import TrainerJob, job_name, plan_jobs
from services.control_plane.kubernetes import Cluster, Refused, Unreachable
from services.control_plane.store import Run, RunStore
from services.runtime.metrics import ControlPlaneMetrics

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
LONGEST_PAUSE = 30.0
"""Between tries, while the API server does not answer or refuses."""


class TrainerJobs:
    """Applies `plan_jobs` again and again. One thread calls `tick`."""

    def __init__(self, cluster: Cluster, store: RunStore, metrics: ControlPlaneMetrics, *, limit: int) -> None:
        self.cluster, self.store, self.metrics, self.limit = cluster, store, metrics, limit
        self._pause = LOOK_SECONDS
        self._trouble: str | None = None
        self._refused: dict[str, int] = {}
        """Status of the last refusal, by the run that was told of it."""
        self._given_up: set[str] = set()
        """Names of Jobs whose failure was told."""

    def tick(self) -> float:
        """Look at runs and Jobs once, and do what follows; seconds to wait before the next tick."""
        try:
            trouble = self._tick()
        except Unreachable as error:
            self.metrics.job_failures.labels("unreachable").inc()
            trouble = f"the Kubernetes API cannot be reached: {error}"
        if trouble is not None and self._trouble is None:
            log.warning("Jobs of trainers have to wait", extra={"error": trouble})
        elif trouble is None and self._trouble is not None:
            log.info("Jobs of trainers are made again")
        self._trouble = trouble
        self._pause = LOOK_SECONDS if trouble is None else min(2 * self._pause, LONGEST_PAUSE)
        return self._pause

    def _tick(self) -> str | None:
        """What was refused, if anything was."""
        try:
            jobs = self.cluster.jobs()  # before the runs: else a Job that another control plane has just made would seem to be nobody's
        except Refused as error:
            for run in self.store.open_runs():
                if run.state is RunState.QUEUED:
                    self._tell_refused(run, error)
            return str(error)
        runs = self.store.open_runs()
        self.metrics.trainer_jobs.set(sum(not job.over for job in jobs))
        self._tell_given_up(runs, jobs)
        planned = plan_jobs(runs, jobs, limit=self.limit, template=self.cluster.template.name)
        refusals = [self._create(run, name) for run, name in planned.create] + [self._delete(name) for name in planned.delete]
        return next((text for text in refusals if text is not None), None)

    def _create(self, run: Run, name: str) -> str | None:
        try:
            made = self.cluster.create(run.run_id, name)
        except Refused as error:
            self._tell_refused(run, error)
            return str(error)
        self._refused.pop(run.run_id, None)
        if made:
            self.store.lifecycle(run.run_id).event("trainer_job_created", f"Job {name} was made for its trainer", data={"job": name})
        return None

    def _delete(self, name: str) -> str | None:
        try:
            self.cluster.delete(name)
        except Refused as error:
            self.metrics.job_failures.labels("refused").inc()
            return str(error)
        log.info("a Job was deleted, whose run wants no trainer any more", extra={"job": name})
        return None

    def _tell_refused(self, run: Run, error: Refused) -> None:
        self.metrics.job_failures.labels("refused").inc()
        if self._refused.get(run.run_id) == error.status:
            return
        self._refused[run.run_id] = error.status
        text = f"Kubernetes refuses a Job for its trainer: {error}. It is asked again every {LONGEST_PAUSE:g} s"
        self.store.lifecycle(run.run_id).event("trainer_job_refused", text, Severity.WARNING, run.version, {"status": error.status})

    def _tell_given_up(self, runs: Sequence[Run], jobs: Sequence[TrainerJob]) -> None:
        by_id = {run.run_id: run for run in runs}
        failed = {job.name: job for job in jobs if job.failure is not None}
        for name in failed.keys() - self._given_up:
            job, run = failed[name], by_id.get(failed[name].run_id)
            self.metrics.job_failures.labels("given_up").inc()
            if run is not None:
                idle = run.state is RunState.QUEUED and name == job_name(self.cluster.template.name, run)
                more = ". Another one follows when this one is removed, or at once when the run is paused and resumed" if idle else ""
                text = f"Kubernetes has given up Job {name}: {job.failure}{more}"
                self.store.lifecycle(run.run_id).event("trainer_job_failed", text, Severity.WARNING, run.version, {"job": name})
        self._given_up = set(failed)
