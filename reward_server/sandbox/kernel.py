"""The kernel's calls that Python has no function for, through the C library. Standard library only: the zygote imports it."""

from __future__ import annotations

import ctypes
import os
import struct
from enum import IntFlag
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 23, 24, 47, 4
CAPABILITY_VERSION_3 = 0x20080522
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000


class Namespace(IntFlag):
    """CLONE_NEW* of <linux/sched.h>."""

    MOUNT = 0x20000
    CGROUP = 0x02000000
    UTS = 0x04000000
    IPC = 0x08000000
    USER = 0x10000000
    PID = 0x20000000
    NET = 0x40000000


class Mount(IntFlag):
    """MS_* of <linux/mount.h>."""

    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    BIND = 4096
    REC = 16384
    PRIVATE = 1 << 18


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: Any) -> int:
    """Raises OSError. Integers are passed as machine words."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *words), f"system call {number}")


def prctl(option: int, *arguments: int) -> int:
    words = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    return _checked(_libc.prctl(ctypes.c_int(option), *words), f"prctl {option}")


def unshare(namespaces: Namespace) -> None:
    _checked(_libc.unshare(ctypes.c_int(namespaces)), f"unshare {namespaces!r}")


def setns(descriptor: int, kind: Namespace) -> None:
    _checked(_libc.setns(ctypes.c_int(descriptor), ctypes.c_int(kind)), "setns")


def mount(source: str | None, target: str, kind: str | None, flags: Mount, options: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _checked(_libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def restrict_mounts(number: int, target: str, flags: Mount) -> None:
    """Adds RDONLY, NOSUID, NODEV or NOEXEC to a mount and all below it, by mount_setattr(2) with this number."""
    syscall(number, AT_FDCWD, os.fsencode(target), AT_RECURSIVE, struct.pack("=4Q", flags, 0, 0, 0), 32)


def detach(target: str) -> None:
    _checked(_libc.umount2(os.fsencode(target), MNT_DETACH), f"umount {target}")


def drop_bounding() -> None:
    """Capabilities that programs could gain."""
    for capability in range(64):
        if _libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) == 1:
            _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # refused without CAP_SETPCAP, and then nothing can be gained: no_new_privs


def drop_capabilities() -> None:
    """All of them, for good: bounding, ambient, inheritable, permitted and effective."""
    drop_bounding()
    _libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
