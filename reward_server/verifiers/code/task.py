"""What a solution is tested with, whatever record it came from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class CallTest:
    """A call of the solution's function, whose value is compared here."""

    function: str
    """Name in the solution's module; `Solution.name` for a method."""
    args: list[Any]
    kwargs: dict[str, Any]
    accepted: tuple[Any, ...]
    """Values of which one is to be returned."""


@dataclass(frozen=True)
class ProgramTest:
    """A run of the solution as a program, whose output is compared here."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class ExaminedTest:
    """Test code with asserts, run in a session of its own, to which the solution's answers are relayed."""

    setup: str
    """Code of the data set that makes the names which the test needs. When it fails, nothing can be said of the solution."""
    source: str
    functions: dict[str, str] = field(default_factory=dict)
    """Names of the solution's functions by the names that the test calls them by."""


Test = CallTest | ProgramTest | ExaminedTest


@dataclass(frozen=True)
class Task:
    """A record, read."""

    tests: tuple[Test, ...]
    preamble: str = ""
    """Code before the solution: imports that the data set takes for granted, helpers that its prompt gives."""
    entry: str = ""
    """The function to be defined."""
    stub: str = ""
    """Its head with its docstring. A solution that does not define the function is its body."""
    method: str = ""
    """The function to be defined may be this method of a class `Solution`."""
    solution: str = ""
    """The record's own, if it has one."""
    solution_in_python: bool = True
    """Else it is in whatever language the options name."""
    tuples_are_lists: bool = False
    """The record is JSON made of Python values, which has no tuples: a returned tuple equals a list."""

    def of(self, code: str) -> Task:
        """The same, its tests aimed at the method of `Solution` where the code has that class and no function of the name."""
        if not self.method or defines(code, self.method) or not re.search(r"^class Solution\b", code, re.MULTILINE):
            return self
        name = f"Solution.{self.method}"
        return replace(self, tests=tuple(replace(test, function=name) if isinstance(test, CallTest) else test for test in self.tests))

    def module(self, code: str) -> str:
        """The module that is tested: the preamble and the solution, or the stub with the solution as its body."""
        if self.stub and not defines(code, self.entry):
            return f"{self.stub}{code if code[:1].isspace() else _indented(code)}\n"
        future = "from __future__" in code  # which must come first
        return code if future or not self.preamble else f"{self.preamble}\n{code}\n"


def defines(code: str, name: str) -> bool:
    """At the margin, by its looks: nothing of the code is parsed outside of the sandbox."""
    return re.search(rf"^(?:(?:async )?def {name}\b|{name}\s*[=:])", code, re.MULTILINE) is not None


def _indented(code: str) -> str:
    return "".join(f"    {line}" for line in code.splitlines(keepends=True))
