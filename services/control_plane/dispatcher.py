"""The dispatcher: issues prompts, as many as the staleness window admits, and before them those of evaluations that are due.

consumes    versions (as a wake-up), knob changes, replays of dead letters
produces    prompts
waits for   capacity(max_lag, B, outstanding) > 0; for an evaluation, a version at which it is due
unblocked by a version published, a group lost
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from services.contracts.evaluation import Probe
from services.contracts.messages import PromptGroup, Severity
from services.contracts.spec import KnobChange, RunSpec, spec_at
from services.contracts.staleness import capacity
from services.contracts.states import ON_FLEET, Action, IllegalMove
from services.contracts.topics import Log, RunKeys
from services.control_plane.evaluations import SetFeed, issue_due, open_set
from services.control_plane.feeds import Feed, open_feed
from services.control_plane.store import Run, RunStore
from services.runtime.bus import Bus, StoreAway
from services.runtime.evaluations import store_probes
from services.runtime.ledger import Conservation, Ledger
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.process import Shutdown
from services.runtime.prompts_used import prompts_used, store_prompts_used
from services.runtime.tokenizer import DataError, ModelError

log = logging.getLogger(__name__)

TICK_SECONDS = 0.1
BURST = 256
"""Groups issued for one run before the others have their turn."""
BROKEN_READINGS = 2
"""Readings in a row before a broken conservation is told."""
PLACES = ("queued", "running", "generated", "scored", "taken")
FATES = ("issued", "consumed", "skipped", "dead", "cancelled", "replaying")


class BadFeed(ValueError):
    """The run's data or tokenizer failed: whatever a data set or its library raised, it ends this run and no other."""

    @classmethod
    def of(cls, error: Exception) -> BadFeed:
        if isinstance(error, DataError | ModelError):
            return cls(str(error))
        log.error("a data source failed", exc_info=error)
        return cls(f"the data source failed: {type(error).__name__}: {error}")


@dataclass(frozen=True)
class Opened:
    """All prompts that a run needs."""

    feed: Feed
    sets: tuple[SetFeed, ...]
    probes: tuple[Probe, ...]
    prompt_ids: list[str] | None
    """Of training's; None where they are too many to keep."""


@dataclass
class Active:
    """What the dispatcher remembers of a run that is on the fleet."""

    feed: Future[Opened]
    probed: bool = False
    """Whether the trainer can read the probes."""
    evaluated: int = -1
    """Newest version at which all that is due has been issued."""
    spec: RunSpec | None = None
    """The spec in force at `spec_version` with `changes` knob changes."""
    spec_version: int = -1
    changes: tuple[KnobChange, ...] = ()
    broken: int = 0


