"""One run in the hands of a trainer: where its batches come from, where its versions go, and what is kept for the day it is killed."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from services.contracts.evaluation import passed_over
from services.contracts.messages import Role, Sample, ScoredGroup, Severity, StepRecord, TokenMeasures
from services.contracts.spec import KnobChange, RunSpec, knobs_of, spec_at
from services.contracts.staleness import Floor, floor_of
from services.contracts.states import ON_FLEET, Action, RunState
from services.runtime.bus import Bus
from services.runtime.evaluations import Evaluations, probes
from services.runtime.fleet import Fleet
from services.runtime.ledger import Ledger, NotOurs
from services.runtime.lifecycle import RunLifecycle
from services.runtime.metrics import TrainerMetrics, step_labels
from services.runtime.process import IdleClock, Shutdown
from services.runtime.settings import Settings
from trainer.checkpoint import Checkpoints, manifest
from trainer.control.actuators import Actuators
from trainer.control.loop import ControlLoops
from trainer.feed import Batch, Feed
from trainer.learner import load
from trainer.orders import Step
from trainer.probes import PromptProbes
from trainer.publisher import Publisher
from trainer.ranks import ALONE, Ranks
from trainer.step import StepResult, train_step
from trainer.weights import make_transport

log = logging.getLogger(__name__)

PULL_MS = 100
EVALUATION_MS = 10
"""Between looks whether an evaluation is generated: training stands still for it."""
LATE_SECONDS = 0.5
"""Between looks for servers that do not hold the current version, while the trainer waits."""
PHASES = ("batch_wait", "publish_prepare", "publish_wait", "evaluation_wait", "publish_deliver", "checkpoint")
"""What a version's time goes into, beside training itself."""


class Interrupted(Exception):
    """The run is paused or cancelled, or the process is asked to end. At a version boundary, unless `between` says otherwise."""

    def __init__(self, why: str, *, trained: bool = False) -> None:
        super().__init__(why)
        self.trained = trained
        """The policy is ahead of the announced version: not a state to keep."""


