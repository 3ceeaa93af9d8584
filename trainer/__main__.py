"""A trainer: waits for a run, trains it, and waits for the next; or for one run only, and ends with it.

Where the environment tells of several ranks (WORLD_SIZE and what torchrun and `trainer.launch` set with it), this process is one of them.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time

import torch
from prometheus_client import CollectorRegistry
from transformers.utils.logging import disable_progress_bar

from services.contracts.messages import Member, Role, Severity
from services.contracts.states import ON_FLEET, WANTS_TRAINER, Action, IllegalMove
from services.runtime import logs
from services.runtime.bus import Bus, without_redis
from services.runtime.fleet import Fleet, Heartbeat
from services.runtime.ledger import Ledger, NotOurs
from services.runtime.lifecycle import RunLifecycle, UnknownRun
from services.runtime.metrics import TrainerMetrics
from services.runtime.process import IdleClock, Shutdown, serving
from services.runtime.settings import Settings
from services.runtime.web import base_app
from trainer.learner import follow
from trainer.ranks import RankGroup, Ranks, join
from trainer.replay import ReplaySession
from trainer.session import Session
from trainer.train import train

log = logging.getLogger("trainer")

UNFINISHED = 75
"""Exit status of a trainer of one run that was asked to end while that run wants it: whoever started it is to start another."""


class Trainer:
    """The process: the run that it trains and what it says of itself."""

    def __init__(self, settings: Settings, registry: CollectorRegistry, shutdown: Shutdown, ranks: Ranks) -> None:
        self.settings, self.metrics, self.shutdown, self.ranks = settings, TrainerMetrics(registry), shutdown, ranks
        self.bus, self.idle, self.started_at = Bus(settings.redis_url), IdleClock(), time.time()
        self.metrics.watch_store(lambda: self.bus.away)
        self.run_id: str | None = None
        self.began: tuple[str, int] | None = None
        """The run that was taken up first, and its version then: while it stands there, a failure of the ranks is one more in a row."""
        self.session: Session | None = None
        self.connected = False
        self.heartbeat = Heartbeat(Fleet(self.bus), self.describe)

    def describe(self) -> Member:
        self.metrics.store_away.set(self.bus.away_seconds)
        self.metrics.idle.set(self.idle.total)
        session = self.session
        return Member(
            member_id=self.settings.member, role=Role.TRAINER, url=self.settings.url, pid=os.getpid(), host=socket.gethostname(), run_id=self.run_id,
            only_run=self.settings.trainer_run, version=session.version if session else None, ready=True, idle_seconds=self.idle.total,
            detail=f"trains {self.run_id}" if self.run_id else "waits for a run", started_at=self.started_at,
        )  # fmt: skip

    def ready(self) -> str | None:
        return None if self.connected else "waits for Redis"

    def over(self) -> bool:
        """Whether the only run that it takes wants no trainer any more."""
        if self.settings.trainer_run is None:
            return False
        try:
            return RunLifecycle(self.bus, self.settings.trainer_run).state() not in WANTS_TRAINER
        except UnknownRun as error:
            log.error("nothing to train: %s", error)
            return True

    def run(self) -> int:
        """Train until asked to end, or until its only run is over; the exit status."""
        self.shutdown.then(self.bus.hurry)
        self.bus.check_version()
        self.connected = True
        self.heartbeat.start()
        try:
            while not self.shutdown.asked:
                if self.over():
                    return 0
                assigned = self.heartbeat.beat()
                if assigned is None or RunLifecycle(self.bus, assigned).state() not in ON_FLEET:
                    with self.idle.waiting():
                        self.shutdown.wait(0.1)
                    continue
                self.train(assigned)
            return UNFINISHED if self.settings.trainer_run else 0
        finally:
            self.heartbeat.stop()

    def train(self, run_id: str) -> None:
        """Train one run as far as it goes. What breaks the run is the run's failure, not the trainer's.

        Unless it leaves the ranks out of step: then all of them end, to start again and go on from the last checkpoint. What breaks them time and
        again while the run gets no further is the run's failure after all.
        """
        self.run_id = run_id
        logs.stamp(run=run_id)
        log.info("trains the run")
        lifecycle = RunLifecycle(self.bus, run_id)
        try:
            make = ReplaySession if Ledger(self.bus, run_id).spec().replay else Session
            self.session = make(
                self.bus, run_id, settings=self.settings, metrics=self.metrics, idle=self.idle, shutdown=self.shutdown, ranks=self.ranks
            )
            self.began = self.began or (run_id, self.session.announced)
            train(self.session)
        except NotOurs as error:
            log.warning("the run was taken over", extra={"error": str(error)})
        except Exception as error:
            got_further = self.began is not None and self.began != (run_id, self.session.announced if self.session else self.began[1])
            if self.ranks.broken and (self.ranks.restarts_left or got_further):
                log.error("the ranks are out of step and end", extra={"error": str(error)})
                raise
            log.exception("the run failed")
            lifecycle.event("trainer_failed", f"{type(error).__name__}: {error}", Severity.ERROR)
            try:
                lifecycle.move(Action.FAIL, f"{type(error).__name__}: {error}", holder=self.settings.member)
            except (IllegalMove, NotOurs) as late:
                log.warning("the run had ended already", extra={"error": str(late)})
            if self.ranks.broken:
                raise
        finally:
            if self.session is not None:
                self.session.close()
            self.session = self.run_id = None
            logs.stamp(run=None)
            self.heartbeat.beat()


def main() -> int:
    settings = Settings()
    logs.set_up_member(Role.TRAINER, settings)
    disable_progress_bar()  # of transformers: the log is one JSON object a line
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    ranks = join(timeout=settings.rank_timeout)
    if isinstance(ranks, RankGroup) and ranks.rank:
        logs.stamp(rank=ranks.rank)
        follow(ranks)
        return 0
    shutdown, registry = Shutdown().install(), CollectorRegistry()
    trainer = Trainer(settings, registry, shutdown, ranks)
    app = base_app(title="Offbeat trainer", description="Trains; its work comes over the bus.", registry=registry, ready=trainer.ready)
    with serving(app, host=settings.host, port=settings.port):
        status = trainer.run()
    ranks.close()
    return status


if __name__ == "__main__":
    with without_redis():
        sys.exit(main())
