"""Recording rules and alerts: what they stand on is there, each alert was seen to fire and not to, and has its runbook."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.contracts.measures import STEP_KEYS
from tests.unit.metric_catalogue import OF_THE_SCRAPE, ROOT, RULES, alerts, recorded, rules, selectors, served, unknown

PROMETHEUS = ROOT / "deploy/prometheus"
RUNBOOKS = ROOT / "docs/runbooks"
PROMTOOL = shutil.which("promtool", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
TESTS = sorted((PROMETHEUS / "tests").glob("*.yaml"))
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: apt-get install prometheus)")
each_alert = pytest.mark.parametrize("name", list(alerts()))


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([str(PROMTOOL), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_rules_and_both_configurations_are_valid() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", *RULES)
    promtool("check", "config", PROMETHEUS / "prometheus.yml", PROMETHEUS / "compose.yml")


@needs_promtool
@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_and_do_not(path: Path) -> None:
    promtool("test", "rules", path)


def expectations(name: str) -> list[list[Any]]:
    """What the tests of an alert expect to fire: one list for each moment that is looked at."""
    cases = [case for path in TESTS for test in yaml.safe_load(path.read_text())["tests"] for case in test.get("alert_rule_test", [])]
    return [case.get("exp_alerts", []) for case in cases if case["alertname"] == name]


@each_alert
def test_every_alert_is_tested_firing_and_not_firing(name: str) -> None:
    assert any(expectations(name))
    assert not all(expectations(name))


@each_alert
def test_every_alert_has_a_severity_and_a_runbook(name: str) -> None:
    alert = alerts()[name]
    assert alert["labels"]["severity"] in {"warning", "critical"}
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    runbook = (ROOT / alert["annotations"]["runbook_url"]).read_text()
    assert runbook.startswith(f"# {name}\n")
    assert re.findall(r"^## (.*)$", runbook, flags=re.MULTILINE) == ["What it means", "What to look at", "What to do"]
    assert f"| `{name}` | {alert['labels']['severity']} |" in (ROOT / "docs/dashboards.md").read_text()


def test_every_runbook_is_an_alert_s() -> None:
    assert {path.relative_to(ROOT).as_posix() for path in RUNBOOKS.glob("*.md")} == {
        alert["annotations"]["runbook_url"] for alert in alerts().values()
    }


def test_rules_stand_on_metrics_that_are_there_with_the_labels_that_they_ask_for() -> None:
    for rule in rules():
        assert unknown(rule["expr"]) == set()
        for one in selectors(rule["expr"]):
            if one.metric in served():
                assert {label for label, _, _ in one.matchers} <= served()[one.metric] | OF_THE_SCRAPE
            if one.metric == "offbeat_trainer_step":
                assert set(one.values("name")) <= set(STEP_KEYS)


def test_every_recording_rule_is_named_by_what_it_is_and_made_once() -> None:
    names = [rule["record"] for rule in rules() if "record" in rule]
    assert len(set(names)) == len(names) == len(recorded())
    assert all(re.fullmatch(r"offbeat:[a-z_]+:[a-z0-9_]+", name) for name in names)
