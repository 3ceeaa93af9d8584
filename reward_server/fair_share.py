"""Who is served next, so that a run with slow verifiers, or with ten times the groups, does not starve another.

Start-time fair queueing (Goyal, Vin and Cheng 1996) of the threads' time, with costs that are known only when they have been paid: a job is charged
at its start what its tenant's jobs took of late, and corrected at its end. Served next is the tenant that was charged least. So

- no thread is idle while anybody has work: a choice among tenants is always one of them;
- of two tenants that both have work all the time, none gets more than about two jobs a thread ahead of the other, however long its jobs are;
- who had no work has saved nothing up: on arrival it is put level with those that are being served.

Pure: it sees no clock and no queue, and is told of both. Not to be shared between threads without a lock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

FIRST_SECONDS = 0.1
"""What a tenant's first job is expected to take."""
MEMORY = 0.2
"""Weight of the newest job in what a tenant's next one is expected to take."""


class FairShare:
    """Seconds charged to each tenant."""

    def __init__(self) -> None:
        self._charged: dict[str, float] = {}
        self._expected: dict[str, float] = {}
        self._level = 0.0
        """What the tenant that was served last had been charged: where newcomers start."""

    def arrive(self, tenant: str) -> None:
        """The tenant has work again, after having none waiting and none in service."""
        self._charged[tenant] = max(self._level, self._charged.get(tenant, 0.0))

    def order(self, tenants: Iterable[str]) -> list[str]:
        """These tenants, who is to be served first coming first."""
        return sorted(tenants, key=lambda tenant: (self._charged.get(tenant, self._level), tenant))

    def begin(self, tenant: str) -> float:
        """One of the tenant's jobs is started; the seconds that it is charged for now, to be given to `end`."""
        charged = self._charged.setdefault(tenant, self._level)
        self._level = max(self._level, charged)
        expected = self._expected.get(tenant, FIRST_SECONDS)
        self._charged[tenant] = charged + expected
        return expected

    def end(self, tenant: str, *, expected: float, seconds: float) -> None:
        """The job took so many seconds."""
        if tenant in self._charged:
            self._charged[tenant] += seconds - expected
            before = self._expected.get(tenant, seconds)
            self._expected[tenant] = before + MEMORY * (seconds - before)

    def expects(self, tenant: str) -> float:
        """Seconds that the tenant's next job is expected to take."""
        return self._expected.get(tenant, FIRST_SECONDS)

    def keep(self, tenants: Collection[str]) -> None:
        """The others are forgotten: they have ended."""
        self._charged = {tenant: seconds for tenant, seconds in self._charged.items() if tenant in tenants}
        self._expected = {tenant: seconds for tenant, seconds in self._expected.items() if tenant in tenants}
