"""The warm process from which jobs are forked, and its guardian. Standard library only; both have one thread, an empty environment and no secrets.

    server == control socket ==> zygote --- fork ---> jobs, confined, of which a few stand ready
      |                            |
      |                         guardian: starts the zygote, outlives it, sweeps up
      '== per session: a lifeline to the zygote; socket, output and error to the job

Nothing outlives the server: when the control socket closes, the zygote ends all jobs, waits until they are gone, and leaves. In the namespaces tier a
job is the first process of its own pid namespace, and the kernel ends all that it started with it. Elsewhere it leads a process group that seccomp
does not let it, or what it starts, leave: the group is killed at once, and who has lost its parent becomes the zygote's child.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from reward_server.sandbox import child, kernel, landlock, namespaces
from reward_server.sandbox.confine import Cell, confine
from reward_server.sandbox.folders import remove, removed, within
from reward_server.sandbox.frames import framed, write_all
from reward_server.sandbox.jobs import Limits, Tier
from reward_server.sandbox.kernel import Namespace
from reward_server.sandbox.landlock import Access, Beneath
from reward_server.sandbox.limits import counted_tasks
from reward_server.sandbox.messages import LONGEST_MESSAGE, STARTED, Ended, Handed, Setup, limits_of
from reward_server.sandbox.paths import DEVICES, Readable, around, readable
from reward_server.sandbox.plain import encode

WARM = """
    abc array ast asyncio base64 bisect calendar cmath collections collections.abc concurrent.futures contextlib copy ctypes dataclasses datetime
    decimal difflib encodings.idna enum fractions functools hashlib heapq html inspect io itertools json locale logging math numbers operator
    pickle pprint queue random re secrets statistics string struct subprocess textwrap threading time timeit traceback types typing unicodedata
    unittest uuid weakref zlib
"""
"""Modules that a job finds loaded. Others of the standard library it can load itself."""
LOW_DESCRIPTORS = 10
"""Numbers that stay free for the jobs."""
SWEEP_MS = 20
"""Between looks at process groups that are being ended."""
LOOK_MS = 50
"""Between looks at working folders, which no kernel limit bounds."""
AGAIN_SECONDS = 1.0
"""After no process could be started to stand ready."""


@dataclass
class Held:
    """A job's process."""

    pid: int
    limits: Limits
    lifeline: socket.socket
    handed: list[int]
    """Descriptors for the supervisor, until it gets them."""
    folder: str
    slot: int
    killed: bool = False
    full: bool = False
    ended: Ended | None = None


