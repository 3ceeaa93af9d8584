"""Run specs from files and `--set` options, with errors that name the field."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from services.cli.session import Code, Failure
from services.contracts.spec import Knobs, RunSpec

Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Replace a field of the spec; may be given several times.")]


def load_spec(path: Path, sets: Sequence[str] = ()) -> RunSpec:
    """The spec in a TOML or JSON file ("-": standard input), with the fields of `sets` replaced."""
    tree = read_tree(path)
    for name, value in assignments(sets).items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise Failure(f"--set {name}: {parent} has no fields", code=Code.USAGE)
        node[leaf] = value
    try:
        return RunSpec.model_validate(tree)
    except ValidationError as error:
        raise Failure(f"{path} is not a valid spec\n{_explain(error)}", code=Code.USAGE) from error


def assignments(sets: Sequence[str]) -> Knobs:
    """Values by dotted name out of "a.b=c"; the value is read as TOML, and as text where it is none."""
    values: Knobs = {}
    for text in sets:
        name, equals, raw = text.partition("=")
        if not equals or not all(part.isidentifier() for part in name.split(".")):
            raise Failure(f"{text!r} is no assignment: write it as name=value, such as clip.high=0.28", code=Code.USAGE)
        values[name] = _value(raw)
    return values


def _value(raw: str) -> Any:
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


def read_tree(path: Path, *, examples: str = "deploy/runs") -> dict[str, Any]:
    """The content of a TOML or JSON file; `examples` says where to find some like it."""
    try:
        raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = raw.decode()
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}; examples are in {examples}", code=Code.USAGE) from error
    except UnicodeDecodeError as error:
        raise Failure(f"{path} is not UTF-8 text (byte {error.start})", code=Code.USAGE) from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise Failure(f"{path} cannot be read as {'JSON' if path.suffix == '.json' else 'TOML'}: {error}", code=Code.USAGE) from error
    if not isinstance(tree, dict):
        raise Failure(f"{path} holds no table of fields", code=Code.USAGE)
    return tree


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        given = problem["input"]
        shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool)) and len(repr(given)) < 80 else ""
        lines.append(f"  {name}: {message}{shown}" if name else f"  {message}")
    return "\n".join(lines)
