"""`code`: the completion's program passes the tests, run in the sandbox; what the tests expect never gets there.

The answer is a record of tests: this package's own (`{"function": "add", "calls": [{"args": [1, 2], "expected": 3}]}`, `{"programs": [{"stdin":
"1 2", "stdout": "3"}]}`), or one of HumanEval, MBPP, LiveCodeBench, APPS, TACO or CodeContests, as it is or as JSON text. A time limit is part of the
task: code that hits one has failed the test, and the outcome says which limit was hit most. Only where there is no sandbox, or the record makes no
sense, is there no score.

Arguments and values cross a wall, as copies, so they must be plain data: None, numbers, texts, bytes, lists, tuples, sets and dicts. A function that
gives a generator or an object of its own has failed; what it does to its arguments is not seen.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import Field, JsonValue, model_validator

from reward_server.sandbox.jobs import Cause
from reward_server.verifiers.code.extraction import last_block
from reward_server.verifiers.code.languages import LANGUAGES, Commands, missing
from reward_server.verifiers.code.records import fit, read
from reward_server.verifiers.code.run import Rules, Trial, run
from reward_server.verifiers.code.task import ProgramTest
from reward_server.verifiers.extract import after_thinking
from reward_server.verifiers.verdict import Options, Tools, Unjudged, Verdict
from services.contracts.messages import Outcome

LONGEST = 200_000
"""Characters of the longest solution that is run."""
PYTHON = ("python", "py", "python3")


class CodeOptions(Options):
    language: Literal["python", "cpp", "c", "javascript"] = "python"
    """Language of the solution. All but Python run programs with stdin/stdout tests only."""
    commands: Commands | None = None
    """Another language, by its commands: `{file = "main.rs", build = [["rustc", "-O", "main.rs"]], run = ["./main"], tags = ["rust"]}`."""
    extract: Literal["fenced", "fenced_or_all", "all"] = "fenced"
    """`fenced`: the last closed code block of the language after the thinking part, else the last without a language; `fenced_or_all`: where there is
    none, all of it; `all`: all that comes after the thinking part."""
    credit: Literal["all", "share"] = "all"
    """`all`: 1 when every test passes, else 0, and the first failure ends the tests; `share`: the share of the tests that pass."""
    tolerance: float = Field(0.0, ge=0, le=1)
    """Relative and absolute difference that numbers may have: returned ones, and printed words that are numbers."""
    tuples_are_lists: bool | None = None
    """A returned tuple equals a list. By default so in records of LiveCodeBench, APPS and TACO, whose JSON has no tuples."""
    seconds_per_test: float = Field(4.0, gt=0, le=60)
    """Wall time of one test, and of loading the solution."""
    seconds: float = Field(20.0, gt=0, le=300)
    """Wall time of all tests together; what is not reached has not passed."""
    build_seconds: float = Field(20.0, gt=0, le=120)
    """Wall time of a compiler."""
    memory_mb: int = Field(512, ge=64, le=8192)
    """Memory of the solution."""

    @model_validator(mode="after")
    def _one(self) -> CodeOptions:
        if self.commands is not None and self.language != "python":
            raise ValueError("give either a language or its commands")
        return self

    @property
    def chosen(self) -> Commands | None:
        """None: Python."""
        return self.commands if self.commands or self.language == "python" else LANGUAGES[self.language].commands


def score(text: str, *, prompt: str, answer: JsonValue, options: CodeOptions, tools: Tools) -> Verdict:
    """1, 0 or a share, by the tests that pass."""
    commands = options.chosen
    try:
        task = read(answer)
    except ValueError as wrong:
        return Verdict(None, Outcome.UNVERIFIABLE, str(wrong))
    if commands is not None and not all(isinstance(test, ProgramTest) for test in task.tests):
        return Verdict(None, Outcome.UNVERIFIABLE, "tests that call a function are for Python only")
    tags = frozenset(PYTHON if commands is None else commands.tags)
    visible = after_thinking(text, prompt)
    code = None if options.extract == "all" else last_block(visible, tags)
    if code is None and options.extract != "fenced":
        code = visible
    if code is None or not code.strip():
        return Verdict(0.0, detail="no code")
    if len(code) > LONGEST:
        return Verdict(0.0, detail=f"code longer than {LONGEST} characters")
    if not fit(code):
        return Verdict(0.0, detail="the code is not valid Unicode, or has a NUL character in it")
    if commands is None:
        task, code = task.of(code), task.module(code)
    elif lacking := missing(commands):
        what = LANGUAGES[options.language].install if options.language in LANGUAGES else ", ".join(lacking)
        raise Unjudged(Outcome.ERROR, f"the tool chain is missing on this server: install {what}", cause="tool_chain")
    sandbox = tools.sandbox()
    rules = Rules(
        seconds=options.seconds, each=options.seconds_per_test, memory_bytes=options.memory_mb << 20, tolerance=options.tolerance,
        tuples_are_lists=task.tuples_are_lists if options.tuples_are_lists is None else options.tuples_are_lists,
        stop_at_failure=options.credit == "all", commands=commands, build_seconds=options.build_seconds if commands else 0.0,
    )  # fmt: skip
    return verdict(run(sandbox, code, task, rules), len(task.tests), options)._replace(tier=sandbox.tier.value)


def gold(answer: JsonValue, options: CodeOptions) -> str | None:
    """The record's reference solution, fenced if it is to be."""
    try:
        task = read(answer)
    except ValueError:
        return None
    solution = "" if options.chosen and task.solution_in_python else task.solution
    return None if not solution else solution if options.extract == "all" else f"```\n{solution}\n```"


def verdict(trials: list[Trial], tests: int, options: CodeOptions) -> Verdict:
    """Of the tests that were tried, in their order; those beyond were not reached."""
    passed = sum(trial.passed for trial in trials)
    causes = Counter(trial.cause for trial in trials if trial.cause)
    first = next((i for i, trial in enumerate(trials) if not trial.passed), None)
    detail = f"passes {passed} of {tests}"
    if first is not None:
        detail += f"; test {first + 1} {trials[first].why}"
    ended = options.credit == "all" and first is not None
    if len(trials) < tests and not ended:
        causes[Cause.TIME] += tests - len(trials)
        detail += f"; {tests - len(trials)} not reached in {options.seconds:g} s"
    value = passed / tests if options.credit == "share" else float(passed == tests)
    if not causes:
        return Verdict(value, detail=detail)
    ((most, _),) = causes.most_common(1)
    if most is Cause.TIME:
        return Verdict(value, Outcome.TIMEOUT, detail)
    return Verdict(value, Outcome.LIMIT, detail, cause=most.value)
