"""A Docker engine for tests: the one that `docker` reaches, or one of their own that ends with them.

Base images are made of Debian's packages, so no registry of images is needed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

START_SECONDS, END_SECONDS = 90.0, 90.0
DEBOOTSTRAP_SECONDS = 1_800.0
RELEASE = "bookworm"
SUBNET = "172.31.250.1/24"
"""Of containers; away from what private networks mostly use."""
BRIDGE = "docker0"


class Unavailable(Exception):
    """What the tests need and this machine lacks."""


@dataclass(frozen=True)
class Mount:
    """A folder of this machine in a container."""

    source: Path
    target: str
    read_only: bool = True

    def __str__(self) -> str:
        return f"type=bind,source={self.source},target={self.target}{',readonly' if self.read_only else ''}"


@dataclass(frozen=True)
class Engine:
    """What the tests ask of Docker. All containers are removed when their command has ended."""

    host: str
    """Address for `docker --host`, and for DOCKER_HOST of what else talks to it; empty: what `docker` takes by itself."""

    @property
    def environment(self) -> dict[str, str]:
        """For `docker`, and what is built on it (compose)."""
        return {**os.environ, **({"DOCKER_HOST": self.host} if self.host else {})}

    def docker(self, *argv: str, seconds: float = 120.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["docker", *argv], env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=check
        )

    def import_rootfs(self, archive: Path, image: str) -> None:
        """Makes an image of a tar file with a root file system."""
        self.docker("import", str(archive), image, seconds=600.0)

    def run(
        self,
        image: str,
        argv: Sequence[str],
        *,
        user: str = "",
        read_only: bool = False,
        mounts: Sequence[Mount] = (),
        tmpfs: Sequence[str] = (),
        cap_drop: Sequence[str] = (),
        security: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        folder: str = "/",
        seconds: float = 600.0,
    ) -> subprocess.CompletedProcess[str]:
        """A command in a container of its own, whatever its exit code. `tmpfs`: "/tmp" or "/tmp:exec,size=64m"; `security`: "no-new-privileges"."""
        name = f"offbeat-test-{uuid.uuid4().hex[:12]}"
        options = [f"--name={name}", "--rm", f"--workdir={folder}", *(["--read-only"] if read_only else []), *([f"--user={user}"] if user else [])]
        options += [f"--mount={mount}" for mount in mounts] + [f"--tmpfs={folder}" for folder in tmpfs]
        options += [f"--cap-drop={capability}" for capability in cap_drop] + [f"--security-opt={option}" for option in security]
        options += [f"--env={key}={value}" for key, value in (environment or {}).items()]
        try:
            return self.docker("run", *options, image, *argv, seconds=seconds, check=False)
        finally:
            self.docker("rm", "--force", "--volumes", name, check=False)  # there only if the command was given up


@contextlib.contextmanager
def any_engine() -> Iterator[Engine]:
    """The engine that `docker` reaches (DOCKER_HOST, the system's own), or a private one. Raises Unavailable."""
    if not shutil.which("docker"):
        raise Unavailable("there is no `docker` command (Debian: apt-get install docker.io)")
    theirs = Engine(host="")
    if theirs.docker("version", check=False).returncode == 0:
        yield theirs
        return
    if os.environ.get("DOCKER_HOST"):
        raise Unavailable(f"no engine answers at DOCKER_HOST={os.environ['DOCKER_HOST']}")
    with private_engine() as own:
        yield own


@contextlib.contextmanager
def private_engine() -> Iterator[Engine]:
    """A dockerd with a socket and a data folder of its own, which leaves nothing behind. Its containers reach nothing outside."""
    if not shutil.which("dockerd"):
        raise Unavailable("no Docker engine runs, and there is no `dockerd` to start (Debian: apt-get install docker.io)")
    if os.geteuid() != 0:
        raise Unavailable("no Docker engine runs, and only root can start one")
    folder = Path(tempfile.mkdtemp(prefix="offbeat-docker-"))
    had_bridge = Path("/sys/class/net", BRIDGE).exists()
    log = folder / "log"
    argv = [
        "setpriv", "--pdeathsig=TERM", "dockerd", f"--host=unix://{folder}/d.sock", f"--data-root={folder}/data", f"--exec-root={folder}/exec",
        f"--pidfile={folder}/pid", "--iptables=false", "--ip6tables=false", f"--bip={SUBNET}",
    ]  # fmt: skip
    with log.open("wb") as told:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=told, stderr=told, start_new_session=True)
    try:
        engine = Engine(host=f"unix://{folder}/d.sock")
        end = time.monotonic() + START_SECONDS
        while engine.docker("version", check=False).returncode != 0:
            if process.poll() is not None or time.monotonic() > end:
                raise Unavailable(f"dockerd does not start: {log.read_text(errors='replace')[-1_500:]}")
            time.sleep(0.2)
        yield engine
    finally:
        process.terminate()  # it ends its containers, and its containerd
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for mounted in _mounts_below(folder):
            subprocess.run(["umount", "--lazy", mounted], check=True)
        shutil.rmtree(folder)
        if not had_bridge and Path("/sys/class/net", BRIDGE).exists():
            subprocess.run(["ip", "link", "delete", BRIDGE], check=True)


def _mounts_below(folder: Path) -> list[str]:
    """Innermost first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted((point for point in points if point.startswith(f"{folder}/")), key=len, reverse=True)


def debian_rootfs(packages: Sequence[str]) -> Path:
    """A tar file of a small Debian with these packages, made once for each set of them. Raises Unavailable."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offbeat"
    archive = cache / f"{RELEASE}-{platform.machine()}-{'-'.join(sorted(packages))}.tar"
    if archive.is_file():
        return archive
    if not shutil.which("debootstrap"):
        raise Unavailable("a base image is made with `debootstrap` (Debian: apt-get install debootstrap)")
    if os.geteuid() != 0:
        raise Unavailable(f"only root can make the base image {archive}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="offbeat-rootfs-", dir=cache) as folder:
        made, packed = Path(folder, "root"), Path(folder, archive.name)
        options = ["--variant=minbase", *([f"--include={','.join(sorted(packages))}"] if packages else [])]
        done = subprocess.run(
            ["debootstrap", *options, RELEASE, str(made)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEBOOTSTRAP_SECONDS,
            check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise Unavailable(f"debootstrap failed: {done.stdout[-1_000:]}{done.stderr[-500:]}")
        unneeded = ("dev/*", "usr/share/doc/*", "usr/share/man/*", "var/cache/apt/*", "var/lib/apt/lists/*")
        without = [f"--exclude=./{path}" for path in unneeded]
        subprocess.run(["tar", "--create", f"--file={packed}", f"--directory={made}", "--numeric-owner", *without, "."], check=True)
        packed.replace(archive)
    return archive
