"""Every query of every dashboard and every rule, by a real Prometheus on a real run: parses, returns numbers, has the labels of its legend.

A study of three arms, then a run whose knobs are turned and whose reward server is killed, which goes on while the queries are asked.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from services.contracts.states import RunState
from services.local.supervisor import free_ports
from tests.unit.metric_catalogue import DASHBOARDS, RULES, Selector, alerts, dashboard, panels, recorded, rules, selectors

from .conftest import ROOT, Stack

PROGRAM = shutil.which("prometheus", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
MAY_BE_EMPTY = {
    "fleet: Servers fenced": "no rollout server fails",
    "fleet: Dead letters": "nothing is given up",
    "mark Alerts": "no alert fires so soon",
    'offbeat_reward_verifications_total{outcome!="ok"}': "no verifier fails",
}
"""Panels, marks and selectors of rules that have no data where all is well, and why. None is empty for want of a GPU."""
VARIABLES = {"$__rate_interval": "20s", "$__interval": "1s", "$__range": "1h", "$study": ".*", "$run": ".+"}
SETS = [
    {"name": "in", "domain": "in", "prompts": 6, "samples": 4},
    {"name": "out", "domain": "out", "prompts": 4, "samples": 4, "data": {"options": {"min_target": 41, "max_target": 52}}},
]
BASE: dict[str, Any] = {
    "model": {"path": str(ROOT / "deploy/models/tiny"), "max_model_len": 64},
    "batch_groups": 8, "group_size": 4, "updates_per_batch": 2, "learning_rate": 1e-3,
    "staleness": {"min_lag": 0, "max_lag": 2}, "measure": {"probe_every": 1, "prompt_entropy_every": 1},
    "evaluation": {"every": 3, "max_share": 1.0, "sets": SETS}, "checkpoint": {"every": 5},
}  # fmt: skip
ARMS = [
    {"name": "plain", "set": {"shaping": {"skip_zero_signal": True}}},
    {"name": "weighted", "set": {"entropy": {"method": "positive_reweighting", "target": 1.4}}},
    {"name": "regularised", "set": {
        "entropy": {"method": "adaptive_regularisation", "target": 1.4}, "staleness": {"target": {"metric": "kl", "value": 0.01, "greatest": 4}},
    }},
]  # fmt: skip
STUDY = {"name": "dashboards", "seeds": [0], "budget": {"rollouts": 10 * 8 * 4}, "base": BASE, "arms": ARMS}
Series = list[dict[str, Any]]

pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="Prometheus is not installed (Debian: apt-get install prometheus)"),
    pytest.mark.timeout(900),
]


@dataclass(frozen=True)
class Prometheus:
    url: str
    began: float
    turned: str = ""
    """The run that goes on, whose knobs were turned."""

    def ask(self, path: str, **parameters: Any) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30, trust_env=False).json()
        if answer["status"] != "success":
            raise ValueError(answer["error"])
        return answer["data"]

    def now(self, expr: str, *, patience: float) -> Series:
        """At this moment; on a machine with much to do, the first time that no scrape has just failed."""
        deadline = time.monotonic() + patience
        while True:
            found = [one | {"values": [one["value"]]} for one in self.ask("query", query=filled(expr))["result"]]
            if found or time.monotonic() > deadline:
                return found
            time.sleep(0.5)

    def over_time(self, expr: str) -> Series:
        """Over all that was scraped."""
        span = time.time() - self.began
        found: Series = self.ask("query_range", query=filled(expr), start=self.began, end=time.time(), step=max(1, math.ceil(span / 5000)))["result"]
        return found


def filled(expr: str) -> str:
    """With Grafana's variables replaced, the longer names first."""
    for name in sorted(VARIABLES, key=len, reverse=True):
        expr = expr.replace(name, VARIABLES[name])
    return expr


def wrong(series: Series, legend: str = "") -> str | None:
    """What is wrong with what a query returned."""
    if not any(math.isfinite(float(value)) for one in series for _, value in one["values"]):
        return "no numbers"
    missing = {label for label in re.findall(r"{{\s*(\w+)\s*}}", legend) for one in series if not one["metric"].get(label)}
    return f"no label {', '.join(sorted(missing))} in a series" if missing else None


