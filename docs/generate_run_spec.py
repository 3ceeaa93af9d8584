"""Writes docs/run-spec.md out of the run spec's own docstrings and bounds: `.venv/bin/python docs/generate_run_spec.py`."""

from __future__ import annotations

import ast
import inspect
import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from services.contracts.algorithms import TAGS
from services.contracts.spec import KNOBS, RunSpec
from services.contracts.spec import Data as DataSpec
from services.contracts.spec import Verifier as VerifierSpec
from services.control_plane.data.procedural import AdditionOptions, SumToTargetOptions

TARGET = Path(__file__).with_name("run-spec.md")

HEAD = """\
# The run spec

<!-- Generated: change services/contracts/spec.py or algorithms.py, then run `.venv/bin/python docs/generate_run_spec.py`. -->

A run spec says everything about a run. It is TOML in files (`deploy/runs/demo.toml`) and TOML or JSON over the API. Every field has a default, so
`{}` is a valid spec. Unknown fields are refused. `GET /v1/schema` answers the same as JSON schema; `POST /v1/validate` checks a spec, its model, its
data and its verifiers without making a run.

Fields marked **knob** may change while the run goes on (`PATCH /v1/runs/{id}/knobs`, `offbeat run set`). A change holds from a version boundary; the
answer names it. For all other fields, submit another run.
"""

BROKEN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("`staleness = { min_lag = 3, max_lag = 2 }`", {"staleness": {"min_lag": 3, "max_lag": 2}}),
    ("`batch_groups = 16`, `updates_per_batch = 3`", {"batch_groups": 16, "updates_per_batch": 3}),
    ("`sampling.max_tokens = 128`, `model.max_model_len = 128`", {"sampling": {"max_tokens": 128}, "model": {"max_model_len": 128}}),
    ('`data.source = "jsonl"` without `data.path`', {"data": {"source": "jsonl"}}),
    ('`rewards = [{ name = "sum_to_target" }, { wieght = 1 }]`', {"rewards": [{"name": "sum_to_target"}, {"wieght": 1}]}),
)
"""Specs that are refused, with how they are written."""

SHOWN_ALREADY: list[list[type[BaseModel]]] = [[DataSpec], [VerifierSpec]]
"""Sections that evaluation sets have too."""

BOUNDS: tuple[tuple[type, str, str], ...] = (
    (Ge, "ge", "≥ {}"), (Gt, "gt", "> {}"), (Le, "le", "≤ {}"), (Lt, "lt", "< {}"),
    (MinLen, "min_length", "at least {} long"), (MaxLen, "max_length", "at most {} long"),
)  # fmt: skip


def render() -> str:
    own = {name: field for name, field in RunSpec.model_fields.items() if not models_of(field)}
    parts = [HEAD, "## Top level\n", table(own)]
    for name, field in RunSpec.model_fields.items():
        parts += section(name, field)
    parts += ["## Words\n", *(words(name, enum) for name, enum in enums(RunSpec))]
    parts += ["## Combinations that are refused\n", refusals()]
    parts += [
        "## Options of the source `sum_to_target`\n",
        "`data.options` of it. Those of `reasoning_gym:TASK` are the task's own; `functions` has none.\n",
    ]
    parts += [table(SumToTargetOptions.model_fields, prefix="data.options.")]
    parts += ["## Options of the source `addition`\n", table(AdditionOptions.model_fields, prefix="data.options.")]
    parts += ["## Options of the verifiers\n", "`rewards.options` by verifier: see [verifiers.md](verifiers.md).\n"]
    return "\n".join(parts)


def section(name: str, field: FieldInfo) -> list[str]:
    """The tables of a field that is a section, a list of sections or one of several variants, and of the sections in it."""
    models = models_of(field)
    if not models:
        return []
    parts = [f"## {name}\n", without_mark(field.description) + (f" A list: one `[[{name}]]` for each." if is_list(field) else "") + "\n"]
    if len(models) == 1:
        parts += [table(plain(models[0]), prefix=f"{name}.")]
    for variant in models if len(models) > 1 else ():
        tag, about = next(iter(tags(variant).items()))
        parts += [f"### {name}: `{tag} = {json.dumps(about)}`\n", f"{inspect.cleandoc(variant.__doc__ or '')}\n"]
        rest = {key: value for key, value in variant.model_fields.items() if key != tag}
        parts += [table(rest, prefix=f"{name}.")] if rest else []
    if len(models) == 1 and name.count(".") < 1:
        for inner, about_inner in models[0].model_fields.items():
            if models_of(about_inner) not in SHOWN_ALREADY:
                parts += section(f"{name}.{inner}", about_inner)
    return parts


