"""The filter's program, run by an evaluator of classic BPF, for both machines and both profiles."""

import errno
import struct

import pytest

from reward_server.sandbox.seccomp import ALLOW, ALWAYS, AUDIT_ARCH, COMMANDS, ERRNO, KILL_PROCESS, MODES, X32_BIT, Instruction, program, rules
from reward_server.sandbox.syscalls import numbers

MACHINES = ["x86_64", "aarch64"]
CLONE_FORK, CLONE_VFORK, CLONE_PTHREAD = 0x01200011, 0x4111, 0x3D0F00
NEW_NAMESPACES = [0x80, 0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000]
HARMLESS = "read write openat mmap futex clock_gettime getrandom exit_group newfstatat rt_sigreturn epoll_create1 getdents64"
DANGEROUS = """
    socket connect bind listen accept accept4 sendmsg recvmsg sendmmsg ptrace process_vm_readv process_vm_writev bpf keyctl add_key request_key
    perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register kexec_load init_module finit_module delete_module mount umount2
    move_mount open_tree fsopen fsmount pivot_root chroot setns unshare setuid setgid setreuid setresuid setresgid setgroups capset personality kill
    tkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_open pidfd_send_signal pidfd_getfd memfd_create memfd_secret execveat link linkat mknod mknodat
    name_to_handle_at open_by_handle_at prctl seccomp setrlimit setsid setpgid setpriority sched_setaffinity shmget shmat msgget semget mq_open
    quotactl swapon reboot sethostname settimeofday clock_settime syslog fanotify_init inotify_init1 kcmp process_madvise landlock_restrict_self
    modify_ldt iopl chown fchown lchown fchownat setxattr acct nfsservctl vmsplice lookup_dcookie mbind migrate_pages openat2
"""


def evaluate(code: list[Instruction], data: bytes) -> int:
    """The filter's answer to a struct seccomp_data: Documentation/networking/filter.rst, as far as the program goes."""
    accumulator = at = 0
    while True:
        step = code[at]
        at += 1
        if step.code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, step.value)
        elif step.code == 0x54:
            accumulator &= step.value
        elif step.code == 0x15:
            at += step.if_true if accumulator == step.value else step.if_false
        elif step.code == 0x35:
            at += step.if_true if accumulator >= step.value else step.if_false
        else:
            assert step.code == 0x06
            return step.value


class Filter:
    def __init__(self, machine: str, *, commands: bool, own_pid: int | None = 1, shared: bool = False) -> None:
        self.machine, self.numbers = machine, numbers(machine)
        self.code = program(self.numbers, machine, commands=commands, own_pid=own_pid, shared=shared)

    def says(self, name: str, *arguments: int) -> int:
        return self.of_number(self.numbers[name], *arguments)

    def of_number(self, number: int, *arguments: int, arch: int | None = None) -> int:
        words = [*arguments, 0, 0, 0, 0, 0, 0][:6]
        return evaluate(self.code, struct.pack("=IIQ6Q", number, AUDIT_ARCH[self.machine] if arch is None else arch, 0, *words))


@pytest.fixture(
    params=[(machine, commands) for machine in MACHINES for commands in (False, True)], ids=lambda p: f"{p[0]}-{'commands' if p[1] else 'job'}"
)
def profile(request: pytest.FixtureRequest) -> Filter:
    return Filter(request.param[0], commands=request.param[1])


def test_harmless_calls_are_allowed(profile: Filter) -> None:
    assert {name: profile.says(name) for name in HARMLESS.split()} == dict.fromkeys(HARMLESS.split(), ALLOW)


def test_dangerous_calls_are_refused(profile: Filter) -> None:
    there = [name for name in DANGEROUS.split() if name in profile.numbers]
    assert len(there) > 80
    assert {name: profile.says(name) for name in there} == dict.fromkeys(there, ERRNO | errno.EPERM)


def test_all_numbers_that_are_not_listed_are_refused(profile: Filter) -> None:
    commands = profile.says("execve") == ALLOW
    named = (
        set(ALWAYS.split())
        | set(MODES.split())
        | {rule.name for rule in rules(commands=True, own_pid=1)}
        | (set(COMMANDS.split()) if commands else set())
    )
    listed = {profile.numbers[name] for name in named if name in profile.numbers}
    for number in [*range(600), 10_000, X32_BIT - 1]:
        if number not in listed:
            assert profile.of_number(number) == ERRNO | errno.EPERM, number


def test_every_listed_name_exists_on_a_machine() -> None:
    known = set(numbers("x86_64")) | set(numbers("aarch64"))
    assert set(f"{ALWAYS} {COMMANDS} {MODES}".split()) <= known
    assert numbers("x86_64")["read"] == 0
    assert numbers("aarch64")["read"] == 63


def test_another_architecture_or_x32_kills(profile: Filter) -> None:
    i386 = 0x40000003
    assert profile.of_number(profile.numbers["read"], arch=i386) == KILL_PROCESS
    assert profile.of_number(X32_BIT + profile.numbers["read"]) == KILL_PROCESS
    assert profile.of_number(0xFFFFFFFF) == KILL_PROCESS


