"""Which prompts a run trains on, kept with the run: the data set may change or go, and a subset was perhaps drawn."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from services.contracts.topics import RunKeys
from services.runtime.bus import Bus


def store_prompts_used(bus: Bus, run_id: str, ids: Sequence[str]) -> None:
    payload = msgspec.json.encode(list(ids))
    bus.call(lambda: bus.redis.set(RunKeys(run_id).prompts_used, payload))


def prompts_used(bus: Bus, run_id: str) -> list[str] | None:
    """Their ids in the source's order. None while the data are not opened, for a larger source, and for a replay, which opens none."""
    raw = bus.call(lambda: bus.redis.get(RunKeys(run_id).prompts_used))
    return None if raw is None else msgspec.json.decode(raw, type=list[str])
