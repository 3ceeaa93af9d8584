"""The kernel's limits on one job, and which of them an error comes from. Standard library only."""

from __future__ import annotations

import errno
import os
import resource

from reward_server.sandbox.jobs import Cause, Limits

THREADS = 16
"""Beside the processes that are allowed."""
ENOUGH = 0.7
"""Share of its processor time after which a SIGKILL came for that reason: the kernel counts ticks for the limit, and time for what it reports."""
NEIGHBOURS = 256
"""Room for other processes that start meanwhile, where jobs share a user, and so a count, with all that user's processes."""


def apply(limits: Limits, *, counted: int = 0) -> None:
    """Lowers this process's limits, soft and hard. `counted`: what the kernel counts for this user already, where it is not alone."""
    processes = limits.processes + THREADS + (counted + NEIGHBOURS if counted else 0)
    for what, most in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_seconds + 1),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, 256 if limits.commands else 64),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_STACK, 8 << 20),
        (resource.RLIMIT_CORE, 1),  # 0 would still start the program that a core_pattern with a pipe names; 1 does not
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (min(limits.cpu_seconds, hard), hard))  # SIGXCPU, which says what it is; SIGKILL to who ignores it


def counted_tasks() -> int:
    """A power of two above the number of processes and threads that the kernel counts for this process's user: /proc may show but a part of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    try:
        for exponent in range(6, 20):
            resource.setrlimit(resource.RLIMIT_NPROC, (1 << exponent, hard))
            try:
                pid = os.fork()
            except BlockingIOError:
                continue
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            break
    finally:
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
    return 1 << exponent


def cause_of(raised: BaseException) -> Cause | None:
    """The limit that makes Python raise this, if one does."""
    if isinstance(raised, MemoryError) or (isinstance(raised, OSError) and raised.errno == errno.ENOMEM):
        return Cause.MEMORY
    if isinstance(raised, OSError) and raised.errno in (errno.EFBIG, errno.ENOSPC, errno.EDQUOT):
        return Cause.FILES
    if isinstance(raised, OSError) and raised.errno == errno.EAGAIN:
        return Cause.PROCESSES
    if isinstance(raised, RuntimeError) and raised.args == ("can't start new thread",):
        return Cause.PROCESSES
    return None
