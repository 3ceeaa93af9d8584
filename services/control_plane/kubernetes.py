"""The Kubernetes API, as far as it is needed to make Jobs: create, list, delete. Nothing else of ours speaks to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import msgspec
from lightkube import Client, KubeConfig
from lightkube.core.exceptions import ConfigError
from lightkube.resources.batch_v1 import Job
from lightkube.types import CascadeType

from services.control_plane.job_plan import MADE_OF, RUN, BadTemplate, JobTemplate, TrainerJob

SECONDS = 10.0
"""As long may an answer take."""
NOT_FOUND, CONFLICT, TOO_MANY = 404, 409, 429


class Unreachable(ConnectionError):
    """The API server does not answer, or cannot now: it may later."""


class Refused(RuntimeError):
    """The API server has understood, and says no; the text says why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{text} ({status})")
        self.status = status


class Cluster:
    """The Jobs that are made of one template. For one thread.

    In a pod it is that pod's service account who asks, else KUBECONFIG. A token that was rotated is read again.
    """

    def __init__(self, template: JobTemplate) -> None:
        """Raises BadTemplate."""
        self.template = template
        self._client: Client | None = None
        try:
            self._job("run", "name")
        except msgspec.ValidationError as error:
            raise BadTemplate(f"the template {template.name} is no Job of batch/v1: {error}") from error

    def jobs(self) -> list[TrainerJob]:
        """Raises Unreachable, Refused."""
        with self._asking() as client:
            found = client.list(Job, namespace=self.template.namespace, labels={MADE_OF: self.template.name})
            return [_seen(job) for job in found]

    def create(self, run_id: str, name: str) -> bool:
        """Make a Job for the run; False when there is one of that name already. Raises Unreachable, Refused."""
        try:
            with self._asking() as client:
                client.create(self._job(run_id, name), namespace=self.template.namespace)
        except Refused as error:
            if error.status == CONFLICT:
                return False
            raise
        return True

    def delete(self, name: str) -> None:
        """Delete the Job, and its pods after it. One that is gone is none to delete. Raises Unreachable, Refused."""
        try:
            with self._asking() as client:
                client.delete(Job, name, namespace=self.template.namespace, cascade=CascadeType.BACKGROUND)
        except Refused as error:
            if error.status != NOT_FOUND:
                raise

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _job(self, run_id: str, name: str) -> Job:
        return msgspec.convert(self.template.of_run(run_id, name), Job)

    @contextmanager
    def _asking(self) -> Iterator[Client]:
        """A connection; what goes wrong with it, in two kinds."""
        try:
            if self._client is None:
                self._client = Client(KubeConfig.from_env(), timeout=httpx2.Timeout(SECONDS), trust_env=False)
            yield self._client
        except httpx2.HTTPStatusError as error:
            status = error.response.status_code
            if status < 500 and status != TOO_MANY:
                raise Refused(status, str(error)) from error
            raise Unreachable(f"{error} ({status})") from error
        # No configuration, no connection, an answer that is no Job; KeyError: lightkube takes an error without a Content-Type for impossible.
        except (ConfigError, httpx2.HTTPError, OSError, ValueError, KeyError) as error:
            self.close()  # certificates, too, may have been renewed: the next try reads all anew
            raise Unreachable(f"{type(error).__name__}: {error}") from error


def _seen(job: Job) -> TrainerJob:
    metadata, status = job.metadata, job.status
    ends = {c.type: c for c in (status.conditions if status else None) or [] if c.status == "True" and c.type in ("Complete", "Failed")}
    failed = ends.get("Failed")
    return TrainerJob(
        name=(metadata.name if metadata else None) or "",
        run_id=((metadata.annotations if metadata else None) or {}).get(RUN, ""),
        ready=bool(status and status.ready),
        over=bool(ends),
        failure=None if failed is None else f"{failed.reason or 'Failed'}: {failed.message or 'no message'}",
    )
