"""What a job's process does once it is confined: it answers requests on its socket until that closes, or a limit ends it.

Untrusted code runs in this very interpreter, so nothing that this process says is believed: what it sends is data (`plain`), its exit code and what
it prints mean nothing by themselves, and it is never told what is expected of it. What can be kept from innocent damage is: the functions here, and
those of the modules that they use, look names up in a copy of the builtins that the code does not see. Standard library only.

Descriptors: 0 nothing or the program's standard input, 1 and 2 pipes that the supervisor reads, 3 the socket, 4 memory for standard inputs.
"""

from __future__ import annotations

import atexit
import builtins
import gc
import io
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from reward_server.sandbox.frames import framed, read_frame, write_all
from reward_server.sandbox.jobs import Cause
from reward_server.sandbox.limits import ENOUGH, cause_of
from reward_server.sandbox.plain import IN_REQUEST, MAX_DEPTH, NotPlain, decode, encode

SOCKET, STDIN_MEMORY = 3, 4
READY = "ready"
MESSAGE_LENGTH = 2_000
"""Characters of what was raised."""
TOOLS = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}


class Limited(Exception):
    """A limit that a program of the tool chain met."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause = cause


def own_builtins() -> None:
    """Gives jobs another module `builtins` than the code loaded so far has: what they replace there, they replace for themselves."""
    fresh = types.ModuleType("builtins")
    fresh.__dict__.update(vars(builtins))
    sys.modules["builtins"] = fresh


class Job:
    """The code's module, and the requests that concern it."""

    def __init__(self, cpu_seconds: int) -> None:
        self._cpu_seconds = cpu_seconds
        self._module: dict[str, Any] = {}
        self._exit_code = 0
        self._builtins = sys.modules["builtins"]

    def serve(self) -> None:
        """Requests are [number, what, arguments]; replies [number, value, error, cause, exit code]."""
        what: dict[str, Callable[..., Any]] = {
            "load": self.load,
            "call": self.call,
            "program": self.program,
            "write": self.write,
            "command": self.command,
        }
        while (text := read_frame(SOCKET)) is not None:
            number, name, arguments = decode(text, MAX_DEPTH + IN_REQUEST)
            value, error, cause = "null", "", None
            self._exit_code = 0
            self._fresh_streams()
            try:
                value = encode(what[name](*arguments))
            except Limited as limited:
                cause = limited.cause
            except NotPlain as wrong:
                error = f"TypeError: {wrong}"
            except BaseException as raised:
                error, cause, self._exit_code = _told(raised), cause_of(raised), 1
            _flush()
            reply = f"[{number},{value},{encode(error)},{encode(cause)},{self._exit_code}]"
            write_all(SOCKET, framed(reply))

    def load(self, code: str) -> None:
        module = self._fresh_module("solution")
        self._module = vars(module)
        exec(compile(code, "solution.py", "exec", dont_inherit=True), self._module)

    def call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        first, *rest = name.split(".")
        if first not in self._module:
            raise NameError(f"name '{first}' is not defined")
        found = self._module[first]
        if rest and isinstance(found, type):
            found = found()
        for attribute in rest:
            found = getattr(found, attribute)
        return found(*args, **kwargs)

    def program(self, code: str, stdin: str) -> None:
        self._give_stdin(stdin)
        module = self._fresh_module("__main__")
        try:
            exec(compile(code, "program.py", "exec", dont_inherit=True), vars(module))
            _join_threads()
        except SystemExit as left:
            self._exit_code = _exit_code(left.code)
        finally:
            atexit._run_exitfuncs()  # some programs print there

    def write(self, name: str, content: bytes) -> None:
        with open(name, "wb", opener=_executable) as file:
            file.write(content)

    def command(self, argv: list[str], stdin: str) -> None:
        self._give_stdin(stdin)
        folder = os.getcwd()
        process = subprocess.Popen(argv, cwd=folder, env={**TOOLS, "HOME": folder, "TMPDIR": folder}, stdin=0, stdout=1, stderr=2)
        _, status, usage = os.wait4(process.pid, 0)
        self._exit_code = process.returncode = os.waitstatus_to_exitcode(status)
        spent = usage.ru_utime + usage.ru_stime >= self._cpu_seconds * ENOUGH
        if self._exit_code == -signal.SIGXCPU or (self._exit_code == -signal.SIGKILL and spent):
            raise Limited(Cause.CPU)
        if self._exit_code == -signal.SIGKILL:
            raise Limited(Cause.MEMORY)
        if self._exit_code == -signal.SIGXFSZ:
            raise Limited(Cause.FILES)

    def _fresh_module(self, name: str) -> types.ModuleType:
        module = sys.modules[name] = types.ModuleType(name)
        vars(module)["__builtins__"] = self._builtins
        return module

    def _fresh_streams(self) -> None:
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            raw = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))
            _set_stream(name, io.TextIOWrapper(raw, "utf-8", "replace", line_buffering=name == "stderr"))

    def _give_stdin(self, text: str) -> None:
        os.ftruncate(STDIN_MEMORY, 0)
        os.lseek(STDIN_MEMORY, 0, os.SEEK_SET)
        write_all(STDIN_MEMORY, text.encode("utf-8", "surrogatepass"))
        os.lseek(STDIN_MEMORY, 0, os.SEEK_SET)
        os.dup2(STDIN_MEMORY, 0)

        _set_stream("stdin", io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "r", closefd=False)), "utf-8", "replace"))


def _set_stream(name: str, stream: io.TextIOWrapper) -> None:
    vars(sys)[name] = vars(sys)[f"__{name}__"] = stream


def _executable(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o700)


def _join_threads() -> None:
    """As an interpreter does at its end."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    if type(code) is int:
        return code & 0xFF
    sys.stderr.write(f"{code}\n")
    return 1


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            stream.flush()  # type: ignore[union-attr]
        except BaseException:  # the code put it there
            continue


def _told(raised: BaseException) -> str:
    try:
        return f"{type(raised).__name__}: {raised}"[:MESSAGE_LENGTH]
    except BaseException:  # its __str__ is the code's
        return "an exception that cannot be told"


def run(cpu_seconds: int) -> None:
    """Never returns to the zygote's code: the process ends."""
    own_builtins()
    atexit._clear()
    gc.enable()
    write_all(SOCKET, framed(encode(READY)))
    Job(cpu_seconds).serve()
