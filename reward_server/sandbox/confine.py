"""What a forked process does to itself before it sees a job: each step can be taken once, and none taken back. Standard library only."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from reward_server.sandbox import kernel, landlock, limits, namespaces, seccomp
from reward_server.sandbox.child import SOCKET, STDIN_MEMORY
from reward_server.sandbox.jobs import Limits, Tier
from reward_server.sandbox.kernel import Namespace
from reward_server.sandbox.landlock import Access, Beneath
from reward_server.sandbox.messages import Setup


@dataclass(frozen=True)
class Cell:
    """What a job is confined to."""

    setup: Setup
    limits: Limits
    readable: list[Beneath]
    folder: str
    """The working folder; empty in the namespaces tier, where it is made here."""
    user: int | None
    """Of the job; None: it stays what it is."""
    counted: int
    """Processes and threads that the kernel counts together with the job's; 0 where it counts those apart."""
    parent: int
    """The zygote, to die with."""


def confine(cell: Cell, *, sock: int, output: int, error: int) -> None:
    """Confines this process for ever, and leaves it with the descriptors that `child` names. Raises OSError."""
    setup, wanted = cell.setup, cell.limits
    separate = setup.tier == Tier.NAMESPACES
    nowhere = os.open("/dev/null", os.O_RDWR)
    memory = os.memfd_create("stdin")
    os.dup2(nowhere, 0)
    os.dup2(output, 1)
    os.dup2(error, 2)
    os.dup2(sock, SOCKET, inheritable=False)
    os.dup2(memory, STDIN_MEMORY, inheritable=False)
    if separate:
        namespaces.enter_job(wanted.file_bytes, cell.user or 0, executable=wanted.commands)
    else:
        os.chdir(cell.folder)
    kernel.drop_bounding()  # while this process may
    if cell.user is not None:
        os.setgroups([])
        os.setresgid(cell.user, cell.user, cell.user)
        os.setresuid(cell.user, cell.user, cell.user)
    if separate:
        kernel.unshare(Namespace.USER)
    else:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user forgets it, so after that
        if os.getppid() != cell.parent:
            raise OSError("the zygote has gone")
    kernel.drop_capabilities()
    os.umask(0o077)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0 if separate else 1)  # where files are watched, the zygote looks at /proc
    if setup.tier != Tier.OUTER:
        rights = landlock.TREES if separate or wanted.commands else landlock.FILES
        own = landlock.beneath(".", rights | (Access.EXECUTE if wanted.commands else Access(0)))
        landlock.restrict(setup.numbers, [*cell.readable, own])
    os.closerange(STDIN_MEMORY + 1, 1 << 20)
    limits.apply(wanted, counted=cell.counted)
    apart = separate or landlock.version(setup.numbers) >= 6  # a user of its own is not enough: another server on this machine may use the same
    own_pid = os.getpid() if not wanted.commands else None if apart else 0  # 0 is nobody's number
    shared = not separate and cell.user is None
    seccomp.install(setup.numbers, seccomp.program(setup.numbers, setup.machine, commands=wanted.commands, own_pid=own_pid, shared=shared))
