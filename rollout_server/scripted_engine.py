"""An engine without a model, for unit tests: its answers follow from seed and prompt alone, its versions from the loads that it is told of."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from rollout_server.engine import RequestAborted, Sampled, SamplingRequest, WeightLoadFailed
from services.contracts.messages import FinishReason, LoadedWeights, LoadWeights, VersionSpan

EOS = 2
FIRST_TOKEN, VOCABULARY = 3, 16


def scripted_tokens(request: SamplingRequest) -> list[int]:
    """The whole answer to a request: 1 to 16 tokens, the last of which is EOS unless `max_tokens` cuts it off."""
    length = 1 + _number(request.seed, request.prompt, "length") % 16
    tokens = [FIRST_TOKEN + _number(request.seed, request.prompt, place) % (VOCABULARY - FIRST_TOKEN) for place in range(length - 1)] + [EOS]
    return tokens[: request.max_tokens]


def scripted_logprob(version: int, token: int) -> float:
    """Between -2 and -1 nats; other versions give other values."""
    return -1.0 - _number(version, [token], "logprob") % 1000 / 1000


class ScriptedEngine:
    """Implements `rollout_server.engine.Engine`. Every token takes `token_seconds`, and none comes while `held`."""

    def __init__(self, *, token_seconds: float = 0.0) -> None:
        self.started = False
        self.fail_next_load: str | None = None
        """Reason with which the next load fails."""
        self.running: set[str] = set()
        """Ids of the requests that are being sampled."""
        self.held = False
        self._token_seconds = token_seconds
        self._version: int | None = None
        self._aborted: set[str] = set()

    @property
    def version(self) -> int | None:
        return self._version

    async def start(self) -> None:
        self.started = True

    async def stop(self) -> None:
        self.started = False
        self._version = None
        await self.abort(self.running)

    async def sample(self, request: SamplingRequest) -> Sampled:
        if self._version is None:
            raise RuntimeError("no version of the weights is loaded: load one before sampling")
        tokens = scripted_tokens(request)
        versions: list[int] = []
        self.running.add(request.request_id)
        try:
            for _ in tokens:
                await asyncio.sleep(self._token_seconds)
                while self.held and request.request_id not in self._aborted:
                    await asyncio.sleep(0.001)
                if request.request_id in self._aborted:
                    raise RequestAborted(f"request {request.request_id} was aborted")
                versions.append(self._version)
        finally:
            self.running.discard(request.request_id)
            self._aborted.discard(request.request_id)
        return Sampled(
            tokens=tokens,
            logprobs=[scripted_logprob(version, token) for version, token in zip(versions, tokens, strict=True)],
            spans=_spans(versions),
            finish=FinishReason.STOP if tokens[-1] == EOS else FinishReason.LENGTH,
        )

    async def score(self, tokens: Sequence[int]) -> list[float]:
        return [scripted_logprob(-1 if self._version is None else self._version, token) for token in tokens[1:]]

    async def load(self, request: LoadWeights) -> LoadedWeights:
        if self.fail_next_load is not None:
            reason, self.fail_next_load = self.fail_next_load, None
            raise WeightLoadFailed(reason)
        self._version = request.version
        return LoadedWeights(version=request.version, stall_seconds=0.0, load_seconds=0.0, canary_logprobs=tuple(await self.score(request.canary)))

    async def abort(self, request_ids: Iterable[str]) -> None:
        self._aborted |= set(request_ids) & self.running


def _spans(versions: Sequence[int]) -> tuple[VersionSpan, ...]:
    """Runs of equal versions: [3, 3, 4] is version 3 on [0, 2) and 4 on [2, 3)."""
    starts = [place for place, version in enumerate(versions) if place == 0 or version != versions[place - 1]]
    return tuple(VersionSpan(version=versions[s], start=s, end=e) for s, e in zip(starts, [*starts[1:], len(versions)], strict=True))


def _number(seed: int, prompt: Sequence[int], what: object) -> int:
    return int.from_bytes(blake2b(repr((seed, list(prompt), what)).encode(), digest_size=8).digest(), "little")
