"""The reward server's HTTP routes: health, metrics, and the same scoring that its stream worker does, in the same threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from reward_server.rubric import Rubric
from reward_server.scoring import HTTP, Scoring
from reward_server.scoring_threads import Overloaded
from reward_server.verifiers import VERIFIERS, check_options
from reward_server.verifiers.verdict import Options, valid
from services.contracts.messages import Score
from services.contracts.scoring import (
    BatchBody,
    BatchView,
    ExampleView,
    GoldBody,
    GoldItem,
    GoldsView,
    GoldView,
    ItemView,
    RubricBody,
    ScoreBody,
    ScoreItem,
    ScoreView,
    VerifierView,
    view_of,
)
from services.contracts.spec import Verifier
from services.contracts.views import FieldProblem, ProblemDocument
from services.runtime.web import PROBLEM_JSON, Problem, base_app, bearer, field_problems, problem_response

T = TypeVar("T")
MAX_BODY = 8 * 1024 * 1024


def create_app(*, scoring: Scoring, cluster_token: str, registry: CollectorRegistry, ready: Callable[[], str | None]) -> FastAPI:
    app = base_app(
        title="Offbeat reward server", description="Judges completions, over the bus and over HTTP.", registry=registry, ready=ready,
        max_body=MAX_BODY,
    )  # fmt: skip
    secured = [Depends(bearer(cluster_token))]
    told, asked, judged = _problems(401), _problems(400, 401, 413, 422), _problems(400, 401, 413, 422, 429)
    judged[429]["headers"] = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer"}}}

    @app.exception_handler(Overloaded)
    async def _overloaded(_: Request, error: Overloaded) -> Response:
        scoring.metrics.refused.inc()
        response = problem_response(Problem(429, "Too much is waiting", str(error)))
        response.headers["Retry-After"] = str(error.retry_after)
        return response

    @app.post("/v1/score", dependencies=secured, responses=judged, summary="Judge one completion")
    async def score(body: ScoreBody) -> ScoreView:
        (found,) = await in_threads([_judging(scoring, rubric_of(body), body)])
        return view_of(found)

    @app.post("/v1/score/batch", dependencies=secured, responses=judged, summary="Judge completions side by side")
    async def batch(body: BatchBody) -> BatchView:
        rubric = rubric_of(body)
        items = [_readable(item) for item in body.items]
        found = iter(await in_threads([_judging(scoring, rubric, item) for item in items if isinstance(item, ScoreItem)]))
        return BatchView(items=tuple(ItemView(score=view_of(next(found))) if isinstance(item, ScoreItem) else item for item in items))

    @app.post("/v1/gold/check", dependencies=secured, responses=judged, summary="What does a verifier say of its own gold answers?")
    async def gold(body: GoldBody) -> GoldsView:
        alone = Verifier(name=body.verifier.name, options=body.verifier.options)  # its bounds are the run's, and no verdict
        rubric = rubric_of(RubricBody(rewards=(alone,)), field="verifier")
        options = check_options(body.verifier.name, body.verifier.options)
        jobs = [partial(_of_gold, scoring, rubric, body.verifier.name, options, item) for item in body.items]
        return GoldsView(items=tuple(await in_threads(jobs)))

    @app.post("/v1/rubric/check", dependencies=secured, responses=asked, summary="Are these verifiers and their options known?")
    async def check(body: RubricBody) -> dict[str, str]:
        rubric_of(body)
        return {"status": "ok"}

    @app.get("/v1/verifiers", dependencies=secured, responses=told, summary="The verifiers, their options and examples")
    async def verifiers() -> list[VerifierView]:
        return [
            VerifierView(
                name=name, text=one.text, options=one.options.model_json_schema(), checks_gold=one.checks_gold,
                examples=tuple(ExampleView(**{**example._asdict(), "options": dict(example.options)}) for example in one.examples),
            )
            for name, one in VERIFIERS.items()
        ]  # fmt: skip

    async def in_threads(jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Their results, in order. Raises Overloaded."""
        return await asyncio.gather(*map(asyncio.wrap_future, scoring.threads.offer(HTTP, jobs)))

    def rubric_of(body: RubricBody, *, field: str = "") -> Rubric:
        wrong: list[FieldProblem] = []
        for i, verifier in enumerate(body.rewards):
            try:
                check_options(verifier.name, verifier.options)
            except ValueError as error:
                wrong.append(FieldProblem(field=field or f"rewards.{i}", problem=str(error)))
        if wrong:
            raise Problem(422, "Invalid rubric", "some verifiers are not as they should be", errors=wrong)
        return scoring.rubric(body.rewards, least=body.reward_least, most=body.reward_most)

    return app


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for OpenAPI."""
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def _judging(scoring: Scoring, rubric: Rubric, item: ScoreItem | ScoreBody) -> Callable[[], Score]:
    return partial(scoring.judge, rubric, item.completion, prompt=item.prompt, answer=item.answer)


def _readable(item: Any) -> ScoreItem | ItemView:
    """The item, or what is wrong with it."""
    if isinstance(item, ScoreItem):
        return item
    try:
        return ScoreItem.model_validate(item)
    except ValidationError as error:
        errors = field_problems(list(error.errors()))
        return ItemView(problem=ProblemDocument(title="Invalid item", status=422, detail="the item cannot be judged", errors=errors))


def _of_gold(scoring: Scoring, rubric: Rubric, name: str, options: Options, item: GoldItem) -> GoldView:
    """The verifier's verdict on the completion that gives the gold answer, or else on an empty one, which tells whether the answer makes sense."""
    verifier = VERIFIERS[name]
    if not verifier.checks_gold:
        return GoldView(completion=None, score=None)
    completion = verifier.gold(item.answer, options) if verifier.gold else None
    score = view_of(scoring.judge(rubric, completion or "", prompt=item.prompt, answer=item.answer))
    return GoldView(completion=None if completion is None else valid(completion), score=score)