def test_clone_makes_threads_and_only_with_commands_processes(profile: Filter) -> None:
    refused = ERRNO | errno.EPERM
    commands = profile.says("execve") == ALLOW
    assert profile.says("clone", CLONE_PTHREAD) == ALLOW
    for flags in (CLONE_FORK, CLONE_VFORK, 17):
        assert profile.says("clone", flags) == (ALLOW if commands else refused)
    for namespace in NEW_NAMESPACES:
        assert profile.says("clone", CLONE_FORK | namespace) == refused
        assert profile.says("clone", CLONE_PTHREAD | namespace) == refused
    assert profile.says("clone3", 1, 88) == ERRNO | errno.ENOSYS


def test_limits_can_be_read_and_not_set(profile: Filter) -> None:
    assert profile.says("prlimit64", 0, 7, 0, 0x7FFF1234) == ALLOW
    assert profile.says("prlimit64", 0, 7, 0x7FFF1234, 0) == ERRNO | errno.EPERM
    assert profile.says("prlimit64", 0, 7, 1 << 32, 0) == ERRNO | errno.EPERM


def test_socket_pairs_are_streams_that_reach_nobody_else(profile: Filter) -> None:
    refused = ERRNO | errno.EPERM
    assert profile.says("socketpair", 1, 1) == ALLOW
    assert profile.says("socketpair", 1, 1 | 0o2000000 | 0o4000) == ALLOW
    for family, kind in ((1, 2), (1, 5), (1, 3), (2, 1), (16, 3)):
        assert profile.says("socketpair", family, kind) == refused
    assert profile.says("sendto", 5, 0x1000, 10, 0, 0, 0) == ALLOW
    assert profile.says("sendto", 5, 0x1000, 10, 0, 0x7FFF0000, 110) == refused
    assert profile.says("sendto", 5, 0x1000, 10, 0, 1 << 40, 110) == refused


def test_signals_go_to_itself_and_are_no_sigkill() -> None:
    refused = ERRNO | errno.EPERM
    own = Filter("x86_64", commands=False, own_pid=4321)
    assert own.says("tgkill", 4321, 4321, 6) == ALLOW
    assert own.says("tgkill", 4321, 4321, 9) == refused
    assert own.says("tgkill", 4322, 4322, 6) == refused
    anyone = Filter("x86_64", commands=True, own_pid=None)
    assert anyone.says("tgkill", 4322, 4322, 6) == ALLOW
    assert anyone.says("tgkill", 4322, 4322, 9) == refused
    assert Filter("x86_64", commands=True, own_pid=0).says("tgkill", 4321, 4321, 6) == refused


def test_files_of_a_shared_user_keep_their_modes_and_times() -> None:
    own, shared = Filter("x86_64", commands=True), Filter("x86_64", commands=True, shared=True)
    assert {own.says(name) for name in MODES.split()} == {ALLOW}
    assert {shared.says(name) for name in [*MODES.split(), "fchmodat2", "utimes", "utime", "futimesat"]} == {ERRNO | errno.EPERM}


def test_descriptors_tell_nobody_of_what_comes(profile: Filter) -> None:
    refused = ERRNO | errno.EPERM
    duplicate, set_flags, set_owner, set_signal, set_owner_ex, set_lease, notify, set_pipe_size = 1030, 4, 8, 10, 15, 1024, 1026, 1031
    assert {profile.says("fcntl", 3, command) for command in (duplicate, set_flags)} == {ALLOW}
    assert {profile.says("fcntl", 3, c) for c in (set_owner, set_signal, set_owner_ex, set_lease, notify, set_pipe_size)} == {refused}
    fiosetown, siocspgrp, fioasync = 0x8901, 0x8902, 0x5452
    assert {profile.says("ioctl", 3, request) for request in (fiosetown, siocspgrp, fioasync)} == {ERRNO | errno.ENOTTY}


def test_space_is_not_had_without_writing(profile: Filter) -> None:
    assert profile.says("fallocate", 3, 0, 0, 1 << 30) == ERRNO | errno.EOPNOTSUPP


def test_terminals_cannot_be_typed_into(profile: Filter) -> None:
    tiocsti = 0x5412
    assert profile.says("ioctl", 0, 0x5401) == ALLOW
    assert profile.says("ioctl", 0, tiocsti) == ERRNO | errno.ENOTTY


def test_jumps_stay_within_the_program_and_its_byte(profile: Filter) -> None:
    for at, step in enumerate(profile.code):
        assert 0 <= step.if_true < 256
        assert 0 <= step.if_false < 256
        assert at + 1 + max(step.if_true, step.if_false) <= len(profile.code)
    assert len(profile.code) < 4096


def test_a_machine_without_table_is_refused() -> None:
    with pytest.raises(ValueError, match="riscv64"):
        numbers("riscv64")
