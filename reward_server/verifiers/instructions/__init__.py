"""`instructions`: the completion follows instructions that a program can check, in the manner of IFEval (arXiv 2311.07911).

The answer is IFEval's own record: `{"instruction_id_list": ["length_constraints:number_words", ...], "kwargs": [{"num_words": 100, "relation":
"at least"}, ...]}`, one entry of `kwargs` for each id; nulls in it are ignored, as are other fields of the record. Each id is decided as the paper's
own program decides, oddities included, with these exceptions: keywords and markers are texts and no patterns; an argument that the program would draw
at random must be given; a text in which no language can be recognised follows no instruction about its language, where the program lets it pass;
sentences are counted by a rule of this package, languages are told by py3langid, and NaN is no JSON. The thinking part of a completion is cut, and
an empty one follows nothing.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AliasPath, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from reward_server.verifiers.extract import after_thinking
from reward_server.verifiers.instructions.constraint import Constraint
from reward_server.verifiers.instructions.registry import CONSTRAINTS, named
from reward_server.verifiers.verdict import LimitedOptions, Tools, Verdict
from services.contracts.messages import Outcome

LONGEST = 262_144
"""Characters of the longest answer that is judged: twice that of 32,768 tokens of English. A longer one follows nothing."""
MOST = 64
"""Instructions in a record."""


class InstructionOptions(LimitedOptions):
    mode: Literal["strict", "loose"] = "strict"
    """`strict`: the completion as it is; `loose`: one of eight variants is enough: whole, without its first line, its last, or both, each with and
    without asterisks, so that an introduction or emphasis is no fault."""
    credit: Literal["all", "share"] = "all"
    """`all`: 1 when every instruction is followed, else 0; `share`: the share of them that is."""


class Record(BaseModel):
    """What the data give as the answer."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    instruction_id_list: tuple[str, ...] = Field(min_length=1, max_length=MOST)
    arguments: tuple[dict[str, Any] | None, ...] = Field(validation_alias=AliasPath("kwargs"))  # as a field, `kwargs` is one name too many for mypy


def score(text: str, *, prompt: str, answer: JsonValue, options: InstructionOptions, tools: Tools) -> Verdict:
    """1, 0 or a share, by what the completion follows."""
    try:
        constraints = read(answer)
    except ValueError as wrong:
        return Verdict(None, Outcome.UNVERIFIABLE, str(wrong))
    visible = after_thinking(text, prompt)
    if len(visible) > LONGEST:
        return Verdict(0.0, detail=f"answer longer than {LONGEST} characters")
    variants = variants_of(visible) if options.mode == "loose" else [visible]
    variants = [variant for variant in variants if variant.strip()]
    missed = [name for name, constraint in constraints if not any(map(constraint.followed_by, variants))]
    share = 1 - len(missed) / len(constraints)
    detail = f"follows {len(constraints) - len(missed)} of {len(constraints)}" + (f", not {', '.join(missed)}" if missed else "")
    return Verdict(share if options.credit == "share" else float(not missed), detail=detail)


def read(answer: JsonValue) -> list[tuple[str, Constraint]]:
    """The constraints of a record, with their ids. ValueError with all that is wrong in it."""
    try:
        record = Record.model_validate(answer)
    except ValidationError as wrong:
        raise ValueError(f"the answer is no record of instructions: {_faults(wrong)}") from wrong
    if len(record.arguments) != len(record.instruction_id_list):
        raise ValueError(f"the answer has {len(record.instruction_id_list)} instructions and {len(record.arguments)} kwargs: give each its own")
    constraints = []
    for name, kwargs in zip(record.instruction_id_list, record.arguments, strict=True):
        given = {key: value for key, value in (kwargs or {}).items() if value is not None}
        try:
            constraints.append((name, named(name).model_validate(given)))
        except ValidationError as wrong:
            there = ", ".join(CONSTRAINTS[name].model_fields) or "none"
            raise ValueError(f"{name}: {_faults(wrong)}. Arguments are: {there}") from wrong
    return constraints


def variants_of(text: str) -> list[str]:
    """The completion as the loose mode reads it: eight ways, fewer where some are the same."""
    lines = text.split("\n")
    parts = [text, *("\n".join(lines[cut]).strip() for cut in (slice(1, None), slice(None, -1), slice(1, -1)))]
    return list(dict.fromkeys([*parts, *(part.replace("*", "") for part in parts)]))


def _faults(wrong: ValidationError) -> str:
    faults = [f"{'.'.join(map(str, error['loc'])) or 'it'}: {error['msg'].removeprefix('Value error, ')}" for error in wrong.errors()]
    return "; ".join(faults[:5])
