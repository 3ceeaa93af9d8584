"""The attacks on the sandbox, inside a container with Docker's default seccomp profile and as little else as it needs."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from reward_server.sandbox.jobs import Tier
from tests.docker.engine import Engine, Mount
from tests.integration.test_sandbox_attacks import TOOL_ATTACKS, WAYS, denied

ROOT = Path(__file__).parents[2]
NEEDED = ("iniconfig", "packaging", "pluggy", "pygments", "pytest", "pytest-timeout", "system-calls")
"""Distributions that the sandbox and its tests import: all of them plain Python, so those of this environment do for another Python."""


@dataclass(frozen=True)
class Setting:
    """How the container is started; its root is read-only, and only /tmp can be written."""

    user: str = ""
    cap_drop: tuple[str, ...] = ()
    security: tuple[str, ...] = ()
    tiers: tuple[Tier, ...] = (Tier.LANDLOCK,)
    """That can be had there, strongest first."""


UNPRIVILEGED = Setting(user="10001:10001", cap_drop=("ALL",), security=("no-new-privileges",))
UNFILTERED = ("no-new-privileges", "seccomp=unconfined")
SETTINGS = {
    "user without capabilities": UNPRIVILEGED,
    "user": Setting(user="10001:10001"),
    "root": Setting(),
    "user without capabilities, no seccomp profile": replace(UNPRIVILEGED, security=UNFILTERED, tiers=(Tier.NAMESPACES, Tier.LANDLOCK)),
}


@dataclass(frozen=True)
class Containers:
    """Python in containers that have this repository, read-only."""

    engine: Engine
    image: str
    environment: Path

    def python(
        self, setting: Setting, *argv: str, mounts: Sequence[Mount] = (), tmpfs: Sequence[str] = ("/tmp:exec",), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return self.engine.run(
            self.image, ["/opt/venv/bin/python", *argv], user=setting.user, read_only=True, cap_drop=setting.cap_drop, security=setting.security,
            mounts=[Mount(ROOT, "/opt/offbeat"), Mount(self.environment, "/opt/venv"), *mounts], tmpfs=tmpfs, folder="/opt/offbeat", seconds=1_800.0,
            environment={"HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": "/opt/offbeat", "OMP_NUM_THREADS": "1", **variables},
        )  # fmt: skip


@pytest.fixture(scope="session")
def containers(engine: Engine, base_image: str, tmp_path_factory: pytest.TempPathFactory) -> Containers:
    """With a virtual environment for the container's Python."""
    folder = tmp_path_factory.mktemp("environment")
    folder.chmod(0o755)
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to("/usr/bin/python3")
    for name in NEEDED:
        for file in importlib.metadata.files(name) or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = folder / "lib" / "python3.11" / "site-packages" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), target)
    return Containers(engine, base_image, folder)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_attacks_are_held(containers: Containers, setting: Setting) -> None:
    files = [f"tests/integration/{name}" for name in ("test_sandbox_attacks.py", "test_sandbox_sessions.py", "test_sandbox_leaks.py")]
    done = containers.python(setting, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", "-m", "not slow", "-rA", "--tb=short", *files)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-1_000:]
    counts = {tier: Counter(re.findall(rf"^PASSED tests/integration/\w+\.py::(\w+)\[{tier}", done.stdout, flags=re.MULTILINE)) for tier in Tier}
    for tier in setting.tiers:
        assert counts[tier]["test_is_refused"] == len(denied())
        assert counts[tier]["test_is_stopped"] == len(WAYS)
        assert counts[tier]["test_programs_are_confined_too"] == len(TOOL_ATTACKS)
        assert counts[tier]["test_jobs_leave_nothing_behind"] == 1
        assert counts[tier]["test_a_program_in_another_language_is_compiled_and_run"] == 1
    assert {tier for tier, passed in counts.items() if passed} == set(setting.tiers)
    print(", ".join(f"{tier}: {passed.total()}" for tier, passed in counts.items() if passed), "of", done.stdout.strip().splitlines()[-1])


@pytest.fixture
def mounts(tmp_path: Path) -> list[Mount]:
    """A secret that anyone may read and a volume that anyone may write: only the sandbox keeps jobs off."""
    secret, volume = tmp_path / "token", tmp_path / "volume"
    secret.write_text("secret-of-the-cluster")
    volume.mkdir()
    volume.chmod(0o777)
    return [Mount(secret, "/run/secrets/token"), Mount(volume, "/data", read_only=False)]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_what_the_container_has_stays_closed_to_jobs(containers: Containers, setting: Setting, mounts: list[Mount]) -> None:
    done = containers.python(setting, "-m", "tests.docker.reach", mounts=mounts, OFFBEAT_CLUSTER_TOKEN="secret-of-the-cluster")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["server"]) == told["tries"] == 12  # all of it can be reached by who is not confined
    assert (told["tier"], told["right"], told["jobs"], told["programs"], told["left"]) == (setting.tiers[0], "42\n", [], [], [])


def test_programs_are_refused_where_they_could_not_be_started(containers: Containers, mounts: list[Mount]) -> None:
    """Docker mounts a tmpfs `noexec` unless it is told otherwise."""
    told = json.loads(containers.python(UNPRIVILEGED, "-m", "tests.docker.reach", mounts=mounts, tmpfs=["/tmp"]).stdout)
    assert (told["right"], told["jobs"]) == ("42\n", [])
    assert "noexec" in told["refused"]


@pytest.mark.parametrize(
    ("setting", "tmpfs", "reason"),
    [
        (UNPRIVILEGED, [], "No usable temporary directory"),
        (Setting(cap_drop=("ALL",)), ["/tmp:exec"], "Operation not permitted: '/tmp/offbeat-sandbox-"),  # it cannot make itself another user
    ],
    ids=["nowhere to write", "root without capabilities"],
)
def test_where_jobs_cannot_be_confined_none_is_run(containers: Containers, setting: Setting, tmpfs: list[str], reason: str) -> None:
    done = containers.python(setting, "-c", "import reward_server.sandbox.supervisor as s; s.CodeSandbox()", tmpfs=tmpfs)
    assert re.search(f"Refused: untrusted code cannot be confined here: .*landlock: .*{reason}", done.stderr)
