"""What the supervisor tells a zygote when it starts it, and what they say to each other later. Standard library only.

The first message on the control socket is a Setup; the zygote answers with STARTED or what is wrong. Each later message is a Limits, in JSON, and is
answered with a Handed and four descriptors: the session's lifeline, its socket, and the reading ends of its standard output and error. On the
lifeline the supervisor writes anything, or closes it, to have the session ended; the zygote writes an Ended when all of it is gone, and closes it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import NamedTuple

from reward_server.sandbox.jobs import Limits, Tier

STARTED = b"started"
LONGEST_MESSAGE = 65_536


@dataclass(frozen=True)
class Setup:
    """Of one zygote."""

    tier: Tier
    machine: str
    """As `uname -m` says."""
    numbers: dict[str, int]
    """Of the kernel's calls."""
    base: str
    """The folder in which working folders are made, where there are no namespaces."""
    first_user: int
    """Jobs of a root server run as this user, and the numbers above it."""
    spares: int
    """Confined processes that stand ready."""
    tools: bool
    """Whether jobs with `commands` can be asked for."""
    site: str
    """Where `packages` are installed."""
    packages: tuple[str, ...] = ()
    """Beyond the standard library, what jobs may import."""

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, message: bytes) -> Setup:
        fields = json.loads(message)
        return cls(**{**fields, "tier": Tier(fields["tier"]), "packages": tuple(fields["packages"])})


class Handed(NamedTuple):
    """A session's process."""

    pid: int
    """In the zygote's pid namespace."""
    folder: str
    """The working folder, where it is one of the server's file system and must be watched from outside; else empty."""


class Ended(NamedTuple):
    """How a session's process ended."""

    status: int
    """Exit code, -n for signal n."""
    cpu_seconds: float
    """User and system time of it and what it waited for."""
    killed: bool
    """By the zygote: it was asked to, or is leaving, or the folder was full."""
    full: bool = False
    """It had written more than it may, where no kernel limit bounds that."""


def limits_message(limits: Limits) -> bytes:
    return json.dumps(asdict(limits)).encode()


def limits_of(message: bytes) -> Limits:
    return Limits(**json.loads(message))
