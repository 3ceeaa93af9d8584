"""The rollout server's HTTP routes: health, metrics, and weights, which only processes of the fleet may send."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from fastapi import Depends, FastAPI
from prometheus_client import CollectorRegistry

from rollout_server.engine import WeightLoadFailed
from rollout_server.worker import NotServing, RolloutWorker
from services.contracts.messages import LoadedWeights, LoadWeights
from services.runtime.web import Problem, base_app, bearer

T = TypeVar("T")


class Server(Protocol):
    """What the routes need of the process."""

    loop: asyncio.AbstractEventLoop

    @property
    def worker(self) -> RolloutWorker | None: ...

    def ready(self) -> str | None: ...


def create_app(server: Server, *, cluster_token: str, registry: CollectorRegistry, load_timeout: float = 600.0) -> FastAPI:
    """Routes of one rollout server. Requests are served from a thread; the engine's work is done on the server's own loop."""
    app = base_app(title="Offbeat rollout server", description="Loads weights; its work comes over the bus.", registry=registry, ready=server.ready)

    def on_loop(do: Callable[[RolloutWorker], Awaitable[T]], run_id: str) -> T:
        worker = server.worker
        if worker is None or worker.run_id != run_id:
            raise Problem(409, "Not serving this run", f"this server serves {worker.run_id if worker else 'no run'}, not {run_id}")

        async def call() -> T:
            return await do(worker)

        try:
            return asyncio.run_coroutine_threadsafe(call(), server.loop).result(timeout=load_timeout)
        except NotServing as error:
            raise Problem(409, "Not serving this run", str(error)) from error
        except WeightLoadFailed as error:
            raise Problem(502, "Weights not loaded", str(error)) from error
        except TimeoutError as error:
            raise Problem(504, "Weights not loaded in time", f"no answer from the engine in {load_timeout:g} s") from error

    @app.post("/v1/weights", dependencies=[Depends(bearer(cluster_token))], summary="Load a version of the policy between two tokens")
    def load(request: LoadWeights) -> LoadedWeights:
        return on_loop(lambda worker: worker.load(request), request.run_id)

    @app.post("/v1/runs/{run_id}/fence", dependencies=[Depends(bearer(cluster_token))], summary="Give up the weights and the groups in hand")
    def fence(run_id: str) -> dict[str, str]:
        on_loop(lambda worker: worker.fence(), run_id)
        return {"status": "fenced"}

    return app
