"""What can be asked of the sandbox, and what comes back: the seam between verifiers and confinement.

A `Session` is one confined, single-use child. It is told code and inputs, and tells what came out. It never sees an expected value: the verdict is
made by who asks. Everything that comes out of a session is untrusted data: plain values, texts and numbers, whatever the code did to its interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any, Protocol


class Tier(StrEnum):
    """How strongly jobs are confined, strongest first."""

    NAMESPACES = "namespaces"
    """User, mount, pid, net, ipc and uts namespaces with a root of its own, and all of `landlock`."""
    LANDLOCK = "landlock"
    """Landlock, seccomp, an unprivileged user, limits."""
    OUTER = "outer"
    """seccomp and limits inside a sandbox that the operator declares (gVisor, Kata), since the kernel has no Landlock."""


class Cause(StrEnum):
    """The limit that stopped a session."""

    TIME = "time"
    """Wall time: reported as the outcome `timeout`."""
    CPU = "cpu"
    MEMORY = "memory"
    OUTPUT = "output"
    FILES = "files"
    PROCESSES = "processes"


@dataclass(frozen=True)
class Limits:
    """Of one session, from its first request to its end. The hard ones are the kernel's."""

    seconds: float = 10.0
    """Wall time of all requests together. Between them, while who asks is busy with something else, only processor time counts."""
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 20
    """Of all replies together, printed text included."""
    file_bytes: int = 16 << 20
    """Of one file, and of all together."""
    processes: int = 1
    """Processes, where `commands` is allowed; threads are bounded by it too, at 16 above."""
    commands: bool = False
    """Programs of the tool chain may be started (compilers). Without it no process can be."""


@dataclass(frozen=True)
class Reply:
    """What one request came to, while the session lives on."""

    value: Any = None
    """Returned by a call: None, bool, int, float, str, bytes, list, tuple, set, frozenset or dict of such, rebuilt outside from plain data."""
    output: str = ""
    """What the request printed."""
    error: str = ""
    """Type and message of what it raised; empty when it came to its end."""
    exit_code: int = 0
    """Of a program or command; -n when signal n ended it."""
    seconds: float = 0.0
    errors: str = ""
    """What went to standard error: a compiler's messages."""


class Stopped(Exception):
    """A limit was hit, or the child died: the session is over, whatever else it was to be asked."""

    def __init__(self, cause: Cause | None, detail: str, *, killed: bool = False) -> None:
        super().__init__(detail)
        self.cause = cause
        """None: the child died of itself (a crash, an exit), which is the code's fault and no limit."""
        self.detail = detail
        self.killed = killed
        """By a signal from elsewhere: most likely the kernel's for want of memory, which need not be this code's doing."""


class Refused(Exception):
    """No session can be had: the sandbox cannot be started, or is closing. No fault of the code."""


class Session(Protocol):
    """One confined child. Not to be shared between threads. Each method raises Stopped, and TimeoutError is never raised: time is a Stopped.

    Each can raise Refused too, when what the child was forked from has died: no fault of the code, and to be tried again with another session.
    """

    def load(self, code: str, *, seconds: float) -> Reply:
        """Run the code as a module; its names are what `call` finds. `error` tells what it raised, a SyntaxError too."""

    def call(self, name: str, args: list[Any], kwargs: dict[str, Any], *, seconds: float) -> Reply:
        """Call a name of the loaded module, dotted for a method (`Solution().add` is written `Solution.add`: an instance is made for each call).

        Raises ValueError when the arguments are not plain data.
        """

    def program(self, code: str, stdin: str, *, seconds: float) -> Reply:
        """Run the code as a program of its own, `__name__` being `__main__`, with this on its standard input; `output` is what it printed."""

    def write(self, name: str, content: bytes) -> None:
        """A file in the working folder. Needs `commands`."""

    def command(self, argv: list[str], stdin: str, *, seconds: float) -> Reply:
        """Run a program of the tool chain in the working folder; `output` is its standard output. Needs `commands`."""

    def __enter__(self) -> Session: ...

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """End the child and everything that it started, and wait until all of it is gone."""


class Sandbox(Protocol):
    """Where sessions come from; safe to use from several threads."""

    @property
    def tier(self) -> Tier: ...

    @property
    def places(self) -> int:
        """Sessions that may be open at once, at least 2: who holds two at a time must leave one place free, or everyone waits for everyone."""

    def open(self, limits: Limits) -> Session:
        """A fresh child, already confined. Waits while as many as allowed are open. Raises Refused."""

    def close(self) -> None: ...
