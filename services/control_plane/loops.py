"""The threads of the control plane: each repeats a tick while this process holds the lease, and outlives an outage of Redis."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from services.control_plane.lease import Lease
from services.runtime.bus import StoreAway
from services.runtime.process import Shutdown

log = logging.getLogger(__name__)

STANDBY_SECONDS = 1.0
"""Between looks at the lease, of a control plane that does not hold it; and after a tick that failed."""


class Loop:
    """Calls `tick` until the process ends. `tick` answers how many seconds to wait before the next one."""

    def __init__(self, name: str, tick: Callable[[], float], *, lease: Lease, shutdown: Shutdown) -> None:
        self.name, self.tick, self.lease, self.shutdown = name, tick, lease, shutdown
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, *, timeout: float) -> None:
        self._thread.join(timeout=timeout)

    def _run(self) -> None:
        while not self.shutdown.asked:
            try:
                pause = self.tick() if self.lease.hold() else STANDBY_SECONDS
            except StoreAway as error:
                log.warning("waits for Redis", extra={"loop": self.name, "error": str(error)})
                pause = 0.2
            except Exception:  # a fault of ours must not stop all runs: it is logged with each try
                log.exception("a tick failed", extra={"loop": self.name})
                pause = STANDBY_SECONDS
            self.shutdown.wait(pause)
