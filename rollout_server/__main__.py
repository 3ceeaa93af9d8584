"""A rollout server: waits for a run, starts vLLM with the run's model, serves the run, and waits for the next.

A run with another model gets a fresh process image.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time

from prometheus_client import CollectorRegistry

from rollout_server.app import create_app
from rollout_server.engine import Engine, VllmEngine
from rollout_server.engine_metrics import EngineMetrics
from rollout_server.worker import RolloutWorker
from services.contracts.messages import Member, Role
from services.contracts.spec import Model
from services.runtime import logs
from services.runtime.bus import Bus, without_redis
from services.runtime.fleet import Fleet, Heartbeat
from services.runtime.ledger import Ledger, NotOurs
from services.runtime.metrics import RolloutMetrics
from services.runtime.process import IdleClock, Shutdown, serving
from services.runtime.settings import Settings
from services.runtime.tokenizer import PromptTokenizer

log = logging.getLogger("rollout_server")


class RolloutServer:
    """The process: its engine, the run that it serves, and what it says of itself."""

    def __init__(self, settings: Settings, registry: CollectorRegistry) -> None:
        self.settings, self.metrics = settings, RolloutMetrics(registry)
        registry.register(EngineMetrics())
        self.bus = Bus(settings.redis_url)
        self.metrics.watch_store(lambda: self.bus.away)
        self.loop = asyncio.get_event_loop()
        self.worker: RolloutWorker | None = None
        self.engine: Engine | None = None
        self.model: Model | None = None
        self.connected = False
        self.idle, self.detail = IdleClock(), "waits for a run"
        self.started_at = time.time()
        self.heartbeat = Heartbeat(Fleet(self.bus), self.describe)

    def describe(self) -> Member:
        worker = self.worker
        self.metrics.store_away.set(self.bus.away_seconds)
        self.metrics.idle.set(self.idle.total)
        return Member(
            member_id=self.settings.member, role=Role.ROLLOUT, url=self.settings.url, pid=os.getpid(), host=socket.gethostname(),
            run_id=worker.run_id if worker else None, version=worker.version if worker else None, ready=self.ready() is None,
            idle_seconds=self.idle.total, detail=self.detail, started_at=self.started_at,
        )  # fmt: skip

    def ready(self) -> str | None:
        """What is missing before it can generate; a server without a run misses nothing."""
        worker = self.worker
        if not self.connected:
            return "waits for Redis"
        if worker is None:
            return None if self.model is None or self.engine is not None else self.detail
        return None if worker.version is not None else "waits for the run's weights"

    async def run(self, shutdown: Shutdown) -> None:
        self.heartbeat.start()
        try:
            while not shutdown.asked:
                run_id = self.heartbeat.assigned or await asyncio.to_thread(self.heartbeat.beat)
                if run_id is None:
                    with self.idle.waiting():
                        await asyncio.sleep(0.2)
                        continue
                await self.serve(run_id, shutdown)
        finally:
            if self.engine is not None:
                await self.engine.stop()
            self.heartbeat.stop()

    async def serve(self, run_id: str, shutdown: Shutdown) -> None:
        """Serve one run until it is no longer this server's."""
        try:
            spec = await asyncio.to_thread(Ledger(self.bus, run_id).spec)
        except NotOurs:
            await asyncio.sleep(0.5)
            return
        logs.stamp(run=run_id)
        log.info("serves the run", extra={"model": spec.model.path})
        await self.start_engine(spec.model)
        assert self.engine is not None
        self.worker = RolloutWorker(
            self.bus, run_id, spec, engine=self.engine, tokenizer=PromptTokenizer(spec.model.path), member=self.settings.member,
            max_sequences=self.settings.max_sequences, metrics=self.metrics, idle=self.idle,
        )  # fmt: skip
        self.detail = f"serves {run_id}"
        serving_run = asyncio.create_task(self.worker.serve())
        while not serving_run.done() and not shutdown.asked and self.heartbeat.assigned == run_id:
            await asyncio.wait([serving_run], timeout=0.1)
        self.worker.stop()
        await serving_run
        self.worker, self.detail = None, "waits for a run"
        logs.stamp(run=None)
        if not shutdown.asked:
            await asyncio.to_thread(self.heartbeat.beat)  # at once: the next run waits for a free server

    async def start_engine(self, model: Model) -> None:
        """The warm engine serves any run of the same model; another one needs vLLM from its beginning: a new process image under the same pid."""
        if self.engine is not None and self.model == model:
            return
        if self.engine is not None:
            log.info("another model: the process starts over", extra={"model": model.path})
            await self.engine.stop()
            logs.write_the_last()  # a new image would not have them
            os.execv(sys.executable, [sys.executable, "-m", "rollout_server"])
        self.model, self.detail = model, f"starts the engine with {model.path}"
        engine = VllmEngine(model, max_num_seqs=self.settings.max_sequences, kv_cache_bytes=self.settings.kv_cache_bytes)
        await engine.start()
        self.engine = engine


async def main() -> None:
    settings = Settings()
    logs.set_up_member(Role.ROLLOUT, settings)
    shutdown = Shutdown().install()
    registry = CollectorRegistry()
    server = RolloutServer(settings, registry)
    with serving(create_app(server, cluster_token=settings.cluster_token, registry=registry), host=settings.host, port=settings.port):
        shutdown.then(server.bus.hurry)
        await asyncio.to_thread(server.bus.check_version)
        server.connected = True
        await server.run(shutdown)


if __name__ == "__main__":
    with without_redis():
        asyncio.run(main())
