"""Sources that make their prompts: sums to a target, additions, Python functions, and the tasks of the reasoning-gym library."""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Sequence
from typing import Any

from pydantic import Field, ValidationError, model_validator

from services.contracts.section import Section
from services.contracts.spec import Data
from services.control_plane.data.files import options_error
from services.control_plane.data.functions import Function, family
from services.control_plane.data.order import drawn
from services.control_plane.data.rows import Source
from services.runtime.tokenizer import DataError, PromptItem

REASONING_GYM = "reasoning_gym:"
"""Prefix of the sources that are reasoning-gym's tasks."""


class SumToTargetOptions(Section):
    """`data.options` of the source `sum_to_target`."""

    min_target: int = Field(8, ge=1, le=99)
    """Least target."""
    max_target: int = Field(40, ge=1, le=99)
    """Greatest target."""
    targets: tuple[int, ...] | None = None
    """The targets themselves, in place of a range."""

    @model_validator(mode="after")
    def _range(self) -> SumToTargetOptions:
        if self.targets is None and self.min_target > self.max_target:
            raise ValueError(f"min_target ({self.min_target}) is above max_target ({self.max_target}): lower it or raise max_target")
        wrong = [target for target in self.targets or () if not 1 <= target <= 99]
        if wrong:
            raise ValueError(f"targets {wrong} are outside 1 to 99: a target has two digits")
        return self


class SumToTarget:
    """Prompts such as "17=": the completion is to be digits 1-9 joined by "+" with that sum. Many answers are right."""

    def __init__(self, targets: tuple[int, ...]) -> None:
        self._targets = targets

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> PromptItem:
        target = self._targets[index]
        return PromptItem(id=self.item_id(index), prompt=f"{target:02d}=", answer=target)

    def item_id(self, index: int) -> str:
        return f"sum_to_target:{self._targets[index]}"


class AdditionOptions(Section):
    """`data.options` of the source `addition`."""

    least: int = Field(0, ge=0, le=99)
    """Least operand."""
    greatest: int = Field(99, ge=0, le=99)
    """Greatest operand."""

    @model_validator(mode="after")
    def _range(self) -> AdditionOptions:
        if self.least > self.greatest:
            raise ValueError(f"least ({self.least}) is above greatest ({self.greatest}): lower it or raise greatest")
        return self


class Addition:
    """Prompts such as "23+45=": the completion is to be the sum, 68. One answer is right."""

    def __init__(self, options: AdditionOptions, places: Sequence[int]) -> None:
        self._least, self._width, self._places = options.least, options.greatest - options.least + 1, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> PromptItem:
        a, b = self._operands(index)
        return PromptItem(id=self.item_id(index), prompt=f"{a:02d}+{b:02d}=", answer=str(a + b))

    def item_id(self, index: int) -> str:
        a, b = self._operands(index)
        return f"addition:{a}+{b}"

    def _operands(self, index: int) -> tuple[int, int]:
        a, b = divmod(self._places[index], self._width)
        return a + self._least, b + self._least


class Functions:
    """Prompts such as "f(2)=5 f(9)=12 f(13)=16:": the completion is to define a Python function f with these values, and the right ones elsewhere."""

    def __init__(self, functions: Sequence[Function]) -> None:
        self._functions = functions

    def __len__(self) -> int:
        return len(self._functions)

    def __getitem__(self, index: int) -> PromptItem:
        function = self._functions[index]
        return PromptItem(id=self.item_id(index), prompt=function.prompt, answer=function.record)

    def item_id(self, index: int) -> str:
        return f"functions:{self._functions[index].expression}"


class ReasoningGym:
    """A task of reasoning-gym. The answer is the library's whole entry (question, answer, metadata), as JSON has it: what its scorer needs."""

    def __init__(self, dataset: Any, task: str) -> None:
        self._dataset, self._task = dataset, task

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> PromptItem:
        if not 0 <= index < len(self):
            raise IndexError(index)
        entry = self._dataset[index]
        return PromptItem(id=self.item_id(index), prompt=entry["question"], answer=json.loads(json.dumps(entry)))

    def item_id(self, index: int) -> str:
        return f"{self._task}:{index}"


def open_sum_to_target(data: Data, seed: int) -> Source:
    """All targets, or `data.size` of them, drawn by the seed."""
    try:
        options = SumToTargetOptions.model_validate(data.options)
    except ValidationError as error:
        raise DataError(options_error(error)) from None
    targets = tuple(range(options.min_target, options.max_target + 1)) if options.targets is None else options.targets
    if data.size is None:
        return SumToTarget(targets)
    if data.size > len(targets):
        raise DataError(f"data.size ({data.size}) is above the number of targets ({len(targets)}): lower it, or widen min_target to max_target")
    return SumToTarget(tuple(sorted(random.Random(seed).sample(targets, data.size))))


def open_addition(data: Data, seed: int) -> Source:
    """All pairs of operands, or `data.size` of them, drawn by the seed."""
    try:
        options = AdditionOptions.model_validate(data.options)
    except ValidationError as error:
        raise DataError(options_error(error)) from None
    pairs = (options.greatest - options.least + 1) ** 2
    if data.size is not None and data.size > pairs:
        raise DataError(f"data.size ({data.size}) is above the number of pairs ({pairs}): lower it, or widen least to greatest")
    return Addition(options, drawn(data.size, of=pairs, seed=seed))


def open_functions(data: Data, seed: int) -> Source:
    """All functions, or `data.size` of them, drawn by the seed."""
    functions = family()
    if data.options:
        raise DataError(f"data.options: the source 'functions' has none: remove {', '.join(data.options)}")
    if data.size is not None and data.size > len(functions):
        raise DataError(f"data.size ({data.size}) is above the number of functions ({len(functions)}): lower it")
    return Functions([functions[place] for place in drawn(data.size, of=len(functions), seed=seed)])


def open_reasoning_gym(data: Data, seed: int) -> Source:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise DataError(f"the source {data.source!r} needs the package reasoning-gym: install it") from None
    task = data.source.removeprefix(REASONING_GYM)
    if task not in DATASETS:
        near = ", ".join(difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.5)) or "none"
        raise DataError(f"reasoning-gym has no task {task!r}: near ones are {near}; its documentation lists all {len(DATASETS)}")
    arguments = {"seed": seed, **({"size": data.size} if data.size is not None else {}), **data.options}
    try:
        dataset = reasoning_gym.create_dataset(task, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"data.options do not fit reasoning-gym's task {task!r}: {error}") from None
    return ReasoningGym(dataset, task)
