"""What every command shares: exit codes, failures, where the stack is, and the parts that tests replace."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from rich.console import Console

from services.cli.output import console
from services.client import Client
from services.local import stack
from services.local.stack import StackInfo

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, which holds deploy/."""


class Code(IntEnum):
    """Exit codes of `offbeat`."""

    OK = 0
    FAILED = 1
    """A run or an operation failed, or was refused."""
    USAGE = 2
    """A wrong command line, or a spec that is not valid."""
    NO_STACK = 3
    """No stack runs, or the API cannot be reached."""
    NOT_FOUND = 4
    INTERRUPTED = 130


class Failure(Exception):
    """Ends the command with one clear sentence and a code."""

    def __init__(self, text: str, *, code: Code = Code.FAILED) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Parts:
    """What a command reaches outside of itself."""

    client: Callable[[str, str], Client] = Client
    up: Callable[..., StackInfo] = stack.up
    down: Callable[..., bool] = stack.down
    status: Callable[[Path], StackInfo | None] = stack.status
    out: Console = field(default_factory=console)
    err: Console = field(default_factory=lambda: console(stderr=True))


@dataclass(frozen=True)
class Session:
    """The options before the command."""

    home: Path
    url: str | None
    token_file: Path | None
    debug: bool
    parts: Parts

    @property
    def out(self) -> Console:
        return self.parts.out

    @property
    def err(self) -> Console:
        return self.parts.err

    @property
    def names_stack(self) -> bool:
        """Whether the user named the API to talk to, so that the local stack is not to be touched."""
        return self.url is not None

    def stack(self) -> StackInfo | None:
        """The local stack, if one runs."""
        return self.parts.status(self.home)

    def client(self) -> Client:
        """A client of the API that was named, or of the local stack."""
        if self.url is not None:
            if not re.match(r"https?://[^/]", self.url):
                raise Failure(f"{self.url!r} is no address of an API: give one such as http://127.0.0.1:8700", code=Code.USAGE)
            if self.token_file is None:
                raise Failure("no token for this API: name the file that holds it with --token-file or OFFBEAT_TOKEN_FILE", code=Code.USAGE)
            return self.parts.client(self.url, read_token(self.token_file))
        info = self.stack()
        if info is None:
            raise Failure(f"no stack runs in {self.home}: start one with `offbeat up`, or name an API with --url", code=Code.NO_STACK)
        return self.client_of(info)

    def client_of(self, info: StackInfo) -> Client:
        """A client of the local stack, with that stack's own token."""
        return self.parts.client(info.api_url, read_token(info.token_file))


def read_token(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise Failure(f"cannot read the token file {path}: {error.strerror}; name another with --token-file", code=Code.USAGE) from error
