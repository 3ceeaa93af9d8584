"""`reasoning_gym`: the task's own `score_answer`, in a worker process, for its scorers may hang.

The answer is the data set's entry: an object with `answer` and `metadata` (and `question`, else the prompt stands in), or the plain answer with the
option `task`. A scorer that raises on the model's answer, but not on the gold one, has met a malformed answer: 0. One that raises on both is
unverifiable. Some scorers evaluate the answer, or the entry, as Python; the worker gives those literals or plain algebra only. The figures are the
library's own, oddities included: where False is right, `game_of_life_halting` gives the point to anything but True.
"""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, JsonValue

from reward_server.verifiers.extract import after_thinking, last_tagged
from reward_server.verifiers.verdict import Judge, LimitedOptions, Tools, Unjudged, Verdict, shown
from services.contracts.messages import Outcome

LONGEST = 16_384
"""Characters of the longest answer: the largest boards are shorter."""

LITERALS = (
    "algorithmic.binary_matrix", "algorithmic.number_sorting", "algorithmic.spiral_matrix", "algorithmic.string_insertion", "games.n_queens",
)  # fmt: skip
"""Modules of reasoning_gym whose scorers call `eval` on an answer, to read a Python list."""
ALGEBRA = frozenset({"countdown", "puzzle24", "simple_integration", "intermediate_integration", "polynomial_multiplication"})
"""Tasks whose scorers give the answer to sympy's `parse_expr`, which is `eval` too."""
FUNCTIONS = "sin|cos|tan|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|Abs|pi|Rational"
SAFE_ALGEBRA = re.compile(rf"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+|[-+*/^(),\s]|(?:{FUNCTIONS}|[A-Za-z])(?![A-Za-z_]))*+", re.ASCII)
"""Numbers, operators, one-letter names and these functions: no string, attribute or other name that Python would look up. No `Integral` either,
though some gold answers have one: an answer that only names the integral that is asked for would be right."""
BITS = re.compile(r"[0-9a-fA-FxX()+*&|^~<>\s-]*")
"""What `bitwise_arithmetic` evaluates: a problem with numbers and operators."""
TUPLES = frozenset({"arc_agi", "rearc"})
"""Tasks whose scorers compare with tuples in the metadata, which JSON made lists of."""


class ReasoningGymOptions(LimitedOptions):
    task: str | None = None
    """Name of the task; by default what the answer's metadata say."""
    config: dict[str, JsonValue] = Field(default_factory=dict)
    """The task's own arguments, where its scorer depends on them."""
    extract: Literal["answer", "last_line", "whole"] = "answer"
    """`answer`: what stands in the last `<answer>` tags; `last_line`: the last line with text in it; `whole`: all. The thinking part is cut."""


def score(text: str, *, prompt: str, answer: JsonValue, options: ReasoningGymOptions, tools: Tools) -> Verdict:
    """The scorer's own figure, from 0 to 1."""
    entry = answer if isinstance(answer, dict) else {"answer": answer, "metadata": {}}
    metadata = entry.get("metadata")
    task = options.task or (metadata.get("source_dataset") if isinstance(metadata, dict) else None)
    if answer is None or "answer" not in entry or not isinstance(metadata, dict) or not isinstance(task, str):
        return Verdict(None, Outcome.UNVERIFIABLE, "the answer must be a reasoning-gym entry, or a text with the option task")
    found = _extract(after_thinking(text, prompt), options.extract)
    if not found:
        return Verdict(0.0, detail="no answer")
    if len(found) > LONGEST:
        return Verdict(0.0, detail=f"answer longer than {LONGEST} characters")
    reply = tools.ask("reasoning_gym", {"task": task, "config": options.config, "entry": {"question": prompt, **entry}, "answer": found})
    if not isinstance(reply, float):
        raise Unjudged(Outcome.UNVERIFIABLE, str(reply))
    return Verdict(reply, detail=f"answer {shown(found)}")


def gold(answer: JsonValue, options: ReasoningGymOptions) -> str | None:
    """The entry's answer, tagged if it is to be."""
    text = answer.get("answer") if isinstance(answer, dict) else answer
    if not isinstance(text, str):
        return None
    return f"<answer>{text}</answer>" if options.extract == "answer" else text


def _extract(text: str, how: str) -> str | None:
    if how == "answer":
        return last_tagged(text, "answer")
    text = text.strip()
    return text.rpartition("\n")[2] if how == "last_line" else text


def _warm() -> None:
    import reasoning_gym

    for module in LITERALS:
        vars(sys.modules[f"{reasoning_gym.__name__}.{module}"])["eval"] = ast.literal_eval


@lru_cache(32)
def _dataset(task: str, config: str) -> Any:
    """The task, whose scorer is all that is used."""
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **{"seed": 0, "size": 1, **json.loads(config)})


def _decide(request: dict[str, Any]) -> JsonValue:
    """The score, or a sentence that says why there cannot be one. Runs in a worker only."""
    task, entry, answer = request["task"], request["entry"], request["answer"]
    if task == "composite":  # its scorer is another task's, which could then evaluate anything
        return "composite is no task of its own: its entries name theirs as source_dataset"
    if not _plain(task, entry):
        return f"the entry of {task} has something else than plain numbers and algebra where its scorer evaluates it"
    try:
        scorer = _dataset(task, json.dumps(request["config"], sort_keys=True)).score_answer
    except Exception as wrong:  # the library raises whatever its configurations raise
        return f"reasoning-gym has no task {task!r} with this configuration: {type(wrong).__name__}: {wrong}"[:300]
    if task in TUPLES:
        entry = entry | {"metadata": {name: _tuples(value) for name, value in entry["metadata"].items()}}
    if task in ALGEBRA and not SAFE_ALGEBRA.fullmatch(answer):
        return 0.0
    try:
        reward = float(scorer(answer, entry))
    except Exception as refused:  # a scorer may stumble over whatever the model wrote, and then over nothing else
        try:
            scorer(entry["answer"], entry)
        except Exception as wrong:
            return f"the scorer of {task} refuses the entry: {type(wrong).__name__} ({type(refused).__name__} on the completion)"
        return 0.0
    return reward if math.isfinite(reward) else f"the scorer of {task} gave {reward}"


def _plain(task: str, entry: dict[str, Any]) -> bool:
    """Whether what the scorer evaluates of the entry itself is safe to be evaluated."""
    metadata = entry["metadata"]
    if task == "bitwise_arithmetic":
        return BITS.fullmatch(str(metadata.get("problem", ""))) is not None
    evaluated = entry["answer"] if task == "polynomial_multiplication" else metadata.get("integrand", "")
    return task not in ALGEBRA or SAFE_ALGEBRA.fullmatch(str(evaluated)) is not None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


JUDGE = Judge(warm=_warm, decide=_decide, seconds=2.0)
