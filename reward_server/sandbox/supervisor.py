"""`CodeSandbox`: sessions for the verifiers, from a zygote that is started again when it dies.

Consumes limits; produces sessions, at most `sessions` at a time. Waits for a free place; unblocked by the end of another session, which its limit of
wall time bounds. The server has threads and secrets, and forks nothing itself.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from reward_server.sandbox import folders, probe
from reward_server.sandbox.jobs import Cause, Limits, Refused, Stopped, Tier
from reward_server.sandbox.messages import LONGEST_MESSAGE, STARTED, Handed, Setup, limits_message
from reward_server.sandbox.session import JobSession
from reward_server.sandbox.syscalls import numbers
from reward_server.turns import Turns

log = logging.getLogger(__name__)

START_SECONDS = 60.0
HANDED = 4
"""Descriptors of a session."""
HAND_SECONDS = 30.0
"""Time for a zygote to fork."""
BOOT = "import sys; sys.path.insert(0, sys.argv.pop()); from reward_server.sandbox.zygote import main; del sys.path[0]; main()"


class ZygoteDied(Exception):
    """The zygote is gone, or could not be started."""


@dataclass(frozen=True)
class SandboxOptions:
    """Of one sandbox."""

    sessions: int = 4
    """Open at a time."""
    spares: int = 2
    """Confined processes that stand ready."""
    tier: Tier | None = None
    """None: the strongest that passes the test."""
    outer: bool = False
    """The operator declares that this server runs in a sandbox of its own (gVisor, Kata): then Landlock can be done without."""
    tools: bool = True
    """Whether sessions with `commands` are given."""
    packages: tuple[str, ...] = ()
    """Beyond the standard library, what jobs may import."""
    python: str = sys.executable
    first_user: int = probe.FIRST_USER
    """When the server is root: jobs run as this user, and as the numbers above it."""


class SandboxStats(NamedTuple):
    """Counts since the sandbox was made."""

    sessions: int
    starts: int
    """Zygotes."""
    stopped: dict[Cause, int]
    """Sessions by the limit that ended them."""


class Zygote:
    """The server's end of a zygote. Safe to use from several threads."""

    def __init__(self, tier: Tier, options: SandboxOptions) -> None:
        """Raises ZygoteDied."""
        self._lock = threading.Lock()
        self._base = self._no_commands = ""
        if tier != Tier.NAMESPACES:
            self._base = tempfile.mkdtemp(prefix="offbeat-sandbox-")
            os.chmod(self._base, 0o711)
            if os.statvfs(self._base).f_flag & os.ST_NOEXEC:  # as Docker mounts a tmpfs: a program that was built could not be started
                self._no_commands = f"{tempfile.gettempdir()} is mounted `noexec`, and what a compiler makes is put there: mount it with `exec`"
                log.warning("no job with commands can be run: %s", self._no_commands)
        setup = Setup(
            tier=tier, machine=platform.machine(), numbers=numbers(), base=self._base, first_user=options.first_user, spares=options.spares,
            tools=options.tools, site=sysconfig.get_path("purelib"), packages=options.packages,
        )  # fmt: skip
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = str(Path(__file__).parents[2])
        with theirs:
            self._process = subprocess.Popen(
                [options.python, "-I", "-S", "-B", "-X", "utf8", "-c", BOOT, str(theirs.fileno()), root],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a Ctrl-C in the terminal is the server's to handle
                cwd="/",
                env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # no thread may be there when the zygote forks
            )
        self._control.settimeout(START_SECONDS)
        try:
            self._control.send(setup.encode())
            said = self._control.recv(LONGEST_MESSAGE)
        except OSError as gone:
            said = str(gone).encode()
        if said != STARTED:
            self.close()
            raise ZygoteDied(said.decode(errors="replace") or "it has exited")
        self._control.settimeout(HAND_SECONDS)

    @property
    def pid(self) -> int:
        """Of the guardian."""
        return self._process.pid

    def hand(self, limits: Limits) -> tuple[Handed, list[int]]:
        """A process with these limits, and its descriptors. Raises ZygoteDied; Refused when none can be had."""
        if limits.commands and self._no_commands:
            raise Refused(self._no_commands)
        with self._lock:
            try:
                self._control.send(limits_message(replace(limits, seconds=0.0, output_bytes=0)))  # without what is bounded here: any spare will do
                message, descriptors, _, _ = socket.recv_fds(self._control, LONGEST_MESSAGE, HANDED, socket.MSG_CMSG_CLOEXEC)
            except OSError as gone:
                raise ZygoteDied(str(gone)) from gone
        if not message:
            raise ZygoteDied("it has exited")
        said = json.loads(message)
        if isinstance(said, str):
            raise Refused(said)
        if len(descriptors) < HANDED:  # those that do not fit are closed, and with them the job ends
            for descriptor in descriptors:
                os.close(descriptor)
            raise Refused("too many files are open in this process: raise its limit (ulimit -n)")
        return Handed(*said), descriptors

    def close(self) -> None:
        """Ends it and its jobs, and waits until they are gone."""
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)  # another thread may be waiting for an answer
        self._control.close()
        try:
            self._process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._base:
            folders.remove(self._base)


