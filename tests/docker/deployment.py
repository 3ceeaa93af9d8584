"""Offbeat's images, and its compose files in force, on a Docker engine that reaches no registry of images and no package index.

What is built is a copy of this working tree, the wheels beside it, on Debian's packages: docker/README.md, "Without a registry".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compose

from services.client import Client, Unreachable
from services.contracts.spec import RunSpec, flatten, with_values
from services.contracts.states import RunState
from services.contracts.views import RunView
from tests.docker.engine import Engine, Unavailable, debian_rootfs

ROOT = Path(__file__).parents[2]
COMPOSE = Path(compose.__file__).parent / "docker-compose"
FILES = ("compose.yaml", "compose.cpu.yaml", "tests/docker/compose.stand-ins.yaml")
TAG = "test"
IMAGES = {
    "control-plane": f"offbeat/control-plane:{TAG}", "reward-server": f"offbeat/reward-server:{TAG}",
    "rollout-server": f"offbeat/rollout-server:{TAG}-cpu", "trainer": f"offbeat/trainer:{TAG}-cpu",
}  # fmt: skip
PYTHON, PYTHON_PACKAGES = "offbeat-test/python:3.11", ("gcc", "libc6-dev", "libnuma1", "python3", "python3-dev", "python3-venv")
STAND_INS, STAND_IN_PACKAGES = "offbeat-test/packages:bookworm", ("prometheus", "redis-server")
LOCKS = ("control-plane", "reward-server", "reasoning-gym", "ray", "cpu")
BUILD_SECONDS, WHEELS_SECONDS, DOWN_SECONDS = 3_000.0, 1_800.0, 240.0


def documented_commands() -> list[str]:
    """From `git clone` to a run, on one host."""
    section = (ROOT / "docs" / "deployment.md").read_text().split("\n## A GPU host by Docker Compose\n")[1]
    return [line.split("  # ")[0].strip() for line in section.split("```")[1].strip().splitlines()]


def tracked(root: Path) -> list[Path]:
    """What a clone of this working tree would hold, changes that are not committed included."""
    argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=True).stdout
    return [path for name in filter(None, listed.split("\0")) if (root / (path := Path(name))).is_file()]


def wheels() -> Path:
    """A folder with every wheel of the locks of the CPU images, fetched once for each state of them. Raises Unavailable."""
    if sys.version_info[:2] != (3, 11):
        raise Unavailable("the images have Python 3.11: only a Python 3.11 can fetch the wheels for it")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offbeat" / "wheelhouse"
    folder.mkdir(parents=True, exist_ok=True)
    # Markers ask about this Python, and the images may have an older 3.11: without them everything is fetched.
    pins = sorted({line.split(";")[0].strip() for lock in LOCKS for line in (ROOT / "deploy" / "locks" / f"{lock}.txt").read_text().splitlines()})
    pins = [pin for pin in pins if pin and not pin.startswith("#")]
    done, state = folder / ".fetched", hashlib.sha256("\n".join(pins).encode()).hexdigest()
    if not done.is_file() or done.read_text() != state:
        argv = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--dest", str(folder), *pins]
        fetched = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WHEELS_SECONDS, check=False)
        if fetched.returncode != 0:
            raise Unavailable(f"the wheels for the images could not be fetched: {fetched.stderr[-1_000:]}")
        done.write_text(state)
    return folder


def clone(folder: Path) -> Path:
    """This working tree as a clone has it, with the wheels in docker/wheelhouse."""
    for path in tracked(ROOT):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
        (folder / path).chmod((ROOT / path).stat().st_mode & 0o700)  # as under umask 077: images and containers must do with that
    for wheel in wheels().iterdir():
        target = folder / "docker" / "wheelhouse" / wheel.name
        try:
            target.hardlink_to(wheel)
        except OSError:  # on another file system
            shutil.copyfile(wheel, target)
    return folder


@dataclass(frozen=True)
class Deployment:
    """A clone with its images built, as one compose project."""

    engine: Engine
    folder: Path
    project: str
    port: int
    """Where its API is published."""

    @property
    def environment(self) -> dict[str, str]:
        variables = {"DOCKER_BUILDKIT": "0", "OFFBEAT_TAG": TAG, "OFFBEAT_API_PORT": str(self.port), "COMPOSE_FILE": ":".join(FILES)}
        return self.engine.environment | {"COMPOSE_PROJECT_NAME": self.project} | variables

    def run(self, *argv: str, seconds: float = 120.0) -> str:
        """A command in the clone. Its output; both outputs where it fails."""
        done = subprocess.run(
            argv, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0, f"{' '.join(argv)}: {done.stdout[-6_000:]}{done.stderr[-6_000:]}"
        return done.stdout

    def compose(self, *argv: str, seconds: float = 120.0) -> str:
        return self.run(str(COMPOSE), *argv, seconds=seconds)

    def documented(self, start: str, further: str = "", *, seconds: float = 600.0) -> str:
        """The one command of docs/deployment.md that starts so, with the images of this clone and for no GPU."""
        (line,) = (line for line in documented_commands() if line.startswith(start))
        line = (
            line.replace("docker compose", str(COMPOSE))
            .replace("offbeat/control-plane:0.1.0", IMAGES["control-plane"])
            .replace("--gpus 2", "--gpus 0")
        )
        return self.run("bash", "-c", f"{line} {further}", seconds=seconds)

    def up(self, *argv: str) -> None:
        """As documented; what the containers say, where it fails."""
        try:
            self.documented("docker compose up", " ".join(argv))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.compose('ps', '--all')}\n{self.compose('logs', '--tail', '30')}") from None

    def containers(self, service: str = "") -> list[str]:
        """Ids of those that run."""
        return self.compose("ps", "--quiet", *([service] if service else [])).split()

    def inspect(self, *ids: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.engine.docker("inspect", *ids).stdout)
        return found

    def execute(self, service: str, *argv: str) -> str:
        """A command in the container of a service."""
        return self.compose("exec", "-T", service, *argv)

    def left(self) -> dict[str, list[str]]:
        """What of the project the engine still has, by kind."""
        label = f"label=com.docker.compose.project={self.project}"
        asked = {"containers": ["ps", "--all"], "networks": ["network", "ls"], "volumes": ["volume", "ls"]}
        return {kind: self.engine.docker(*argv, "--quiet", "--filter", label).stdout.split() for kind, argv in asked.items()}

    def kill(self, service: str) -> None:
        """SIGKILL to the process that the container of a service is there for, and waits for another in its place."""
        (container,) = self.inspect(*self.containers(service))
        before = container["RestartCount"], container["State"]["StartedAt"]
        self.engine.docker("exec", container["Id"], "sh", "-c", "kill -KILL $(cat /proc/1/task/1/children)", check=False)  # may end with it

        def again() -> bool:
            state = self.inspect(container["Id"])[0]
            return (state["RestartCount"], state["State"]["StartedAt"]) != before and state["State"]["Running"]

        wait(again, f"{service} is not started again", seconds=60)

    def client(self) -> Client:
        return Client(f"http://127.0.0.1:{self.port}", (self.folder / "secrets" / "token").read_text().strip())


def wait(holds: Callable[[], bool], otherwise: str, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{otherwise} after {seconds:g} s"
        time.sleep(0.2)


def wait_for_run(client: Client, run_id: str, holds: Callable[[RunView], bool], *, seconds: float = 300.0) -> RunView:
    """Until the run is so; while the API is away, it waits too."""
    deadline, run = time.monotonic() + seconds, None
    while run is None or not holds(run):
        assert run is None or run.state is not RunState.FAILED, run.reason
        assert time.monotonic() < deadline, f"after {seconds:g} s: {run}"
        time.sleep(0.2)
        with contextlib.suppress(Unreachable):
            run = client.run(run_id)
    return run


def demo_run(**values: Any) -> RunSpec:
    """The demo run, with other values: nested ones as dicts."""
    return with_values(RunSpec.model_validate(tomllib.loads((ROOT / "deploy" / "runs" / "demo.toml").read_text())), flatten(values))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextlib.contextmanager
def deployment(engine: Engine, folder: Path) -> Iterator[Deployment]:
    """Images built and `offbeat init` done as docs/deployment.md says, nothing started. Nothing is left of it afterwards. Raises Unavailable."""
    made = Deployment(engine, clone(folder), f"offbeat-test-{os.getpid()}", free_port())
    try:
        engine.import_rootfs(debian_rootfs(PYTHON_PACKAGES), PYTHON)
        engine.import_rootfs(debian_rootfs(STAND_IN_PACKAGES), STAND_INS)
        arguments = f"--build-arg PYTHON_IMAGE={PYTHON} --build-arg PIP_NO_INDEX=1"
        began = time.monotonic()
        made.documented("make images", f"VARIANT=cpu VERSION={TAG} BUILD_ARGS='{arguments}'", seconds=BUILD_SECONDS)
        print(f"images made in {time.monotonic() - began:.0f} s")
        made.documented("docker run")
        made.compose("build", "redis", "prometheus")
        try:
            yield made
        finally:
            made.compose("down", "--volumes", "--remove-orphans", seconds=DOWN_SECONDS)
    finally:
        engine.docker("image", "rm", *IMAGES.values(), "offbeat-test/redis", "offbeat-test/prometheus", PYTHON, STAND_INS, check=False)
