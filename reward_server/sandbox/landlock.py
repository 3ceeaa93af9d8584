"""Landlock: files that a process may reach, and no TCP, no abstract sockets, no signals to outside (<linux/landlock.h>). Standard library only."""

from __future__ import annotations

import os
import stat
import struct
from enum import IntFlag
from typing import NamedTuple

from reward_server.sandbox import kernel


class Access(IntFlag):
    """LANDLOCK_ACCESS_FS_*."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


READ = Access.READ_FILE | Access.READ_DIR
FILES = READ | Access.WRITE_FILE | Access.REMOVE_FILE | Access.MAKE_REG | Access.TRUNCATE
"""Of a working folder: plain files in it."""
TREES = FILES | Access.MAKE_DIR | Access.REMOVE_DIR | Access.MAKE_SYM | Access.REFER
"""Folders and links too."""
OF_A_FILE = Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV
"""Rights that a rule on something else than a folder may name."""
KNOWN = {1: Access(0x1FFF), 2: Access(0x3FFF), 3: Access(0x7FFF), 4: Access(0x7FFF), 5: Access(0xFFFF)}
"""Rights by version of the interface; later ones add none of this kind."""
TCP_BIND_AND_CONNECT = 3
SCOPE_SOCKETS_AND_SIGNALS = 3
NEEDED_VERSION = 3
"""Before it, files could be truncated against the rules."""


class Beneath(NamedTuple):
    """A rule: what is allowed with a file or below a folder."""

    descriptor: int
    """Opened with O_PATH."""
    allowed: Access


def version(numbers: dict[str, int]) -> int:
    """Of the kernel's interface; 0 where there is none."""
    try:
        return kernel.syscall(numbers["landlock_create_ruleset"], None, 0, 1)
    except OSError:
        return 0


def beneath(path: str, allowed: Access) -> Beneath:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
    return Beneath(descriptor, allowed if folder else allowed & OF_A_FILE)


def restrict(numbers: dict[str, int], allowed: list[Beneath]) -> None:
    """Puts this process under the rules for ever. Needs no_new_privs."""
    known_version = version(numbers)
    handled = KNOWN[min(known_version, 5)]
    network = TCP_BIND_AND_CONNECT if known_version >= 4 else 0
    scoped = SCOPE_SOCKETS_AND_SIGNALS if known_version >= 6 else 0
    attributes = struct.pack("=QQQ", handled, network, scoped)[: 8 if known_version < 4 else 16 if known_version < 6 else 24]
    ruleset = kernel.syscall(numbers["landlock_create_ruleset"], attributes, len(attributes), 0)
    for rule in allowed:
        kernel.syscall(numbers["landlock_add_rule"], ruleset, 1, struct.pack("=Qi", rule.allowed & handled, rule.descriptor), 0)
    kernel.syscall(numbers["landlock_restrict_self"], ruleset, 0)
    os.close(ruleset)
