"""A reward server: judges the completions of every active run until it is asked to end. With `--http-only` it serves HTTP alone, without Redis."""

from __future__ import annotations

import argparse
import os
import socket
import time

from prometheus_client import CollectorRegistry

from reward_server.app import create_app
from reward_server.scoring import Scoring
from reward_server.scoring_threads import ScoringThreads
from reward_server.tools import open_tools
from reward_server.worker import RewardWorker
from services.contracts.messages import Member, Role
from services.runtime import logs
from services.runtime.bus import Bus, without_redis
from services.runtime.fleet import Fleet, Heartbeat
from services.runtime.metrics import RewardMetrics
from services.runtime.process import IdleClock, Shutdown, serving
from services.runtime.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reward_server", description="Judge the completions of every active run.")
    parser.add_argument("--http-only", action="store_true", help="serve HTTP alone, without Redis and a fleet")
    http_only = parser.parse_args().http_only
    settings = Settings()
    logs.set_up_member(Role.REWARD, settings, ship=not http_only)
    shutdown, registry, idle = Shutdown().install(), CollectorRegistry(), IdleClock()
    metrics, connected = RewardMetrics(registry), http_only
    threads = ScoringThreads(settings.reward_threads, most_waiting=settings.reward_waiting)

    def ready() -> str | None:
        if shutdown.asked:
            return "is ending"
        return None if connected else "waits for Redis"

    with open_tools(settings, metrics) as tools:
        scoring = Scoring(tools, threads, metrics)
        app = create_app(scoring=scoring, cluster_token=settings.cluster_token, registry=registry, ready=ready)
        try:
            with serving(app, host=settings.host, port=settings.port):  # ends with the answers to the requests that it has
                if http_only:
                    while not shutdown.wait(3600):
                        pass
                else:
                    bus = Bus(settings.redis_url)
                    metrics.watch_store(lambda: bus.away)
                    shutdown.then(bus.hurry)
                    bus.check_version()
                    connected = True
                    serve_stream(bus, scoring, settings, shutdown=shutdown, idle=idle)
        finally:
            threads.close()


def serve_stream(bus: Bus, scoring: Scoring, settings: Settings, *, shutdown: Shutdown, idle: IdleClock) -> None:
    """Works on the streams as a member of the fleet, until the end is asked for and what is in hand is done."""
    started_at, metrics = time.time(), scoring.metrics

    def describe() -> Member:
        metrics.store_away.set(bus.away_seconds)
        metrics.idle.set(idle.total)
        return Member(
            member_id=settings.member, role=Role.REWARD, url=settings.url, pid=os.getpid(), host=socket.gethostname(), ready=not shutdown.asked,
            idle_seconds=idle.total, detail="scores every active run", started_at=started_at,
        )  # fmt: skip

    heartbeat = Heartbeat(Fleet(bus), describe)
    heartbeat.start()
    try:
        RewardWorker(bus, scoring=scoring, member=settings.member, idle=idle).run(shutdown)
    finally:
        heartbeat.stop()


if __name__ == "__main__":
    with without_redis():
        main()
