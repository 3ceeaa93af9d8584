"""A study from its file to its report, through the command, over real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from services.contracts.states import RunState

from .conftest import ROOT, Stack

SMOKE = ROOT / "deploy/studies/smoke.toml"


def test_the_smoke_study_runs_to_its_report_with_paired_seeds(stack: Stack, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.cli", "--home", str(stack.home), "study", "run", str(SMOKE), "--plain", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=420, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there are 2, with which no claim is decided" in done.stderr + done.stdout
    (summary, *_) = stack.client.studies().studies
    study = stack.client.study(summary.study_id)
    assert {(run.arm, run.seed, run.state) for run in study.runs} == {
        (arm, seed, RunState.COMPLETED) for arm in ("n1", "n4", "n4-positive") for seed in (0, 1)
    }
    runs = {(run.arm, run.seed): run.run_id for run in study.runs if run.run_id is not None}
    first = {key: stack.steps(run_id)[0].values for key, run_id in runs.items()}
    for seed in (0, 1):
        arms = [first[arm, seed] for arm in ("n1", "n4", "n4-positive")]
        for name in ("reward_mean", "tokens", "mismatch_lag0_nats"):
            assert arms[1][name] == pytest.approx(arms[0][name], abs=1e-6)
            assert arms[2][name] == pytest.approx(arms[0][name], abs=1e-6)
    assert first["n1", 0]["reward_mean"] != first["n1", 1]["reward_mean"]
    for run_id in runs.values():
        records = stack.client.evaluations(run_id).evaluations
        assert {(one.name, one.version) for one in records} == {(name, version) for name in ("in", "out") for version in (0, 20)}
    page = (tmp_path / "report.html").read_text()
    assert "not separable" in page
    assert "<script" not in page
    assert {path.stem for path in tmp_path.glob("*.png")} >= {"claims", "budget", "correlations", "factor-updates_per_batch"}
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 7
