"""What a reward server is asked over HTTP, and what it answers: for the fleet, the `offbeat reward` commands and whoever scores by hand."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic.config import JsonDict

from services.contracts.messages import Outcome, Score
from services.contracts.spec import Verifier
from services.contracts.views import ProblemDocument

BATCH = 256
"""Items of one request at most."""


_RUBRIC: JsonDict = {"rewards": [{"name": "math"}, {"name": "format", "weight": 0.5, "options": {"boxed": True}}]}
_ITEM: JsonDict = {"prompt": "What is a half?", "completion": "It is \\boxed{1/2}.", "answer": "0.5"}


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ScoreItem(Body):
    """One completion to be judged."""

    prompt: str = ""
    """The prompt, for verifiers that need it."""
    completion: str
    """The text to be judged."""
    answer: JsonValue = None
    """What the verifiers compare with."""


class RubricBody(Body):
    model_config = ConfigDict(allow_inf_nan=False, json_schema_extra={"examples": [_RUBRIC]})
    rewards: tuple[Verifier, ...] = Field(min_length=1, max_length=64)
    """Verifiers with weights and options, as in a run spec."""
    reward_least: float | None = None
    """A lower reward counts as this one."""
    reward_most: float | None = None
    """A higher reward counts as this one."""

    @model_validator(mode="after")
    def _bounds(self) -> RubricBody:
        if self.reward_least is not None and self.reward_most is not None and self.reward_least > self.reward_most:
            raise ValueError(f"reward_least ({self.reward_least}) is above reward_most ({self.reward_most}): no reward is between them")
        return self


class ScoreBody(RubricBody, ScoreItem):
    model_config = ConfigDict(json_schema_extra={"examples": [{**_RUBRIC, **_ITEM}]})


class BatchBody(RubricBody):
    model_config = ConfigDict(json_schema_extra={"examples": [{**_RUBRIC, "items": [_ITEM, {"completion": "I do not know", "answer": "0.5"}]}]})
    items: list[Annotated[ScoreItem | Any, Field(union_mode="left_to_right")]] = Field(min_length=1, max_length=BATCH)
    """Completions to be judged side by side. An item that is none has a problem in its place, and the others are judged all the same."""


class GoldItem(Body):
    """A prompt with its gold answer, as a data set has them."""

    prompt: str = ""
    answer: JsonValue = None


class GoldBody(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"verifier": {"name": "math"}, "items": [{"answer": "0.5"}]}]})
    verifier: Verifier
    items: list[GoldItem] = Field(min_length=1, max_length=BATCH)


class PartView(Body):
    """What one verifier said."""

    verifier: str
    weight: float
    score: float | None
    outcome: str
    """`ok`, `timeout`, `limit:WHICH`, `error:WHERE` or `unverifiable`."""
    detail: str
    tier: str
    """Confinement under which untrusted code was run to find this out; empty when none was run."""
    milliseconds: float


class ScoreView(Body):
    """A completion's reward, with what each verifier said of it."""

    reward: float | None
    """Weighted sum of the scores. None when a verifier could not judge: never 0 in its place."""
    outcome: str
    """`ok`, or the outcome of the first verifier that has another one."""
    parts: tuple[PartView, ...]
    tier: str
    """Confinement of the untrusted code that was run, if any was."""
    milliseconds: float


class ItemView(Body):
    """One of the two."""

    score: ScoreView | None = None
    problem: ProblemDocument | None = None
    """Why the item could not be judged at all."""


class BatchView(Body):
    items: tuple[ItemView, ...]
    """In the order of the request's."""


class GoldView(Body):
    """What a verifier says of its own gold answer."""

    completion: str | None
    """The completion that was judged; None when none can be made of this answer."""
    score: ScoreView | None
    """Of an empty completion when there is none: `unverifiable` says that the gold answer makes no sense. None when a verifier cannot be asked so."""


class GoldsView(Body):
    items: tuple[GoldView, ...]
    """In the order of the request's."""


class ExampleView(Body):
    """A completion and what the verifier says of it."""

    completion: str
    answer: JsonValue = None
    options: dict[str, JsonValue] = {}
    prompt: str = ""
    score: float | None = None


class VerifierView(Body):
    name: str
    """As named in a run spec's `rewards`."""
    text: str
    """What it does, in a sentence."""
    options: dict[str, JsonValue]
    """JSON schema of its options."""
    examples: tuple[ExampleView, ...]
    checks_gold: bool
    """Whether `POST /v1/gold/check` can say anything of its gold answers."""


def view_of(score: Score) -> ScoreView:
    parts = tuple(
        PartView(
            verifier=part.verifier, weight=part.weight, score=part.score, outcome=part.said, detail=part.detail, tier=part.tier,
            milliseconds=round(1000 * part.seconds, 3),
        )
        for part in score.parts
    )  # fmt: skip
    outcome = next((part.said for part in score.parts if part.outcome is not Outcome.OK), Outcome.OK.value)
    tier = next((part.tier for part in score.parts if part.tier), "")
    return ScoreView(reward=score.reward, outcome=outcome, parts=parts, tier=tier, milliseconds=round(1000 * score.seconds, 3))
