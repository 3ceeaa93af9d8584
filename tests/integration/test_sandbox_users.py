"""The sandbox's tests once more, as an ordinary user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USER = 61_234


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("file", ["test_sandbox_attacks.py", "test_sandbox_replies.py", "test_sandbox_sessions.py", "test_sandbox_leaks.py"])
def test_all_holds_for_an_ordinary_user(file: str, request: pytest.FixtureRequest) -> None:
    if os.geteuid() != 0:
        pytest.skip("the other tests have just been run as an ordinary user")
    if not (setpriv := shutil.which("setpriv")):
        pytest.skip("no setpriv, from util-linux")
    as_user = [setpriv, f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs", "env", "-i"]
    packages = sysconfig.get_path("purelib")
    for python in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin")):
        tried = [*as_user, f"PYTHONPATH={ROOT}:{packages}", python or "false", "-c", "import pytest"]
        if subprocess.run(tried, cwd=ROOT, stderr=subprocess.DEVNULL, check=False).returncode == 0:
            break
    else:
        pytest.skip("an ordinary user cannot read this interpreter")
    home = tempfile.mkdtemp(prefix="sandbox-user-")  # pytest's own folders are closed to others
    request.addfinalizer(lambda: shutil.rmtree(home))
    os.chown(home, USER, USER)
    environment = [f"PYTHONPATH={ROOT}:{packages}", f"HOME={home}", f"TMPDIR={home}", "PATH=/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1"]
    environment.append("PYTEST_DISABLE_PLUGIN_AUTOLOAD=1")  # that interpreter may lack what other plug-ins need
    tests = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--noconftest", "-m", "not slow", f"tests/integration/{file}", "-ra"]
    done = subprocess.run([*as_user, *environment, python, *tests], cwd=ROOT, capture_output=True, text=True, timeout=1100, check=False)
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-1_000:]
    assert " passed" in done.stdout