class CodeSandbox:
    """The `Sandbox` of the seam."""

    def __init__(self, options: SandboxOptions | None = None) -> None:
        """Chooses the tier, which takes a second or two. Raises Refused when no tier is safe here."""
        self._options = options or SandboxOptions()
        self._places = Turns(range(self._options.sessions))
        self._lock = threading.Lock()
        self._closed = False
        self._sessions = self._starts = 0
        self._stopped: Counter[Cause] = Counter()
        self._zygote: Zygote | None = None
        self._tier = self._choose()

    @property
    def tier(self) -> Tier:
        return self._tier

    @property
    def places(self) -> int:
        return self._options.sessions

    def stats(self) -> SandboxStats:
        with self._lock:
            return SandboxStats(self._sessions, self._starts, dict(self._stopped))

    def open(self, limits: Limits) -> JobSession:
        place = self._places.take()
        try:
            return self._open(limits, place)
        except BaseException:
            self._places.give(place)
            raise

    def close(self) -> None:
        """Ends all sessions too."""
        with self._lock:
            self._closed = True
            zygote, self._zygote = self._zygote, None
        if zygote:
            zygote.close()

    def _open(self, limits: Limits, place: int) -> JobSession:
        try:
            zygote = self._live()
            try:
                handed, descriptors = zygote.hand(limits)
            except ZygoteDied:
                zygote = self._live(instead_of=zygote)
                handed, descriptors = zygote.hand(limits)
        except (ZygoteDied, OSError) as gone:
            raise Refused(f"no job can be started: {gone}") from gone
        return self._ready(handed, descriptors, limits, place)

    def _ready(self, handed: Handed, descriptors: list[int], limits: Limits, place: int | None) -> JobSession:
        began = False

        def done(cause: Cause | None) -> None:
            with self._lock:
                if cause:
                    self._stopped[cause] += 1
            if place is not None and began:
                self._places.give(place)

        session = JobSession(handed, descriptors, limits, done)
        session.ready()
        began = True
        with self._lock:
            self._sessions += 1
        return session

    def _live(self, *, instead_of: Zygote | None = None) -> Zygote:
        with self._lock:
            if self._closed:
                raise Refused("the sandbox is closing")
            if self._zygote and self._zygote is instead_of:
                log.warning("the zygote has died and is started again")
                self._zygote.close()
                self._zygote = None
            if self._zygote is None:
                self._zygote = Zygote(self._tier, self._options)
                self._starts += 1
            return self._zygote

    def _choose(self) -> Tier:
        """Starts the first zygote in the strongest tier that holds."""
        options = self._options
        known = probe.facts(numbers())
        tiers = probe.candidates(known, outer=options.outer, root=os.geteuid() == 0)
        if options.tier:
            tiers = [tier for tier in tiers if tier == options.tier]
        reasons = [] if tiers else [f"seccomp {'there' if known.seccomp else 'missing'}, Landlock version {known.landlock}, outer={options.outer}"]
        for tier in tiers:
            zygote: Zygote | None = None
            try:
                zygote = Zygote(tier, options)
                limits = replace(Limits(), seconds=60.0)
                with self._ready(*zygote.hand(limits), limits, None) as session:
                    found = probe.breaches(session, tier, root=os.geteuid() == 0)
            except (ZygoteDied, Refused, Stopped, OSError) as wrong:
                found = [str(wrong)]
            if not found:
                self._zygote, self._starts = zygote, 1
                return tier
            reasons.append(f"{tier}: {', '.join(found)}")
            log.warning("the tier %s cannot be used: %s", tier, ", ".join(found))
            if zygote:
                zygote.close()
        raise Refused(f"untrusted code cannot be confined here: {'; '.join(reasons)}")
