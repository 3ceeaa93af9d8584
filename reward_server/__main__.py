"""A reward server: judges the completions of every active run until it is asked to end."""

from __future__ import annotations

import os
import socket
import time

from prometheus_client import CollectorRegistry

from reward_server.app import create_app
from reward_server.pool import JudgePools
from reward_server.worker import RewardWorker
from services.contracts.messages import Member, Role
from services.runtime import logs
from services.runtime.bus import Bus, without_redis
from services.runtime.fleet import Fleet, Heartbeat
from services.runtime.metrics import RewardMetrics
from services.runtime.process import IdleClock, Shutdown, serving
from services.runtime.settings import Settings


def main() -> None:
    settings = Settings()
    logs.set_up(role=Role.REWARD, member=settings.member, level=settings.log_level)
    shutdown, registry, idle, started_at = Shutdown().install(), CollectorRegistry(), IdleClock(), time.time()
    metrics, bus, pools = RewardMetrics(registry), Bus(settings.redis_url), JudgePools()
    metrics.watch_store(lambda: bus.away)
    connected = False

    def ready() -> str | None:
        return None if connected else "waits for Redis"

    def describe() -> Member:
        metrics.store_away.set(bus.away_seconds)
        metrics.idle.set(idle.total)
        return Member(
            member_id=settings.member, role=Role.REWARD, url=settings.url, pid=os.getpid(), host=socket.gethostname(), ready=True,
            idle_seconds=idle.total, detail="scores every active run", started_at=started_at,
        )  # fmt: skip

    app = create_app(pools=pools, cluster_token=settings.cluster_token, registry=registry, ready=ready)
    with serving(app, host=settings.host, port=settings.port):
        shutdown.then(bus.hurry)
        bus.check_version()
        connected = True
        heartbeat = Heartbeat(Fleet(bus), describe)
        heartbeat.start()
        try:
            worker = RewardWorker(bus, pools=pools, member=settings.member, threads=settings.reward_threads, metrics=metrics, idle=idle)
            worker.run(shutdown)
        finally:
            heartbeat.stop()
            pools.close()


if __name__ == "__main__":
    with without_redis():
        main()
