"""The reward server's HTTP routes: health, metrics, and the same scoring that its stream worker does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from reward_server.judges.pool import JudgePools
from reward_server.rubric import Rubric
from reward_server.verifiers import VERIFIERS, check_options
from services.contracts.messages import Score
from services.contracts.spec import Verifier
from services.contracts.views import FieldProblem, ProblemDocument
from services.runtime.web import Problem, base_app, bearer


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class RubricBody(Body):
    rewards: tuple[Verifier, ...] = Field(min_length=1)
    """Verifiers with weights and options, as in a run spec."""


class ScoreBody(RubricBody):
    prompt: str = ""
    """The prompt, for verifiers that need it."""
    completion: str
    """The text to be judged."""
    answer: JsonValue = None
    """What the verifiers compare with."""


class VerifierView(Body):
    name: str
    """As named in a run spec's `rewards`."""
    options: dict[str, JsonValue]
    """JSON schema of its options."""


def create_app(*, pools: JudgePools, cluster_token: str, registry: CollectorRegistry, ready: Callable[[], str | None]) -> FastAPI:
    app = base_app(title="Offbeat reward server", description="Judges completions, over the bus and over HTTP.", registry=registry, ready=ready)
    secured = [Depends(bearer(cluster_token))]
    problems: dict[int | str, dict[str, Any]] = {401: {"model": ProblemDocument}, 422: {"model": ProblemDocument}}

    @app.post("/v1/score", dependencies=secured, responses=problems, summary="Judge one completion")
    def score(body: ScoreBody) -> Score:
        return rubric_of(body).score(body.completion, prompt=body.prompt, answer=body.answer)

    @app.post("/v1/rubric/check", dependencies=secured, responses=problems, summary="Are these verifiers and their options known?")
    def check(body: RubricBody) -> dict[str, str]:
        rubric_of(body)
        return {"status": "ok"}

    @app.get("/v1/verifiers", dependencies=secured, summary="The verifiers and their options")
    def verifiers() -> list[VerifierView]:
        return [VerifierView(name=name, options=verifier.options.model_json_schema()) for name, verifier in VERIFIERS.items()]

    def rubric_of(body: RubricBody) -> Rubric:
        wrong: list[FieldProblem] = []
        for i, verifier in enumerate(body.rewards):
            try:
                check_options(verifier.name, verifier.options)
            except ValueError as error:
                wrong.append(FieldProblem(field=f"rewards.{i}", problem=str(error)))
        if wrong:
            raise Problem(422, "Invalid rubric", "some verifiers are not as they should be", errors=wrong)
        return Rubric(body.rewards, pools.ask)

    return app
