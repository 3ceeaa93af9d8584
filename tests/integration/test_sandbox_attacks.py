"""Attacks on the sandbox, in each tier. An attack is a function that returns what it has achieved; each must be refused, or be stopped by its limit.

Run again as an ordinary user by test_sandbox_users.py.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from reward_server.sandbox.jobs import Cause, Limits, Stopped, Tier
from reward_server.sandbox.supervisor import CodeSandbox
from reward_server.sandbox.syscalls import numbers
from tests.integration.sandbox_tiers import TIERS, open_tier, processes

LIMITS = Limits(seconds=60.0, cpu_seconds=30, memory_bytes=512 << 20, output_bytes=1 << 20, file_bytes=4 << 20)
SECONDS = 30.0
SHORT = 1.0
PRELUDE = f"""
import ctypes, os, signal, socket, struct, subprocess, sys, threading, time
NUMBERS = {numbers()!r}
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

def kernel(name, *args):
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(NUMBERS[name]), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return [result]

def read(path):
    with open(path, "rb") as file:
        return [path, file.read(1)]

def create(path):
    with open(path, "w"):
        return [path]
"""
DENIALS = (
    "PermissionError:", "FileNotFoundError:", "NotADirectoryError:", "OSError:", "ConnectionRefusedError:", "BlockingIOError:", "ProcessLookupError:",
    "ValueError: not allowed to raise maximum limit",
)  # fmt: skip

READS = """
/etc/passwd /etc/shadow /etc/hostname /proc/self/environ /proc/1/environ /proc/self/maps /proc/self/mem /proc/self/status /proc/cpuinfo /proc/kallsyms
/proc/self/ROOT/etc/passwd /proc/self/cwd/../../../etc/passwd /proc/self/fd/3 /proc/self/exe /proc/sys/kernel/core_pattern /proc/net/tcp /sys/kernel
/../../../etc/passwd ../../../../../etc/passwd /dev/../etc/passwd /dev/mem /dev/kmsg /dev/kvm /dev/vda /dev/sda /dev/tty
/dev/userfaultfd /var/log/dpkg.log /usr/bin/env /etc/ssl/openssl.cnf
"""
LISTS = "/ /etc /home /root /proc /sys /proc/self/fd /dev /var /run /tmp/.. /mnt /opt"
WRITES = "/offbeat /etc/offbeat /usr/offbeat /var/tmp/offbeat /dev/shm/offbeat /dev/offbeat /run/offbeat ../offbeat /tmp/../offbeat /proc/offbeat"
CALLS = {
    "ptrace": ["0, 0, 0, 0"],
    "process_vm_readv": ["1, 0, 0, 0, 0, 0"],
    "process_vm_writev": ["1, 0, 0, 0, 0, 0"],
    "io_uring_setup": ["4, ctypes.create_string_buffer(256)"],
    "bpf": ["0, ctypes.create_string_buffer(128), 128"],
    "keyctl": ["0, -3, 1"],
    "add_key": ["b'user', b'x', b'y', 1, -3"],
    "request_key": ["b'user', b'x', None, 0"],
    "userfaultfd": ["1", "0"],
    "perf_event_open": ["ctypes.create_string_buffer(128), 0, -1, -1, 0"],
    "memfd_create": ["b'x', 0"],
    "unshare": ["0x10000000", "0x20000", "0x40000000"],
    "setns": ["3, 0"],
    "mount": ["b'none', b'.', b'tmpfs', 0, None"],
    "umount2": ["b'/tmp', 2", "b'/dev', 2"],
    "pivot_root": ["b'.', b'.'"],
    "chroot": ["b'.'"],
    "setuid": ["0"],
    "setgid": ["0"],
    "setresuid": ["0, 0, 0"],
    "setgroups": ["0, None"],
    "capset": ["struct.pack('II', 0x20080522, 0), b'\\xff' * 24"],
    "prctl": ["4, 1, 0, 0, 0", "38, 0, 0, 0, 0", "22, 2, 0, 0, 0"],
    "seccomp": ["2, 0, struct.pack('I', 0)"],
    "personality": ["0x0040000"],
    "sethostname": ["b'x', 1"],
    "setpriority": ["0, 0, 19"],
    "sched_setaffinity": ["0, 8, b'\\x01' * 8"],
    "setsid": [""],
    "setpgid": ["0, 0"],
    "kill": ["-1, 0", "1, 0", "0, 0", "1, 9"],
    "tkill": ["1, 0"],
    "tgkill": ["1, 1, 9", "2, 2, 0"],
    "rt_sigqueueinfo": ["1, 0, ctypes.create_string_buffer(128)"],
    "pidfd_open": ["1, 0"],
    "pidfd_send_signal": ["0, 0, None, 0"],
    "prlimit64": ["0, 0, struct.pack('QQ', 1 << 40, 1 << 40), None", "0, 7, struct.pack('QQ', 4, 4), None"],
    "setrlimit": ["0, struct.pack('QQ', 1 << 40, 1 << 40)"],
    "shmget": ["0, 4096, 0x3ff"],
    "msgget": ["0, 0x3ff"],
    "semget": ["0, 1, 0x3ff"],
    "mq_open": ["b'x', 0x42, 0o600, None"],
    "inotify_init1": ["0"],
    "fanotify_init": ["0, 0"],
    "name_to_handle_at": ["-100, b'.', ctypes.create_string_buffer(b'\\x80', 256), ctypes.create_string_buffer(8), 0"],
    "open_by_handle_at": ["3, ctypes.create_string_buffer(256), 0"],
    "mknodat": ["-100, b'n', 0o20666, 0x103", "-100, b'f', 0o10666, 0"],
    "linkat": ["-100, b'/etc/passwd', -100, b'l', 0"],
    "chown": ["b'.', 0, 0"],
    "init_module": ["b'', 0, b''"],
    "kexec_load": ["0, 0, None, 0"],
    "swapon": ["b'x', 0"],
    "syslog": ["3, ctypes.create_string_buffer(64), 64"],
    "quotactl": ["0, None, 0, None"],
    "settimeofday": ["ctypes.create_string_buffer(16), None"],
    "clone3": ["ctypes.create_string_buffer(88), 88"],
    "clone": ["17, 0, 0, 0, 0", "0x10000011, 0, 0, 0, 0"],
    "execveat": ["-100, b'/bin/true', None, None, 0"],
    "kcmp": ["1, 1, 0, 0, 0"],
    "landlock_create_ruleset": ["ctypes.create_string_buffer(b'\\x01', 24), 24, 0"],
    "modify_ldt": ["1, ctypes.create_string_buffer(16), 16"],
    "iopl": ["3"],
    "ioperm": ["0, 8, 1"],
    "ioctl": ["0, 0x5412, b'x'", "1, 0x5412, b'x'", "3, 0x8901, struct.pack('i', 1)", "3, 0x5452, struct.pack('i', 1)"],
    "fallocate": ["4, 0, 0, 1 << 22"],
    "timer_create": ["0, struct.pack('QiiQQ', 0, 9, 0, 0, 0), ctypes.create_string_buffer(8)"],
    "timerfd_create": ["0, 0"],
    "signalfd4": ["-1, ctypes.create_string_buffer(8), 8, 0"],
    "fchmodat2": ["-100, b'/etc', 0o777, 0"],
    "openat2": ["-100, b'/etc/passwd', ctypes.create_string_buffer(24), 24"],
    "open_tree": ["-100, b'/', 1"],
    "fsopen": ["b'tmpfs', 0"],
    "mount_setattr": ["-100, b'/', 0x8000, struct.pack('4Q', 0, 1, 0, 0), 32"],
    "pidfd_getfd": ["3, 1, 0"],
    "process_madvise": ["3, 0, 0, 4, 0"],
    "memfd_secret": ["0"],
    "vmsplice": ["1, 0, 0, 0"],
    "splice": ["0, 0, 1, 0, 1, 0"],
    "io_setup": ["4, ctypes.create_string_buffer(8)"],
    "sched_setscheduler": ["0, 1, struct.pack('i', 1)"],
    "ioprio_set": ["1, 0, 0"],
    "mlockall": ["1"],
    "set_mempolicy": ["0, 0, 0"],
    "recvmsg": ["3, ctypes.create_string_buffer(56), 0"],
    "sendmsg": ["3, ctypes.create_string_buffer(56), 0"],
    "acct": ["b'x'"],
}
SNIPPETS = {
    "environment": "return dict(os.environ)",
    "C environment": "libc.getenv.restype = ctypes.c_char_p; return [v for v in (b'PATH', b'HOME', b'OMP_NUM_THREADS') if libc.getenv(v)]",
    "arguments with secrets": "return [a for a in sys.orig_argv if 'token' in a.lower()]",
    "inherited descriptors": """
        found = []
        for n in range(5, 1024):
            try:
                os.fstat(n)
                found.append(n)
            except OSError:
                pass
        return found""",
    "real root": "return [os.getuid() == 0, os.geteuid() == 0] if 0 in (os.getuid(), os.geteuid()) else []",
    "symbolic link": "os.symlink('/etc/passwd', 'link'); return read('link')",
    "symbolic link of a folder": "os.symlink('/', 'root'); return read('root/etc/passwd') or os.listdir('root/home')",
    "hard link": "os.link('/etc/passwd', 'hard'); return read('hard')",
    "hard link of a library": "os.link(os.__file__, 'hard'); return create('hard')",
    "rename to outside": "create('a'); os.rename('a', '/var/tmp/offbeat'); return [1]",
    "change the library": "return create(os.__file__)",
    "truncate the library": "os.truncate(os.__file__, 0); return [1]",
    "mode of the library": "os.chmod(os.__file__, 0o777); return [1]",
    "times of outside files": "os.utime('/etc/passwd'); return [1]",
    "remove outside": "os.unlink('/etc/hostname'); return [1]",
    "set-user-id file": "create('s'); os.chmod('s', 0o4755); return kernel('execve', b's', None, None)",
    "TCP socket": "socket.socket(); return [1]",
    "TCP connection": "return [bool(socket.create_connection(('127.0.0.1', PORT), 2))]",
    "TCP6 socket": "socket.socket(socket.AF_INET6); return [1]",
    "UDP": "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); return [s.sendto(b'x', ('127.0.0.1', PORT))]",
    "names": "return socket.getaddrinfo('localhost', 80, flags=0) if socket.socket(socket.AF_INET, socket.SOCK_DGRAM) else []",
    "abstract socket": "s = socket.socket(socket.AF_UNIX); s.connect(ABSTRACT); return [1]",
    "socket file": "s = socket.socket(socket.AF_UNIX); s.bind('s'); return [1]",
    "datagram pair": "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); return [a.sendto(b'x', ABSTRACT + 'd')]",
    "stream pair with an address": "a, b = socket.socketpair(); return [a.sendto(b'x', ABSTRACT)]",
    "reconnected pair": "a, b = socket.socketpair(); a.connect(ABSTRACT); return [1]",
    "listening pair": "a, b = socket.socketpair(); a.listen(); return [1]",
    "descriptors over a pair": "a, b = socket.socketpair(); return [socket.send_fds(a, [b'x'], [0])]",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); return [1]",
    "packets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0); return [1]",
    "vsock": "socket.socket(40, socket.SOCK_STREAM, 0); return [1]",
    "fork": "p = os.fork(); p or os._exit(0); return [p]",
    "vfork": "return kernel('vfork') if 'vfork' in NUMBERS else os.fork()",
    "subprocess": "return [subprocess.run(['/bin/true']).args]",
    "shell": "status = os.system('true'); return [status] if status == 0 else []",
    "spawn": "return [os.posix_spawn('/bin/true', ['true'], {})]",
    "exec": "os.execv('/bin/true', ['true'])",
    "exec of its own file": "create('e'); os.chmod('e', 0o700); os.execv('e', ['e'])",
    "exec from memory": "fd = os.memfd_create('x', 0); os.write(fd, b'#!/bin/echo achieved'); os.execve(fd, ['x'], {})",
    "exec of the standard input": "os.execve(4, ['x'], {})",
    "multiprocessing": "import multiprocessing as m; p = m.get_context('fork').Process(target=print); p.start(); return [p.pid]",
    "a terminal": "return [os.openpty()]",
    "signal the parent": "os.kill(os.getppid(), 0); return [1]",
    "signal the group": "os.killpg(0, 0); return [1]",
    "signal all": "os.kill(-1, signal.SIGKILL); return [1]",
    "signal neighbours": """
        found = []
        for pid in list(range(1, 4096)) + [NEIGHBOUR]:
            if pid != os.getpid():
                try:
                    kernel('tgkill', pid, pid, 0)
                    found.append(pid)
                except OSError:
                    pass
        return found""",
    "raise the limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 40)); return [1]",
    "limits of others": "import resource; return [resource.prlimit(NEIGHBOUR, resource.RLIMIT_CPU, (1, 1))]",
    "capabilities": """
        data = ctypes.create_string_buffer(24)
        kernel('capget', struct.pack('II', 0x20080522, 0), data)
        return [data.raw] if any(data.raw) else []""",
    "core files": "import resource; return [r for r in resource.getrlimit(resource.RLIMIT_CORE) if r > 1]",
    "many open files": "files = [open('/dev/null') for _ in range(4096)]; return files",
    "named pipe": "os.mkfifo('p'); return ['p']",
    "device node": "os.mknod('d', 0o20600, os.makedev(1, 1)); return ['d']",
    "signals to others by a descriptor": "import fcntl; return [fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, NEIGHBOUR)]",
    "signals to a group by a descriptor": "import fcntl; return [fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, -os.getpgid(0))]",
    "another signal by a descriptor": "import fcntl; return [fcntl.fcntl(os.pipe()[0], 10, 9)]",
    "word of changes in a folder": "import fcntl; return [fcntl.fcntl(os.open('.', 0), fcntl.F_NOTIFY, 1)]",
    "a lease on the library": "import fcntl; return [fcntl.fcntl(os.open(os.__file__, 0), fcntl.F_SETLEASE, fcntl.F_RDLCK)]",
    "room of all pipes of a user": "import fcntl; return [fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)]",
    "mode of the server's file": "os.chmod(OWNED, 0); return [1]",
    "times of the server's file": "os.utime(OWNED, (1, 1)); return [1]",
    "mode of a file that can be read": "os.fchmod(os.open(os.__file__, 0), 0o644); return [1]",
    "times of a file that can be read": "os.utime(os.open(os.__file__, 0)); return [1]",
    "mode of the folder of packages": """
        import sysconfig
        for name in ('site-packages', 'dist-packages'):
            with __import__('contextlib').suppress(FileNotFoundError):
                os.chmod(os.path.join(sysconfig.get_path('stdlib'), name), 0o777)
                return [name]""",
    "mode of the root": "os.chmod('/', 0o777); return [1]",
    "mode of a device": "os.chmod('/dev/null', 0o600); return [1]",
    "program that starts with the interpreter": "return create(os.path.join(os.path.dirname(os.__file__), 'sitecustomize.py'))",
    "cached code of the library": "return create(os.path.join(os.path.dirname(os.__file__), '__pycache__', 'x.pyc'))",
    "replace a library by a rename": "create('a'); os.rename('a', os.__file__); return [1]",
    "exchange with a library": "create('a'); return kernel('renameat2', -100, b'a', -100, os.__file__.encode(), 2)",
    "the zygote's socket by number": """
        found = []
        for n in range(5, 4096):
            try:
                found.append(os.write(n, b'{}'))
            except OSError:
                pass
        return found""",
    "the zygote's objects": """
        import gc
        held = [o for o in gc.get_objects() if type(o).__name__ == 'Zygote']
        return [os.kill(pid, 9) for z in held for pid in z._held] or [z._control.send(b'{}') for z in held]""",
    "folder of a neighbour": "return [n for n in os.listdir('..')]",
    "descriptors of the parent": "return os.listdir(f'/proc/{os.getppid()}/fd')",
    "extended attributes": "create('x'); os.setxattr('x', 'user.a', b'b'); return [1]",
}


def denied() -> list[object]:
    reads = [(f"read {path}", f"return read({path!r})") for path in READS.replace("ROOT", "root").split()]
    reads += [("read the server's code", f"return read({__file__!r})"), ("read at home", f"return read({str(Path.home() / '.bashrc')!r})")]
    reads += [("read the server's environment", f"return read('/proc/{os.getpid()}/environ')")]
    lists = [(f"list {path}", f"return os.listdir({path!r})") for path in LISTS.split()]
    writes = [(f"write {path}", f"return create({path!r})") for path in WRITES.split()]
    calls = [(f"{name}({a})", f"return kernel({name!r}, {a})") for name, args in CALLS.items() if name in numbers() for a in args]
    return [pytest.param(code, id=name) for name, code in [*reads, *lists, *writes, *calls, *SNIPPETS.items()]]


@pytest.fixture(scope="module", params=TIERS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[CodeSandbox]:
    sandbox = open_tier(request.param)
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def targets() -> Iterator[str]:
    """What some attacks aim at, as code: a port, an abstract socket, a process of the job's neighbourhood."""
    name = f"\0offbeat-attacked-{os.getpid()}"
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract, datagrams:
        abstract.bind(name)
        abstract.listen()
        datagrams.bind(f"{name}d")
        with tempfile.TemporaryDirectory() as folder:
            owned = Path(folder, "owned")
            owned.write_text("x")
            mode = owned.stat().st_mode
            yield f"PORT = {server.getsockname()[1]}\nABSTRACT = {name!r}\nNEIGHBOUR = {os.getpid()}\nOWNED = {str(owned)!r}\n"
            assert owned.stat().st_mode == mode
            assert owned.stat().st_mtime > 1


