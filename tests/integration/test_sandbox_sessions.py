"""What sessions give to who asks honestly, what forgers get, and what is left when things end or are killed: nothing."""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward_server.sandbox import probe, supervisor
from reward_server.sandbox.jobs import Cause, Limits, Refused, Reply, Stopped, Tier
from reward_server.sandbox.supervisor import CodeSandbox, SandboxOptions
from tests.integration.sandbox_tiers import TIERS, descendants, gone, open_tier

LIMITS = Limits(seconds=60.0, memory_bytes=512 << 20)
SECONDS = 30.0
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=TIERS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[CodeSandbox]:
    sandbox = open_tier(request.param)
    yield sandbox
    sandbox.close()


def value_of(sandbox: CodeSandbox, code: str, *args: object) -> Reply:
    with sandbox.open(LIMITS) as session:
        loaded = session.load(code, seconds=SECONDS)
        assert loaded.error == ""
        return session.call("f", list(args), {}, seconds=SECONDS)


def test_calls_return_values_and_output(sandbox: CodeSandbox) -> None:
    code = """
import collections
def f(a, *, b=1):
    print('said', a)
    return {'a': (a, b), 'c': collections.Counter('aab'), 'd': {1, 2}, 'e': b'x', 'n': None}
"""
    with sandbox.open(LIMITS) as session:
        session.load(code, seconds=SECONDS)
        reply = session.call("f", [[1, 2.5]], {"b": "é"}, seconds=SECONDS)
    assert reply.value == {"a": ([1, 2.5], "é"), "c": {"a": 2, "b": 1}, "d": {1, 2}, "e": b"x", "n": None}
    assert (reply.output, reply.error, reply.exit_code) == ("said [1, 2.5]\n", "", 0)
    assert 0 < reply.seconds < SECONDS


def test_methods_get_an_instance_each(sandbox: CodeSandbox) -> None:
    code = "class Solution:\n    def __init__(self): self.n = 0\n    def count(self):\n        self.n += 1\n        return self.n"
    with sandbox.open(LIMITS) as session:
        session.load(code, seconds=SECONDS)
        assert [session.call("Solution.count", [], {}, seconds=SECONDS).value for _ in range(2)] == [1, 1]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"), ("def f(:", "SyntaxError: "), ("import no_such_module", "ModuleNotFoundError: "),
        ("raise SystemExit(0)", "SystemExit: 0"), ("exit()", "NameError: "), ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "an exception that cannot be told"), ("x = 'a\0b'", "ValueError: "),
        ("raise BaseExceptionGroup('x', [ValueError(1)])", "ExceptionGroup: "), ("raise Exception('x' * 10**5)", "Exception: xxx"),
        ("import numpy", "ModuleNotFoundError: "), ("import reward_server.supervisor", "ModuleNotFoundError: "),
    ],
)  # fmt: skip
def test_what_code_raises_is_told(sandbox: CodeSandbox, code: str, error: str) -> None:
    with sandbox.open(LIMITS) as session:
        reply = session.load(code, seconds=SECONDS)
        assert reply.error.startswith(error) or (error.startswith("ValueError") and reply.error.startswith("SyntaxError"))
        assert len(reply.error) <= 2_000
        assert session.load("x = 1", seconds=SECONDS).error == ""


@pytest.mark.parametrize("value", ["object()", "lambda: 1", "(n for n in 'ab')", "range(3)", "open", "1j"])
def test_values_that_are_not_plain_are_errors(sandbox: CodeSandbox, value: str) -> None:
    reply = value_of(sandbox, f"def f(): return {value}")
    assert "is not plain data" in reply.error
    assert reply.value is None


def test_arguments_that_are_not_plain_are_refused(sandbox: CodeSandbox) -> None:
    with sandbox.open(LIMITS) as session, pytest.raises(ValueError, match="not plain data"):
        session.call("f", [object()], {}, seconds=1.0)


