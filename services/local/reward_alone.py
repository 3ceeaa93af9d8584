"""A reward server by itself, for a command that needs one for a while: no Redis, no fleet, an address and a token of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from services.local.supervisor import LEASH, free_ports

PATIENCE_SECONDS = 120.0
"""Time for the server to be ready on a busy machine."""
GRACE_SECONDS = 20.0


class NoRewardServer(RuntimeError):
    """It did not start; the text is what it said last."""


@contextlib.contextmanager
def reward_alone(*, patience_s: float = PATIENCE_SECONDS) -> Iterator[tuple[str, str]]:
    """(address, token) of a reward server that ends with the block, or with this thread, however that ends. Raises NoRewardServer."""
    with TemporaryDirectory(prefix="offbeat-") as folder:
        token_file, log = Path(folder) / "token", Path(folder) / "log"
        token = secrets.token_urlsafe(32)
        token_file.touch(mode=0o600)
        token_file.write_text(token)
        (port,) = free_ports(1)
        own = {
            "OFFBEAT_HOST": "127.0.0.1", "OFFBEAT_PORT": str(port), "OFFBEAT_CLUSTER_TOKEN_FILE": str(token_file), "OFFBEAT_MEMBER": "reward-alone",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [*LEASH, sys.executable, "-m", "reward_server", "--http-only"], env={**os.environ, **own}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,  # a Ctrl-C in the terminal is the caller's to handle
            )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(process, url, log, patience_s)
            yield url, token
        finally:
            process.terminate()
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    with httpx.Client(trust_env=False, timeout=2.0) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise NoRewardServer(f"the reward server ended with status {process.returncode}: {_last_words(log)}")
            with contextlib.suppress(httpx.TransportError):
                if client.get(f"{url}/readyz").status_code == 200:
                    return
            time.sleep(0.05)
    raise NoRewardServer(f"the reward server was not ready after {patience_s:g} s: {_last_words(log)}")


def _last_words(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-5:])
