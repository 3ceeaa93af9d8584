"""The server's side of one job: requests go out, replies and output come back, and a watch is kept on all of it."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from reward_server.sandbox import folders
from reward_server.sandbox.child import READY
from reward_server.sandbox.frames import LENGTH, framed
from reward_server.sandbox.jobs import Cause, Limits, Refused, Reply, Stopped
from reward_server.sandbox.limits import ENOUGH
from reward_server.sandbox.messages import Ended, Handed
from reward_server.sandbox.plain import IN_REPLY, IN_REQUEST, MAX_DEPTH, NotPlain, decode, encode

READY_SECONDS = 30.0
"""Time for a fresh process to confine itself on a busy machine."""
END_SECONDS = 30.0
"""Time for a killed one, and all that it started, to go."""
LAST_SECONDS = 0.5
"""Between the closing of a process's socket and its end: one that lives on has closed it itself."""
FEW_BYTES = 4_096
PAUSE_SECONDS = 0.005
"""After so few bytes, so that a process that writes one after the other does not keep the server busy."""
REPLY_FRAME = 4_096
"""Bytes of a reply beside its value."""
BELIEVED = frozenset({Cause.CPU, Cause.MEMORY, Cause.FILES, Cause.PROCESSES})
"""Limits that a process may say it has met; the others are seen from here."""
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