PROGRAM = """
import sys, atexit, threading
lines = sys.stdin.read().split()
atexit.register(print, 'at exit')
threading.Thread(target=lambda: print('thread', sum(map(int, lines)))).start()
print('error', file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("code", "stdin", "output", "exit_code"),
    [
        (PROGRAM, "1 2\n3", "thread 6\nat exit\n", 0),
        ("print(int(input()) * 2)\nif __name__ == '__main__': print(__name__)", "21\n", "42\n__main__\n", 0),
        ("import sys\nsys.stdout.write(sys.stdin.buffer.read().decode())\nsys.exit(3)", "é\u2028x", "é\u2028x", 3),
        ("import os\nos.write(1, os.read(0, 100)); raise SystemExit('sorry')", "raw", "raw", 1),
        ("print(open(0).read())", "zero", "zero\n", 0), ("print(len(__import__('sys').stdin.readlines()))", "a\n" * 100_000, "100000\n", 0),
        ("print(1)\n1 / 0", "", "1\n", 1), ("exit(2)", "", "", 1), ("import sys; sys.stdout.close()", "", "", 0),
        ("import asyncio\nasync def m():\n    await asyncio.sleep(0)\n    print('async')\nasyncio.run(m())", "", "async\n", 0),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(1))", "", "A(x=1)\n", 0),
        ("import tempfile\nwith tempfile.TemporaryFile() as f:\n    print(f.write(b'x'))", "", "1\n", 0),
    ],
)  # fmt: skip
def test_programs_read_and_print(sandbox: CodeSandbox, code: str, stdin: str, output: str, exit_code: int) -> None:
    with sandbox.open(LIMITS) as session:
        for _ in range(2):  # one program leaves nothing to the next
            reply = session.program(code, stdin, seconds=SECONDS)
            assert (reply.output, reply.exit_code) == (output, exit_code), reply


def test_a_program_in_another_language_is_compiled_and_run(sandbox: CodeSandbox) -> None:
    source = b"#include <iostream>\nint main() { long n; std::cin >> n; std::cout << n * 2 << std::endl; return n == 21 ? 0 : 1; }"
    limits = Limits(seconds=120.0, cpu_seconds=60, memory_bytes=1 << 30, processes=16, commands=True)
    with sandbox.open(limits) as session:
        session.write("a.cpp", b"int main() { return wrong; }")
        refused = session.command(["g++", "-o", "a", "a.cpp"], "", seconds=60.0)
        if "No such file" in refused.error:
            pytest.skip("no C++ compiler")
        assert refused.exit_code == 1
        assert "wrong" in refused.errors
        session.write("a.cpp", source)
        assert session.command(["g++", "-o", "a", "a.cpp"], "", seconds=60.0).exit_code == 0
        for n, code in ((21, 0), (4, 1)):
            reply = session.command(["./a"], str(n), seconds=SECONDS)
            assert (reply.output, reply.exit_code) == (f"{2 * n}\n", code)
        assert "FileNotFoundError" in session.command(["no-such-program"], "", seconds=SECONDS).error


def test_no_job_sees_what_another_left(sandbox: CodeSandbox) -> None:
    for _ in range(3):
        reply = value_of(
            sandbox,
            "import os, builtins\nopen('mark', 'a').write('x')\nbuiltins.mark = 1\ndef f(): return [os.listdir('.'), os.path.getsize('mark')]",
        )
        assert reply.value == [["mark"], 1]
        assert "mark" in value_of(sandbox, "def f(): return mark").error


def test_children_do_not_share_their_random_numbers(sandbox: CodeSandbox) -> None:
    drawn = {
        value_of(sandbox, "import random, uuid\ndef f(): return [random.random(), str(uuid.uuid4())]").value[n] for n in (0, 1) for _ in range(4)
    }
    assert len(drawn) == 8


def test_sessions_run_side_by_side_and_are_bounded(sandbox: CodeSandbox) -> None:
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(sandbox.open(LIMITS)) for _ in range(sandbox.places)]
        fifth = threading.Thread(target=lambda: value_of(sandbox, "def f(): return 1"))
        fifth.start()
        fifth.join(0.3)
        assert fifth.is_alive()
        values = []

        def work(n: int) -> None:
            sessions[n].load("import time\ndef f(n):\n    time.sleep(0.5)\n    return n", seconds=SECONDS)
            values.append(sessions[n].call("f", [n], {}, seconds=SECONDS).value)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(sessions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(values) == list(range(len(sessions)))
    fifth.join(SECONDS)
    assert not fifth.is_alive()


def test_a_bomb_does_not_stop_its_neighbours(sandbox: CodeSandbox) -> None:
    with sandbox.open(LIMITS) as bomb, sandbox.open(LIMITS) as other:
        stopped: list[Stopped] = []

        def burn() -> None:
            try:
                bomb.load("x = []\nwhile True:\n    try: x.append(bytearray(1 << 20))\n    except MemoryError: pass", seconds=1.5)
            except Stopped as caught:
                stopped.append(caught)

        thread = threading.Thread(target=burn)
        thread.start()
        assert other.program("print(sum(range(1000)))", "", seconds=SECONDS).output == "499500\n"
        thread.join(SECONDS)
    assert [s.cause for s in stopped] == [Cause.TIME]


FORGERIES = {
    "equal to all": "class L(list):\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(x): return L([0])",
    "equal to all, in a list": "class L(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef f(x): return [L(0)][0:1]",
    "poisoned json": """
