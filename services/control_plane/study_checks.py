"""What is checked of a study before it is accepted: the study itself, and what its runs stand on, once for each model, data and rubric."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from services.contracts.problems import explained
from services.contracts.study import StudySpec
from services.contracts.views import FieldProblem, StudyValidationView
from services.control_plane.checks import CheckRewards, check
from services.runtime.web import Problem

STANDS_ON = {"model", "data", "sampling", "rewards", "evaluation", "replay"}
"""Sections of a run spec that name something outside of it; of arms that have them in common one is looked at."""


def parse_study(tree: dict[str, Any]) -> StudySpec:
    """The study in a JSON or TOML tree. Raises Problem with every field that is wrong."""
    try:
        return StudySpec.model_validate(tree)
    except ValidationError as error:
        raise invalid_study([FieldProblem(field=name or "(whole)", problem=problem) for name, problem in explained(error, StudySpec)]) from error


def check_study(study: StudySpec, *, check_rewards: CheckRewards) -> StudyValidationView:
    """Everything that can be known of the study before it runs. Raises Problem."""
    looked_at: set[str] = set()
    faults: list[FieldProblem] = []
    rewards_checked = True
    for arm in study.arms:
        spec = study.run(arm.name, study.seeds[0])
        stands_on = spec.model_dump_json(include=STANDS_ON)
        if stands_on in looked_at:
            continue
        looked_at.add(stands_on)
        try:
            rewards_checked &= check(spec, check_rewards=check_rewards).rewards_checked
        except Problem as problem:
            if not problem.document.errors:
                raise
            faults += [FieldProblem(field=_place(study, arm.name, error.field), problem=error.problem) for error in problem.document.errors]
    if faults:
        raise invalid_study([fault for i, fault in enumerate(faults) if fault not in faults[:i]])
    cells = study.cells()
    return StudyValidationView(
        valid=True, spec=study, runs=len(cells), versions=sum(study.run(*cell).versions for cell in cells), rewards_checked=rewards_checked,
        warnings=list(study.warnings),
    )  # fmt: skip


def invalid_study(errors: list[FieldProblem]) -> Problem:
    fields = ", ".join(error.field for error in errors[:3]) + (" and more" if len(errors) > 3 else "")
    return Problem(422, "Invalid study", f"{fields}: see `errors`; nothing was made", errors=errors)


def _place(study: StudySpec, arm: str, field: str) -> str:
    """Where the user wrote a field of the arm's run: in the arm, or else in the base run."""
    set_here = any(name == field or name.startswith(f"{field}.") or field.startswith(f"{name}.") for name in study.overrides(arm))
    return f"arms.{arm}.set.{field}" if set_here else f"base.{field}"