def as_function(code: str) -> str:
    body = code if code.startswith("\n") else f"\n        {code}"
    return f"def attack():{body}\n"


@pytest.mark.parametrize("code", denied())
def test_is_refused(sandbox: CodeSandbox, targets: str, code: str) -> None:
    with sandbox.open(LIMITS) as session:
        assert session.load(PRELUDE + targets + as_function(code), seconds=SECONDS).error == ""
        reply = session.call("attack", [], {}, seconds=SECONDS)
        assert reply.error.startswith(DENIALS) if reply.error else reply.value in ([], {}, None)
        assert session.call("len", [[1]], {}, seconds=SECONDS).error.startswith("NameError")  # the session lives on


OUTSIDE = [
    "read /etc/passwd", "list /", "environment", "C environment", "TCP connection", "UDP", "abstract socket", "datagram pair", "netlink", "fork",
    "subprocess", "spawn", "shell", "signal neighbours", "setpriority(0, 0, 19)", "symbolic link", "inotify_init1(0)",
    "memfd_create(b'x', 0)", "clone(17, 0, 0, 0, 0)", "named pipe", "signal the parent", "signals to others by a descriptor",
    "room of all pipes of a user", "timerfd_create(0, 0)", "word of changes in a folder",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_same_attack_succeeds_outside(targets: str, name: str, tmp_path: Path) -> None:
    [code] = [p.values[0] for p in denied() if p.id == name]  # type: ignore[attr-defined]
    program = f"{PRELUDE}{targets}{as_function(code)}\nprint('achieved' if attack() else 'nothing')"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert "achieved" in done.stdout, done.stderr


STOPPED = {
    "loop": ("while True: pass", {Cause.TIME}),
    "loop that ignores signals": ("[signal.signal(n, signal.SIG_IGN) for n in range(1, 32) if n not in (9, 19)]\nwhile True: pass", {Cause.TIME}),
    "loop that catches all": ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", {Cause.TIME}),
    "sleep": ("time.sleep(1000)", {Cause.TIME}),
    "waits for ever": ("threading.Event().wait()", {Cause.TIME}),
    "waits for a thread": ("t = threading.Thread(target=time.sleep, args=(1000,)); t.start(); t.join()", {Cause.TIME}),
    "stops itself": ("signal.pthread_kill(threading.get_ident(), signal.SIGSTOP); time.sleep(1000)", {Cause.TIME}),
    "reads the socket": ("os.read(3, 1 << 20)", {Cause.TIME}),
    "pathological expression": ("import re; re.match('(a|aa)+$', 'a' * 200 + 'b')", {Cause.TIME}),
    "big integers": ("x = 10 ** 10 ** 7; str(x ** 3) if not sys.set_int_max_str_digits(0) else 0", {Cause.TIME, Cause.MEMORY}),
    "tower of powers": ("9 ** 9 ** 9 ** 9", {Cause.TIME, Cause.MEMORY}),
    "loop in a destructor": ("class D:\n    def __del__(self):\n        while True: pass\nD()", {Cause.TIME}),
    "loop in a thread, at once": ("threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\nwhile True: pass", {Cause.TIME}),
    "loop in a message": ("class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E", {Cause.TIME}),
    "memory": ("x = bytearray(1 << 40)", {Cause.MEMORY}),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytearray(1 << 20))", {Cause.MEMORY}),
    "memory again and again": ("x = []\nwhile True:\n    try: x.append(bytearray(1 << 22))\n    except MemoryError: pass", {Cause.TIME}),
    "mapped memory": ("import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 24))", {Cause.MEMORY, None}),
    "nested lists": ("x = []\nwhile True: x = [x] * 1000", {Cause.MEMORY, Cause.TIME}),
    "output": ("while True: print('x' * 1000)", {Cause.OUTPUT}),
    "output past the stream": ("while True: os.write(1, b'x' * 65536)", {Cause.OUTPUT}),
    "errors": ("while True: os.write(2, b'x' * 65536)", {Cause.OUTPUT}),
    "one large output": ("print('x' * (3 << 20))", {Cause.OUTPUT}),
    "garbage on the socket": ("os.write(3, b'\\x00\\x00\\x00\\x40' + b'x' * 1000); time.sleep(1000)", {Cause.OUTPUT}),
    "no reply at all": ("os.write(3, b'\\x05\\x00\\x00\\x00hello'); time.sleep(1000)", {None}),
    "a reply that is none": ("os.write(3, b'\\x04\\x00\\x00\\x00[[]]'); time.sleep(1000)", {None}),
    "a large file": ("with open('f', 'wb') as f:\n    while True: f.write(b'x' * 65536)", {Cause.FILES}),
    "many large files": ("n = 0\nwhile True:\n    n += 1\n    with open(f'{n}', 'wb') as f: f.write(b'x' * 1000000)", {Cause.FILES}),
    "many small files": ("n = 0\nwhile True:\n    n += 1\n    open(f'{n}', 'wb').close()", {Cause.FILES}),
    "threads": ("for _ in range(1000): threading.Thread(target=time.sleep, args=(1000,)).start()", {Cause.PROCESSES}),
    "threads with small stacks": (
        "threading.stack_size(32768)\nfor _ in range(5000): threading.Thread(target=time.sleep, args=(1000,)).start()", {Cause.PROCESSES},
    ),
    "segmentation fault": ("ctypes.string_at(0)", {None}),
    "abort": ("os.abort()", {None}),
    "exit": ("os._exit(0)", {None}),
    "kernel's exit": ("kernel('exit_group', 0)", {None}),
    "illegal call": ("kernel('getpid'); libc.syscall(ctypes.c_long(0x40000000 + 39)); time.sleep(1000)", {None}),
    "closed descriptors": ("os.closerange(0, 100)", {None}),
    "files that are removed and kept open": (
        "files = []\nwhile True:\n    try: files.append(open('f', 'wb', 0)); files[-1].write(b'x' * 500000); os.unlink('f')\n"
        "    except OSError as e:\n        if e.errno != 24: raise\n        time.sleep(0.01)", {Cause.FILES},
    ),
    "files that are removed and mapped": (
        "libc.mmap.restype = ctypes.c_void_p\nwhile True:\n    f = open('f', 'w+b', 0); f.write(b'x' * 500000)\n"
        "    libc.mmap(None, 4096, 1, 1, f.fileno(), 0); os.unlink('f'); f.close()", {Cause.FILES},
    ),
    "files without a name": (
        "files = []\nwhile True:\n    try: files.append(os.open('.', os.O_TMPFILE | os.O_RDWR)); os.write(files[-1], b'x' * 500000)\n"
        "    except OSError as e:\n        if e.errno != 24: raise\n        time.sleep(0.01)", {Cause.FILES},
    ),
    "files in a closed folder": (
        "try: os.chmod('.', 0o300)\nexcept OSError: pass\nn = 0\nwhile True:\n    n += 1\n    with open(f'{n}', 'wb') as f: f.write(b'x' * 500000)",
        {Cause.FILES},
    ),
    "memory of standard inputs": ("while True: os.write(4, b'x' * 65536)", {Cause.FILES}),
    "calls of i386": (
        "import mmap\nm = mmap.mmap(-1, 4096, prot=7); m.write(bytes.fromhex('b814000000cd80c3'))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))(); time.sleep(1000)", {None},
    ),
    "a lock that is never given back": (
        "class S:\n    def flush(self): threading.Event().wait()\nsys.stdout = S()", {Cause.TIME},
    ),
    "a list that grows while it is told": (
        "class E(Exception):\n    def __str__(self):\n        while True:\n            x = [1]\n            try:\n"
        "                for _ in x: x.append(1)\n            except MemoryError: pass\nraise E", {Cause.MEMORY, Cause.TIME},
    ),
    "end of the main thread": ("threading.Thread(target=time.sleep, args=(1000,)).start(); kernel('exit', 0)", {None, Cause.TIME}),
    "deep recursion in C": ("sys.setrecursionlimit(10 ** 9)\nx = None\nfor _ in range(10 ** 5): x = [x]\nrepr(x)", {None, Cause.MEMORY}),
    "deep recursion without limit": ("sys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()", {None, Cause.MEMORY, Cause.TIME}),
}  # fmt: skip