import json, json.encoder
json.dumps = json.loads = json.JSONEncoder.encode = json.JSONEncoder.iterencode = json.encoder.encode_basestring_ascii = lambda *a, **k: '[42]'
def f(x): return [0]""",
    "patched builtins": """
import builtins
for name in ('len', 'type', 'isinstance', 'issubclass', 'list', 'int', 'print', 'str', 'tuple', 'open', 'id', 'getattr', 'BaseException'):
    setattr(builtins, name, None)
def f(x): return [0]""",
    "patched modules": "import os, sys\nos.write = os.read = None\nsys.modules.clear()\ndef f(x): return [0]",
    "no streams": "import sys\nsys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = sys.stdin = None\ndef f(x): return [0]",
    "evil stream": "import sys\nclass S:\n    def flush(self): raise SystemExit(0)\n    write = flush\nsys.stdout = S()\ndef f(x): return [0]",
    "traced": "import sys\ndef t(frame, event, arg): return t\nsys.settrace(t); sys.setprofile(t)\ndef f(x): return [0]",
    "at exit": "import atexit\natexit.register(lambda: print('PASS'))\ndef f(x): return [0]",
    "odd hooks": "import sys\nsys.excepthook = sys.unraisablehook = sys.breakpointhook = None\nsys.setrecursionlimit(200)\ndef f(x): return [0]",
}


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES)
def test_forgers_return_what_they_return(sandbox: CodeSandbox, code: str) -> None:
    with sandbox.open(LIMITS) as session:
        assert session.load(code, seconds=SECONDS).error == ""
        reply = session.call("f", [1], {}, seconds=SECONDS)
    assert (reply.value, reply.output, reply.error) == ([0], "", "")
    assert type(reply.value) is list
    assert type(reply.value[0]) is int


SPEAKS = """
import os, struct
def say(text):
    body = text.encode()
    os.write(3, struct.pack('=I', len(body)) + body)