class JobSession:
    """A `Session` over the descriptors that a zygote has handed out."""

    def __init__(self, handed: Handed, descriptors: list[int], limits: Limits, done: Callable[[Cause | None], None]) -> None:
        """`done` is told once the session is over: the limit that ended it, if one did."""
        self.limits, self.pid, self._folder, self._done = limits, handed.pid, handed.folder, done
        self._lifeline, self._socket = (socket.socket(fileno=descriptor) for descriptor in descriptors[:2])
        self._pipes = {descriptors[2]: bytearray(), descriptors[3]: bytearray()}
        self._output, self._error = descriptors[2:]
        for pipe in self._pipes:
            os.set_blocking(pipe, False)
        self._socket.setblocking(False)
        self._received = bytearray()
        self._output_bytes = 0
        self._number = 0
        self._left = limits.seconds
        self._over = False
        self._cause: Cause | None = None
        self._ended: Ended | None = None

    def ready(self) -> None:
        """Waits until the job's process has confined itself. Raises Refused."""
        try:
            told = self._frame(time.monotonic() + READY_SECONDS, output_bytes=REPLY_FRAME)
        except Stopped as stopped:
            raise Refused(f"a process did not confine itself: {stopped.detail}") from stopped
        if told != READY:
            self._stop(None, "")
            raise Refused(f"a process could not confine itself: {told}")

    def load(self, code: str, *, seconds: float) -> Reply:
        return self._ask("load", [code], seconds)

    def call(self, name: str, args: list[Any], kwargs: dict[str, Any], *, seconds: float) -> Reply:
        return self._ask("call", [name, args, kwargs], seconds)

    def program(self, code: str, stdin: str, *, seconds: float) -> Reply:
        return self._ask("program", [code, stdin], seconds)

    def write(self, name: str, content: bytes) -> None:
        self._needs_commands()
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"not the name of a file in the working folder: {name!r}")
        reply = self._ask("write", [name, content], self.limits.seconds)
        if reply.error:
            raise self._stop(None, f"{name} could not be written: {reply.error}")

    def command(self, argv: list[str], stdin: str, *, seconds: float) -> Reply:
        self._needs_commands()
        if self._folder and os.geteuid() != 0 and FILE_NAME.fullmatch(name := argv[0].removeprefix("./")):
            folders.make_executable(f"{self._folder}/{name}")
        return self._ask("command", [argv, stdin], seconds)

    def __enter__(self) -> JobSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _needs_commands(self) -> None:
        if not self.limits.commands:
            raise ValueError("the session was opened without `commands`")

    def _ask(self, what: str, arguments: list[Any], seconds: float) -> Reply:
        """Raises Stopped; Refused when the zygote has died; ValueError when the arguments are not plain data."""
        if self._over:
            raise Stopped(self._cause, "the session is over")
        self._number += 1
        request = framed(encode([self._number, what, arguments], MAX_DEPTH + IN_REQUEST))
        began = time.monotonic()
        deadline = began + min(seconds, self._left)
        self._send(request, deadline)
        told = self._frame(deadline, output_bytes=self.limits.output_bytes)
        self._left -= time.monotonic() - began
        match told:
            case [int(number), value, str(error), None | str() as cause, int(exit_code)] if number is not True and number == self._number:
                pass
            case _:
                raise self._stop(None, "the process sent what is no reply")
        texts = [self._text(pipe) for pipe in (self._output, self._error)]
        error = error.encode(errors="backslashreplace").decode()  # halves of surrogate pairs, which no message or log takes
        if cause is not None:
            # the process says so itself: at worst the code has lied about why it is stopped
            raise self._stop(Cause(cause) if cause in BELIEVED else None, ascii(error[:200]))
        return Reply(value, texts[0], error, exit_code & 0xFF if exit_code >= 0 else max(exit_code, -64), time.monotonic() - began, texts[1])

    def _send(self, data: bytes, deadline: float) -> None:
        left = memoryview(data)
        while left:
            self._wait(deadline, writing=True)
            try:
                left = left[self._socket.send(left) :]
            except BlockingIOError:
                continue
            except OSError:
                raise self._died() from None

    def _frame(self, deadline: float, *, output_bytes: int) -> Any:
        """The next text of the process, decoded; meanwhile its output is taken in."""
        while True:
            if len(self._received) >= LENGTH.size:
                (size,) = LENGTH.unpack_from(self._received)
                if size > output_bytes - self._output_bytes + REPLY_FRAME:
                    raise self._stop(Cause.OUTPUT, f"more than {output_bytes} bytes of output")
                if len(self._received) >= LENGTH.size + size:
                    text = bytes(self._received[LENGTH.size : LENGTH.size + size])
                    del self._received[: LENGTH.size + size]
                    self._output_bytes += size
                    self._drain()  # what was written before the reply is in the pipes by now
                    try:
                        return decode(text.decode("ascii"), MAX_DEPTH + IN_REPLY)
                    except (UnicodeDecodeError, NotPlain) as wrong:
                        raise self._stop(None, f"the process sent what is no reply: {wrong}") from None
            self._wait(deadline)
            try:
                more = self._socket.recv(1 << 18)
            except BlockingIOError:
                continue
            except OSError:
                more = b""
            if not more:
                raise self._died()
            self._received += more
            if len(more) < FEW_BYTES and not self._complete():
                time.sleep(PAUSE_SECONDS)

    def _complete(self) -> bool:
        return len(self._received) >= LENGTH.size and len(self._received) >= LENGTH.size + LENGTH.unpack_from(self._received)[0]

    def _wait(self, deadline: float, *, writing: bool = False) -> None:
        """Until the socket may have something, or room. Raises Stopped when a limit is reached meanwhile."""
        alone, everything = select.poll(), select.poll()
        for poll in (alone, everything):
            poll.register(self._socket, select.POLLOUT if writing else select.POLLIN)  # not both: what comes is not read before all is sent
        for pipe in self._pipes:
            everything.register(pipe, select.POLLIN)
        taken = FEW_BYTES
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._stop(Cause.TIME, "out of time")
            if taken < FEW_BYTES and alone.poll(1000 * min(left, PAUSE_SECONDS)):
                return
            taken = FEW_BYTES
            for descriptor, events in everything.poll(1000 * left + 1):
                if descriptor == self._socket.fileno():
                    return
                taken = self._drain()
                if not taken and not events & select.POLLIN:
                    everything.unregister(descriptor)  # the code has closed its end

    def _drain(self) -> int:
        """Takes in what the pipes hold: its length. Raises Stopped when it is too much."""
        taken = 0
        for pipe, kept in self._pipes.items():
            while True:
                try:
                    more = os.read(pipe, 1 << 16)
                except BlockingIOError:
                    break
                if not more:
                    break
                kept += more
                taken += len(more)
                self._output_bytes += len(more)
                if self._output_bytes > self.limits.output_bytes:
                    raise self._stop(Cause.OUTPUT, f"more than {self.limits.output_bytes} bytes of output")
        return taken

    def _text(self, pipe: int) -> str:
        text = self._pipes[pipe].decode("utf-8", "replace")
        self._pipes[pipe].clear()
        return text

    def _died(self) -> Exception:
        """What is to be raised when the process has closed its socket: most likely it has ended."""
        lifeline = select.poll()
        lifeline.register(self._lifeline, select.POLLIN)
        alive = not lifeline.poll(1000 * LAST_SECONDS)
        self._close()
        if self._ended is None or (self._ended.killed and not self._ended.full and not alive):
            self._done(None)
            return Refused("the process from which jobs are forked has ended")
        self._cause, detail = self._fate(self._ended)
        self._done(self._cause)
        return Stopped(self._cause, detail, killed=not self._ended.killed and self._cause is Cause.MEMORY)

    def _fate(self, ended: Ended) -> tuple[Cause | None, str]:
        if ended.full:
            return Cause.FILES, "too much in the working folder"
        if ended.killed:
            return None, "the process has closed its socket"
        status = ended.status
        if status == -signal.SIGXCPU or (status == -signal.SIGKILL and ended.cpu_seconds >= self.limits.cpu_seconds * ENOUGH):
            return Cause.CPU, f"more than {self.limits.cpu_seconds} s of processor time"
        if status == -signal.SIGKILL:  # we have not: the kernel was out of memory, or the code says so with a timer
            return Cause.MEMORY, "killed by the kernel"
        if status == -signal.SIGXFSZ:
            return Cause.FILES, "file too large"
        return None, f"the process ended with exit code {status}" if status >= 0 else f"the process died of signal {-status}"

    def _stop(self, cause: Cause | None, detail: str) -> Stopped:
        if not self._over:
            self._cause = cause
        self._end()
        return Stopped(cause, detail)

    def _end(self) -> None:
        """Ends the process and all that it started, waits until it is gone, and closes what is open. More than once is no more."""
        if not self._over:
            self._close()
            self._done(self._cause)

    def _close(self) -> None:
        self._over = True
        self._lifeline.settimeout(END_SECONDS)
        with suppress(OSError):  # it has gone by itself, and its last words are still to be read
            self._lifeline.send(b"e")
        try:
            words = self._lifeline.recv(256)
            self._ended = Ended(*json.loads(words)) if words else None
        except OSError:
            self._ended = None
        self._lifeline.close()
        self._socket.close()
        for pipe in self._pipes:
            os.close(pipe)
