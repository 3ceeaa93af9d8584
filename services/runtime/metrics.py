"""Every metric of Offbeat, declared once, by role, on a registry that the process passes in.

Prefix `offbeat_`, base units, labels from closed sets.
"""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from services.runtime import logs

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
LAGS = tuple(float(k) for k in (0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 128))


class LagHistogram(Collector):
    """Trained tokens by lag, added by the thousand: the library's own histogram takes one observation at a time."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tokens: dict[str, dict[int, int]] = {}
        registry.register(self)

    def add(self, run: str, lags: Mapping[int, int]) -> None:
        counts = dict(self._tokens.get(run, {}))
        for lag, tokens in lags.items():
            counts[lag] = counts.get(lag, 0) + tokens
        self._tokens = {**self._tokens, run: counts}  # replaced, not changed: a scrape may be reading it

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily("offbeat_trainer_lag_versions", "Lag of trained tokens", labels=["run"])
        for run, counts in self._tokens.items():
            below = [(str(bound), float(sum(n for lag, n in counts.items() if lag <= bound))) for bound in (*LAGS, math.inf)]
            buckets = [("+Inf" if bound == "inf" else bound, n) for bound, n in below]
            family.add_metric([run], buckets=buckets, sum_value=float(sum(lag * n for lag, n in counts.items())))
        return [family]


class Latest(Collector):
    """A gauge whose series of one owner are replaced together: what was not measured again is no longer shown, and a scrape sees one measurement
    whole. The library's own gauge shows each series until somebody removes it."""

    def __init__(self, name: str, documentation: str, owner: Sequence[str], labels: Sequence[str], registry: CollectorRegistry) -> None:
        """`owner`: the first labels, which say whose series they are; `labels`: the others."""
        self.name, self.documentation, self.names = name, documentation, (*owner, *labels)
        self._series: dict[tuple[str, ...], dict[tuple[str, ...], float]] = {}
        self._lock = threading.Lock()
        registry.register(self)

    def show(self, owner: tuple[str, ...], series: Mapping[tuple[str, ...], float]) -> None:
        """From now on the owner has these series, by their other labels, and no others."""
        with self._lock:
            self._series = {**self._series, owner: dict(series)}  # replaced, not changed: a scrape may be reading it

    def forget(self, first: str) -> None:
        """The owners whose first label this is have no series any more."""
        self.keep({owner[0] for owner in self._series} - {first})

    def keep(self, firsts: Collection[str]) -> None:
        """Only the owners whose first label is one of these keep their series."""
        with self._lock:
            self._series = {owner: series for owner, series in self._series.items() if owner[0] in firsts}

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(self.name, self.documentation, labels=self.names)
        for owner, series in self._series.items():
            for labels, value in series.items():
                family.add_metric((*owner, *labels), value)
        return [family]


class Shown(Collector):
    """Another collector's metrics, while `when` answers True."""

    def __init__(self, inner: Collector, when: Callable[[], bool], registry: CollectorRegistry) -> None:
        self.inner, self.when = inner, when
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        return self.inner.collect() if self.when() else ()


def step_labels(key: str) -> tuple[str, str, str]:
    """Name, division and bin of a step's key: `entropy_nats/lag/2-3` is the `entropy_nats` of the `lag` `2-3`; both empty for the whole."""
    name, _, division = key.partition("/")
    by, _, bin_ = division.partition("/")
    return name, by, bin_


class CountedElsewhere(Collector):
    """A counter of what something else counts: it is asked at each scrape."""

    def __init__(self, name: str, documentation: str, count: Callable[[], int], registry: CollectorRegistry) -> None:
        self.name, self.documentation, self.count = name, documentation, count
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        return [CounterMetricFamily(self.name, self.documentation, value=self.count())]


