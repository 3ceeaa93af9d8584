"""The server's side of killable worker processes.

    server --- control socket ---> template (single-threaded, libraries imported) --- fork ---> worker
       \\------------------------------ one socket per worker ------------------------------------/

The server has threads and must not fork; the template (`reward_server.judges.template`) forks for it, in milliseconds, reaps, and tells how a worker
died. Nothing outlives the server, however it dies: the template leaves when its control socket closes, and the kernel kills the workers when the
template is gone. This bounds time and memory of code that is trusted; it is no sandbox for code that is not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

START_SECONDS = 60.0
"""Time for a template to import its libraries on a busy machine."""
REPLY_SECONDS = 10.0
"""Time for a template to fork or reap."""
SLOW_NICENESS = 10
"""Added to a slow worker's: a tenth of the weight that the kernel gives to the others."""
WALL = 4
"""Wall time of a decision, in times of what it may take of the processor."""
ALARMS = (signal.SIGPROF, signal.SIGALRM)
"""With which the kernel kills a worker that is late."""

FORK, END, READY = b"f", b"e", b"ready"
NUMBER = struct.Struct("=i")


class TemplateDied(Exception):
    """The template is gone, and its workers with it."""


class Worker:
    """A forked process that answers one request at a time."""

    def __init__(self, template: Template, pid: int, connection: Connection) -> None:
        self._template = template
        self._connection = connection
        self.pid = pid
        self.served = 0

    def alive(self) -> bool:
        """False when an idle worker has died: its socket is at its end, where nothing else can be read."""
        try:
            return not self._connection.poll(0)
        except OSError:
            return False

    def ask(self, request: bytes) -> None:
        """Raises OSError when the worker is dead."""
        self._connection.send_bytes(request)

    def reply(self, seconds: float) -> bytes | None:
        """The answer to what was asked; None when there is none in time. Raises EOFError or OSError when the worker is dead."""
        if not self._connection.poll(seconds):
            return None
        self.served += 1
        return self._connection.recv_bytes()

    def processor_seconds(self) -> float:
        """What it has taken of the processor so far, in steps of 10 ms; 0 when it has just died."""
        try:
            times = psutil.Process(self.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def step_back(self) -> None:
        """The others go first where there are not enough cores for all."""
        with contextlib.suppress(OSError):  # it has just died
            os.setpriority(os.PRIO_PROCESS, self.pid, min(19, os.getpriority(os.PRIO_PROCESS, self.pid) + SLOW_NICENESS))

    def end(self) -> int | None:
        """Kills the worker if it still lives. The exit code, -n for signal n; None when it is not known."""
        self._connection.close()
        try:
            return self._template.end(self.pid)
        except TemplateDied:
            return None


class Template:
    """A process that has imported what one judge needs, and forks workers. Safe to use from several threads."""

    def __init__(self, judge: str, *, seconds: float, memory_bytes: int) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "reward_server.judges.template", judge, str(theirs.fileno()), str(seconds), str(memory_bytes)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a Ctrl-C in the terminal is the server's to handle
                cwd="/",
                # no secrets, and no thread pools: the template may only fork while it has one thread
                env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        self._control.settimeout(START_SECONDS)
        try:
            self._receive()
        except TemplateDied:
            self.close()
            raise
        self._control.settimeout(REPLY_SECONDS)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self) -> Worker:
        """A new worker. Raises TemplateDied."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            try:
                socket.send_fds(self._control, [FORK + NUMBER.pack(0)], [theirs.fileno()])
                (pid,) = NUMBER.unpack(self._receive())
            except (OSError, TemplateDied) as gone:
                ours.close()
                raise TemplateDied("the template did not fork") from gone
        return Worker(self, pid, Connection(ours.detach()))

    def end(self, pid: int) -> int:
        """Kills and reaps a worker; its exit code, -n for signal n. Raises TemplateDied."""
        with self._lock:
            try:
                self._control.send(END + NUMBER.pack(pid))
            except OSError as gone:
                raise TemplateDied("the template is gone") from gone
            return NUMBER.unpack(self._receive())[0]

    def close(self) -> None:
        """Ends the template, and the workers that it still has."""
        self._control.close()
        try:
            self._process.wait(REPLY_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self) -> bytes:
        try:
            reply = self._control.recv(64)
        except OSError as gone:
            raise TemplateDied("the template does not answer") from gone
        if not reply:
            raise TemplateDied("the template has exited")
        return reply
