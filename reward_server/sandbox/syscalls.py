"""Numbers of the kernel's calls, from the tables of the `system-calls` package."""

from __future__ import annotations

import platform

from system_calls import syscalls

ARCHITECTURES = {"x86_64": "x86_64", "aarch64": "arm64", "arm64": "arm64"}
"""What `uname -m` says, and the table's name."""


def numbers(machine: str | None = None) -> dict[str, int]:
    """Number of each call by name, on this machine or that one. Raises ValueError for a machine that the sandbox does not know."""
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise ValueError(f"the sandbox runs on x86-64 and arm64, not on {machine}")
    return dict(syscalls().load_arch_table(ARCHITECTURES[machine]))