"""


@pytest.mark.parametrize(
    "said",
    [
        '[2,42,"",null,0,1]',
        '[2,42,"","nonsense"]',
        "[2,42,1,null,0]",
        '{"n":2}',
        "null",
        "[99]",
        '[2,{"bad":[]},"",null,0]',
        "NaN",
        '[true,1,"",null,0]',
        "",
    ],
)
def test_replies_that_are_none_end_the_session(sandbox: CodeSandbox, said: str) -> None:
    with sandbox.open(LIMITS) as session:
        session.load(f"{SPEAKS}\ndef f(): say({said!r}); import time; time.sleep(1000)", seconds=SECONDS)
        with pytest.raises(Stopped) as stopped:
            session.call("f", [], {}, seconds=SECONDS)
        assert stopped.value.cause is None


def test_a_forged_reply_is_at_most_a_lie_about_its_own_value(sandbox: CodeSandbox) -> None:
    with sandbox.open(LIMITS) as session:
        session.load(f"{SPEAKS}\ndef f(): say('[2,42,\"\",null,0]'); say('[3,43,\"\",null,0]'); return 1", seconds=SECONDS)
        assert session.call("f", [], {}, seconds=SECONDS).value == 42
        assert session.call("f", [], {}, seconds=SECONDS).value in (43, 1)  # its own word, in either case
        with contextlib.suppress(Stopped):
            session.call("f", [], {}, seconds=SECONDS)


@pytest.mark.parametrize("claimed", ["time", "output", "forgery"])
def test_a_limit_that_is_seen_from_outside_cannot_be_claimed(sandbox: CodeSandbox, claimed: str) -> None:
    with sandbox.open(LIMITS) as session:
        session.load(f'{SPEAKS}\ndef f(): say(\'[2,null,"","{claimed}",0]\'); return 1', seconds=SECONDS)
        with pytest.raises(Stopped) as stopped:
            session.call("f", [], {}, seconds=SECONDS)
    assert stopped.value.cause is None


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("tier", TIERS)
def test_closing_ends_all_of_it(tier: Tier) -> None:
    before = set(glob.glob(f"{tempfile.gettempdir()}/offbeat-sandbox-*"))
    sandbox = open_tier(tier)
    pids = {sandbox._zygote.pid} | descendants(sandbox._zygote.pid)  # type: ignore[union-attr]
    session = sandbox.open(LIMITS)
    sandbox.close()
    assert gone(pids)
    with pytest.raises(Refused):
        session.load("x = 1", seconds=SECONDS)
    with pytest.raises(Refused):
        sandbox.open(LIMITS)
    session.__exit__(None, None, None)
    assert set(glob.glob(f"{tempfile.gettempdir()}/offbeat-sandbox-*")) <= before


@pytest.mark.parametrize("victim", ["guardian", "zygote"])
@pytest.mark.parametrize("tier", TIERS)
def test_a_killed_zygote_is_started_again(tier: Tier, victim: str) -> None:
    sandbox = open_tier(tier)
    try:
        guardian = sandbox._zygote.pid  # type: ignore[union-attr]
        [zygote] = [pid for pid in descendants(guardian) if _parent(pid) == guardian]
        with sandbox.open(Limits(seconds=60.0, processes=8, commands=True)) as session:
            session.command(["sh", "-c", "sleep 4326 >/dev/null 2>&1 &"], "", seconds=SECONDS)
            pids = {guardian} | descendants(guardian)
            os.kill(guardian if victim == "guardian" else zygote, signal.SIGKILL)
            with pytest.raises((Refused, Stopped)) as failed:
                session.program("while True: pass", "", seconds=SECONDS)
            assert not isinstance(failed.value, Stopped) or failed.value.cause is None
        assert gone(pids - {guardian})
        assert value_of(sandbox, "def f(): return 7").value == 7
        assert sandbox.stats().starts == 2
    finally:
        sandbox.close()


SERVER = """
import sys
from reward_server.sandbox import probe, supervisor
from reward_server.sandbox.jobs import Limits, Tier
from reward_server.sandbox.supervisor import CodeSandbox, SandboxOptions
sandbox = CodeSandbox(SandboxOptions(tier=Tier(sys.argv[1]), python=sys.argv[2]))
session = sandbox.open(Limits(seconds=600.0, cpu_seconds=600, commands=True, processes=8))
session.command(["sh", "-c", "sleep 4327 >/dev/null 2>&1 &"], "", seconds=60.0)
print(sandbox._zygote.pid, flush=True)
session.load("while True: pass", seconds=600.0)
"""


@pytest.mark.parametrize("tier", TIERS)
def test_everything_ends_with_a_killed_server(tier: Tier) -> None:
    probe = open_tier(tier)
    python = probe._options.python
    probe.close()
    before = set(glob.glob(f"{tempfile.gettempdir()}/offbeat-sandbox-*"))
    server = subprocess.Popen([sys.executable, "-c", SERVER, tier, python], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        guardian = int(server.stdout.readline())
        pids = {guardian} | descendants(guardian)
        assert len(pids) >= 4
    finally:
        server.kill()
        server.wait()
    assert gone(pids)
    end = time.monotonic() + SECONDS
    while not set(glob.glob(f"{tempfile.gettempdir()}/offbeat-sandbox-*")) <= before:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_strongest_tier_is_chosen_and_the_rest_refused() -> None:
    sandbox = CodeSandbox(SandboxOptions())
    try:
        assert sandbox.tier in TIERS
    finally:
        sandbox.close()
    with pytest.raises(Refused, match="cannot be confined"):
        CodeSandbox(SandboxOptions(tier=Tier.OUTER))  # there is Landlock here


def test_where_namespaces_are_refused_the_next_tier_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    open_tier(Tier.LANDLOCK).close()
    python = next(p for p in (sys.executable, "/usr/bin/python3") if os.geteuid() != 0 or p.startswith("/usr"))
    real = supervisor.Zygote

    def refusing(tier: Tier, options: SandboxOptions) -> supervisor.Zygote:
        if tier == Tier.NAMESPACES:
            raise supervisor.ZygoteDied("unshare: Operation not permitted")  # as in a container of Docker
        return real(tier, options)

    monkeypatch.setattr(supervisor, "Zygote", refusing)
    sandbox = CodeSandbox(SandboxOptions(python=python))
    try:
        assert sandbox.tier is Tier.LANDLOCK
        assert value_of(sandbox, "def f(): return 1").value == 1
    finally:
        sandbox.close()


def test_a_tier_that_an_attack_gets_through_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ATTACKS", probe.ATTACKS.replace("def forks():", "def forks(): return\ndef unused():"))
    with pytest.raises(Refused, match=r"(namespaces|landlock): forks\(\)"):
        CodeSandbox(SandboxOptions())


def test_commands_are_refused_where_what_they_make_could_not_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A right program that cannot be started must not look like a wrong one."""
    flags = os.ST_NOEXEC | os.ST_NODEV
    monkeypatch.setattr(supervisor.os, "statvfs", lambda path: os.statvfs_result([4096] * 8 + [flags, 255]))  # as a tmpfs in a container of Docker
    sandbox = open_tier(Tier.LANDLOCK)
    try:
        with pytest.raises(Refused, match="noexec"):
            sandbox.open(Limits(commands=True))
        assert value_of(sandbox, "def f(): return 1").value == 1
    finally:
        sandbox.close()