class Zygote:
    """The loop: descriptors for who asks, an end for who is to end, and word of it."""

    def __init__(self, control: socket.socket, setup: Setup, *, root: bool) -> None:
        self._control, self._setup, self._root = control, setup, root
        self._separate = setup.tier == Tier.NAMESPACES
        self._held: dict[int, Held] = {}
        self._spares: list[Held] = []
        self._slots: set[int] = set()
        self._wanted: Limits | None = None
        self._made = 0
        self._counted = 0 if self._separate or root else counted_tasks()
        self._own_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        shown = readable(setup.site, setup.packages, tools=setup.tools)
        if self._separate:
            namespaces.build_root(setup.numbers, shown)
        self._rules = {} if setup.tier == Tier.OUTER else {commands: _rules(shown, commands=commands) for commands in {False, setup.tools}}
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._by_lifeline: dict[int, Held] = {}
        self._looked = self._failed = 0.0
        self._guardian = os.getppid()

    def run(self) -> None:
        self._control.send(STARTED)
        open_ = True
        while open_ or self._held:
            ending = any(held.ended for held in self._held.values())
            watched = bool(self._by_lifeline) and not self._separate
            refill = open_ and self._lacks_spares() and time.monotonic() - self._failed > AGAIN_SECONDS
            for descriptor, _ in self._poll.poll(0 if refill else SWEEP_MS if ending or not open_ else LOOK_MS if watched else None):
                if descriptor == self._control.fileno():
                    open_ = self._answer()
                elif descriptor == self._wake:
                    os.read(self._wake, 4096)
                elif descriptor in self._by_lifeline:
                    self._poll.unregister(descriptor)
                    self._kill(self._by_lifeline.pop(descriptor))
            self._reap()
            if watched and time.monotonic() - self._looked > LOOK_MS / 1000:
                self._look()
                self._looked = time.monotonic()
            if refill and self._wanted and open_:
                try:
                    self._spares.append(self._fork(self._wanted))
                except OSError:
                    self._failed = time.monotonic()

    def _answer(self) -> bool:
        """One message of the supervisor; False when it has gone."""
        try:
            message = self._control.recv(LONGEST_MESSAGE)
        except OSError:
            message = b""
        if not message:
            self._poll.unregister(self._control)
            for held in self._held.values():
                self._kill(held)
            return False
        limits = limits_of(message)
        try:
            held = self._take(limits)
        except OSError as wrong:
            self._control.send(json.dumps(f"no process can be started: {wrong}").encode())
            return True
        self._poll.register(held.lifeline, select.POLLIN)
        self._by_lifeline[held.lifeline.fileno()] = held
        with suppress(OSError):  # it has gone: the next message says so
            socket.send_fds(self._control, [json.dumps(Handed(held.pid, held.folder)).encode()], held.handed)
        for descriptor in held.handed:
            os.close(descriptor)
        held.handed = []
        self._wanted = limits
        return True

    def _take(self, limits: Limits) -> Held:
        if limits.commands and not self._setup.tools:
            raise OSError("commands are not allowed")
        for held in self._spares:
            if held.limits == limits:
                self._spares.remove(held)
                return held
        return self._fork(limits)

    def _lacks_spares(self) -> bool:
        while len(self._spares) > 2 * self._setup.spares:
            self._kill(self._spares.pop(0))
        return self._wanted is not None and sum(held.limits == self._wanted for held in self._spares) < self._setup.spares

    def _fork(self, limits: Limits) -> Held:
        """Raises OSError, and has then left nothing."""
        slot = next(n for n in range(1 << 16) if n not in self._slots)
        user = (1 if self._separate else self._user(slot)) if self._root else None
        with ExitStack() as failed, ExitStack() as done:
            folder = "" if self._separate else self._folder(user, failed)
            lifeline, theirs = self._pair(failed, failed)
            near, far = self._pair(done, failed)
            (output, output_end), (error, error_end) = self._pipe(failed, done), self._pipe(failed, done)
            me = os.getpid()
            if self._separate:
                kernel.setns(self._own_namespace, Namespace.PID)
                kernel.unshare(Namespace.PID)
            pid = os.fork()
            if pid == 0:
                cell = Cell(
                    self._setup, limits, self._rules.get(limits.commands, []), folder, user,
                    counted=self._counted, parent=me,
                )  # fmt: skip
                _become(cell, near.fileno(), output_end, error_end)
            failed.pop_all()
        if not self._separate:
            with suppress(OSError):
                os.setpgid(pid, pid)
        held = self._held[pid] = Held(pid, limits, lifeline, [theirs.detach(), far.detach(), output, error], folder, slot)
        self._slots.add(slot)
        return held

    def _folder(self, user: int | None, failed: ExitStack) -> str:
        self._made += 1
        folder = f"{self._setup.base}/{self._made}"
        os.mkdir(folder, 0o700)
        failed.callback(os.rmdir, folder)
        if user is not None:
            os.chown(folder, user, user)
        return folder

    @staticmethod
    def _pair(*closing: ExitStack) -> list[socket.socket]:
        return [stack.enter_context(end) for stack, end in zip(closing, socket.socketpair(), strict=True)]

    @staticmethod
    def _pipe(*closing: ExitStack) -> list[int]:
        ends = os.pipe()
        for stack, end in zip(closing, ends, strict=True):
            stack.callback(os.close, end)
        return list(ends)

    def _look(self) -> None:
        """Ends the jobs that have written more than they may."""
        if os.getppid() != self._guardian:  # it went when its death was no signal
            self._control.shutdown(socket.SHUT_RDWR)
        groups: dict[int, list[int]] = {held.pid: [] for held in self._by_lifeline.values()}
        for name in os.listdir("/proc"):
            with suppress(ProcessLookupError, ValueError):
                groups.get(os.getpgid(int(name)), []).append(int(name))
        for held in self._by_lifeline.values():
            most = held.limits.file_bytes
            with self._as(held):
                gone = sum(removed(pid, held.folder, most) for pid in groups[held.pid])
            if not within(held.folder, most, removed=gone):
                held.full = True
                self._kill(held)

    @contextmanager
    def _as(self, held: Held) -> Iterator[None]:
        """With the job's user, who may look at its process; root without CAP_SYS_PTRACE may not."""
        if not self._root:
            yield
            return
        os.setegid(self._user(held.slot))
        os.seteuid(self._user(held.slot))
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGTERM)  # a change of user forgets it

    def _user(self, slot: int) -> int:
        return self._setup.first_user + slot

    def _kill(self, held: Held) -> None:
        with suppress(ProcessLookupError):
            if held.ended is None:
                held.killed = True
                os.kill(held.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        self._kill_group(held)

    def _kill_group(self, held: Held) -> bool:
        """False when nobody is left in it."""
        if self._separate:
            return False  # the kernel has ended them before it let the first process go
        try:
            os.killpg(held.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def _reap(self) -> None:
        """All that have ended; a leader of a group only when the group has been told to end, as its number is free for others after that."""
        with suppress(ChildProcessError):
            while info := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                held = self._held.get(info.si_pid)
                if held:
                    self._kill_group(held)
                _, status, usage = os.wait4(info.si_pid, 0)
                if held:
                    held.ended = Ended(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, held.killed, held.full)
        for held in [held for held in self._held.values() if held.ended]:
            if not self._kill_group(held):
                self._forget(held)

    def _forget(self, held: Held) -> None:
        if held.folder:
            with suppress(OSError):  # then the guardian removes it at the end, with all others
                remove(held.folder)
        if self._by_lifeline.pop(held.lifeline.fileno(), None):
            self._poll.unregister(held.lifeline)
        with suppress(OSError):
            held.lifeline.send(json.dumps(held.ended).encode())
        held.lifeline.close()
        for descriptor in held.handed:
            os.close(descriptor)
        if held in self._spares:
            self._spares.remove(held)
        del self._held[held.pid]
        self._slots.discard(held.slot)


def _rules(shown: Readable, *, commands: bool) -> list[Beneath]:
    rules = [landlock.beneath(path, landlock.READ) for folder in shown.job for path in around(folder, shown.hidden)]
    rules += [landlock.beneath(f"/dev/{name}", Access.READ_FILE | (Access.WRITE_FILE if name == "null" else Access(0))) for name in DEVICES]
    return rules + [landlock.beneath(path, landlock.READ | Access.EXECUTE) for path in shown.tools if commands]


def _become(cell: Cell, sock: int, output: int, error: int) -> None:
    """The forked process: confined, then at the service of whoever has the other end. Never returns."""
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if cell.setup.tier != Tier.NAMESPACES:
            os.setpgid(0, 0)
        confine(cell, sock=sock, output=output, error=error)
    except BaseException as wrong:
        try:
            write_all(sock, framed(encode(f"{type(wrong).__name__}: {wrong}")))
        finally:
            os._exit(1)  # nothing goes on that is not confined, even where nobody listens any more
    try:
        child.run(cell.limits.cpu_seconds)
    finally:
        os._exit(0)


def main() -> None:
    """The guardian. Its only argument is the descriptor of the control socket."""
    control = socket.socket(fileno=int(sys.argv[1]))
    setup = Setup.decode(control.recv(LONGEST_MESSAGE))
    root = os.geteuid() == 0
    if setup.packages:
        sys.path.append(setup.site)
    try:
        for name in (*WARM.split(), *setup.packages):
            importlib.import_module(name)
    except ImportError as wrong:
        control.send(str(wrong).encode())
        return
    os.environ.clear()
    gc.collect()
    gc.freeze()  # pages that the collector does not touch stay shared with the jobs
    gc.disable()
    if len(os.listdir("/proc/self/task")) > 1:
        control.send(b"a package starts threads when it is imported: nothing can be forked after it")
        return
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when the machine is out of memory, the kernel ends a job before the server, or an engine beside it
    guardian = os.getpid()
    separate = setup.tier == Tier.NAMESPACES
    try:
        if separate:
            namespaces.isolate(setup.first_user)
        else:
            kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        pid = os.fork()
    except OSError as wrong:
        control.send(str(wrong).encode())
        return
    if pid == 0:
        try:
            _start(control, setup, root=root, guardian=0 if separate else guardian)
        finally:
            os._exit(1)
    control.close()
    os.waitpid(pid, 0)
    if not separate:  # there the kernel has ended all of it
        _sweep(guardian)
        remove(setup.base)


def _start(control: socket.socket, setup: Setup, *, root: bool, guardian: int) -> None:
    try:
        if setup.tier == Tier.NAMESPACES:
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        else:
            signal.signal(signal.SIGTERM, lambda *_: control.shutdown(socket.SHUT_RDWR))
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGTERM)
            kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        if os.getppid() != guardian:
            return
        nowhere = os.open("/dev/null", os.O_RDWR)
        high = control.fileno()
        while high < LOW_DESCRIPTORS:
            high = os.dup(high)
        control = socket.socket(fileno=high) if high != control.fileno() else control
        for low in range(3, LOW_DESCRIPTORS):
            os.dup2(nowhere, low)
        zygote = Zygote(control, setup, root=root)
    except (OSError, ValueError) as wrong:
        control.send(str(wrong).encode() or b"cannot be started")
        return
    try:
        zygote.run()
    except BaseException:
        traceback.print_exc()  # to the server's standard error: what follows is no interpreter's end
        raise
    os._exit(0)


def _sweep(guardian: int) -> None:
    """Ends what a zygote that was killed has left to its guardian."""
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = [int(name) for name in os.listdir("/proc") if name.isdigit() and _parent(name) == guardian]
        if not left:
            return
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _parent(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0
