"""Which Kubernetes Jobs there should be: one for each run that wants a trainer. Pure functions of the runs and the Jobs that there are."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from services.contracts.states import WANTS_TRAINER, RunState
from services.control_plane.store import Run, digest

MADE_OF = "offbeat/template"
"""Label: name of the template that a Job was made of, by which it is found again."""
RUN = "offbeat/run"
"""Annotation: id of the run; and label, of which Kubernetes allows the first 63 characters."""
LONGEST_LABEL = 63
LONGEST_NAME = 57
"""Kubernetes adds six characters for a pod's name, and keeps no more than 63."""
ONLY_RUN = "OFFBEAT_TRAINER_RUN"


class BadTemplate(ValueError):
    """The manifest is none that Jobs of trainers can be made of; the text says why."""


@dataclass(frozen=True)
class TrainerJob:
    """A Job of ours, as the cluster has it."""

    name: str
    run_id: str
    ready: bool = False
    """A trainer of it works or waits."""
    over: bool = False
    """Its trainer has ended in order, or Kubernetes has given it up."""
    failure: str | None = None
    """Why Kubernetes has given it up."""


@dataclass(frozen=True)
class JobPlan:
    create: tuple[tuple[Run, str], ...] = ()
    """Runs with the name of the Job that each gets."""
    delete: tuple[str, ...] = ()


def plan_jobs(runs: Sequence[Run], jobs: Sequence[TrainerJob], *, limit: int, template: str) -> JobPlan:
    """What is to be made and deleted. `runs` are oldest first, at most `limit` Jobs are active, `template` is the name of their template.

    Only a queued run gets a Job: one on the fleet has a trainer, and is queued again when that is lost. While its Job is active it gets no other:
    Kubernetes starts that one's trainer again. A trainer that has begun ends by itself when nobody wants it: only Jobs without one are deleted.
    """
    active = [job for job in jobs if not job.over]
    wanted = {run.run_id for run in runs if run.state in WANTS_TRAINER}
    unwanted = tuple(sorted(job.name for job in active if job.run_id not in wanted and not job.ready))
    served, there = {job.run_id for job in active}, {job.name for job in jobs}
    named = [(run, job_name(template, run)) for run in runs if run.state is RunState.QUEUED and run.run_id not in served]
    fresh = [(run, name) for run, name in named if name not in there]
    return JobPlan(create=tuple(fresh[: max(0, limit - len(active))]), delete=unwanted)


def job_name(template: str, run: Run) -> str:
    """The same for every control plane, and another one each time that the run is queued again."""
    unique = f"-{digest(run.run_id)[:10]}-{run.requeued}"
    readable = re.sub(r"[^a-z0-9]+", "-", f"{template}-{run.run_id}".lower())
    return readable[: LONGEST_NAME - len(unique)].strip("-") + unique


@dataclass(frozen=True)
class JobTemplate:
    """The manifest of a Job whose first container is a trainer."""

    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def namespace(self) -> str | None:
        """None: that of the service account."""
        return self.manifest["metadata"].get("namespace")

    @classmethod
    def read(cls, path: Path) -> JobTemplate:
        """Raises BadTemplate."""
        try:
            manifest = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise BadTemplate(f"cannot read the template {path}: {error}") from error
        match manifest:
            case {
                "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": str()},
                "spec": {"template": {"spec": {"containers": [dict() as container, *_]}}},
            }:  # fmt: skip
                if any(variable.get("name") == ONLY_RUN for variable in container.get("env", [])):
                    raise BadTemplate(f"the template {path} sets {ONLY_RUN}: the control plane does, for each run")
                return cls(manifest)
        raise BadTemplate(f"the template {path} is no Job of batch/v1 with a name and a container")

    def of_run(self, run_id: str, name: str) -> dict[str, Any]:
        """The manifest of the Job `name` for this run."""
        made = copy.deepcopy(self.manifest)
        pod = made["spec"]["template"]
        for metadata in (made["metadata"], pod.setdefault("metadata", {})):
            metadata.setdefault("labels", {}).update({MADE_OF: self.name, RUN: run_id[:LONGEST_LABEL].rstrip("-._")})
            metadata.setdefault("annotations", {})[RUN] = run_id
        made["metadata"]["name"] = name
        pod["spec"]["containers"][0].setdefault("env", []).append({"name": ONLY_RUN, "value": run_id})
        return made
