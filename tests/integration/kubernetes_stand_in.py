"""As much of the Kubernetes API over HTTP as Jobs need: create, list, delete, with the answers that a real one gives when it will not."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from services.runtime.process import serving
from tests.integration.conftest import free_port

NAMESPACE = "rl"
JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"


def status(code: int, reason: str, message: str) -> JSONResponse:
    return JSONResponse({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message}, code)


@dataclass
class KubernetesStandIn:
    """One namespace of a cluster in which no controller runs: Jobs stay as the test leaves them."""

    folder: Path
    port: int = field(default_factory=free_port)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=lambda: {"first"})
    forbidden: set[str] = field(default_factory=set)
    """Verbs that the service account has no right to."""
    quota: int = 99
    """As many Jobs may there be."""
    broken: Response | None = None
    """What is answered instead."""
    while_listing: Callable[[], None] | None = None
    """What happens elsewhere while a list is being made."""
    delete_first: bool = False
    """Somebody else deletes a Job just before."""
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Methods and parameters of the requests."""

    def __post_init__(self) -> None:
        self.give_token("first")
        user = {"name": "us", "user": {"tokenFile": str(self.folder / "kube-token")}}
        config = {
            "current-context": "c", "clusters": [{"name": "k", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}], "users": [user],
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "us", "namespace": NAMESPACE}}],
        }  # fmt: skip
        self.kubeconfig.write_text(yaml.safe_dump(config))

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "kubeconfig"

    def give_token(self, token: str) -> None:
        (self.folder / "kube-token").write_text(token)

    def set_status(self, name: str, **fields: Any) -> None:
        self.jobs[name]["status"] = fields

    def end(self, name: str, kind: str, reason: str = "", message: str = "") -> None:
        self.set_status(name, conditions=[{"type": kind, "status": "True", "reason": reason, "message": message}])

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        with serving(self._app(), host="127.0.0.1", port=self.port):
            yield

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def gate(request: Request, go_on: Any) -> Response:
            verb = {"GET": "list", "POST": "create", "DELETE": "delete"}[request.method]
            self.asked.append((verb, dict(request.query_params)))
            if self.broken is not None:
                return self.broken
            if request.headers.get("authorization", "").removeprefix("Bearer ") not in self.tokens:
                return status(401, "Unauthorized", "Unauthorized")
            if verb in self.forbidden:
                return status(403, "Forbidden", f'jobs.batch is forbidden: User "sa" cannot {verb} resource "jobs"')
            answer: Response = await go_on(request)
            return answer

        @app.get(JOBS)
        def listed(labelSelector: str = "") -> Any:  # as Kubernetes writes it
            if self.while_listing is not None:
                self.while_listing()
            key, _, value = labelSelector.partition("=")
            found = [job for job in self.jobs.values() if not key or job["metadata"].get("labels", {}).get(key) == value]
            return {"kind": "JobList", "apiVersion": "batch/v1", "metadata": {"resourceVersion": "1"}, "items": found}

        @app.post(JOBS, status_code=201)
        async def created(request: Request) -> Any:
            job = json.loads(await request.body())
            name = job["metadata"]["name"]
            if name in self.jobs:
                return status(409, "AlreadyExists", f'jobs.batch "{name}" already exists')
            if len(self.jobs) >= self.quota:
                return status(403, "Forbidden", f'jobs.batch "{name}" is forbidden: exceeded quota: compute')
            self.jobs[name] = job
            return job

        @app.delete(JOBS + "/{name}")
        def deleted(name: str) -> Any:
            if self.delete_first:
                self.jobs.pop(name)
            if self.jobs.pop(name, None) is None:
                return status(404, "NotFound", f'jobs.batch "{name}" not found')
            return {"kind": "Status", "apiVersion": "v1", "status": "Success"}

        return app