class Session:
    """Everything that `train` needs of the world."""

    def __init__(
        self, bus: Bus, run_id: str, *, settings: Settings, metrics: TrainerMetrics, idle: IdleClock, shutdown: Shutdown, ranks: Ranks = ALONE
    ) -> None:
        self.bus, self.run_id, self.settings, self.metrics, self.idle, self.shutdown = bus, run_id, settings, metrics, idle, shutdown
        self.ranks = ranks
        self.ledger, self.lifecycle = Ledger(bus, run_id), RunLifecycle(bus, run_id)
        self.spec: RunSpec = self.ledger.spec()
        self.checkpoints = Checkpoints(settings.data / run_id / "checkpoints", keep=self.spec.checkpoint.keep)
        found = self.checkpoints.newest()
        self.version = found[1].version if found else 0
        """Version of the policy in memory."""
        self.policy, self.optimizer = load(found[0] if found else self.spec.model.path, self.spec, resumed=found is not None, ranks=ranks)
        self.control = ControlLoops(self.spec, prompts=self.data_size(), saved=found[1].control if found else None)
        self.evaluations = Evaluations(bus, run_id, self.spec)
        self._probes: PromptProbes | None = None
        self._probed: dict[str, float] = {}
        self.feed = Feed(bus, self.ledger, trainer=settings.member, metrics=metrics)
        self.feed.checkpointed(self.version)
        self.announced = self.ledger.version() or 0
        """Version that the fleet was told of before this trainer took over."""
        weights = self.spec.weights
        transport = make_transport(
            weights.transport_where(settings.weight_transport),
            directory=shared_memory(run_id), host=settings.advertise or settings.host, timeout=weights.timeout,
        )  # fmt: skip
        self.publisher = Publisher(
            bus, run_id, self.spec, policy=self.policy, transport=transport, cluster_token=settings.cluster_token, metrics=metrics
        )
        self._changes: list[KnobChange] = self.ledger.knobs()
        self._phases = dict.fromkeys(PHASES, 0.0)
        self._late_at = 0.0
        self._began, self._evaluating = time.monotonic(), 0.0
        self._restart_clocks()

    # -- the run as it stands at a version --------------------------------------------------------------------------------------------

    def spec_at(self, version: int) -> RunSpec:
        """The spec with the knobs in force at `version`; a change that came into force is told."""
        known = len(self._changes)
        self._changes = self.ledger.knobs()
        for change in self._changes[known:]:
            log.info("knobs turned", extra={"values": change.values, "from_version": change.version})
        return spec_at(self.spec, self._changes, version)

    def floor_at(self, version: int) -> Floor:
        """The floor as it is known at `version`. A change that comes into force later is left out: the groups that it needs are not issued yet."""
        return floor_of(self.spec, [change for change in self._changes if change.version <= version])

    # -- batches in -------------------------------------------------------------------------------------------------------------------

    def next_batch(self, version: int, spec: RunSpec) -> Batch:
        """The batch of `version`: the one that a killed trainer took, or else the staleness rules' choice. Waits for it; raises Interrupted."""
        planned, floor = self.feed.planned(version), self.floor_at(version)
        self.feed.admit(spec, version)  # after a planned batch too: what comes in while it is trained on may be skipped as ever
        if planned is not None:
            self._learn_data_size()
            return planned
        began = time.monotonic()
        while True:
            self._check_in()
            self.feed.pull(block_ms=None)
            batch = self.feed.take(version, batch=spec.batch_groups, floor=floor, order=spec.staleness.taken)
            if batch is not None:
                self._phases["batch_wait"] = time.monotonic() - began
                self._learn_data_size()
                return batch
            with self.idle.waiting():
                self.feed.pull(block_ms=PULL_MS)
            self._admit_late()

    def planned_batch(self, version: int) -> Batch:
        """The batch that a killed trainer took at `version`."""
        batch = self.feed.planned(version)
        if batch is None:
            raise LookupError(f"version {version} was published after the last checkpoint, but its batch is not recorded")
        return batch

    def probe(self, version: int) -> None:
        """Measure the prompt entropy of the policy at hand, if it is due at `version`."""
        every = self.spec.measure.prompt_entropy_every
        self._probed = {}
        if not every or version % every:
            return
        if self._probes is None:  # they are stored before the first group is issued
            self._probes = PromptProbes(probes(self.bus, self.run_id), temperature=self.spec.temperature, device=self.policy.device)
        self._probed = self._probes.values(self.policy)

    # -- the step --------------------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch, spec: RunSpec, version: int, actuators: Actuators) -> StepResult:
        """Train on the batch of `version`, on all ranks."""
        forking_nats = self.control.forking_nats
        with self.ranks.together(Step(groups=batch.groups, spec=spec, version=version, actuators=actuators, forking_nats=forking_nats)):
            return train_step(self.policy, self.optimizer, batch.groups, spec, version, actuators=actuators, forking_nats=forking_nats)

    # -- versions out -----------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Publish the version at hand, which is the initial policy's or a resumed one's, and say that the run is running once a server holds it.

        Raises Interrupted.
        """
        self.publisher.prepare(self.announced, self.spec_at(self.announced).kv_policy)
        publication = self.publisher.deliver()
        while not publication.confirmed:
            self._check_in()
            with self.idle.waiting():
                time.sleep(PULL_MS / 1000)
            self._admit_late()
        self.ledger.announce(self.announced, trainer=self.settings.member)
        if self.lifecycle.state() is RunState.STARTING:
            self.lifecycle.move(Action.START, holder=self.settings.member)
        self._restart_clocks()

    def publish(self, version: int, batch: Batch, result: StepResult, spec: RunSpec) -> None:
        """Publish the policy as `version`, when the staleness rules allow, and commit the step that made it. Raises Interrupted."""
        began = time.monotonic()
        window, floor = spec.staleness, self.floor_at(version - 1)
        min_lag = min(window.min_lag, self.spec.versions - version)  # no more batches are issued than there are versions to come
        while not self.feed.may_load(version, batch=spec.batch_groups, min_lag=min_lag, floor=floor, order=window.taken):
            self._check_in(trained=True)
            with self.idle.waiting():
                self.feed.pull(block_ms=PULL_MS)
            self._admit_late()
        self._phases["publish_wait"] = time.monotonic() - began
        began = time.monotonic()
        while not self.evaluations.may_load(version - 1):
            self._check_in(trained=True)
            with self.idle.waiting():
                self.feed.pull(block_ms=EVALUATION_MS)
            self._admit_late()
        self._phases["evaluation_wait"] = waited = time.monotonic() - began
        self._evaluation_share(version, waited)
        self.publisher.prepare(version, spec.kv_policy)
        self.ledger.loading(version, trainer=self.settings.member)
        publication = self.publisher.deliver()
        for server, reason in publication.fenced.items():
            self.lifecycle.event("server_fenced", f"rollout server {server} is fenced: {reason}", Severity.WARNING, version)
        self._phases |= {"publish_prepare": publication.prepare_seconds, "publish_deliver": publication.deliver_seconds}
        self.commit(version, batch, result, spec, extra={
            "publish_stall_seconds": publication.stall_seconds, "canary_nats": publication.canary,
            "rollout_servers": float(len(publication.confirmed)),
        })  # fmt: skip

    def commit(self, version: int, batch: Batch, result: StepResult, spec: RunSpec, *, extra: dict[str, float]) -> None:
        """Record the step that made `version`, with `extra` values, count its groups as consumed, and turn what controllers ask for."""
        values = result.values | self.control.shown | self._probed | self.feed.skipped.as_values() | self._times() | extra
        step = StepRecord(
            run_id=self.run_id, version=version - 1, values=values, lags=result.lags,
            window=(self.floor_at(version - 1)(version - 1), spec.staleness.max_lag), groups=batch.plan.indices,
        )  # fmt: skip
        samples = [
            Sample(scored=scored, trained_version=version - 1, advantages=advantages, measured=measured_of(scored, result.tokens))
            for scored, advantages in zip(batch.groups, result.advantages, strict=True)
        ]
        self.ledger.commit(batch.plan, step, samples, trainer=self.settings.member, keep_samples=self.spec.record.samples)
        self.version = self.announced = version
        self._show(step)
        self._steer()

    def finish(self) -> None:
        """Wait for the evaluation of the last version: what a run that is completed has come to is all there. Raises Interrupted."""
        while not self.evaluations.recorded(self.version):
            self._check_in()
            with self.idle.waiting():
                time.sleep(PULL_MS / 1000)
            self._admit_late()

    def checkpoint(self, *, due: bool = False) -> None:
        """Keep the policy at hand and acknowledge what made it; with `due`, only if the spec asks for one at this version.

        A disk that is full pauses the run: nothing was lost, and resuming it tries again.
        """
        if due and self.version % self.spec.checkpoint.every and self.version < self.spec.versions:
            return
        began = time.monotonic()
        counts = self.ledger.conservation()
        knobs = knobs_of(spec_at(self.spec, self._changes, self.version))
        try:
            self.checkpoints.save(
                manifest(
                    self.run_id, self.version, consumed=counts.consumed, issued=counts.issued, knobs=knobs, control=self.control.state()
                ),
                self.policy, self.optimizer,
            )  # fmt: skip
        except OSError as error:
            reason = (
                f"the checkpoint of version {self.version} could not be written: {error}. Make room in {self.checkpoints.folder} and resume the run"
            )
            if self.lifecycle.state() is RunState.RUNNING:
                self.lifecycle.move(Action.PAUSE, reason, holder=self.settings.member)
            raise Interrupted(reason, trained=True) from error
        self.feed.checkpointed(self.version)
        self._phases["checkpoint"] = time.monotonic() - began  # counted with the version that follows

    def close(self) -> None:
        self.metrics.let_go(self.run_id)
        self.publisher.close()

    def _steer(self) -> None:
        """Turn the knob that the staleness controller asks for. One who turns knobs at that moment goes first: the controller asks again."""
        wanted, now = self.control.wanted_max_lag, spec_at(self.spec, self._changes, self.version).staleness.max_lag
        if wanted is None or wanted == now or self.version >= self.spec.versions:
            return
        exact = self.spec.staleness.target is not None and self.spec.staleness.target.exact
        turned = {"staleness.max_lag": wanted} | ({"staleness.min_lag": wanted} if exact else {})
        version = self.ledger.turn(turned, expected=len(self._changes))
        if version is not None:
            text = f"From version {version}: staleness.max_lag {now} -> {wanted}{', min_lag with it' if exact else ''}, by the staleness controller"
            self.lifecycle.event("knobs_steered", text, Severity.INFO, version)

    def _evaluation_share(self, version: int, waited: float) -> None:
        """Pass over the evaluation of `version`, which is not announced yet, if those before it took more than their share of this session."""
        self._evaluating += waited
        elapsed = time.monotonic() - self._began
        if not passed_over(self.spec, version, waited=self._evaluating, elapsed=elapsed):
            return
        self.evaluations.pass_over(version)
        share, most = self._evaluating / elapsed, self.spec.evaluation.max_share
        text = f"Version {version} is not evaluated: evaluations took {share:.0%} of the time, more than evaluation.max_share = {most:g}"
        self.lifecycle.event("evaluation_passed_over", text, Severity.WARNING, version, {"share": share})

    # -- meanwhile --------------------------------------------------------------------------------------------------------------------

    def _check_in(self, *, trained: bool = False) -> None:
        if self.shutdown.asked:
            raise Interrupted("the trainer is asked to end", trained=trained)
        state = self.lifecycle.state()
        if state is RunState.QUEUED:
            raise NotOurs(f"run {self.run_id} was taken from this trainer")
        if state not in ON_FLEET:
            raise Interrupted(f"the run is {state.value}", trained=trained)

    def data_size(self) -> int | None:
        """Prompts in the data; None before they are opened."""
        return self.ledger.data_size()

    def _learn_data_size(self) -> None:
        """The data were opened, and their size stored, before the first group was issued."""
        if self.control.prompts is None:
            self.control.prompts = self.data_size()

    def _admit_late(self) -> None:
        if time.monotonic() - self._late_at > LATE_SECONDS:
            self._late_at = time.monotonic()
            for server in self.publisher.admit_late():
                self.lifecycle.event("server_admitted", f"rollout server {server} holds version {self.announced}", Severity.INFO, self.announced)

    def _restart_clocks(self) -> None:
        self._step_began, self._idle_before, self._phases = time.monotonic(), self._idle(), dict.fromkeys(PHASES, 0.0)

    def _idle(self) -> dict[str, float]:
        totals = {"trainer": self.idle.total, "rollout": 0.0, "reward": 0.0}
        for member in Fleet(self.bus).members():
            if member.role is Role.REWARD or (member.role is Role.ROLLOUT and member.run_id == self.run_id):
                totals[member.role.value] += member.idle_seconds
        return totals

    def _times(self) -> dict[str, float]:
        """Wall time of the version by phase, and how much of it each kind of process stood idle."""
        now, idle = time.monotonic(), self._idle()
        seconds = now - self._step_began
        for phase in PHASES:
            self.metrics.phase.labels(phase).observe(self._phases[phase])
        values = {"seconds": seconds, "train_seconds": seconds - sum(self._phases.values())}
        values |= {f"{phase}_seconds": self._phases[phase] for phase in PHASES}
        values |= {f"idle_{role}_seconds": max(0.0, idle[role] - self._idle_before[role]) for role in idle}
        self._step_began, self._idle_before, self._phases = now, idle, dict.fromkeys(PHASES, 0.0)
        return values

    def _show(self, step: StepRecord) -> None:
        run, metrics = self.run_id, self.metrics
        metrics.version.labels(run).set(self.version)
        metrics.step.show((run,), {step_labels(key): value for key, value in step.values.items()})
        metrics.entropy.labels(run).set(step.values.get("entropy_nats", math.nan))
        metrics.reward.labels(run).set(step.values["reward_mean"])
        metrics.tokens.labels(run).inc(step.values["tokens"])
        for bound, lag in zip(("min", "max", "least", "greatest"), (*step.window, min(step.lags, default=0), max(step.lags, default=0)), strict=True):
            metrics.window.labels(run, bound).set(lag)
        metrics.lag.add(run, step.lags)
        metrics.knob_changes.labels(run).set(sum(change.version <= step.version for change in self._changes))
        metrics.show_disk(self.checkpoints.folder)


def measured_of(scored: ScoredGroup, tokens: Mapping[tuple[int, int], TokenMeasures]) -> tuple[TokenMeasures | None, ...]:
    """What is kept of the tokens of each completion; empty where nothing is."""
    found = tuple(tokens.get((scored.group.index, g)) for g in range(len(scored.completed.completions)))
    return found if any(found) else ()


def shared_memory(run_id: str) -> Path:
    """Folder in memory for the weights of a run: readable by this user only."""
    root = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")
    return root / f"offbeat-{os.getuid()}" / run_id