@dataclass
class Dispatcher:
    """Issues the groups of all runs that are on the fleet. One thread calls `tick`."""

    bus: Bus
    store: RunStore
    metrics: ControlPlaneMetrics
    shutdown: Shutdown
    _active: dict[str, Active] = field(default_factory=dict)
    _opener: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="open-data"))

    def tick(self) -> float:
        """Issue what may be issued now, then wait for the next version of any run; seconds to wait beyond that."""
        more = False
        on_fleet = [run for run in self.store.open_runs() if run.state in ON_FLEET and run.generates]
        for run_id in self._active.keys() - {run.run_id for run in on_fleet}:
            self._drop(run_id)
        for run in on_fleet:
            try:
                more |= self._serve(run)
            except (IllegalMove, LookupError) as error:
                log.info("the run went on meanwhile", extra={"run": run.run_id, "error": str(error)})
            except StoreAway:
                raise
            except Exception:  # one run's boundary: the others are served; it is tried again with the next tick
                log.exception("a run could not be served", extra={"run": run.run_id})
        if more:
            return 0.0
        if not on_fleet:
            return TICK_SECONDS
        self._wait_for_a_version([run.run_id for run in on_fleet])
        return 0.0

    def close(self) -> None:
        self._opener.shutdown(wait=False, cancel_futures=True)

    def _serve(self, run: Run) -> bool:
        """Issue what is due for evaluation, and up to BURST groups of one run; True if any was: then the state has moved on, and is looked at again
        at once."""
        active = self._active.get(run.run_id)
        if active is None:
            active = self._active[run.run_id] = Active(self._opener.submit(open_all, run.spec))  # may take long: the other runs go on
        ledger = Ledger(self.bus, run.run_id)
        counts = ledger.conservation()
        self._publish(run, active, counts)
        if not active.feed.done():
            return False
        try:
            opened = _opened(active.feed)
            if not active.probed:
                store_probes(self.bus, run.run_id, opened.probes)
                if opened.prompt_ids is not None:
                    _keep_prompts(self.bus, run.run_id, opened.prompt_ids)
                ledger.set_data_size(len(opened.feed.source))
                active.probed = True
            if run.version is None:
                return False
            if ledger.version() != run.version:
                return True  # counts and version must be of one moment
            if active.evaluated < run.version:
                if not _evaluate(self.bus, run.run_id, opened, version=run.version, shutdown=self.shutdown):
                    return False
                active.evaluated = run.version
            return self._issue(run.run_id, run.version, opened.feed, active, ledger, counts)
        except BadFeed as error:
            self._drop(run.run_id)  # a resumed run opens its data again
            self.store.lifecycle(run.run_id).move(Action.FAIL, str(error))
            return False

    def _issue(self, run_id: str, version: int, feed: Feed, active: Active, ledger: Ledger, counts: Conservation) -> bool:
        spec = self._spec(active, feed, ledger, version)
        may = min(BURST, admitted(spec, version=version, counts=counts))
        replays = min(may, counts.replaying)
        for i in range(may):
            if self.shutdown.asked:
                return False
            if i < replays:
                ledger.issue_replay(max_lag=spec.staleness.max_lag, version=version)
            elif not ledger.issue(_group(feed, run_id, counts.issued + i - replays, spec=spec, version=version)):
                return False  # the run has ended, or another control plane issues: look again
        return may > 0

    @staticmethod
    def _spec(active: Active, feed: Feed, ledger: Ledger, version: int) -> RunSpec:
        """The spec in force at `version`; made again only when the version or the knobs have changed."""
        changes = tuple(ledger.knobs())
        if active.spec is None or active.spec_version != version or active.changes != changes:
            active.spec, active.spec_version, active.changes = spec_at(feed.spec, changes, version), version, changes
        return active.spec

    def _publish(self, run: Run, active: Active, counts: Conservation) -> None:
        for place in PLACES:
            self.metrics.queue.labels(run.run_id, place).set(getattr(counts, place))
        for fate in FATES:
            self.metrics.conservation.labels(run.run_id, fate).set(getattr(counts, fate))
        active.broken = 0 if counts.holds else active.broken + 1
        self.metrics.broken.labels(run.run_id).set(active.broken >= BROKEN_READINGS)
        if active.broken == BROKEN_READINGS:
            log.error("groups are not all accounted for", extra={"run": run.run_id, "counts": str(counts)})
            missing = counts.issued - counts.consumed - counts.skipped - counts.outstanding - counts.replaying - counts.dead - counts.cancelled
            text = f"Groups are not all accounted for: {missing:+d} of {counts.issued} issued"
            self.store.lifecycle(run.run_id).event("conservation_broken", text, Severity.ERROR, run.version, {"missing": missing})

    def _drop(self, run_id: str) -> None:
        self._active.pop(run_id).feed.cancel()
        for metric in (self.metrics.queue, self.metrics.conservation, self.metrics.broken):
            metric.remove_by_labels({"run": run_id})

    def _wait_for_a_version(self, run_ids: list[str]) -> None:
        """Until a version of one of these runs is announced, or a tick has passed: what is lost or replayed wakes nobody."""
        streams = {RunKeys(run_id).stream(Log.VERSIONS): "$" for run_id in run_ids}
        self.bus.call(lambda: self.bus.redis.xread(streams, count=1, block=int(TICK_SECONDS * 1000)))


def admitted(spec: RunSpec, *, version: int, counts: Conservation) -> int:
    """Groups that may be issued now: what the window admits, and no more than the run still needs, so that it ends with nothing left over."""
    window = capacity(max_lag=spec.staleness.max_lag, batch=spec.batch_groups, outstanding=counts.outstanding)
    needed = (spec.versions - version) * spec.batch_groups - counts.outstanding
    return max(0, min(window, needed))


def open_all(spec: RunSpec) -> Opened:
    """Raises ModelError or DataError, which say what to change."""
    feed = open_feed(spec)
    sets = tuple(open_set(spec, one, feed.tokenizer) for one in spec.evaluation.sets)
    return Opened(feed, sets, tuple(one.probe() for one in sets), feed.prompt_ids())


def _keep_prompts(bus: Bus, run_id: str, ids: Sequence[str]) -> None:
    """Store which prompts the run trains on. Raises BadFeed when a run that goes on finds others than it began with: group n would be another."""
    before = prompts_used(bus, run_id)
    if before is not None and before != list(ids):
        gone, new = set(before) - set(ids), set(ids) - set(before)
        what = f"{len(gone)} of {len(before)} prompts are gone and {len(new)} are new" if gone or new else "the order of its prompts has changed"
        raise BadFeed(f"the data are not those that the run began with: {what}. Restore them and resume the run, or submit another one")
    store_prompts_used(bus, run_id, ids)


def _opened(feed: Future[Opened]) -> Opened:
    try:
        return feed.result()
    except Exception as error:
        raise BadFeed.of(error) from error


def _evaluate(bus: Bus, run_id: str, opened: Opened, *, version: int, shutdown: Shutdown) -> bool:
    try:
        return issue_due(bus, run_id, opened.feed.spec, opened.sets, version=version, shutdown=shutdown)
    except StoreAway:
        raise
    except (DataError, OSError) as error:
        raise BadFeed.of(error) from error


def _group(feed: Feed, run_id: str, n: int, *, spec: RunSpec, version: int) -> PromptGroup:
    try:
        return feed.group(run_id, n, spec=spec, version=version)
    except Exception as error:
        raise BadFeed.of(error) from error