WAYS = [(name, "load") for name in STOPPED] + [
    (name, how) for name in ("loop", "exit", "memory", "output", "segmentation fault") for how in ("call", "program")
]


@pytest.mark.parametrize(("name", "how"), WAYS)
def test_is_stopped(sandbox: CodeSandbox, name: str, how: str) -> None:
    code, causes = STOPPED[name]
    seconds = SHORT if Cause.TIME in causes else SECONDS
    began = time.monotonic()
    with sandbox.open(LIMITS) as session, pytest.raises(Stopped) as stopped:  # noqa: PT012
        if how == "load":
            reply = session.load(f"{PRELUDE}\n{code}", seconds=seconds)
        elif how == "program":
            reply = session.program(f"{PRELUDE}\n{code}", "", seconds=seconds)
        else:
            body = "\n    ".join(code.split("\n"))
            session.load(f"{PRELUDE}\ndef attack():\n    {body}\n", seconds=SECONDS)
            reply = session.call("attack", [], {}, seconds=seconds)
        pytest.fail(f"went on: {reply}")
    assert stopped.value.cause in causes, stopped.value
    assert time.monotonic() - began < SECONDS


def test_processor_time_is_limited_apart_from_wall_time(sandbox: CodeSandbox) -> None:
    with sandbox.open(Limits(seconds=60.0, cpu_seconds=1)) as session, pytest.raises(Stopped) as stopped:
        session.load("while True: pass", seconds=60.0)
    assert stopped.value.cause is Cause.CPU


