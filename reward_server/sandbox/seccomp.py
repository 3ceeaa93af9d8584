"""The allow-list of kernel calls, as a classic BPF program (Documentation/userspace-api/seccomp_filter.rst). Standard library only.

Two profiles: one for a Python job, which can start threads and no process, and `commands`, which adds what a compiler needs to run. What is not
listed is refused with EPERM; calls made in the manner of another architecture kill the process.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from typing import NamedTuple

from reward_server.sandbox import kernel

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "arm64": 0xC00000B7}
"""Machine of the ELF header, 64 bits, little endian (<linux/audit.h>)."""
X32_BIT = 0x40000000
LOAD, AND, EQUAL, GREATER_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER_AT, ARCH_AT, ARGUMENTS_AT = 0, 4, 16
"""Offsets in struct seccomp_data."""
SET_MODE_FILTER = 1
INSTRUCTION = struct.Struct("=HBBI")

ALWAYS = """
    read write readv writev pread64 pwrite64 preadv pwritev close close_range lseek fsync fdatasync ftruncate truncate
    open openat creat access faccessat faccessat2 stat lstat fstat newfstatat statx statfs fstatfs getdents getdents64 getcwd chdir fchdir
    readlink readlinkat mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 symlink symlinkat umask
    dup dup2 dup3 pipe pipe2 eventfd2 poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait copy_file_range sendfile flock
    fadvise64
    mmap mprotect munmap mremap madvise brk mincore msync membarrier
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack restart_syscall pause alarm
    setitimer getitimer nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time
    futex futex_wait futex_wake futex_waitv set_robust_list get_robust_list rseq sched_yield sched_getaffinity getcpu
    getpid gettid getppid getuid geteuid getgid getegid getgroups getpgrp getpgid getsid getresuid getresgid uname sysinfo times
    getrlimit getrusage getrandom arch_prctl set_tid_address exit exit_group
    recvfrom getsockname getsockopt shutdown
"""
"""Whatever their arguments. There is no way to a socket but a pair (below), so the last line reaches nobody else."""

COMMANDS = "fork vfork execve wait4 waitid timer_create timer_settime timer_gettime timer_delete"

MODES = "chmod fchmod fchmodat utimensat"
"""Not where the job shares the server's user and its files: Landlock lets these pass."""

CLONE_THREAD = 0x10000
CLONE_REFUSED = 0x7E02A080
"""New namespaces of each kind, CLONE_PARENT and CLONE_PTRACE."""
AF_UNIX, SOCK_STREAM, SOCK_TYPE = 1, 1, 0xF
TCGETS, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX = 0x5401, 0x541B, 0x5421, 0x5450, 0x5451
FCNTL = (*range(8), 36, 37, 38, 1030, 1032, 1034)
"""Duplicates, flags, locks, the size of a pipe, seals. Not F_SETOWN and F_SETSIG, which have the kernel send any signal to any process of the user;
not F_SETPIPE_SZ, since pipes of all of a user's processes have one limit."""
SIGKILL = 9


class Instruction(NamedTuple):
    code: int
    if_true: int
    if_false: int
    value: int


class Check(NamedTuple):
    """Holds when a word of an argument, masked, has the value; or has it not."""

    argument: int
    value: int
    mask: int = 0xFFFFFFFF
    high: bool = False
    """The upper 32 bits."""
    holds: bool = True


class Rule(NamedTuple):
    """A call that is allowed when all checks of one of the alternatives hold."""

    name: str
    alternatives: tuple[tuple[Check, ...], ...]
    error: int = errno.EPERM


def _null(argument: int) -> tuple[Check, Check]:
    return Check(argument, 0), Check(argument, 0, high=True)


