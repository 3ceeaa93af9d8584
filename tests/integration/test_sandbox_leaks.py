"""What is left after many jobs of all kinds: no process, file, mount or descriptor, and no more memory than before."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward_server.sandbox.jobs import Limits, Stopped
from reward_server.sandbox.supervisor import CodeSandbox
from tests.integration.sandbox_tiers import TIERS, descendants, open_tier

LIMITS = Limits(seconds=60.0, memory_bytes=256 << 20, output_bytes=1 << 16, file_bytes=1 << 20)
COMMANDS = Limits(seconds=60.0, memory_bytes=256 << 20, processes=8, commands=True)
SECONDS = 30.0
LEAVERS = [
    "def f(x): return x",
    "import os\nos.makedirs('a/b/c', exist_ok=True) if os.getuid() == 65534 else 0\nopen('file', 'w').write('x' * 10000)\ndef f(x): return x",
    "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\ndef f(x): return x",
    "import os\ndef f(x): os._exit(0)",
    "import os\nfiles = [os.open('/dev/null', 0) for _ in range(50)]\ndef f(x): return x",
    "def f(x): raise MemoryError",
    "def f(x): print('x' * 100_000)",
    "import os\ndef f(x): os.closerange(0, 100)",
    "import os\ndef f(x): os.write(3, b'garbage' * 100); return x",
    "def f(x):\n    with open('f', 'wb') as f: f.write(b'x' * (2 << 20))",
    "import ctypes\ndef f(x): ctypes.string_at(0)",
    "def f(:",
]
SLOW_LEAVER = "def f(x):\n    while True: pass"
SCRIPT = "mkdir -p a/b/c; ln -s / a/l; touch a/b/x; chmod 0 a/b 2>/dev/null; (sleep 5328 </dev/null >/dev/null 2>&1 &); exit 3"


@pytest.fixture(scope="module", params=TIERS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[CodeSandbox]:
    sandbox = open_tier(request.param)
    yield sandbox
    sandbox.close()


def leave(sandbox: CodeSandbox, jobs: int) -> None:
    for n in range(jobs):
        with contextlib.suppress(Stopped):
            if n % 25 == 24:
                with sandbox.open(COMMANDS) as session:
                    assert session.command(["sh", "-c", SCRIPT], "", seconds=SECONDS).exit_code == 3
                continue
            with sandbox.open(LIMITS) as session:
                session.load(SLOW_LEAVER if n % 100 == 50 else LEAVERS[n % len(LEAVERS)], seconds=SECONDS)
                session.call("f", [n], {}, seconds=0.05 if n % 100 == 50 else SECONDS)


def traces(sandbox: CodeSandbox) -> dict[str, int]:
    """What a job could leave behind, beside the processes that stand ready: how many of those there are depends on what was asked for last."""
    guardian, zygote = processes(sandbox)
    ready = len(descendants(guardian)) - 1
    base = sandbox._zygote._base  # type: ignore[union-attr]
    found = {
        "starts": sandbox.stats().starts,
        "most ready": max(ready, 2 * sandbox._options.spares),
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "guardian's descriptors": len(os.listdir(f"/proc/{guardian}/fd")),
        "mounts": Path("/proc/self/mountinfo").read_text().count("offbeat-sandbox"),
        "folders": len(os.listdir(base)) - ready if base else 0,
    }
    with contextlib.suppress(PermissionError):  # root of a container may not look at who was another user for a while
        own = os.readlink("/proc/self/ns/mnt") == os.readlink(f"/proc/{zygote}/ns/mnt")
        found["zygote's mounts"] = 0 if own else Path(f"/proc/{zygote}/mountinfo").read_text().count("\n")
        found["zygote's descriptors"] = len(os.listdir(f"/proc/{zygote}/fd")) - 5 * ready
    return found


def processes(sandbox: CodeSandbox) -> tuple[int, int]:
    """Of the guardian and the zygote."""
    guardian = sandbox._zygote.pid  # type: ignore[union-attr]
    [zygote] = [pid for pid in descendants(guardian) if _parent(pid) == guardian]
    return guardian, zygote


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def settled(sandbox: CodeSandbox) -> dict[str, int]:
    """Once the spares are made up, which takes a moment."""
    last, end = traces(sandbox), time.monotonic() + SECONDS
    while time.monotonic() < end:
        time.sleep(0.3)
        if (now := traces(sandbox)) == last:
            break
        last = now
    return last


def kilobytes(sandbox: CodeSandbox) -> list[int]:
    """Resident memory of this process, the guardian and the zygote that is theirs and not a file's."""
    found = []
    for pid in (os.getpid(), *processes(sandbox)):
        [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon")]
        found.append(int(line.split()[1]))
    return found


@pytest.mark.parametrize("jobs", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_jobs_leave_nothing_behind(sandbox: CodeSandbox, jobs: int) -> None:
    leave(sandbox, 100)
    before, memory = settled(sandbox), kilobytes(sandbox)
    began = time.monotonic()
    leave(sandbox, jobs)
    seconds = time.monotonic() - began
    assert settled(sandbox) == before
    grown = [now - then for now, then in zip(kilobytes(sandbox), memory, strict=True)]
    print(f"\n{sandbox.tier}: {jobs} jobs in {seconds:.0f} s, {before}, memory grown by {grown} KiB from {memory}")
    assert max(grown) < 4_096, grown