class ProcessMetrics:
    """What every process tells of itself."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.idle = Gauge("offbeat_idle_seconds", "Time spent waiting for work since start", registry=registry)
        self.store_away = Gauge("offbeat_store_away_seconds", "Time spent waiting for Redis since start", registry=registry)
        self.store_is_away = Gauge("offbeat_store_away", "1 while Redis does not answer", registry=registry)
        self.sequence_gaps = Counter("offbeat_bus_sequence_gaps", "Entries of a stream that were lost before this reader saw them", registry=registry)
        self.dead_letters = Counter("offbeat_dead_letters", "Entries given up by this process", ["stream"], registry=registry)
        CountedElsewhere("offbeat_log_records_dropped", "Lines of the log that never got to Redis", logs.dropped, registry)
        ProcessCollector(namespace="offbeat", registry=registry)  # memory, CPU, open files, and when it started

    def watch_store(self, away: Callable[[], bool]) -> None:
        """Ask at each scrape whether Redis is away: a thread that waits for it sets nothing."""
        self.store_is_away.set_function(away)


class RolloutMetrics(ProcessMetrics):
    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.version = Gauge("offbeat_rollout_version", "Policy version that the engine holds", registry=registry)
        self.tokens = Counter("offbeat_rollout_tokens", "Tokens sampled", registry=registry)
        self.groups = Counter("offbeat_rollout_groups", "Groups by how they ended", ["end"], registry=registry)
        self.running = Gauge("offbeat_rollout_running_groups", "Groups being generated", registry=registry)
        self.wait = Histogram("offbeat_rollout_prompt_wait_seconds", "From issue to start of generation", buckets=SECONDS, registry=registry)
        self.generation = Histogram(
            "offbeat_rollout_generation_seconds", "From start to end of a group's generation", buckets=SECONDS, registry=registry
        )
        self.stall = Histogram(
            "offbeat_rollout_load_stall_seconds", "Time that generation stood still for a load", buckets=SECONDS, registry=registry
        )
        self.loads = Counter("offbeat_rollout_loads", "Weight loads by result", ["result"], registry=registry)


class RewardMetrics(ProcessMetrics):
    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.verifications = Counter(
            "offbeat_reward_verifications", "Completions judged, by verifier, outcome and tier", ["verifier", "outcome", "tier"], registry=registry
        )
        self.failures = Counter(
            "offbeat_reward_failures", "Completions that a verifier could not judge, whatever the outcome: they have no score", ["verifier"],
            registry=registry,
        )  # fmt: skip
        self.verification_seconds = Histogram(
            "offbeat_reward_verification_seconds", "Time of one verifier for one completion", ["verifier"], buckets=SECONDS, registry=registry
        )
        self.tier = Gauge("offbeat_reward_sandbox_info", "1 for the tier under which untrusted code is run", ["tier"], registry=registry)
        self.waiting = Gauge("offbeat_reward_waiting", "Completions that wait for a thread", ["source"], registry=registry)
        self.refused = Counter("offbeat_reward_refused", "HTTP requests refused since too much was waiting", registry=registry)
        self.groups = Counter("offbeat_reward_groups", "Groups by how they ended", ["end"], registry=registry)
        self.wait = Histogram("offbeat_reward_wait_seconds", "From the end of generation to the start of scoring", buckets=SECONDS, registry=registry)
        self.seconds = Histogram("offbeat_reward_group_seconds", "Time to score a group", buckets=SECONDS, registry=registry)


class TrainerMetrics(ProcessMetrics):
    """The trainer's. What a step measures (`StepRecord.values`) is shown under `offbeat_trainer_step{name=..., by=..., bin=...}`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.version = Gauge("offbeat_trainer_version", "Version announced last", ["run"], registry=registry)
        self.step = Latest("offbeat_trainer_step", "Measurements of the last step", ["run"], ["name", "by", "bin"], registry)
        self.lag = LagHistogram(registry)
        self.window = Gauge(
            "offbeat_trainer_window_versions", "Lag requested (min, max) and achieved (least, greatest)", ["run", "bound"], registry=registry
        )
        self.knob_changes = Gauge("offbeat_trainer_knob_changes", "Knob changes in force", ["run"], registry=registry)
        self.disk = Gauge("offbeat_trainer_disk_bytes", "Disk with the folder of checkpoints, free and in all", ["kind"], registry=registry)
        self.entropy = Gauge("offbeat_trainer_entropy_nats", "Exact mean entropy of the policy on the trained tokens", ["run"], registry=registry)
        self.reward = Gauge("offbeat_trainer_reward", "Mean reward of the batch", ["run"], registry=registry)
        self.tokens = Counter("offbeat_trainer_tokens", "Tokens trained on", ["run"], registry=registry)
        self.phase = Histogram("offbeat_trainer_phase_seconds", "Time of a version by phase", ["phase"], buckets=SECONDS, registry=registry)
        self.publish = Histogram("offbeat_trainer_publish_seconds", "Time of a publication by stage", ["stage"], buckets=SECONDS, registry=registry)
        self.fenced = Counter("offbeat_trainer_servers_fenced", "Rollout servers fenced, by reason", ["reason"], registry=registry)
        self.canary = Gauge(
            "offbeat_trainer_canary_difference", "Mean absolute difference of canary log-probabilities", ["server"], registry=registry
        )

    def show_disk(self, folder: Path) -> None:
        usage = shutil.disk_usage(folder)
        for kind, size in (("free", usage.free), ("all", usage.total)):
            self.disk.labels(kind).set(size)

    def let_go(self, run: str) -> None:
        """The trainer has let go of the run: what was last measured is no longer so. What was counted stays."""
        self.step.forget(run)
        for gauge in (self.version, self.window, self.knob_changes, self.entropy, self.reward):
            gauge.remove_by_labels({"run": run})
        self.canary.clear()  # of the servers of this run, and a trainer has one run at a time


