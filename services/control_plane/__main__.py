"""The control plane: `python -m services.control_plane` serves the API, schedules runs and dispatches prompts until it is asked to end.

It serves from its first moment and is ready once Redis is there. Any number of control planes may run: all answer, and the one that holds the lease
dispatches.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry

from services.contracts.messages import Member, Role
from services.control_plane.api.deps import Deps
from services.control_plane.app import create_app
from services.control_plane.checks import AskRewardServer
from services.control_plane.collector import Collector
from services.control_plane.dispatcher import Dispatcher
from services.control_plane.job_plan import BadTemplate, JobTemplate
from services.control_plane.lease import Lease
from services.control_plane.loops import Loop
from services.control_plane.scheduler import Scheduler
from services.control_plane.store import EventTail, RunStore
from services.runtime import logs
from services.runtime.bus import Bus, StoreAway, StoreRefuses
from services.runtime.fleet import Fleet, Heartbeat
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.process import Shutdown, serving
from services.runtime.settings import MissingSecret, Settings

log = logging.getLogger("services.control_plane")

API_PATIENCE = 0.5
"""Seconds that a request waits for Redis before it is answered 503."""
LOOP_PATIENCE = 2.0
"""Seconds that the loops wait before they look whether the process is to end."""
CANNOT_START = 2
"""Exit status when something is missing that only a person can give."""


class ControlPlane:
    """The process: its connections, its loops, and what it says of itself."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.registry, self.started_at = settings, CollectorRegistry(), time.time()
        self.shutdown, self.metrics, self.connected = Shutdown(), ControlPlaneMetrics(self.registry), False
        self.api_bus = Bus(settings.redis_url, patience=API_PATIENCE)
        self.loop_bus = Bus(settings.redis_url, patience=LOOP_PATIENCE)
        self.metrics.watch_store(lambda: self.loop_bus.away)
        self.lease = Lease(self.loop_bus, settings.member)
        self.metrics.show_while(lambda: self.lease.held)
        store, fleet = RunStore(self.loop_bus), Fleet(self.loop_bus)
        scheduler = Scheduler(store, fleet, self.metrics)
        self.dispatcher = Dispatcher(self.loop_bus, store, self.metrics, self.shutdown)
        self.loops = [
            Loop("scheduler", scheduler.tick, lease=self.lease, shutdown=self.shutdown),
            Loop("dispatcher", self.dispatcher.tick, lease=self.lease, shutdown=self.shutdown),
            Loop("collector", Collector(store, self.metrics).tick, lease=self.lease, shutdown=self.shutdown),
        ]
        if settings.trainer_job_template is not None:
            self.loops.append(Loop("trainer jobs", self._trainer_jobs(settings.trainer_job_template), lease=self.lease, shutdown=self.shutdown))
        self.heartbeat = Heartbeat(Fleet(Bus(settings.redis_url)), self.describe)
        api_fleet = Fleet(self.api_bus)
        deps = Deps(
            bus=self.api_bus, store=RunStore(self.api_bus), fleet=api_fleet, tail=EventTail(settings.redis_url),
            check_rewards=AskRewardServer(api_fleet, cluster_token=settings.cluster_token), data=settings.data, shutdown=self.shutdown,
        )  # fmt: skip
        self.app = create_app(deps, token=settings.token, registry=self.registry, metrics=self.metrics, ready=self.ready)

    def _trainer_jobs(self, template: Path) -> Callable[[], float]:
        """The tick of the loop that makes them. Raises BadTemplate."""
        from services.control_plane.kubernetes import Cluster  # whoever is not on Kubernetes needs none of it
        from services.control_plane.trainer_jobs import TrainerJobs

        return TrainerJobs(Cluster(JobTemplate.read(template)), RunStore(self.loop_bus), self.metrics, limit=self.settings.trainer_jobs).tick

    def ready(self) -> str | None:
        """What is missing; None when requests can be answered."""
        if not self.connected:
            return "waits for Redis"
        try:
            self.api_bus.call(self.api_bus.redis.ping)
        except StoreAway as error:
            return str(error)
        return None

    def describe(self) -> Member:
        self.metrics.store_away.set(self.loop_bus.away_seconds)
        return Member(
            member_id=self.settings.member, role=Role.CONTROL_PLANE, url=self.settings.url, pid=os.getpid(), host=socket.gethostname(),
            ready=self.connected, detail="dispatches" if self.lease.held else "stands by", started_at=self.started_at,
        )  # fmt: skip

    def run(self) -> None:
        """Serve until asked to end. Raises StoreRefuses, and OSError when the port is taken."""
        with serving(self.app, host=self.settings.host, port=self.settings.port):
            self._connect()
            if self.shutdown.asked:
                return
            self.heartbeat.start()
            for loop in self.loops:
                loop.start()
            while not self.shutdown.wait(1.0):
                pass
            self._drain()

    def _connect(self) -> None:
        while not self.shutdown.asked:
            try:
                log.info("connected", extra={"store": self.loop_bus.check_version()})
                self.connected = True
                return
            except StoreAway as error:
                log.warning("waits for Redis", extra={"error": str(error)})

    def _drain(self) -> None:
        for loop in self.loops:
            loop.join(timeout=5)
        self.dispatcher.close()
        self.heartbeat.fleet.bus.patience = LOOP_PATIENCE  # to say good-bye is not worth waiting for
        try:
            self.lease.release()
            self.heartbeat.stop()
        except StoreAway as error:
            log.warning("ends without a good-bye", extra={"error": str(error)})


def main() -> int:
    settings = Settings()
    logs.set_up_member(Role.CONTROL_PLANE, settings)
    try:
        control_plane = ControlPlane(settings)
        control_plane.shutdown.install()
        control_plane.run()
    except (MissingSecret, BadTemplate, StoreRefuses, OSError) as error:
        log.error("cannot start: %s", error)
        return CANNOT_START
    return 0


if __name__ == "__main__":
    sys.exit(main())