def test_the_time_of_all_requests_together_is_limited(sandbox: CodeSandbox) -> None:
    with sandbox.open(Limits(seconds=1.5)) as session, pytest.raises(Stopped) as stopped:  # noqa: PT012
        session.load("import time", seconds=SECONDS)
        time.sleep(2.0)  # the server's own time
        assert session.load("x = 1", seconds=SECONDS).error == ""
        for _ in range(10):
            session.program("import time; time.sleep(0.4)", "", seconds=SECONDS)
    assert stopped.value.cause is Cause.TIME
    with pytest.raises(Stopped, match="over"):
        session.load("pass", seconds=1.0)


def test_recursion_is_an_error_like_others(sandbox: CodeSandbox) -> None:
    with sandbox.open(LIMITS) as session:
        session.load("def f(n): return f(n + 1)", seconds=SECONDS)
        assert session.call("f", [0], {}, seconds=SECONDS).error.startswith("RecursionError")


OURS = f"4321.{os.getpid()}"
"""Seconds, by which these processes are told from those of other tests on this machine."""
FORK_BOMB = f"f() {{ f | f & }}; f; sleep {OURS}"
DAEMON = f"(setsid sleep {OURS} || sleep {OURS}) </dev/null >/dev/null 2>&1 & exit 0"
WAITERS = {
    "fork bomb": FORK_BOMB,
    "daemon": DAEMON,
    "loop": "while :; do :; done",
    "ignores signals": f"trap '' TERM INT HUP; sleep {OURS}",
    "many": f"sleep {OURS} & sleep {OURS} & wait",
}


