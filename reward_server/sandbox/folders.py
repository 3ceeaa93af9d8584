"""Working folders of jobs on a real file system: measured while the job runs, removed whatever it left. Standard library only."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

MOST_FILES = 2_048
MAPPED = 8
"""A file that is in no folder and no descriptor any more, but in memory, counts as this part of what is allowed: its size cannot be seen."""
DEEPEST = 64
MOST_MAPPINGS = 10_000
"""Of a process. Pages with other rights beside each other are many mappings, and a long list takes long to read."""


def within(folder: str, most_bytes: int, *, removed: int = 0) -> bool:
    """Whether what lies below the folder is small enough: bytes of all files, their number, and their depth. The folder may change meanwhile.

    `removed`: bytes that count beside them. What cannot be looked into is too much: a job may close a folder to others, and to itself.
    """
    files, size = 0, removed
    pending = [(folder, 0)]
    while pending and size <= most_bytes:
        here, depth = pending.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        facts = entry.stat(follow_symlinks=False)
                        files += 1
                        size += facts.st_blocks * 512
                        if stat.S_ISDIR(facts.st_mode):
                            pending.append((entry.path, depth + 1))
                    if files > MOST_FILES or size > most_bytes or depth > DEEPEST:
                        return False
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return False
    return size <= most_bytes


def removed(pid: int, folder: str, most_bytes: int) -> int:
    """Bytes that a process holds of files which have been removed from the folder. 0 for a process that has gone."""
    held: dict[int, int] = {}
    with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with suppress(OSError):
                if _is_removed(os.readlink(entry.path), folder):
                    facts = entry.stat()
                    held[facts.st_ino] = facts.st_blocks * 512
    with suppress(OSError), open(f"/proc/{pid}/maps", errors="replace") as maps:
        for number, line in enumerate(maps):
            if number > MOST_MAPPINGS:
                return most_bytes + 1
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and _is_removed(fields[5], folder):
                held.setdefault(int(fields[4]), most_bytes // MAPPED)
    return sum(held.values())


def make_executable(path: str) -> None:
    """If it is a plain file, and no link. Of a linker that shares the server's user, which may not change modes (`seccomp.MODES`)."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.chmod(f"/proc/self/fd/{descriptor}", 0o700)
        finally:
            os.close(descriptor)


def _is_removed(path: str, folder: str) -> bool:
    return path.startswith(f"{folder}/") and path.endswith(" (deleted)")


def remove(folder: str) -> None:
    """The folder and all in it, which nothing changes any more. Trees of any depth: what lies in a folder is first moved up, so paths stay short."""
    with suppress(FileNotFoundError):
        while True:
            os.chmod(folder, 0o700)
            with os.scandir(folder) as entries:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for name, is_folder in found:
                path = f"{folder}/{name}"
                if is_folder:
                    _lift(path, folder)
                else:
                    os.unlink(path)
            if not found:
                os.rmdir(folder)
                return


def _lift(path: str, above: str) -> None:
    os.chmod(path, 0o700)
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        os.rename(f"{path}/{name}", f"{above}/{os.urandom(12).hex()}")  # a name that the job could guess would stand in the way
    os.rmdir(path)
