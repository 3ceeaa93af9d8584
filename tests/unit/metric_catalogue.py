"""What can be asked of Prometheus: the metrics that processes serve, those that rules record, and what a query asks for."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry

from services.runtime.metrics import ControlPlaneMetrics, ProcessMetrics, RewardMetrics, RolloutMetrics, Shown, TrainerMetrics

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
RULES = sorted((ROOT / "deploy/prometheus/rules").glob("*.yaml"))
ROLES: tuple[type[ProcessMetrics], ...] = (RolloutMetrics, RewardMetrics, TrainerMetrics, ControlPlaneMetrics)
OF_THE_SCRAPE = {"job", "instance"}
SELECTOR = re.compile(r"\b(offbeat[_:][\w:]+|vllm:\w+|ALERTS)(\{[^}]*\})?")
MATCHER = re.compile(r'(\w+)(=~|!=|!~|=)"([^"]*)"')


@dataclass(frozen=True)
class Selector:
    """One metric in a query, with what its labels must be."""

    text: str
    metric: str
    matchers: tuple[tuple[str, str, str], ...]
    """Label, operator, value."""

    def values(self, label: str) -> list[str]:
        """The alternatives that a label may have."""
        return [one for name, _, value in self.matchers if name == label for one in value.split("|")]


def selectors(expr: str) -> list[Selector]:
    return [
        Selector(found[0], found[1], tuple((label, operator, value) for label, operator, value in MATCHER.findall(found[2] or "")))
        for found in SELECTOR.finditer(expr)
    ]


def suffixed(name: str, kind: str) -> tuple[str, ...]:
    """Names of the series of a metric."""
    if kind == "histogram":
        return f"{name}_bucket", f"{name}_sum", f"{name}_count"
    return (f"{name.removesuffix('_total')}_total",) if kind == "counter" else (name,)


@cache
def served() -> dict[str, frozenset[str]]:
    """Labels of the series of every metric of every role, by their names."""
    found: dict[str, frozenset[str]] = {}
    for role in ROLES:
        registry = CollectorRegistry()
        role(registry)
        for collector in list(registry._collector_to_names):
            for family in collector.collect():
                declared = collector.inner if isinstance(collector, Shown) else collector
                labels: Any = getattr(declared, "_labelnames", None) or getattr(family, "_labelnames", ())
                for name in suffixed(family.name, family.type):
                    found[name] = frozenset(labels) | ({"le"} if name.endswith("_bucket") else frozenset())
    return found


@cache
def of_vllm() -> frozenset[str]:
    """Names of vLLM's series, as its source declares them."""
    package = importlib.util.find_spec("vllm")
    assert package is not None
    assert package.origin is not None
    source = (Path(package.origin).parent / "v1/metrics/loggers.py").read_text()
    declared = re.findall(r'_(gauge|counter|histogram)_cls\(\s*name="(vllm:\w+)"', source)
    assert len(declared) > 20
    return frozenset(series for kind, name in declared for series in suffixed(name, kind))


@cache
def rules() -> tuple[dict[str, Any], ...]:
    """Recording rules and alerts of all files."""
    return tuple(rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"])


def recorded() -> dict[str, str]:
    return {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def unknown(expr: str) -> set[str]:
    """Metrics that nobody serves or records."""
    return {one.metric for one in selectors(expr)} - served().keys() - recorded().keys() - of_vllm() - {"ALERTS"}


def dashboard(path: Path) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(path.read_text())
    return whole


def panels(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in dashboard(path)["panels"] if panel["type"] != "row"]


def queries(path: Path) -> Iterator[tuple[str, str]]:
    """Where it stands and what it asks, of every query of a dashboard."""
    for panel in panels(path):
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for annotation in dashboard(path)["annotations"]["list"]:
        yield f"annotation {annotation['name']}", annotation["expr"]
    for variable in dashboard(path)["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["query"]
