"""What rank 0 of a trainer tells the other ranks to do. Each order is one common act: they do it with the same arguments as rank 0."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.contracts.messages import ScoredGroup
from services.contracts.spec import RunSpec
from trainer.control.actuators import Actuators


class _Order(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Load(_Order):
    """Load a run's model, in shares."""

    kind: Literal["load"] = "load"
    path: str
    """Folder that all ranks see."""
    resumed: bool
    """It is a checkpoint, with the optimiser's moments."""
    spec: RunSpec


class Step(_Order):
    """Train on a batch: the arguments of `trainer.step.train_step`."""

    kind: Literal["step"] = "step"
    groups: tuple[ScoredGroup, ...]
    spec: RunSpec
    version: int
    actuators: Actuators
    forking_nats: float | None


class Pass(_Order):
    """Take part in one forward pass of rank 0's, without work of one's own."""

    kind: Literal["pass"] = "pass"


class Weights(_Order):
    """Send one's share of every weight."""

    kind: Literal["weights"] = "weights"


class Moments(_Order):
    """Send one's share of every weight and of the optimiser's moments."""

    kind: Literal["moments"] = "moments"


class End(_Order):
    """The trainer ends."""

    kind: Literal["end"] = "end"


Order = Load | Step | Pass | Weights | Moments | End


class Envelope(BaseModel):
    """An order as it is sent."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    order: Annotated[Order, Field(discriminator="kind")]