def rules(*, commands: bool, own_pid: int | None) -> list[Rule]:
    """Calls whose arguments decide. `own_pid`: the only process that may be sent a signal; None: any that the kernel lets it reach."""
    aimed = () if own_pid is None else (Check(0, own_pid),)
    thread = (Check(0, 0, CLONE_REFUSED), Check(0, CLONE_THREAD, CLONE_THREAD))
    return [
        Rule("clone", ((Check(0, 0, CLONE_REFUSED),) if commands else thread,)),
        Rule("clone3", (), errno.ENOSYS),  # its flags are in memory, where a filter cannot see them; the C library then takes clone
        Rule("prlimit64", (_null(2),)),  # to read only
        Rule("fcntl", tuple((Check(1, command),) for command in FCNTL)),
        Rule("fallocate", (), errno.EOPNOTSUPP),  # fills a disk between two looks at a working folder; the C library then writes
        Rule("ioctl", tuple((Check(1, request),) for request in (TCGETS, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX)), errno.ENOTTY),
        Rule("socketpair", ((Check(0, AF_UNIX), Check(1, SOCK_STREAM, SOCK_TYPE)),)),  # a datagram one could send to any name: asyncio needs a stream
        Rule("sendto", (_null(4),)),
        Rule("tgkill", ((*aimed, Check(2, SIGKILL, holds=False)),)),  # a SIGKILL is then the kernel's, or ours
    ]


def program(numbers: dict[str, int], machine: str, *, commands: bool, own_pid: int | None, shared: bool) -> list[Instruction]:
    """The filter. `shared`: the job has the server's user, and can see its files."""
    code = [
        Instruction(LOAD, 0, 0, ARCH_AT),
        Instruction(EQUAL, 1, 0, AUDIT_ARCH[machine]),
        Instruction(RETURN, 0, 0, KILL_PROCESS),
        Instruction(LOAD, 0, 0, NUMBER_AT),
        Instruction(GREATER_EQUAL, 0, 1, X32_BIT),
        Instruction(RETURN, 0, 0, KILL_PROCESS),
    ]
    for rule in rules(commands=commands, own_pid=own_pid):
        body = [step for checks in rule.alternatives for step in _alternative(checks)] + [Instruction(RETURN, 0, 0, ERRNO | rule.error)]
        if rule.name in numbers:
            code += [Instruction(EQUAL, 0, len(body), numbers[rule.name]), *body]
    for name in f"{ALWAYS} {COMMANDS if commands else ''} {'' if shared else MODES}".split():
        if name in numbers:
            code += [Instruction(EQUAL, 0, 1, numbers[name]), Instruction(RETURN, 0, 0, ALLOW)]
    return [*code, Instruction(RETURN, 0, 0, ERRNO | errno.EPERM)]


def _alternative(checks: tuple[Check, ...]) -> list[Instruction]:
    """Allows when all hold, else goes on behind its end."""
    steps: list[Instruction] = [Instruction(RETURN, 0, 0, ALLOW)]
    for check in reversed(checks):
        onward, away = 0, len(steps)
        jump = Instruction(EQUAL, *((onward, away) if check.holds else (away, onward)), check.value)
        steps = [Instruction(LOAD, 0, 0, ARGUMENTS_AT + 8 * check.argument + 4 * check.high), Instruction(AND, 0, 0, check.mask), jump, *steps]
    return steps


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(numbers: dict[str, int], instructions: list[Instruction]) -> None:
    """Puts this process, and all that it starts, under the filter for ever. Needs no_new_privs."""
    text = b"".join(INSTRUCTION.pack(*step) for step in instructions)
    loaded = _Program(len(instructions), text)
    kernel.syscall(numbers["seccomp"], SET_MODE_FILTER, 0, ctypes.byref(loaded))


def available(numbers: dict[str, int]) -> bool:
    """Whether the kernel knows filters that answer with an error."""
    try:
        kernel.syscall(numbers["seccomp"], 2, 0, ctypes.byref(ctypes.c_uint32(ERRNO)))  # SECCOMP_GET_ACTION_AVAIL
    except OSError:
        return False
    return True
