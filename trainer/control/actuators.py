"""What entropy control may do to an update, and what it is told of the last one. Between the two stands a controller."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """What the last step measured, as controllers see it."""

    version: int
    """Version at which the step's batch was taken."""
    entropy: float
    """Exact mean entropy of the trainer's policy on the tokens of the batch, nats."""
    lag: float
    """Age of those tokens: their mean lag in versions."""
    reward: float
    """Mean reward of the batch."""


@dataclass(frozen=True)
class Progress:
    """Where the run stands at a step."""

    version: int
    versions: int
    epoch: int
    """Passes over the data set begun, from 1."""
    epochs: int
    """Passes that the whole run begins, at least 1."""


@dataclass(frozen=True)
class Actuators:
    """Numbers that weigh in the loss of the next update; as they stand here they change nothing."""

    positive_weight: float = 1.0
    """lambda: factor of the loss of tokens with positive advantage."""
    includes_zero: bool = False
    """It weighs A >= 0 in place of A > 0."""
    entropy_coefficient: float = 0.0
    """Weight of the mean entropy in the objective."""
    high_probability: float = 0.0
    """alpha of EntroPIC: weight of -r |A| on tokens whose probability is above `threshold`."""
    threshold: float = 1.0


STILL = Actuators()
"""No control."""