@pytest.mark.parametrize("facts", [probe.Facts(seccomp=False, landlock=7), probe.Facts(seccomp=True, landlock=0)])
def test_a_kernel_without_the_means_is_refused(monkeypatch: pytest.MonkeyPatch, facts: probe.Facts) -> None:
    monkeypatch.setattr(probe, "facts", lambda numbers: facts)
    with pytest.raises(Refused, match="cannot be confined here"):
        CodeSandbox(SandboxOptions())


def test_a_declared_outer_sandbox_stands_in_for_landlock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "facts", lambda numbers: probe.Facts(seccomp=True, landlock=0))
    if os.geteuid() != 0:  # jobs would be the server's own user, with its memory and files before them
        with pytest.raises(Refused, match="cannot be confined"):
            CodeSandbox(SandboxOptions(outer=True))
        return
    sandbox = CodeSandbox(SandboxOptions(outer=True, python="/usr/bin/python3"))
    try:
        assert sandbox.tier is Tier.OUTER
        assert value_of(sandbox, "def f(): return 1").value == 1
        assert "PermissionError" in value_of(sandbox, "import socket\ndef f(): socket.socket()").error
    finally:
        sandbox.close()


def test_packages_can_be_allowed() -> None:
    sandbox = open_tier(Tier.NAMESPACES, packages=("numpy",))
    try:
        assert value_of(sandbox, "import numpy as np\ndef f(n): return float(np.arange(n).sum())", 5).value == 10.0
        assert "FileNotFoundError" in value_of(sandbox, "import os\ndef f(p): return os.listdir(p)", os.path.dirname(pytest.__file__)).error
        assert "ModuleNotFoundError" in value_of(sandbox, "def f():\n    import torch").error
    finally:
        sandbox.close()


def test_what_is_told_to_the_zygote_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFBEAT_CLUSTER_TOKEN", "secret-of-the-cluster")
    sandbox = open_tier(Tier.NAMESPACES)
    try:
        for pid in {sandbox._zygote.pid} | descendants(sandbox._zygote.pid):  # type: ignore[union-attr]
            told = Path(f"/proc/{pid}/cmdline").read_bytes()
            with contextlib.suppress(PermissionError):  # the jobs' own are closed even to their user
                told += Path(f"/proc/{pid}/environ").read_bytes()
            assert b"secret" not in told
            assert b"OFFBEAT" not in told
    finally:
        sandbox.close()
