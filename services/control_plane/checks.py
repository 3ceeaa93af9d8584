"""What is checked of a run before it is accepted: spec, model, tokenizer, data, first prompts, verifiers. Each finding names the field to change."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable
from typing import Any

import httpx
from pydantic import ValidationError

from services.contracts.messages import Role
from services.contracts.problems import explained
from services.contracts.spec import KNOBS, EvaluationSet, Knobs, RunSpec, Verifier, flatten, knobs_of
from services.contracts.views import FieldProblem, ProblemDocument, ValidationView
from services.control_plane.data import DataError, open_source
from services.control_plane.evaluations import open_set
from services.control_plane.feeds import LOOK_AHEAD, Feed, open_tokenizer
from services.runtime.fleet import Fleet
from services.runtime.tokenizer import ModelError, PromptTokenizer
from services.runtime.web import Problem

log = logging.getLogger(__name__)

RUBRIC_SECONDS = 10.0
"""Time that a reward server has for an answer; past it the next one is asked."""

CheckRewards = Callable[[tuple[Verifier, ...]], bool]
"""Whether some reward server could be asked. Raises Problem with what it refused."""


def parse_spec(tree: dict[str, Any]) -> RunSpec:
    """The spec in a JSON or TOML tree. Raises Problem with every field that is wrong."""
    try:
        return RunSpec.model_validate(tree)
    except ValidationError as error:
        raise invalid_spec(_spec_problems(error)) from error


def parse_knobs(tree: dict[str, Any]) -> Knobs:
    """Knob values by dotted name. Raises Problem for an empty change and for names that are no knobs."""
    values = flatten(tree)
    if not values:
        raise Problem(422, "No knobs", f"name at least one of the knobs: {', '.join(sorted(KNOBS))}")
    wrong = [FieldProblem(field=name, problem=_no_knob(name)) for name in values if name not in KNOBS]
    if wrong:
        raise Problem(422, "Not a knob", "only knobs may change while a run goes on; for anything else submit another run", errors=wrong)
    return values


def refuse_foreign(values: Knobs, spec: RunSpec) -> None:
    """Raises Problem for knobs that a run of `spec` has not: those of another variant, or of a part that it was submitted without."""
    if foreign := sorted(values.keys() - knobs_of(spec).keys()):
        wrong = [FieldProblem(field=name, problem=f"this run has no {name}: its knobs are {', '.join(knobs_of(spec))}") for name in foreign]
        raise Problem(422, "Not a knob of this run", "the run keeps the knobs that it has", errors=wrong)


def invalid_knobs(error: ValidationError) -> Problem:
    return Problem(422, "Invalid knob values", "the run keeps the knobs that it has", errors=_spec_problems(error))


def invalid_overrides(error: ValidationError) -> Problem:
    return invalid_spec(_spec_problems(error))


def check(spec: RunSpec, *, check_rewards: CheckRewards) -> ValidationView:
    """Everything that can be known of the spec before a run. Raises Problem."""
    try:
        tokenizer = open_tokenizer(spec)
    except (ModelError, OSError) as error:
        raise invalid_spec([FieldProblem(field="model.path", problem=str(error))]) from error
    try:
        feed = Feed(spec, open_source(spec.data, seed=spec.seed), tokenizer)
        prompts = [feed.prompt(n) for n in range(min(LOOK_AHEAD, len(feed.source)))]
    except (DataError, OSError) as error:
        raise invalid_spec([FieldProblem(field="data", problem=str(error))]) from error
    item, tokens = prompts[0]
    checked = check_rewards(spec.rewards)
    for n, one in enumerate(spec.evaluation.sets):
        checked &= _check_set(spec, one, tokenizer, check_rewards, field=f"evaluation.sets.{n}")
    return ValidationView(
        valid=True, spec=spec, prompts=len(feed.source), first_prompt=item.text, first_prompt_tokens=len(tokens), rewards_checked=checked
    )


def _check_set(spec: RunSpec, one: EvaluationSet, tokenizer: PromptTokenizer, check_rewards: CheckRewards, *, field: str) -> bool:
    """The same of an evaluation set; `field` is its place in the spec. Whether its rubric could be checked."""
    try:
        opened = open_set(spec, one, tokenizer)
        for n in range(min(LOOK_AHEAD, opened.count)):
            opened.feed.prompt(n)
    except ValidationError as error:  # of all its own fields, only together with the model's length
        raise invalid_spec([FieldProblem(field=f"{field}.max_tokens", problem=_spec_problems(error)[0].problem)]) from error
    except (DataError, OSError) as error:
        raise invalid_spec([FieldProblem(field=f"{field}.data", problem=str(error))]) from error
    if not one.rewards:
        return True
    try:
        return check_rewards(one.rewards)
    except Problem as problem:
        raise invalid_spec([error.model_copy(update={"field": f"{field}.{error.field}"}) for error in problem.document.errors]) from problem


class AskRewardServer:
    """Asks a live reward server whether it knows the verifiers: the control plane has none of them itself."""

    def __init__(self, fleet: Fleet, *, cluster_token: str) -> None:
        self.fleet = fleet
        self._http = httpx.Client(headers={"Authorization": f"Bearer {cluster_token}"}, timeout=RUBRIC_SECONDS, trust_env=False)

    def __call__(self, rewards: tuple[Verifier, ...]) -> bool:
        body = {"rewards": [verifier.model_dump(mode="json") for verifier in rewards]}
        for member in self.fleet.members(role=Role.REWARD):
            try:
                answer = self._http.post(f"{member.url}/v1/rubric/check", json=body)
            except httpx.HTTPError as error:
                log.warning("a reward server could not be asked", extra={"server": member.member_id, "error": str(error)})
                continue
            if answer.status_code == 422:
                found = ProblemDocument.model_validate_json(answer.content)
                raise invalid_spec(found.errors or [FieldProblem(field="rewards", problem=found.detail)])
            if answer.is_success:
                return True
            log.warning("a reward server did not check the rubric", extra={"server": member.member_id, "status": answer.status_code})
        return False


def invalid_spec(errors: list[FieldProblem]) -> Problem:
    fields = ", ".join(error.field for error in errors[:3]) + (" and more" if len(errors) > 3 else "")
    return Problem(422, "Invalid run spec", f"{fields}: see `errors`; the schema is at GET /v1/schema", errors=errors)


def refuse_not_finite(values: Any, name: str = "") -> None:
    """Raises Problem for a NaN or infinity, which TOML can say and JSON cannot."""
    if isinstance(values, float) and not math.isfinite(values):
        raise invalid_spec([FieldProblem(field=name, problem=f"{values} is not a finite number")])
    if isinstance(values, dict):
        for key, value in values.items():
            refuse_not_finite(value, f"{name}.{key}" if name else key)
    if isinstance(values, list):
        for i, value in enumerate(values):
            refuse_not_finite(value, f"{name}.{i}")


def _spec_problems(error: ValidationError) -> list[FieldProblem]:
    return [FieldProblem(field=name or "(whole)", problem=problem) for name, problem in explained(error, RunSpec)]


def _no_knob(name: str) -> str:
    near = difflib.get_close_matches(name, sorted(KNOBS), n=1)
    return f"not a knob{f'; did you mean {near[0]!r}?' if near else '.'} Knobs are {', '.join(sorted(KNOBS))}"
