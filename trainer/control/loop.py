"""The control loops of a run, entropy and staleness, around a step: measure, decide, actuate. Their state is a few numbers that checkpoints keep."""

from __future__ import annotations

import math
from collections.abc import Mapping

from services.contracts.algorithms import StalenessTarget
from services.contracts.spec import RunSpec
from trainer.control import entropy, staleness
from trainer.control.actuators import Actuators, Progress, Reading
from trainer.control.staleness import StalenessReading
from trainer.control.state import State


class ControlLoops:
    """What the controllers of one run remember. The same readings in the same order give the same state, so a resumed run finds its way again."""

    def __init__(self, spec: RunSpec, *, prompts: int | None, saved: Mapping[str, Mapping[str, float]] | None = None) -> None:
        self.prompts = prompts
        """Size of the data set, which says what an epoch is; while it is None, the run is one epoch."""
        kept = saved or {}
        self._entropy: State = dict(kept.get("entropy") or entropy.start(spec.entropy))
        self._staleness: State | None = dict(kept["staleness"]) if kept.get("staleness") else None
        self.forking_nats: float | None = kept.get("measure", {}).get("forking_nats")
        """Entropy above which a token counts as forking: of the run's first step."""
        self.wanted_max_lag: int | None = None
        """What the staleness controller asks for; None while there is none."""
        self.shown: dict[str, float] = {}
        """What the controllers did to the last step, for its record."""

    def actuate(self, spec: RunSpec, version: int) -> Actuators:
        """What the step at `version` is to do, `spec` being the one in force at it."""
        progress = self._progress(spec, version)
        self.shown = entropy.shown(spec.entropy, self._entropy, progress)
        return entropy.actuate(spec.entropy, self._entropy, progress)

    def observe(self, spec: RunSpec, version: int, values: Mapping[str, float]) -> None:
        """What the step at `version` measured. A step without a trained token teaches the controllers nothing."""
        self.forking_nats = values.get("forking_threshold_nats", self.forking_nats)
        measured = {name: values.get(name, math.nan) for name in ("entropy_nats", "lag_mean", "reward_mean", "kl_behaviour_k3_nats", "ess_share")}
        reading = Reading(version=version, entropy=measured["entropy_nats"], lag=measured["lag_mean"], reward=measured["reward_mean"])
        self._entropy = entropy.update(spec.entropy, self._entropy, reading)
        if spec.staleness.target is not None:
            self._observe_staleness(spec.staleness.target, spec, version, measured)

    def _observe_staleness(self, target: StalenessTarget, spec: RunSpec, version: int, measured: Mapping[str, float]) -> None:
        state = self._staleness if self._staleness is not None else staleness.start(target, spec.staleness.max_lag)
        reading = StalenessReading(
            version=version, kl=measured["kl_behaviour_k3_nats"], ess=measured["ess_share"], entropy=measured["entropy_nats"],
            lag=measured["lag_mean"], max_lag=spec.staleness.max_lag,
        )  # fmt: skip
        self._staleness, wanted = staleness.update(target, state, reading)
        self.wanted_max_lag = wanted if target.exact else max(wanted, spec.staleness.min_lag)  # a knob may have raised min_lag
        self.shown["staleness_target"] = target.value
        self.shown["staleness_wish_versions"] = float(self.wanted_max_lag)

    def state(self) -> dict[str, State]:
        """For the checkpoint's manifest."""
        states = {"entropy": self._entropy, "staleness": self._staleness or {}}
        return states | {"measure": {"forking_nats": self.forking_nats} if self.forking_nats is not None else {}}

    def _progress(self, spec: RunSpec, version: int) -> Progress:
        size = self.prompts or spec.versions * spec.batch_groups
        return Progress(
            version=version, versions=spec.versions, epoch=1 + version * spec.batch_groups // size,
            epochs=max(1, math.ceil(spec.versions * spec.batch_groups / size)),
        )  # fmt: skip
