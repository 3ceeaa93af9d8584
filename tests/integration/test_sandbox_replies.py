"""Hostile processes against the server's side: what they send, when, and how; and against those from which they are forked.

Whatever a job does to its interpreter, a request comes to a Reply of plain data or to a Stopped, at a bounded cost, and the next job is well.
"""

from __future__ import annotations

import contextlib
import os
import resource
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward_server.sandbox.jobs import Cause, Limits, Refused, Reply, Stopped, Tier
from reward_server.sandbox.supervisor import CodeSandbox
from tests.integration.sandbox_tiers import TIERS, descendants, open_tier
from tests.integration.test_sandbox_leaks import processes, settled

LIMITS = Limits(seconds=60.0, cpu_seconds=30, memory_bytes=512 << 20, file_bytes=4 << 20)
SECONDS = 30.0
PRELUDE = """
import ctypes, gc, inspect, os, signal, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def say(text, fd=3):
    body = text.encode() if isinstance(text, str) else text
    os.write(fd, struct.pack('=I', len(body)) + body)
def driver():
    return sys.modules['reward_server.sandbox.child']
"""


@pytest.fixture(scope="module", params=TIERS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[CodeSandbox]:
    sandbox = open_tier(request.param)
    yield sandbox
    sandbox.close()


def asked(sandbox: CodeSandbox, code: str, *args: object, seconds: float = SECONDS) -> Reply | Stopped:
    """What a call of `f` comes to."""
    with sandbox.open(LIMITS) as session:
        try:
            loaded = session.load(f"{PRELUDE}\n{code}", seconds=SECONDS)
            return loaded if loaded.error else session.call("f", list(args), {}, seconds=seconds)
        except Stopped as stopped:
            return stopped


OWN_WORD = {
    "an early reply": """say('[2,42,"",null,0]')\nreturn 1""",
    "a reply of the encoder": "said = iter([chr(34) * 2, 'null']); driver().encode = lambda *a: next(said)\nreturn 42",
    "a frame of the driver": """
    frame = sys._getframe()
    while frame.f_code.co_name != 'serve': frame = frame.f_back
    say('[%d,42,"",null,0]' % frame.f_locals['number'])
    return 1
    """,
    "the socket as standard output": "os.dup2(3, 1)\nprint(end='\\x10\\0\\0\\0[2,42,\"\",null,0]', flush=True)\nreturn 1",
    "a thread that replies": "threading.Thread(target=say, args=('[2,42,\"\",null,0]',)).start()\ntime.sleep(0.5)\nreturn 1",
    "a class that claims another": """
    class L(int):
        __class__ = property(lambda self: list)
        __index__ = __int__ = __str__ = __repr__ = __len__ = lambda self: 0
    return L(42)""",
    "a metaclass": """
    class M(type):
        __instancecheck__ = __subclasscheck__ = lambda *a: True
        def mro(cls): return [cls, int, object]
    return M('X', (int,), {})(42)""",
    "arrays of arguments": "return next(a for a in [inspect.currentframe().f_back.f_locals['args'][0]])",
}
"""Each has the value 42, by whatever way: that is the job's own word, and no more can be had by any."""


@pytest.mark.parametrize("body", OWN_WORD.values(), ids=OWN_WORD)
def test_a_forged_reply_is_no_more_than_a_value(sandbox: CodeSandbox, body: str) -> None:
    reply = asked(sandbox, function(body), 42)
    assert isinstance(reply, Reply)
    assert (reply.value, type(reply.value), reply.error, reply.output) == (42, int, "", "")


NO_REPLIES = {
    "no number": "say('[null,42,\"\",null,0]')",
    "a number that is a float": "say('[2.0,42,\"\",null,0]')",
    "the next number": "say('[3,42,\"\",null,0]')",
    "one more item": "say('[2,42,\"\",null,0,1]')",
    "a cause that is none": 'say(\'[2,42,"","",0]\')',
    "an exit code that is none": "say('[2,42,\"\",null,1e9]')",
    "an exit code without end": "say('[2,42,\"\",null,' + '9' * 5000 + ']')",
    "a value that is no data": 'say(\'[2,{"__class__":["os.system"]},"",null,0]\')',
    "a set of lists": 'say(\'[2,{"set":[[1]]},"",null,0]\')',
    "keys of one hash": "say('[2,{\"set\":[' + ','.join(str(n * (2**61 - 1)) for n in range(200)) + ']},\"\",null,0]')",
    "tuples of one hash": "say('[2,{\"set\":[' + ','.join(['{\"tuple\":[]}'] * 200) + ']},\"\",null,0]')",
    "too deep to be read": "say('[2,' + '[' * 100_000 + ']' * 100_000 + ',\"\",null,0]')",
    "too deep to be sent on": "say('[2,' + '[' * 65 + ']' * 65 + ',\"\",null,0]')",
    "a number too large to be sent on": "say('[2,' + '9' * 4200 + ',\"\",null,0]')",
    "bytes that are no text": "say(b'\\xff\\xfe')",
    "a frame of no length": "say('')",
    "all zeros": "os.write(3, bytes(4096))",
    "a null": "say('[2,null,null,null,null]')",
    "a driver that says nothing": "driver().encode = lambda *a: ''\nreturn 1",
    "a driver that writes elsewhere": "os.dup2(1, 3)",
    "a driver with other parts": "frame = sys._getframe().f_back.f_back; frame.f_globals['framed'] = lambda text: b'\\1\\0\\0\\0]'\nreturn 1",
    "a closed socket": "os.close(3)",
    "half a frame": "os.write(3, b'\\x09\\0\\0\\0[2,'); os._exit(0)",
    "small numbers that are others": "ctypes.memset(id(2) + 24, 9, 1); ctypes.memset(id(0) + 24, 9, 1)\nreturn 1",
    "no exceptions": "ctypes.memset(id(BaseException), 0, 64); raise ValueError",
    "a signal between requests": "signal.signal(14, lambda *a: os._exit(3)); signal.setitimer(0, 0.01); time.sleep(1)",
}


@pytest.mark.parametrize("body", NO_REPLIES.values(), ids=NO_REPLIES)
def test_what_is_no_reply_ends_the_session_by_its_own_fault(sandbox: CodeSandbox, body: str) -> None:
    stopped = asked(sandbox, function(f"{body}\ntime.sleep(1000)"))
    assert isinstance(stopped, Stopped), stopped
    assert stopped.cause is None
    assert stopped.detail.isprintable()
    assert asked(sandbox, "def f(): return 7").value == 7  # type: ignore[union-attr]


TEXTS = ["\ud800", "\x1b]0;x\x07", "\0", "\u202e", "x" * 10**6, "\U0010ffff"]


@pytest.mark.parametrize("text", TEXTS, ids=[repr(text)[:12] for text in TEXTS])
@pytest.mark.parametrize(
    "how", ["raise ValueError(t)", "raise MemoryError(t)", "print(t)", "sys.stderr.write(t)", "raise type(t[:9], (Exception,), {})(t)"]
)
def test_texts_can_be_written_down(sandbox: CodeSandbox, text: str, how: str) -> None:
    told = asked(sandbox, function(f"t = {text!r}\n{how}"))
    for said in (told.detail,) if isinstance(told, Stopped) else (told.error, told.output, told.errors):
        said.encode()
        assert len(said) <= 10**6 + 1


def test_what_comes_out_can_be_sent_in_again(sandbox: CodeSandbox) -> None:
    code = "def f(x): return x\ndef g():\n    v = {'a': (1 << 12_999, -0.0, '\\ud800', b'x')}\n    for _ in range(60): v = [v]\n    return v"
    with sandbox.open(LIMITS) as session:
        session.load(code, seconds=SECONDS)
        value = session.call("g", [], {}, seconds=SECONDS).value
        assert session.call("f", [value], {}, seconds=SECONDS).value == value
        session.load(f"{PRELUDE}def h(): say('[5,' + '[' * 64 + ']' * 64 + ',\"\",null,0]'); return 1", seconds=SECONDS)
        deepest = session.call("h", [], {}, seconds=SECONDS).value
    with sandbox.open(LIMITS) as session:
        session.load(code, seconds=SECONDS)
        assert session.call("f", [deepest], {}, seconds=SECONDS).value == deepest


SLOW = {
    "output byte by byte": "while True:\n    os.write(1, b'x')\n    for _ in range(300): pass",
    "errors byte by byte": "while True:\n    os.write(2, b'x')\n    for _ in range(300): pass",
    "a reply byte by byte": "os.write(3, struct.pack('=I', 1 << 19))\nwhile True:\n    os.write(3, b' ')\n    for _ in range(300): pass",
    "closed streams": "os.close(1); os.close(2)\ntime.sleep(1000)",
}


@pytest.mark.parametrize("code", SLOW.values(), ids=SLOW)
def test_slow_talk_costs_the_server_little(sandbox: CodeSandbox, code: str) -> None:
    with sandbox.open(LIMITS) as session:
        busy = time.thread_time()
        with pytest.raises(Stopped):
            session.load(f"{PRELUDE}\n{code}", seconds=2.0)
        assert time.thread_time() - busy < 0.4


def test_a_request_that_is_not_read_costs_the_server_little(sandbox: CodeSandbox) -> None:
    code = "def t():\n    time.sleep(0.3)\n    os.write(3, b'x')\n    ctypes.PyDLL(None).pause()\nthreading.Thread(target=t).start()"  # with the GIL
    with sandbox.open(LIMITS) as session:
        assert session.load(f"{PRELUDE}\n{code}", seconds=SECONDS).error == ""
        time.sleep(1.0)
        argument, busy = "x" * (8 << 20), time.thread_time()
        with pytest.raises(Stopped) as stopped:
            session.call("f", [argument], {}, seconds=3.0)
        assert time.thread_time() - busy < 1.0
    assert stopped.value.cause is Cause.TIME


def test_files_are_watched_while_nobody_asks(sandbox: CodeSandbox) -> None:
    code = "def t():\n    for n in range(10**6):\n        with open(str(n), 'wb') as f: f.write(b'x' * 500_000)\nthreading.Thread(target=t).start()"
    with sandbox.open(LIMITS) as session:
        session.load(f"{PRELUDE}\n{code}", seconds=SECONDS)
        time.sleep(1.5)
        if sandbox.tier == Tier.NAMESPACES:  # the kernel bounds it
            assert session.load("x = 1", seconds=SECONDS).error == ""
            return
        [folder] = [f for f in Path(sandbox._zygote._base).iterdir() if any(f.iterdir())] or [None]  # type: ignore[union-attr]
        assert folder is None
        with pytest.raises(Stopped) as stopped:
            session.load("x = 1", seconds=SECONDS)
    assert stopped.value.cause is Cause.FILES
    assert sandbox.stats().stopped[Cause.FILES] > 0


ODD_FOLDERS = """
for n in $(seq 30); do mkdir -p .lifted-$PPID-$n/a/b $n/.lifted-$PPID-$n/c; done
d=.; for n in $(seq 60); do d=$d/dddddddddddddddddddddddddddddddddddddddddddddddd; mkdir $d || break; done
touch "$(printf 'a\\nb')" "$(printf '\\377\\376')" -- -rf; ln -s / root; ln -s . self; mkdir closed; touch closed/x; chmod 0 closed . 2>/dev/null
true
"""


def test_odd_folders_do_not_end_the_zygote(sandbox: CodeSandbox) -> None:
    asked(sandbox, "def f(): return 7")
    before = settled(sandbox)
    for _ in range(3):
        with sandbox.open(Limits(seconds=60.0, processes=8, commands=True)) as session, contextlib.suppress(Stopped):
            session.command(["sh", "-c", ODD_FOLDERS], "", seconds=SECONDS)
    assert asked(sandbox, "def f(): return 7").value == 7  # type: ignore[union-attr]
    assert settled(sandbox) == before


def test_a_server_without_free_descriptors_refuses_and_recovers(sandbox: CodeSandbox) -> None:
    before = settled(sandbox)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for free in range(6):
        held: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(0))
            for _ in range(min(free, len(held))):
                os.close(held.pop())
            with contextlib.suppress(Refused), sandbox.open(LIMITS) as session:
                assert free >= 4
                session.load("x = 1", seconds=SECONDS)
        finally:
            for descriptor in held:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert asked(sandbox, "def f(): return 7").value == 7  # type: ignore[union-attr]
    assert settled(sandbox) == before


