"""The `offbeat` command as people run it: the demo to its end, Ctrl-C, and going on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

OFFBEAT = [sys.executable, "-m", "services.cli"]
SMALL = ["--set", "batch_groups=8", "--set", "group_size=4", "--set", "checkpoint.every=5"]


def processes_of(home: Path) -> list[psutil.Process]:
    """Living processes that were started with this folder, by their environment or working directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.status() != psutil.STATUS_ZOMBIE
                and process.pid != os.getpid()
                and str(home) in " ".join([*process.cmdline(), *process.environ().values()])
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_the_demo_ends_with_a_report_and_leaves_no_process(tmp_path: Path) -> None:
    done = subprocess.run([*OFFBEAT, "demo", *SMALL, "--set", "versions=15"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = tmp_path.glob("runs/*/report.html")
    assert "data:image/png;base64," in report.read_text()
    plots = {path.stem for path in report.parent.glob("*.png")}
    assert plots >= {"reward", "entropy", "budget", "entropy-position", "lag", "kl", "ess", "clip", "clip-entropy", "idle"}
    assert not plots & {"prompt-entropy", "pass", "control-entropy", "control-staleness"}, "what was not measured has no plot"
    assert str(report) in done.stdout.replace("\n", "")
    assert processes_of(tmp_path) == []


def test_ctrl_c_pauses_and_resume_goes_on_to_the_end(tmp_path: Path) -> None:
    versions = 400
    with subprocess.Popen(
        [*OFFBEAT, "demo", "--plain", *SMALL, "--set", f"versions={versions}"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as demo:  # fmt: skip
        assert demo.stdout is not None
        shown = ""
        for line in demo.stdout:
            shown += line
            if line.startswith("version "):
                break
        demo.send_signal(signal.SIGINT)
        shown += demo.stdout.read()
        assert demo.wait(timeout=60) == 130, shown
    assert "offbeat run resume" in shown
    assert processes_of(tmp_path) == []

    (run,) = tmp_path.glob("runs/*")
    kept = [json.loads(path.read_text())["version"] for path in run.glob("checkpoints/*/manifest.json")]
    assert kept, "no checkpoint was made"
    resumed = subprocess.Popen(
        [*OFFBEAT, "run", "resume", run.name, "--plain"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert resumed.stdout is not None
        for line in resumed.stdout:
            if line.startswith("version ") and int(line.split()[1].split("/")[0]) > max(kept):
                break
        else:
            pytest.fail(f"it did not go on past version {max(kept)}")
        resumed.send_signal(signal.SIGINT)
        assert resumed.wait(timeout=60) == 130
    finally:
        resumed.kill()
        resumed.wait()
        assert resumed.stdout is not None
        resumed.stdout.close()
    deadline = time.monotonic() + 20
    while processes_of(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.1)
