"""The `namespaces` tier: user, mount, pid, net, ipc and uts namespaces, and a root that has nothing but what jobs may read. Standard library only.

Three nested steps. The guardian gets namespaces of its own, once. The zygote, first in their pid namespace, builds the root in them, once. Each job
has a pid and a mount namespace of its own with a small file system in memory at /tmp, and at last a user namespace in which it is nobody: with that,
the kernel counts its processes apart from all others.
"""

from __future__ import annotations

import os

from reward_server.sandbox import kernel
from reward_server.sandbox.kernel import Mount, Namespace
from reward_server.sandbox.paths import DEVICES, LINKS, Readable

FOLDER = "/tmp"
"""The only place where a job can write."""
MOST_FILES = 2_048
"""In it."""


def isolate(job_user: int) -> None:
    """New namespaces for this process; its children will be in the new pid namespace. A root server's jobs can then run as `job_user`, here 1."""
    user, group, me = os.geteuid(), os.getegid(), os.getpid()
    begin, go = os.pipe()
    helper = os.fork()  # the maps of a new user namespace can name other users only when they are written from outside
    if helper == 0:
        try:
            os.close(go)
            os.read(begin, 1)
            if user == 0:
                _write(f"/proc/{me}/uid_map", f"0 0 1\n1 {job_user} 1\n")
                _write(f"/proc/{me}/gid_map", f"0 {group} 1\n1 {job_user} 1\n")
            else:
                _write(f"/proc/{me}/setgroups", "deny")
                _write(f"/proc/{me}/uid_map", f"0 {user} 1\n")
                _write(f"/proc/{me}/gid_map", f"0 {group} 1\n")
            os._exit(0)
        finally:
            os._exit(1)
    try:
        kernel.unshare(Namespace.USER | Namespace.MOUNT | Namespace.NET | Namespace.IPC | Namespace.UTS | Namespace.PID)
        os.write(go, b".")
    finally:
        os.close(begin)
        os.close(go)
        status = os.waitpid(helper, 0)[1]
    if status:
        raise OSError("the maps of the user namespace cannot be written")


def build_root(numbers: dict[str, int], readable: Readable) -> None:
    """Puts this process into a root that has copies of the readable mounts, four devices and an empty FOLDER, all read-only."""
    kernel.mount(None, "/", None, Mount.REC | Mount.PRIVATE)
    shown = [*readable.job, *(path for path in readable.tools if path not in readable.job)]
    shown.sort(key=len)
    # opened first: the new root may be mounted over them
    sources = {path: os.open(path, os.O_PATH) for path in shown} | {f"/dev/{name}": os.open(f"/dev/{name}", os.O_PATH) for name in DEVICES}
    links = {path: os.readlink(path) for path in LINKS if os.path.islink(path)}
    new = FOLDER
    kernel.mount("tmpfs", new, "tmpfs", Mount.NOSUID | Mount.NODEV, "size=1m,mode=755")
    for path, target in links.items():
        os.symlink(target, new + path)
    covered: list[str] = []
    for path in shown:
        if not any(path.startswith(f"{other}/") for other in covered):
            _show(sources[path], new + path, numbers)
            covered.append(path)
        if path in readable.job:
            for hidden in (h for h in readable.hidden if h.startswith(f"{path}/")):
                kernel.mount("tmpfs", new + hidden, "tmpfs", Mount.NOSUID | Mount.NODEV, "size=1m,mode=755")
                for package in (p for p in readable.job if p.startswith(f"{hidden}/")):
                    _show(sources[package], new + package, numbers)
    for name in DEVICES:
        _show(sources[f"/dev/{name}"], f"{new}/dev/{name}", numbers, device=True)
    os.makedirs(new + FOLDER)
    os.makedirs(f"{new}/old")
    for descriptor in sources.values():
        os.close(descriptor)
    os.chdir(new)
    _pivot(numbers["pivot_root"], new)
    kernel.restrict_mounts(numbers["mount_setattr"], "/", Mount.RDONLY | Mount.NOSUID)  # what is mounted below what is shown, too


def enter_job(size: int, user: int, *, executable: bool) -> None:
    """A mount namespace for this process, with a fresh FOLDER of `size` bytes that belongs to `user`; it becomes the working folder."""
    kernel.unshare(Namespace.MOUNT | Namespace.IPC)
    flags = Mount.NOSUID | Mount.NODEV | (Mount(0) if executable else Mount.NOEXEC)
    kernel.mount("tmpfs", FOLDER, "tmpfs", flags, f"size={size},nr_inodes={MOST_FILES},mode=700,uid={user},gid={user}")
    os.chdir(FOLDER)


def _pivot(number: int, new: str) -> None:
    kernel.syscall(number, os.fsencode(new), os.fsencode(f"{new}/old"))
    os.chdir("/")
    kernel.detach("/old")
    os.rmdir("/old")


def _show(source: int, target: str, numbers: dict[str, int], *, device: bool = False) -> None:
    if os.path.isdir(f"/proc/self/fd/{source}"):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    kernel.mount(f"/proc/self/fd/{source}", target, None, Mount.BIND | Mount.REC)
    if not device:
        kernel.restrict_mounts(numbers["mount_setattr"], target, Mount.NODEV)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