@pytest.mark.parametrize("script", WAITERS.values(), ids=WAITERS)
def test_programs_end_with_their_session(sandbox: CodeSandbox, script: str) -> None:
    limits = Limits(seconds=SECONDS, cpu_seconds=5, memory_bytes=512 << 20, processes=8, commands=True)
    with sandbox.open(limits) as session, suppress(Stopped):
        session.command(["sh", "-c", script], "", seconds=SHORT)
    assert processes(lambda line: f"sleep {OURS}" in line) == []


TOOL_ATTACKS = {
    "reads": "cat /etc/passwd /proc/1/environ /proc/self/environ $(echo /root)/.bashrc /home/*/.bashrc",
    "lists": "ls /etc/ssh /proc /home /root /sys /run",
    "writes": "touch /offbeat /usr/offbeat /dev/shm/offbeat /var/tmp/offbeat ../offbeat",
    "connects": "python3 -I -c 'import socket; print(socket.create_connection((\"127.0.0.1\", PORT)))'",
    "signals": "kill -9 -1",
    "traces": "python3 -I -c 'import ctypes; assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0; print(1)'",
    "unshares": "unshare -U true && echo 1",
    "becomes root": "su -c 'echo 1'; setpriv --reuid 0 echo 1",
    "runs from memory": 'python3 -I -c \'import os; f = os.memfd_create("x"); os.write(f, b"#!/bin/echo 1"); os.execve(f, ["x"], {})\'',
    "inherits": "for n in 3 4 5 6 7 8 9; do (echo x >&$n) 2>/dev/null && echo $n; done",
    "includes": "echo '#include \"/etc/passwd\"' >a.c; gcc -E a.c 2>/dev/null | grep root:",
    "assemblers": "echo '.incbin \"/etc/passwd\"' >a.s; gcc -c a.s -o a.o 2>/dev/null && cat a.o",
    "linkers": "echo 'INPUT(/etc/passwd)' >a.ld; ld a.ld 2>&1 | grep root:",
    "links": "ln /usr/bin/env e 2>/dev/null && echo 1; ln -s /etc/passwd l; cat l",
    "set-user-id": "cp /usr/bin/id i 2>/dev/null; chmod 4755 i 2>/dev/null; ./i 2>/dev/null | grep 'uid=0'",
    "schedules": "chrt -f 1 true && echo 1; nice -n -5 true 2>&1 | grep -v nice && echo 1; false",
    "traces its parent": 'python3 -I -c \'import os; print(open(f"/proc/{os.getppid()}/mem", "rb").read(1))\'',
    "asks for signals": "python3 -I -c 'import fcntl, os; print(fcntl.fcntl(os.pipe()[0], 8, os.getppid()))'",
    "secrets": "env | grep -i -e token -e secret -e redis",
}


