"""The fleet: every process says with a heartbeat that it lives and what it does, and learns from it which run it works for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from services.contracts.messages import Member, Role
from services.contracts.topics import FLEET
from services.runtime.bus import Bus, StoreAway
from services.runtime.codec import Undecodable, decode, encode

log = logging.getLogger(__name__)

LIFE_SECONDS = 6.0
"""A member whose last heartbeat is older is lost."""
BEAT_SECONDS = 1.0


class Fleet:
    """The members that live, and which run each one works for."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    def beat(self, member: Member) -> str | None:
        """Say that `member` lives; the id of the run to which it is assigned."""

        def send() -> bytes | None:  # a pipeline is empty once it has failed: each try makes its own
            pipe = self.bus.redis.pipeline()
            pipe.set(f"{FLEET}:member:{member.member_id}", encode(member), px=int(LIFE_SECONDS * 1000))
            pipe.sadd(FLEET, member.member_id)
            pipe.get(f"{FLEET}:assigned:{member.member_id}")
            assigned: bytes | None = pipe.execute()[2]
            return assigned

        run_id = self.bus.call(send)
        return None if run_id is None else run_id.decode()

    def leave(self, member_id: str) -> None:
        """Say good-bye: the member is gone at once."""
        self.bus.call(lambda: self.bus.redis.delete(f"{FLEET}:member:{member_id}", f"{FLEET}:assigned:{member_id}"))
        self.bus.call(lambda: self.bus.redis.srem(FLEET, member_id))

    def members(self, *, role: Role | None = None, run_id: str | None = None) -> list[Member]:
        """The members that live, ordered by id; those that do not are forgotten."""
        ids = sorted(raw.decode() for raw in self.bus.call(lambda: self.bus.redis.smembers(FLEET)))
        if not ids:
            return []
        rows = self.bus.call(lambda: self.bus.redis.mget([f"{FLEET}:member:{i}" for i in ids]))
        found: list[Member] = []
        for member_id, raw in zip(ids, rows, strict=True):
            if raw is None:  # its assignment stays: Redis may only have been away for longer than a heartbeat lives
                self.bus.call(partial(self.bus.redis.srem, FLEET, member_id))
                continue
            try:
                found.append(decode(Member, raw))
            except Undecodable as error:
                log.error("a member that cannot be read", extra={"member_id": member_id, "error": str(error)})
        return [m for m in found if (role is None or m.role is role) and (run_id is None or m.run_id == run_id)]

    def assign(self, member_id: str, run_id: str) -> None:
        self.bus.call(lambda: self.bus.redis.set(f"{FLEET}:assigned:{member_id}", run_id))

    def release(self, member_id: str) -> None:
        self.bus.call(lambda: self.bus.redis.delete(f"{FLEET}:assigned:{member_id}"))

    def assignments(self) -> dict[str, str]:
        """Run id by member id."""
        ids = sorted(raw.decode() for raw in self.bus.call(lambda: self.bus.redis.smembers(FLEET)))
        if not ids:
            return {}
        rows = self.bus.call(lambda: self.bus.redis.mget([f"{FLEET}:assigned:{i}" for i in ids]))
        return {i: raw.decode() for i, raw in zip(ids, rows, strict=True) if raw is not None}


class Heartbeat:
    """Beats in a thread of its own, so that a long step or a blocked loop is not taken for death.

    Consumes: nothing. Produces: heartbeats. Waits for: the clock. `assigned` is the run of the last answer.
    """

    def __init__(self, fleet: Fleet, describe: Callable[[], Member], *, seconds: float = BEAT_SECONDS) -> None:
        self.fleet, self.describe, self.seconds = fleet, describe, seconds
        self.assigned: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self.beat()
        self._thread.start()

    def beat(self) -> str | None:
        """Beat now, in the caller's thread; the run assigned."""
        self.assigned = self.fleet.beat(self.describe())
        return self.assigned

    def stop(self) -> None:
        """Stop beating and leave the fleet. Does not wait for Redis: without it, the last heartbeat soon runs out."""
        self._stop.set()
        self.fleet.bus.hurry()
        if self._thread.is_alive():
            self._thread.join(timeout=5)  # a beat after the good-bye would bring it back
        try:
            self.fleet.leave(self.describe().member_id)
        except StoreAway as error:
            log.warning("could not say good-bye", extra={"error": str(error)})

    def _run(self) -> None:
        while not self._stop.wait(self.seconds):
            try:
                self.beat()
            except StoreAway as error:
                log.warning("no heartbeat", extra={"error": str(error)})
