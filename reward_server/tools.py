"""What a reward server lends to its verifiers: judges, the sandbox, the way to users' own services. Opened once, closed with the process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from reward_server.judges.pool import JudgePools
from reward_server.remote_client import RemoteClient
from reward_server.sandbox.jobs import Refused, Sandbox
from reward_server.sandbox.supervisor import CodeSandbox, SandboxOptions
from reward_server.verifiers.verdict import Tools, Unjudged
from services.contracts.messages import Outcome
from services.runtime.metrics import RewardMetrics
from services.runtime.settings import Settings

log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_tools(settings: Settings, metrics: RewardMetrics) -> Iterator[Tools]:
    """Without a safe sandbox the server judges what needs none; the rest is an error, never a reward."""
    with contextlib.ExitStack() as stack:
        pools = JudgePools(workers=settings.reward_workers)
        stack.callback(pools.close)
        remote = RemoteClient(key=settings.remote_key, networks=settings.remote_networks)
        stack.callback(remote.close)
        opened: Sandbox | None = None
        why = ""
        try:
            opened = CodeSandbox(SandboxOptions(sessions=settings.reward_workers + 2, outer=settings.sandbox_outer))
            stack.callback(opened.close)
        except Refused as refused:
            why = str(refused)
            log.error("there is no sandbox here: verifiers that need one will fail", extra={"reason": why})
        metrics.tier.labels(opened.tier.value if opened else "none").set(1)

        def sandbox() -> Sandbox:
            if opened is None:
                raise Unjudged(Outcome.ERROR, f"this reward server has no sandbox: {why}", cause="sandbox")
            return opened

        yield Tools(ask=pools.ask, sandbox=sandbox, post=remote.post)
