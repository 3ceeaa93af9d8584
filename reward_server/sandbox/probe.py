"""What this kernel allows, and a quick test of a tier that has been started: attacks that must fail before any job is taken."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from reward_server.sandbox import landlock, seccomp
from reward_server.sandbox.jobs import Session, Tier

SECONDS = 30.0
FIRST_USER = 62_000
"""Jobs of a root server run as this user and those above: outside of what systems give to people and services."""


class Facts(NamedTuple):
    """Of the kernel."""

    seccomp: bool
    landlock: int
    """Version of its interface; 0: none."""


def facts(numbers: dict[str, int]) -> Facts:
    return Facts(seccomp.available(numbers), landlock.version(numbers))


def candidates(known: Facts, *, outer: bool, root: bool) -> list[Tier]:
    """The tiers to try, strongest first. Empty: refuse. `outer`: the operator declares that the server runs in a sandbox.

    Without Landlock only a user of its own keeps a job from the server's memory and secrets, and only root can give it one.
    """
    if not known.seccomp:
        return []
    if known.landlock >= landlock.NEEDED_VERSION:
        return [Tier.NAMESPACES, Tier.LANDLOCK]
    return [Tier.OUTER] if outer and root else []


ATTACKS = r"""
import ctypes, os, socket, subprocess, sys

def imports_what_is_not_loaded():
    import colorsys

def is_root():
    assert 0 in (os.getuid(), os.geteuid())

def has_environment():
    assert os.environ or os.environb

def has_descriptors():
    found = []
    for number in range(5, 256):
        try:
            os.fstat(number)
            found.append(number)
        except OSError:
            pass
    assert found

def reads_files(path):
    return open(path, "rb").read(1)

def lists_files(path):
    return os.listdir(path)

def writes_files(path):
    open(path + "/offbeat-attack", "w").close()

def opens_sockets():
    socket.socket(socket.AF_INET, socket.SOCK_STREAM)

def forks():
    if os.fork() == 0:
        os._exit(0)

def starts_programs():
    subprocess.run(["/bin/true"], check=True)

def signals():
    os.kill(os.getppid() or 1, 0)

def traces():
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.ptrace(0, 0, 0, 0) == 0

def gets_namespaces():
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x10000000) == 0
"""


def _closed() -> str:
    """Why users without a name cannot read this interpreter, when a folder is the reason."""
    for folder in reversed(Path(os.__file__).resolve().parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            return (
                f"this server runs as root, its jobs as user {FIRST_USER} and above, and {folder} is closed to them; run it as an ordinary user or "
            )
    return ""


def breaches(session: Session, tier: Tier, *, root: bool) -> list[str]:
    """The attacks that got through. Where an outer sandbox guards the files, those on files are left out."""
    attacks: list[tuple[str, list[str]]] = [
        ("has_environment", []), ("has_descriptors", []), ("opens_sockets", []), ("forks", []), ("starts_programs", []), ("signals", []),
        ("traces", []), ("gets_namespaces", []),
    ]  # fmt: skip
    if root:
        attacks.append(("is_root", []))
    if tier != Tier.OUTER:
        attacks += [("reads_files", [path]) for path in ("/etc/passwd", "/proc/self/environ", "/proc/1/environ", os.path.abspath(__file__))]
        attacks += [("lists_files", [path]) for path in ("/proc", "/home", "/etc")]
        attacks += [("writes_files", [path]) for path in ("/", "/var/tmp", "/dev/shm", os.path.dirname(os.path.abspath(__file__)))]
    loaded = session.load(ATTACKS, seconds=SECONDS)
    if loaded.error:
        return [f"cannot be tested: {loaded.error}"]
    if found := session.call("imports_what_is_not_loaded", [], {}, seconds=SECONDS).error:
        return [f"jobs cannot import the standard library ({found}): {_closed() if root else ''}use an interpreter that their user can read"]
    return [f"{name}({', '.join(args)})" for name, args in attacks if not session.call(name, list(args), {}, seconds=SECONDS).error]