@pytest.mark.parametrize("script", TOOL_ATTACKS.values(), ids=TOOL_ATTACKS)
def test_programs_are_confined_too(sandbox: CodeSandbox, targets: str, script: str) -> None:
    script = script.replace("PORT", targets.split()[2])
    with sandbox.open(Limits(seconds=SECONDS, processes=16, commands=True)) as session:
        assert session.command(["sh", "-c", "echo works"], "", seconds=SECONDS).output == "works\n"
        reply = session.command(["sh", "-c", script], "", seconds=SECONDS)
    assert reply.output == ""
    assert reply.exit_code != 0


def test_files_of_programs_are_limited_too(sandbox: CodeSandbox) -> None:
    code = "import os\nos.mkdir('d', 0o300)\nfor n in range(10**5): open(f'd/{n}', 'wb').write(b'x' * 500_000)"
    limits = Limits(seconds=SECONDS, file_bytes=4 << 20, processes=8, commands=True)
    with sandbox.open(limits) as session, nullcontext() if sandbox.tier == Tier.NAMESPACES else pytest.raises(Stopped) as stopped:
        reply = session.command(["/usr/bin/python3", "-I", "-c", code], "", seconds=SECONDS)
        assert "No space left" in reply.errors
    assert stopped is None or stopped.value.cause is Cause.FILES


def test_programs_cannot_be_had_without_asking(sandbox: CodeSandbox) -> None:
    with sandbox.open(LIMITS) as session:
        with pytest.raises(ValueError, match="commands"):
            session.command(["true"], "", seconds=1.0)
        with pytest.raises(ValueError, match="commands"):
            session.write("a", b"")


@pytest.mark.parametrize("name", ["../a", "/a", "", ".", "..", "a/b", ".a", "a\0", "a" * 200, "a\n"])
def test_files_are_written_to_the_working_folder_only(sandbox: CodeSandbox, name: str) -> None:
    with sandbox.open(Limits(commands=True, processes=4)) as session, pytest.raises(ValueError, match="working folder"):
        session.write(name, b"x")


def test_a_file_is_not_written_through_a_link(sandbox: CodeSandbox) -> None:
    with sandbox.open(Limits(commands=True, processes=4, seconds=SECONDS)) as session:
        session.command(["ln", "-s", "other", "a.c"], "", seconds=SECONDS)
        with pytest.raises(Stopped):
            session.write("a.c", b"x")
