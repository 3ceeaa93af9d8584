"""Publication: the policy's weights reach every live rollout server, and each proves with a canary that it serves them.

A server that fails is named and fenced: it may start no group until it has loaded the current version, which it does as a late joiner.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch

from services.contracts.messages import LoadedWeights, LoadWeights, Member, Role
from services.contracts.spec import KvPolicy, RunSpec
from services.contracts.topics import RunKeys
from services.runtime.bus import Bus
from services.runtime.codec import encode
from services.runtime.fleet import Fleet
from services.runtime.metrics import TrainerMetrics
from trainer.batching import Trajectory, pack
from trainer.policy import Policy
from trainer.weights import Transport, TransportFailed

log = logging.getLogger(__name__)

CANARY_TOKENS = 16
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest mean absolute difference of the canary's log-probabilities between trainer and server, by the servers' type."""


class NotLoaded(ValueError):
    """A server answers that it does not hold the version; the text is its reason."""


class CanaryDiffers(ValueError):
    """A server answers with other log-probabilities than the policy's."""


@dataclass
class Publication:
    """What became of one publication."""

    version: int
    confirmed: list[str] = field(default_factory=list)
    fenced: dict[str, str] = field(default_factory=dict)
    """Servers that failed and had not failed before: reason by fleet id."""
    stall_seconds: float = 0.0
    """Longest time that generation stood still at a server."""
    prepare_seconds: float = 0.0
    deliver_seconds: float = 0.0
    canary: float = 0.0
    """Greatest canary difference, in nats."""


