"""Working folders of jobs on a real file system: measured while the job runs, removed whatever it left. Standard library only."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

MOST_FILES = 2_048
DEEPEST = 64


def within(folder: str, most_bytes: int) -> bool:
    """Whether what lies below the folder is small enough: bytes of all files, their number, and their depth. The folder may change meanwhile."""
    files = size = 0
    pending = [(folder, 0)]
    while pending:
        here, depth = pending.pop()
        with suppress(OSError), os.scandir(here) as entries:
            for entry in entries:
                with suppress(OSError):
                    facts = entry.stat(follow_symlinks=False)
                    files += 1
                    size += facts.st_blocks * 512
                    if stat.S_ISDIR(facts.st_mode):
                        pending.append((entry.path, depth + 1))
                if files > MOST_FILES or size > most_bytes or depth > DEEPEST:
                    return False
    return True


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


_lifted = 0


def _lift(path: str, above: str) -> None:
    global _lifted
    os.chmod(path, 0o700)
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        _lifted += 1
        os.rename(f"{path}/{name}", f"{above}/.lifted-{os.getpid()}-{_lifted}")
    os.rmdir(path)