def config(stack: Stack) -> dict[str, Any]:
    """The example of deploy/prometheus, for this stack and in a hurry."""
    whole: dict[str, Any] = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    whole["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    whole["rule_files"] = [str(path) for path in RULES]
    names = {"control-plane": "control-plane", "rollout-server": "rollout-0", "reward-server": "reward-0", "trainer": "trainer-0"}
    for job in whole["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"127.0.0.1:{stack.info.processes[names[job['job_name']]].port}"]}]
    return whole


@pytest.fixture(scope="module")
def prometheus(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """After the study, while the last run goes on."""
    home = tmp_path_factory.mktemp("prometheus")
    (home / "prometheus.yml").write_text(yaml.safe_dump(config(stack)))
    (port,) = free_ports(1)
    arguments = [f"--config.file={home}/prometheus.yml", f"--storage.tsdb.path={home}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen([str(PROGRAM), *arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    running = None
    try:
        made = Prometheus(f"http://127.0.0.1:{port}", time.time())
        wait_until_ready(made, home / "log")
        study = stack.client.submit_study(STUDY)
        for run in study.runs:
            assert run.run_id is not None
            stack.finish(run.run_id, seconds=300)
        running = stack.submit(**BASE | {"name": "turned", "versions": 100_000})
        stack.reach(running, 2)
        assert made.now(f'offbeat_trainer_knob_changes{{run="{running}"}}', patience=60), "a turn is seen against what was scraped before it"
        turned = stack.client.set_knobs(running, {"clip.high": 0.28, "staleness.max_lag": 3}).version
        stack.kill("reward-0")
        stack.reach(running, turned + 4)
        stack.ready()
        time.sleep(5)  # a few more scrapes and evaluations of the rules
        yield replace(made, turned=running)
    finally:
        if running is not None:
            stack.client.cancel(running)
            stack.wait(running, lambda run: run.state is RunState.CANCELLED)
        process.terminate()
        process.wait(30)


def wait_until_ready(prometheus: Prometheus, log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if httpx.get(f"{prometheus.url}/-/ready", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def test_every_process_is_scraped(prometheus: Prometheus) -> None:
    """At one time all of them: on a machine with much to do a scrape may take too long."""
    seen = prometheus.now("min by (job) (max_over_time(up[1m]))", patience=0)
    assert {one["metric"]["job"]: one["value"][1] for one in seen} == dict.fromkeys(
        ("control-plane", "rollout-server", "reward-server", "trainer"), "1"
    )


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_has_data_and_the_labels_of_its_legend(prometheus: Prometheus, path: Path) -> None:
    found = {}
    for panel in panels(path):
        name = f"{path.stem}: {panel['title']}"
        for target in panel["targets"]:
            must = name not in MAY_BE_EMPTY
            instant = target.get("instant")
            series = prometheus.now(target["expr"], patience=15 * must) if instant else prometheus.over_time(target["expr"])
            if (series or must) and (complaint := wrong(series, target["legendFormat"])):
                found[f"{name}: {target['expr']}"] = complaint
    assert found == {}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_measurement_that_a_panel_names_was_made(prometheus: Prometheus, path: Path) -> None:
    """A panel of several has data as soon as one of them has."""
    asked = {
        alone(one, name) for panel in panels(path) for target in panel["targets"] for one in selectors(target["expr"]) for name in one.values("name")
    }
    assert {expr: complaint for expr in sorted(asked) if (complaint := wrong(prometheus.over_time(expr)))} == {}


def alone(selector: Selector, name: str) -> str:
    """The selector with one of its names; those of evaluations are patterns."""
    others = ", ".join(f'{label}{operator}"{value}"' for label, operator, value in selector.matchers if label != "name")
    return f'{selector.metric}{{name=~"{name}", {others}}}'


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_mark_and_variable_has_data(prometheus: Prometheus, path: Path) -> None:
    for mark in dashboard(path)["annotations"]["list"]:
        series = prometheus.over_time(mark["expr"])
        if f"mark {mark['name']}" not in MAY_BE_EMPTY:
            assert wrong(series, mark["titleFormat"]) is None, mark["name"]
    for variable in dashboard(path)["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert asked is not None
            assert prometheus.ask(f"label/{asked[2]}/values", **{"match[]": filled(asked[1])}) != [], variable["name"]


def test_a_turned_knob_and_a_restart_are_marked(prometheus: Prometheus) -> None:
    marks = {mark["name"]: prometheus.over_time(mark["expr"]) for mark in dashboard(DASHBOARDS[0])["annotations"]["list"]}
    assert any(one["metric"]["run"] == prometheus.turned for one in marks["Knobs"])
    assert not any(".plain." in one["metric"]["run"] for one in marks["Knobs"]), "nobody turned its knobs"
    assert any(one["metric"]["job"] == "reward-server" for one in marks["Restarts"])


def test_every_rule_is_evaluated_and_what_it_stands_on_is_there(prometheus: Prometheus) -> None:
    evaluated = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in evaluated if rule["health"] != "ok" or rule.get("lastError")] == []
    assert {rule["name"] for rule in evaluated} == {*recorded(), *alerts()}
    found = {}
    for rule in rules():
        for one in selectors(rule["expr"]):
            if one.text not in MAY_BE_EMPTY and (complaint := wrong(prometheus.over_time(one.text))):
                found[f"{rule.get('record', rule.get('alert'))}: {one.text}"] = complaint
    assert found == {}


def test_every_recorded_series_has_data_and_its_labels(prometheus: Prometheus) -> None:
    for name, expr in recorded().items():
        outer = re.match(r"\s*\(?\s*(?:max|min|sum) by \(([^)]*)\)", expr)
        legend = "".join(f"{{{{{label}}}}}" for label in outer[1].split(", ") if label != "namespace") if outer else ""  # that of Kubernetes
        assert wrong(prometheus.over_time(name), legend) is None, name


def test_alerts_name_who_is_meant(prometheus: Prometheus) -> None:
    """The labels that a summary shows are those of what the alert compares."""
    for name, alert in alerts().items():
        shown = re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"])
        compared = selectors(alert["expr"])[0].metric
        assert wrong(prometheus.over_time(compared), "".join(f"{{{{{label}}}}}" for label in shown)) is None, name


def test_what_is_wrong_is_seen(prometheus: Prometheus) -> None:
    assert wrong(prometheus.over_time('offbeat_trainer_entropy{run=~"$run"}')) == "no numbers"
    assert wrong(prometheus.over_time('offbeat_trainer_entropy_nats{run=~"$run"}'), "{{run}} {{arm}}") == "no label arm in a series"
    with pytest.raises(ValueError, match="parse error"):
        prometheus.over_time("rate(offbeat_trainer_tokens_total)[5m]")
