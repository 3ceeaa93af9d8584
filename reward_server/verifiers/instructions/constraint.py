"""What a constraint is: its arguments, and whether a text follows it. Every check is linear in the text, whatever a model wrote."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Count = Annotated[int, Field(ge=0, le=10**6)]
Phrase = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
"""A keyword, a marker or a closing phrase."""
Relation = Literal["less than", "at least"]


class Constraint(BaseModel, ABC):
    """One instruction with its arguments, by the names that IFEval gives them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @abstractmethod
    def followed_by(self, text: str) -> bool:
        """Whether `text`, which is not empty, follows the instruction."""


def compare(count: int, relation: Relation, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold
