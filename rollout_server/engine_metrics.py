"""vLLM's own metrics, among those of the rollout server.

vLLM counts in prometheus_client's global registry, of which nothing else is shown: this process has a registry of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import REGISTRY
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

PREFIX = "vllm:"


class EngineMetrics(Collector):
    def collect(self) -> Iterable[Metric]:
        return [family for family in REGISTRY.collect() if family.name.startswith(PREFIX)]