class ControlPlaneMetrics(ProcessMetrics):
    """Runs and fleet are told by the control plane that dispatches, and by no other: what it knew before it lost that is no longer so."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        own = CollectorRegistry()  # of which `registry` shows what is so now
        self._dispatches: Callable[[], bool] = lambda: True
        self.runs = Gauge("offbeat_runs", "Runs by state", ["state"], registry=own)
        self.members = Gauge("offbeat_fleet_members", "Living members by role", ["role"], registry=own)
        self.queue = Gauge("offbeat_queue_groups", "Outstanding groups by place", ["run", "place"], registry=own)
        self.conservation = Gauge("offbeat_groups", "Groups since the run was made, by what became of them", ["run", "fate"], registry=own)
        self.broken = Gauge("offbeat_conservation_broken", "1 when issued groups are not all accounted for", ["run"], registry=own)
        self.info = Latest("offbeat_run_info", "1 for each run that is on the fleet", [], ["run", "name", "study", "arm", "seed"], own)
        self.evaluation = Latest("offbeat_evaluation", "Measurements of the last evaluation", ["run", "set"], ["domain", "name"], own)
        self.evaluation_version = Latest("offbeat_evaluation_version", "Version of the last evaluation", ["run", "set"], [], own)
        self.trainer_jobs = Gauge("offbeat_trainer_jobs", "Kubernetes Jobs of trainers that are active", registry=own)
        of_runs = (self.runs, self.queue, self.conservation, self.broken, self.info, self.evaluation, self.evaluation_version)
        for gauge in (*of_runs, self.members, self.trainer_jobs):
            Shown(gauge, lambda: self._dispatches(), registry)
        self.job_failures = Counter(
            "offbeat_trainer_job_failures", "Jobs of trainers that were refused or given up, and tries to reach Kubernetes in vain", ["reason"],
            registry=registry,
        )  # fmt: skip
        for reason in ("refused", "given_up", "unreachable"):
            self.job_failures.labels(reason)
        self.requests = Histogram("offbeat_http_request_seconds", "API requests", ["method", "route", "status"], buckets=SECONDS, registry=registry)

    def show_while(self, dispatches: Callable[[], bool]) -> None:
        """Ask at each scrape whether this control plane dispatches."""
        self._dispatches = dispatches
