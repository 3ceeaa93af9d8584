"""Alerts ask for metrics that there are, by labels that they have."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from services.runtime.metrics import ControlPlaneMetrics, RewardMetrics, RolloutMetrics, TrainerMetrics

RULES = sorted((Path(__file__).resolve().parents[2] / "deploy" / "prometheus" / "rules").glob("*.yaml"))


def names() -> set[str]:
    """Of every series, as they are scraped."""
    found: set[str] = set()
    for role in (RolloutMetrics, RewardMetrics, TrainerMetrics, ControlPlaneMetrics):
        registry = CollectorRegistry()
        role(registry)
        for family in registry.collect():
            found |= {
                f"{family.name}{suffix}" for suffix in {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
            }
    return found


def test_there_are_rules() -> None:
    assert [path.name for path in RULES] >= ["reward.yaml"]


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.name)
def test_alerts_ask_for_metrics_that_there_are(path: Path) -> None:
    asked = set(re.findall(r"\boffbeat_\w+", path.read_text()))
    assert asked
    assert asked <= names()


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.name)
def test_prometheus_takes_the_rules(path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("there is no promtool in PATH")
    done = subprocess.run([promtool, "check", "rules", "--lint=all", "--lint-fatal", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