class Publisher:
    """Publishes the versions of one run."""

    def __init__(
        self, bus: Bus, run_id: str, spec: RunSpec, *, policy: Policy, transport: Transport, cluster_token: str, metrics: TrainerMetrics
    ) -> None:
        self.fleet, self.bus, self.run_id, self.spec = Fleet(bus), bus, run_id, spec
        self.policy, self.transport, self.metrics = policy, transport, metrics
        self.tolerance = spec.weights.canary_tolerance or TOLERANCE[spec.model.dtype]
        self._http = httpx.Client(headers={"Authorization": f"Bearer {cluster_token}"}, timeout=spec.weights.timeout, trust_env=False)
        start = policy.model.config.bos_token_id
        # Its own samples: of tokens that it finds absurd, bfloat16 gives log-probabilities that are tenths of nats off.
        self._canary = tuple(policy.sample(start if isinstance(start, int) else 0, CANARY_TOKENS, seed=spec.seed))
        self._expected: tuple[float, ...] = ()
        self._holding: dict[tuple[str, float], int] = {}
        """Version that each server process confirmed last."""
        self._fenced: set[tuple[str, float]] = set()
        self._current: Publication | None = None
        self._request: LoadWeights | None = None

    def prepare(self, version: int, kv_policy: KvPolicy) -> None:
        """Copy the policy's weights to where servers load them from; training may go on afterwards."""
        began = time.monotonic()
        self._current = Publication(version)
        with contextlib.closing(self.policy.weights(getattr(torch, self.spec.model.dtype))) as weights:
            self.transport.prepare(version, weights)
        self._expected = self._canary_logprobs()
        self._request = LoadWeights(
            run_id=self.run_id, version=version, transport=self.transport.name, kv_policy=kv_policy, canary=self._canary,
            expected=self._expected, tolerance=self.tolerance, source=self.transport.stored or {},
        )  # fmt: skip
        self._current.prepare_seconds = time.monotonic() - began
        self.metrics.publish.labels("prepare").observe(self._current.prepare_seconds)

    def deliver(self) -> Publication:
        """Have every live server of the run load what was prepared. The caller has made sure that the staleness rules allow it."""
        publication, request = self._prepared()
        record = RunKeys(self.run_id).weights
        if self.transport.stored is not None:
            self.bus.call(lambda: self.bus.redis.set(record, encode(request)))
        else:  # a trainer before this one may have left files: nobody is to take those of the same number for this version
            self.bus.call(lambda: self.bus.redis.delete(record))
        began = time.monotonic()
        self._deliver_to(self._servers(), publication, request)
        publication.deliver_seconds = time.monotonic() - began
        self.metrics.publish.labels("deliver").observe(publication.deliver_seconds)
        self.metrics.publish.labels("stall").observe(publication.stall_seconds)
        return publication

    def admit_late(self) -> list[str]:
        """Give the current version to servers of the run that do not hold it: new, restarted or fenced ones. The ids of those that hold it now."""
        publication, request = self._prepared()
        before = len(publication.confirmed)
        late = []
        for member in self._servers():
            if self._holding.get(_identity(member)) == publication.version:
                continue
            # It has loaded, and checked, the stored copy by itself. The heartbeat of a fenced one may be from before its fence.
            if member.version == publication.version and _identity(member) not in self._fenced:
                self._note(member, publication)
            else:
                late.append(member)
        self._deliver_to(late, publication, request)
        return sorted(publication.confirmed[before:])

    def close(self) -> None:
        self._http.close()
        self.transport.close()

    def _servers(self) -> list[Member]:
        return self.fleet.members(role=Role.ROLLOUT, run_id=self.run_id)

    def _prepared(self) -> tuple[Publication, LoadWeights]:
        if self._current is None or self._request is None:
            raise RuntimeError("prepare a version before it is delivered")
        return self._current, self._request

    def _deliver_to(self, servers: Sequence[Member], publication: Publication, request: LoadWeights) -> None:
        """To all of them at once. A collective that one server broke is made again with the others, who could not load for no fault of their own."""
        left = list(servers)
        while left:
            sources = self.transport.sources([m.member_id for m in left])
            failed: dict[str, Exception] = {}  # in the order in which they failed
            sent, broken_by = True, frozenset[str]()

            def ask(member: Member, sources: dict[str, dict[str, Any]] = sources, failed: dict[str, Exception] = failed) -> LoadedWeights | None:
                try:
                    return self._ask(member, request.model_copy(update={"source": sources[member.member_id]}))
                except (httpx.HTTPError, ValueError) as error:
                    failed[member.member_id] = error
                    if not isinstance(error, CanaryDiffers):
                        self.transport.cancel(f"{member.member_id}: {error}")  # it takes no part in a collective
                    return None

            with ThreadPoolExecutor(len(left), thread_name_prefix="publish") as pool:  # a collective waits for all: none may queue for a thread
                asked = [(member, pool.submit(ask, member)) for member in left]
                try:
                    self.transport.send()
                except TransportFailed as error:
                    sent, broken_by = False, error.broken_by or frozenset(list(failed)[:1])
                    log.error("weights could not be sent", extra={"error": str(error), "version": publication.version})
            again = []
            for member, answer in asked:
                loaded = answer.result()
                if loaded is not None:
                    publication.stall_seconds = max(publication.stall_seconds, loaded.stall_seconds)
                    self._note(member, publication)
                elif not sent and isinstance(failed[member.member_id], NotLoaded) and member.member_id not in broken_by:
                    again.append(member)
                else:
                    self._fail(member, failed[member.member_id], publication)
            if len(again) == len(left):  # it is not for one of them that they fail
                for member in again:
                    self._fail(member, failed[member.member_id], publication)
                return
            left = again

    def _ask(self, member: Member, request: LoadWeights) -> LoadedWeights:
        response = self._http.post(f"{member.url}/v1/weights", content=request.model_dump_json(), headers={"Content-Type": "application/json"})
        if response.is_error:
            raise NotLoaded(f"HTTP {response.status_code}: {response.text[:500]}")
        loaded = LoadedWeights.model_validate_json(response.content)
        if loaded.version != request.version:
            raise NotLoaded(f"it answers that it holds version {loaded.version}, not {request.version}")
        difference = loaded.difference(self._expected)
        self.metrics.canary.labels(member.member_id).set(difference)
        if not difference <= self.tolerance:
            differs = CanaryDiffers(
                f"its canary is {difference:.2g} nats off, more than {self.tolerance:g}: it does not serve the weights that it was sent"
            )
            try:
                self._http.post(f"{member.url}/v1/runs/{self.run_id}/fence").raise_for_status()
            except httpx.HTTPError as error:
                raise CanaryDiffers(f"{differs}; and it could not be told so: {error}") from error
            raise differs
        assert self._current is not None
        self._current.canary = max(self._current.canary, difference)
        return loaded

    def _note(self, member: Member, publication: Publication) -> None:
        publication.confirmed.append(member.member_id)
        self._fenced.discard(_identity(member))
        self._holding[_identity(member)] = publication.version

    def _fail(self, member: Member, error: Exception, publication: Publication) -> None:
        self._holding.pop(_identity(member), None)
        if _identity(member) in self._fenced:
            return
        self._fenced.add(_identity(member))
        publication.fenced[member.member_id] = str(error)
        self.metrics.fenced.labels("canary" if isinstance(error, CanaryDiffers) else "load").inc()
        log.error("a rollout server is fenced", extra={"server": member.member_id, "reason": str(error), "version": publication.version})

    @torch.no_grad()
    def _canary_logprobs(self) -> tuple[float, ...]:
        """Log-probabilities of the canary's tokens after the first, at temperature 1."""
        first, *rest = self._canary
        trajectory = Trajectory(prompt_ids=[first], completion_ids=rest, behaviour_logps=[0.0] * len(rest), versions=[0] * len(rest), advantage=0.0)
        (packed,) = pack([trajectory])
        return tuple(self.policy.forward(packed.to(self.policy.device), temperature=1.0)[0].tolist())


def _identity(member: Member) -> tuple[str, float]:
    """Tells a restarted server from the one before it."""
    return member.member_id, member.started_at
