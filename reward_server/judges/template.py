"""The process from which workers are forked, started by `workers.Template`: `python -m reward_server.judges.template JUDGE FD SECONDS MEMORY_BYTES`.

Each worker answers requests on its own socket, one at a time, under
- an alarm of SECONDS of the processor's time, and one of the wall's after WALL times as many for what sleeps or starves, at the signals' default
  action: the kernel kills, and no `except` clause can swallow that. Neighbours that take the processor make nobody's answer late;
- RLIMIT_AS of twice MEMORY_BYTES. The libraries swallow MemoryError and take it for a wrong answer, so a decision after which the worker has held
  more than MEMORY_BYTES is reported as a limit, whatever it is;
- no core files, no file writes, no descriptors but its socket and /dev/null, none of the server's environment.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import socket
import sys
from multiprocessing.connection import Connection

from reward_server.judges.workers import ALARMS, FORK, NUMBER, READY, WALL
from reward_server.verifiers import VERIFIERS
from reward_server.verifiers.verdict import Judge
from services.contracts.messages import Outcome

PR_SET_PDEATHSIG = 1


def main() -> None:
    judge = VERIFIERS[sys.argv[1]].judge
    assert judge is not None
    control = socket.socket(fileno=int(sys.argv[2]))
    seconds, memory_bytes = float(sys.argv[3]), int(sys.argv[4])
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for alarm in ALARMS:
        signal.signal(alarm, signal.SIG_DFL)
    libc = ctypes.CDLL(None)
    judge.warm()
    gc.collect()
    gc.freeze()  # pages that the collector does not touch stay shared with the workers
    if len(os.listdir("/proc/self/task")) > 1:
        raise SystemExit(f"the judge {sys.argv[1]} starts threads when it is imported: its workers cannot be forked")
    control.send(READY)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            return
        (pid,) = NUMBER.unpack(message[1:])
        if message[:1] == FORK:
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                try:
                    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                    if os.getppid() == parent:
                        control.close()
                        work(judge, descriptors[0], seconds, memory_bytes)
                finally:
                    os._exit(0)
            os.close(descriptors[0])
            control.send(NUMBER.pack(pid))
        else:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still the worker's
            control.send(NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


def work(judge: Judge, descriptor: int, seconds: float, memory_bytes: int) -> None:
    """Answers requests until the socket closes. A reply is [outcome, value or detail] in JSON."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.close(nowhere)
    resource.setrlimit(resource.RLIMIT_AS, (2 * memory_bytes, 2 * memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    connection = Connection(descriptor)
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, WALL * seconds)
        try:
            reply = [Outcome.OK, judge.decide(json.loads(request))]
        except MemoryError:
            reply = [Outcome.LIMIT, "memory"]
        except Exception as wrong:
            reply = [Outcome.ERROR, f"{type(wrong).__name__}: {ascii(wrong)[:200]}"]
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > memory_bytes:
            reply = [Outcome.LIMIT, "memory"]
        connection.send_bytes(json.dumps(reply).encode())


if __name__ == "__main__":
    main()
