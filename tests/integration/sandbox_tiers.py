"""Sandboxes of each tier that this machine allows, for the tests of this folder."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from reward_server.sandbox.jobs import Refused, Tier
from reward_server.sandbox.supervisor import CodeSandbox, SandboxOptions

TIERS = [Tier.NAMESPACES, Tier.LANDLOCK]


def open_tier(tier: Tier, **options: Any) -> CodeSandbox:
    """Skips where the kernel, or an outer sandbox, refuses the tier."""
    tries = [sys.executable]
    if tier == Tier.LANDLOCK and os.geteuid() == 0 and (system := shutil.which("python3", path="/usr/local/bin:/usr/bin")):
        tries.append(system)  # jobs run as another user, who may not be able to read this interpreter
    reason = ""
    for python in tries:
        try:
            return CodeSandbox(SandboxOptions(tier=tier, **{"python": python, "sessions": 4, **options}))
        except Refused as refused:
            reason = str(refused)
    pytest.skip(reason)


def processes(holds: Callable[[str], bool]) -> list[int]:
    """Those whose command line is so."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    line = file.read().replace(b"\0", b" ").decode(errors="replace")
                with open(f"/proc/{name}/stat") as file:
                    state = file.read().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state not in "ZX" and holds(line):
                found.append(int(name))
    return found


def descendants(pid: int) -> set[int]:
    """Of a process, zombies too."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def gone(pids: set[int], *, seconds: float = 30.0) -> bool:
    """Waits until none of them is there; zombies that nobody has collected yet do not count."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(_lives(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
