"""What is wrong with a spec, field by field, in words that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo


class Faults(ValueError):
    """Several faults of one spec, each with the field to change; for a validator that looks at the whole and can name the parts."""

    def __init__(self, found: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{name}: {problem}" for name, problem in found))
        self.found = tuple(found)


def explained(error: ValidationError, model: type[BaseModel]) -> list[tuple[str, str]]:
    """(dotted name of the field, what is wrong) of everything that `error` says of a tree for `model`. The name is empty for the tree as a whole."""
    found = error.errors(include_url=False)
    problems: list[tuple[str, str]] = []
    for one in found:
        loc = one["loc"]
        if one["type"] == "too_short" and any(len(other["loc"]) > len(loc) and other["loc"][: len(loc)] == loc for other in found):
            continue  # a list of which an item is wrong counts as too short beside that
        name, parent = _resolve(loc, model)
        inner = one.get("ctx", {}).get("error")
        if isinstance(inner, Faults):
            problems += [(f"{name}.{part}" if name and part else name or part, problem) for part, problem in inner.found]
        elif one["type"] == "extra_forbidden" and parent is not None:
            problems.append((name, f"no such field{_near(str(loc[-1]), list(parent.model_fields))}"))
        elif one["type"] == "union_tag_invalid":
            there = [tag.strip("' ") for tag in one["ctx"]["expected_tags"].split(",")]
            tag = one["ctx"]["discriminator"].strip("'")
            problems.append((f"{name}.{tag}", f"there is no {tag} {one['ctx']['tag']!r}{_near(one['ctx']['tag'], there)}"))
        else:
            given = one["input"]
            shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool)) and len(repr(given)) < 80 else ""
            problems.append((name, one["msg"].removeprefix("Value error, ") + shown))
    return problems


def _resolve(loc: Sequence[str | int], model: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """The name that a user would write for `loc`, without the tags of variants, and the model that its last part is a field of, if it is known."""
    names: list[str] = []
    owner: type[BaseModel] | None = model
    parent: type[BaseModel] | None = model
    choices: tuple[type[BaseModel], ...] = ()
    tag: str | None = None
    for part in loc:
        if choices and isinstance(part, str):  # the tag of the variant that was meant
            owner = next((choice for choice in choices if tag and part in get_args(choice.model_fields[tag].annotation)), None)
            choices = ()
            continue
        names.append(str(part))
        if isinstance(part, int):
            continue
        parent = owner
        field = owner.model_fields.get(part) if owner is not None else None
        models = _models_in(field.annotation) if field is not None else ()
        tag = _discriminator(field)
        owner, choices = (None, models) if len(models) > 1 else (models[0] if models else None, ())
    return ".".join(names), parent


def _models_in(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The models of an annotation such as tuple[M, ...], M | None or A | B."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    return tuple(model for part in get_args(annotation) for model in _models_in(part))


def _discriminator(field: FieldInfo | None) -> str | None:
    return field.discriminator if field is not None and isinstance(field.discriminator, str) else None


def _near(name: str, there: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, there, n=1)
    return f"{f'; did you mean {near[0]!r}?' if near else '.'} There are: {', '.join(there)}"
