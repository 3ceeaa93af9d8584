"""How pods of the chart end: drained, upgraded, asked to write a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python.chart import Chart

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "offbeat"


def documents(*files: str, **values: Any) -> list[dict[str, Any]]:
    """With the values files, and others over them."""
    merged: dict[str, Any] = {"existingSecret": "offbeat"}
    for name in files:
        merged |= yaml.safe_load((CHART / "values" / f"{name}.yaml").read_text())
    merged |= {key: merged.get(key, {}) | value for key, value in values.items()}
    with Chart.load(CHART) as chart:
        texts = chart.render(merged, name="demo", namespace="rl")
    return [document for path, text in texts.items() if path.endswith(".yaml") for document in yaml.safe_load_all(text) if document]


def test_a_drain_takes_one_at_a_time_and_waits_for_nobody_who_is_not_ready() -> None:
    """One replica alone may go too, and where Redis is away, when nobody is ready, a node can still be drained."""
    budgets = [d["spec"] for d in documents("cpu") if d["kind"] == "PodDisruptionBudget"]
    assert len(budgets) == 5
    for budget in budgets:
        assert budget["maxUnavailable"] == 1
        assert "minAvailable" not in budget
        assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@pytest.mark.parametrize("seconds", [30, 60, 300, 1800])
def test_the_launcher_kills_its_ranks_before_kubernetes_kills_the_launcher_and_not_much_sooner(seconds: int) -> None:
    (cluster,) = [d for d in documents("ray", trainer={"terminationGraceSeconds": seconds}) if d["kind"] == "RayCluster"]
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    assert {group["template"]["spec"]["terminationGracePeriodSeconds"] for group in groups} == {seconds}
    (launcher,) = [one for one in groups[0]["template"]["spec"]["containers"] if one["name"] == "launcher"]
    grace = float({variable["name"]: variable.get("value") for variable in launcher["env"]}["OFFBEAT_RANK_GRACE"])
    assert 0 < grace <= seconds - 15
    assert grace >= seconds - 30


def test_what_runs_have_made_outlives_the_release() -> None:
    of = documents()
    claims = [d for d in of if d["kind"] == "PersistentVolumeClaim"]
    assert {d["metadata"]["annotations"]["helm.sh/resource-policy"] for d in claims} == {"keep"}
    (redis,) = [d["spec"] for d in of if d["kind"] == "StatefulSet" and d["metadata"]["name"].endswith("redis")]
    assert redis.get("persistentVolumeClaimRetentionPolicy", {}).get("whenDeleted", "Retain") == "Retain"
    (container,) = redis["template"]["spec"]["containers"]
    assert "--appendonly yes --appendfsync always" in container["args"][0]
    assert {"name": "data", "mountPath": "/data"} in container["volumeMounts"]