def test_a_zygote_that_cannot_fork_loses_nothing(sandbox: CodeSandbox) -> None:
    before, (_, zygote) = settled(sandbox), processes(sandbox)
    limits = resource.prlimit(zygote, resource.RLIMIT_NOFILE)
    taken = len(os.listdir(f"/proc/{zygote}/fd"))
    try:
        for free in range(9):
            resource.prlimit(zygote, resource.RLIMIT_NOFILE, (taken + free, limits[1]))
            for n in range(5):
                with contextlib.suppress(Refused), sandbox.open(Limits(seconds=60.0, memory_bytes=(300 + 10 * free + n) << 20)) as session:
                    session.load("x = 1", seconds=SECONDS)
    finally:
        resource.prlimit(zygote, resource.RLIMIT_NOFILE, limits)
    time.sleep(1.1)
    for _ in range(5):
        assert asked(sandbox, "def f(): return 7").value == 7  # type: ignore[union-attr]
    assert settled(sandbox) == before


def test_closing_while_others_open_ends_them_all() -> None:
    sandbox = open_tier(Tier.NAMESPACES, sessions=2)
    ends: list[str] = []

    def work() -> None:
        try:
            while True:
                asked(sandbox, "def f(): time.sleep(0.01)")
        except Refused as refused:
            ends.append(str(refused))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    sandbox.close()
    for thread in threads:
        thread.join(SECONDS)
    assert len(ends) == 6


def test_what_the_kernel_says_of_a_job(sandbox: CodeSandbox) -> None:
    guardian, zygote = processes(sandbox)
    with sandbox.open(LIMITS) as session:
        session.load("x = 1", seconds=SECONDS)
        end = time.monotonic() + SECONDS
        while not (jobs := descendants(guardian) - {zygote}) or any(said(pid)["Seccomp"] != "2" for pid in jobs):  # spares are being made
            assert time.monotonic() < end
            time.sleep(0.1)
        for pid in (guardian, zygote, *jobs):
            assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
        for pid in jobs:
            told = said(pid)
            assert (told["NoNewPrivs"], told["Threads"]) == ("1", "1")
            assert {int(told[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {0}
            assert "0" not in told["Uid"].split() + told["Groups"].split()
            if os.geteuid() == 0:
                assert int(told["CapBnd"], 16) == 0
                assert told["Uid"].split() == told["Gid"].split()


def said(pid: int) -> dict[str, str]:
    lines = [line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return {name: value.strip() for name, value in lines}


def function(body: str) -> str:
    return f"def f(*args):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
