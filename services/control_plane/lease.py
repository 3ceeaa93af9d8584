"""The lease of the one control plane that schedules and dispatches; others only answer the API, and take over when it is gone.

Two holders for a moment, after a long pause of one, do no harm: every move of a run is a compare-and-set and every group is issued once by its index.
"""

from __future__ import annotations

import threading
import time

from services.contracts.topics import PREFIX
from services.runtime.bus import Bus

LEASE = f"{PREFIX}:dispatch-lease"
"""Fleet id of the control plane that schedules and dispatches; expires unless renewed."""
LIFE_SECONDS = 5.0


class Lease:
    """Held by at most one member at a time."""

    def __init__(self, bus: Bus, member: str, *, life: float = LIFE_SECONDS) -> None:
        self.bus, self.member, self.life = bus, member, life
        self._renewed, self._held = float("-inf"), False
        self._lock = threading.Lock()

    def hold(self) -> bool:
        """Take or renew the lease; whether it is ours. Asks Redis a few times in its life, not with each call."""
        with self._lock:
            now = time.monotonic()
            if now - self._renewed >= self.life / 5:
                self._held = bool(self.bus.script(_HOLD, [LEASE], [self.member, int(self.life * 1000)]))
                self._renewed = now
            return self._held

    @property
    def held(self) -> bool:
        return self._held and time.monotonic() - self._renewed < self.life

    def release(self) -> None:
        with self._lock:
            self._held = False
            self.bus.script(_RELEASE, [LEASE], [self.member])


_HOLD = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
