"""What processes tell beside their work: Redis, the disk, their start, knobs, and vLLM's own metrics."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from rollout_server.engine_metrics import EngineMetrics
from services.local.supervisor import free_ports
from services.runtime.bus import Bus, StoreAway
from services.runtime.metrics import RewardMetrics, TrainerMetrics


def test_redis_is_away_while_it_does_not_answer() -> None:
    registry = CollectorRegistry()
    bus = Bus(f"redis://127.0.0.1:{free_ports(1)[0]}/0", patience=0.0)
    RewardMetrics(registry).watch_store(lambda: bus.away)
    assert registry.get_sample_value("offbeat_store_away") == 0
    with pytest.raises(StoreAway):
        bus.call(bus.redis.ping)
    assert registry.get_sample_value("offbeat_store_away") == 1
    bus.call(lambda: None)
    assert registry.get_sample_value("offbeat_store_away") == 0


def test_a_process_tells_when_it_started() -> None:
    registry = CollectorRegistry()
    RewardMetrics(registry)
    started = registry.get_sample_value("offbeat_process_start_time_seconds")
    assert started is not None
    assert time.time() - 86_400 < started < time.time() + 2
    assert (registry.get_sample_value("offbeat_process_resident_memory_bytes") or 0) > 1e6


def test_a_trainer_tells_the_disk_of_its_checkpoints(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    TrainerMetrics(registry).show_disk(tmp_path)
    free, whole = (registry.get_sample_value("offbeat_trainer_disk_bytes", {"kind": kind}) for kind in ("free", "all"))
    assert free is not None
    assert whole is not None
    assert 0 < free < whole


def test_knob_changes_vanish_with_their_run() -> None:
    registry = CollectorRegistry()
    metrics = TrainerMetrics(registry)
    for run in ("a", "b"):
        metrics.knob_changes.labels(run).set(2)
    metrics.let_go("a")
    assert registry.get_sample_value("offbeat_trainer_knob_changes", {"run": "a"}) is None
    assert registry.get_sample_value("offbeat_trainer_knob_changes", {"run": "b"}) == 2


def test_of_the_global_registry_only_vllm_s_metrics_are_shown() -> None:
    running = Gauge("vllm:num_requests_running", "Running", ["engine"])
    own = [running, Counter("vllm:generation_tokens", "Tokens"), Gauge("another", "Of another library")]
    try:
        running.labels("0").set(3)
        registry = CollectorRegistry()
        registry.register(EngineMetrics())
        assert registry.get_sample_value("vllm:num_requests_running", {"engine": "0"}) == 3
        assert registry.get_sample_value("vllm:generation_tokens_total") == 0
        assert {family.name for family in registry.collect()} == {"vllm:num_requests_running", "vllm:generation_tokens"}
    finally:
        for metric in own:
            REGISTRY.unregister(metric)
