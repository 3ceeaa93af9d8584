"""Programs of the other planes that a command runs to their end: they load what the command itself must not."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Callable

KEPT = 15
"""Lines of a failed program's last words that are told."""


class ProgramFailed(RuntimeError):
    """The program ended with an error; the text is what it said last."""


def run_module(module: str, *arguments: str, progress: Callable[[str], None]) -> None:
    """Run `python -m module arguments`; `progress` is called with each line that it writes to standard error. Raises ProgramFailed."""
    last: deque[str] = deque(maxlen=KEPT)
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        errors="replace",
    ) as process:  # fmt: skip
        assert process.stderr is not None
        try:
            for line in process.stderr:
                last.append(line.rstrip())
                progress(last[-1])
        finally:
            if process.poll() is None:
                process.terminate()
    if process.returncode:
        raise ProgramFailed("\n".join(last) or f"{module} ended with status {process.returncode}")