def plain(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields that are no sections, or are shown elsewhere."""
    return {name: field for name, field in model.model_fields.items() if not models_of(field) or models_of(field) in SHOWN_ALREADY}


def tags(variant: type[BaseModel]) -> dict[str, str]:
    return {tag: variant.model_fields[tag].default for tag in TAGS.values() if tag in variant.model_fields}


def table(fields: dict[str, FieldInfo], *, prefix: str = "") -> str:
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        mark = " **knob**" if prefix + name in KNOBS else ""
        rows.append(f"| `{name}`{mark} | {cell(kind(field))} | {cell(default(field))} | {cell(without_mark(field.description))} |")
    return "\n".join(rows) + "\n"


def without_mark(description: str | None) -> str:
    """The description in one line, without its own mark of a knob: the table has one."""
    return re.sub(r"\s*\*Knobs?\.\*", "", " ".join((description or "").split()))


def kind(field: FieldInfo) -> str:
    bounds = [text.format(getattr(one, key)) for one in field.metadata for of, key, text in BOUNDS if isinstance(one, of)]
    bounds += [f"matches `{pattern}`" for one in field.metadata if (pattern := getattr(one, "pattern", None))]
    return ", ".join([spelled(field.annotation), *bounds])


def spelled(annotation: Any) -> str:
    """A type as a user of TOML knows it."""
    plain = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "none", Path: "path"}
    if annotation in plain:
        return plain[annotation]
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return " or ".join(f"`{member.value}`" for member in annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {DataSpec: "as `data`", VerifierSpec: "as `rewards`"}.get(annotation, "table")
    if hasattr(annotation, "__metadata__"):  # Annotated
        return spelled(annotation.__origin__)
    choices = get_args(annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return " or ".join(f"`{choice}`" for choice in choices)
    if getattr(annotation, "__origin__", None) is dict:
        return "table"
    if getattr(annotation, "__origin__", None) is tuple:
        return f"list of {spelled(choices[0])}"
    return " or ".join(spelled(choice) for choice in choices)


def default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "must be given"
    if isinstance(value, BaseModel):
        return "its own"
    return "none" if value is None else f"`{json.dumps(value)}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def models_of(field: FieldInfo) -> list[type[BaseModel]]:
    """The sections that the field may hold, or holds a list of."""
    candidates = [field.annotation, *get_args(field.annotation)]
    return [one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)]


def is_list(field: FieldInfo) -> bool:
    return getattr(field.annotation, "__origin__", None) is tuple


def enums(model: type[BaseModel], prefix: str = "") -> list[tuple[str, type[StrEnum]]]:
    """Dotted name and type of each field that takes one of several words; once for each type."""
    found: dict[type[StrEnum], str] = {}
    for name, field in model.model_fields.items():
        for inner in models_of(field):
            for below, enum in enums(inner, f"{prefix}{name}."):
                found.setdefault(enum, below)
        if isinstance(field.annotation, type) and issubclass(field.annotation, StrEnum):
            found.setdefault(field.annotation, prefix + name)
    return [(name, enum) for enum, name in found.items()]


def words(name: str, enum: type[StrEnum]) -> str:
    """An enumeration's values with the docstrings below them, which Python itself forgets."""
    body = ast.parse(inspect.getsource(enum)).body[0]
    assert isinstance(body, ast.ClassDef)
    meanings: dict[str, str] = {}
    for member, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(member, ast.Assign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            target = member.targets[0]
            assert isinstance(target, ast.Name)
            meanings[target.id] = str(text.value.value)
    rows = [f"- `{member.value}`: {meanings[member.name]}" for member in enum]
    return "\n".join([f"`{name}`: {inspect.getdoc(enum)}", "", *rows]) + "\n"


def refusals() -> str:
    rows = ["| spec | answer |", "|---|---|"]
    for text, tree in BROKEN:
        try:
            RunSpec.model_validate(tree)
        except ValidationError as error:
            found = [f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}".removeprefix(": ") for one in error.errors()]
            rows.append(f"| {text} | {cell('; '.join(found))} |")
        else:
            raise AssertionError(f"{text} is not refused any more")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render())
