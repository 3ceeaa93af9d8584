"""Gold answers of the known data sets, read into one kind of task. Nothing of a record is evaluated or unpickled as an object.

| record | known by | reference |
|---|---|---|
| own | `calls` with `function`, or `programs` | docs/verifiers.md |
| HumanEval | `test` and `entry_point` | arXiv 2107.03374 |
| MBPP, full and sanitised | `test_list` | arXiv 2108.07732 |
| LiveCodeBench | `public_test_cases`, `private_test_cases` | arXiv 2403.07974 |
| APPS, TACO | `input_output`, or `inputs` and `outputs` | arXiv 2105.09938, 2312.14852 |
| CodeContests | `public_tests`, `private_tests`, `generated_tests` | arXiv 2203.07814 |
"""

from __future__ import annotations

import base64
import json
import pickletools
import re
import zlib
from dataclasses import replace
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from reward_server.verifiers.code.asserts import call_test, called_names, parsed, says_nothing
from reward_server.verifiers.code.task import CallTest, ExaminedTest, ProgramTest, Task, Test

MOST = 1_000
"""Tests of one record."""
LONGEST = 64 << 20
"""Bytes of LiveCodeBench's packed tests, unpacked."""
TEXT = frozenset({"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"})
AROUND = frozenset({"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"})
"""Opcodes of the pickle of a text: all that its packed tests may hold."""
IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]{0,100}"
NAME = re.compile(rf"{IDENTIFIER}(?:\.{IDENTIFIER})?")

MODULES = ("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools", "functools", "operator")
JUDGE_IMPORTS = "\n".join(
    (
        *(f"from {module} import *" for module in (*MODULES, "io", "json", "typing", "builtins")),
        f"import {', '.join(MODULES)}, io, json, sys, typing",
        "sys.setrecursionlimit(50_000)",
    )
)
"""What LiveCodeBench's own runner puts before each solution, and solutions take for granted."""


class Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Call(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    args: list[JsonValue] = []
    named: dict[str, JsonValue] = Field({}, alias="kwargs")
    expected: JsonValue


class Program(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    stdin: str = ""
    stdout: str


class Own(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    function: str = ""
    calls: tuple[Call, ...] = ()
    programs: tuple[Program, ...] = ()
    solution: str = ""


class HumanEval(Record):
    test: str
    entry_point: str
    prompt: str = ""
    canonical_solution: str = ""


class Mbpp(Record):
    test_list: tuple[str, ...]
    challenge_test_list: tuple[str, ...] = ()
    test_setup_code: str = ""
    test_imports: tuple[str, ...] = ()
    code: str = ""


class LiveCodeBench(Record):
    public_test_cases: str | list[JsonValue] = "[]"
    private_test_cases: str | list[JsonValue] = "[]"
    metadata: str | dict[str, JsonValue] = "{}"


class PackedTest(Record):
    input: str
    output: str
    testtype: str = "stdin"


class InputsOutputs(Record):
    inputs: list[JsonValue]
    outputs: list[JsonValue]
    fn_name: str | None = None


class Column(Record):
    input: list[str] = []
    output: list[str] = []


class CodeContests(Record):
    public_tests: Column = Column()
    private_tests: Column = Column()
    generated_tests: Column = Column()


def read(answer: JsonValue) -> Task:
    """The task of a gold answer: an object, or the JSON text of one. Raises ValueError with what is wrong."""
    record = _json(answer, "the answer") if isinstance(answer, str) else answer
    if not isinstance(record, dict):
        raise ValueError("the answer must be a record of tests, or the JSON text of one")
    try:
        task = _known(record)
    except ValidationError as wrong:
        faults = "; ".join(f"{'.'.join(map(str, error['loc'])) or 'it'}: {error['msg']}" for error in wrong.errors()[:3])
        raise ValueError(f"the answer is no record of tests: {faults}") from wrong
    if not task.solution and (solution := _first_solution(record.get("solutions"))):
        task = replace(task, solution=solution)
    if not 1 <= len(task.tests) <= MOST:
        raise ValueError(f"the answer has {len(task.tests)} tests: give from 1 to {MOST}")
    for test in task.tests:
        for text in (test.stdin, test.stdout) if isinstance(test, ProgramTest) else ():
            if not fit(text):
                raise ValueError("a test has text that is not valid Unicode, or a NUL character in it")
    return task


def fit(text: str) -> bool:
    """Text that a program can be given: valid Unicode without NUL."""
    try:
        return b"\x00" not in text.encode()
    except UnicodeEncodeError:
        return False


def _known(record: dict[str, Any]) -> Task:
    if "calls" in record or "programs" in record:
        return _own(Own.model_validate(record))
    if "test" in record and "entry_point" in record:
        return _human_eval(HumanEval.model_validate(record))
    if "test_list" in record:
        return _mbpp(Mbpp.model_validate(record))
    if "public_test_cases" in record or "private_test_cases" in record:
        return _live_code_bench(LiveCodeBench.model_validate(record))
    if "input_output" in record:
        packed = record["input_output"]
        return _inputs_outputs(InputsOutputs.model_validate(_json(packed, "input_output") if isinstance(packed, str) else packed))
    if "inputs" in record and "outputs" in record:
        return _inputs_outputs(InputsOutputs.model_validate(record))
    if "public_tests" in record or "private_tests" in record:
        return _code_contests(CodeContests.model_validate(record))
    raise ValueError(
        "the answer is no record of tests: it has none of calls, programs, test with entry_point (HumanEval), test_list (MBPP), public_test_cases"
        " (LiveCodeBench), input_output (APPS, TACO), public_tests (CodeContests)"
    )


def _own(record: Own) -> Task:
    if record.calls:
        _checked(record.function)
    calls = (CallTest(record.function, call.args, call.named, (call.expected,)) for call in record.calls)
    programs = (ProgramTest(program.stdin, program.stdout) for program in record.programs)
    return Task((*calls, *programs), solution=record.solution, solution_in_python=False)


def _human_eval(record: HumanEval) -> Task:
    """The prompt up to the function's head is imports and helpers. A `check` of nothing but plain asserts becomes a test for each of them."""
    entry = _checked(record.entry_point)
    preamble = record.prompt[:at] if (at := _head(record.prompt, entry)) >= 0 else ""
    statements = parsed(record.test)
    functions = {"candidate": entry}
    check = next((one for one in statements if getattr(one, "name", "") == "check"), None)
    if check is None:
        raise ValueError("the test of a HumanEval record must define check(candidate)")
    tests: list[Test] = []
    for statement in getattr(check, "body", []):
        test = call_test(statement, functions)
        if test is not None:
            tests.append(test)
        elif not says_nothing(statement):
            tests = []
            break
    source = f"{record.test}\ncheck(candidate)\n"
    found = tuple(tests) or (ExaminedTest(preamble, source, functions),)
    solution = record.prompt + record.canonical_solution if record.canonical_solution else ""
    return Task(found, preamble=preamble, entry=entry, stub=record.prompt, solution=solution)


def _mbpp(record: Mbpp) -> Task:
    """Each assert is a test. Names that they call, and that nothing else defines, are the solution's."""
    setup = "\n".join((*record.test_imports, record.test_setup_code))
    sources = (*record.test_list, *record.challenge_test_list)
    codes = [parsed(source) for source in sources]
    names = called_names([*parsed(setup), *(statement for code in codes for statement in code)])
    functions = {name: name for name in sorted(names)}
    if not functions:
        raise ValueError("the asserts of an MBPP record must call a function of the solution")
    tests: list[Test] = []
    for source, code in zip(sources, codes, strict=True):
        test = call_test(code[0], functions) if len(code) == 1 else None
        tests.append(test or ExaminedTest(setup, source, functions))
    return Task(tuple(tests), solution=record.code)


def _live_code_bench(record: LiveCodeBench) -> Task:
    metadata = _json(record.metadata, "metadata") if isinstance(record.metadata, str) else record.metadata
    tests: list[Test] = []
    name = ""
    for name_of, packed in (("public_test_cases", record.public_test_cases), ("private_test_cases", record.private_test_cases)):
        cases = unpacked(packed) if isinstance(packed, str) else packed
        if not isinstance(cases, list):
            raise ValueError(f"{name_of} must be a list of tests")
        for case in map(PackedTest.model_validate, cases):
            if case.testtype == "functional":
                name = _checked(metadata.get("func_name") if isinstance(metadata, dict) else None)
                args = [_json(line, "an input") for line in case.input.split("\n") if line.strip()]
                tests.append(CallTest(name, args, {}, (_json(case.output, "an output"),)))
            else:
                tests.append(ProgramTest(case.input, case.output))
    return Task(tuple(tests), preamble=JUDGE_IMPORTS, method=name, tuples_are_lists=True)


def _inputs_outputs(record: InputsOutputs) -> Task:
    if len(record.inputs) != len(record.outputs):
        raise ValueError(f"{len(record.inputs)} inputs with {len(record.outputs)} outputs: give each its own")
    pairs = list(zip(record.inputs, record.outputs, strict=True))
    if not record.fn_name:
        return Task(tuple(ProgramTest(_text(one), _text(out)) for one, out in pairs), preamble=JUDGE_IMPORTS)
    name = _checked(record.fn_name)
    tests: list[Test] = []
    for given, out in pairs:
        if not isinstance(given, list):
            raise ValueError("an input of a function must be the list of its arguments")
        # an output is the value, or a list of nothing but the value: the data have both
        tests.append(CallTest(name, given, {}, (out, out[0]) if isinstance(out, list) and len(out) == 1 else (out,)))
    return Task(tuple(tests), preamble=JUDGE_IMPORTS, method=name, tuples_are_lists=True)


def _code_contests(record: CodeContests) -> Task:
    tests: list[Test] = []
    for column in (record.public_tests, record.private_tests, record.generated_tests):
        if len(column.input) != len(column.output):
            raise ValueError(f"{len(column.input)} inputs with {len(column.output)} outputs: give each its own")
        tests += [ProgramTest(stdin, stdout) for stdin, stdout in zip(column.input, column.output, strict=True)]
    return Task(tuple(tests), preamble=JUDGE_IMPORTS)


@lru_cache(16)  # a group's completions have the same record, of which this is megabytes
def unpacked(text: str) -> JsonValue:
    """LiveCodeBench's tests: JSON, or the base64 of the zlib of the pickle of its text, which is read without being unpickled."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(text, validate=True), LONGEST)
        if not stream.eof:
            raise ValueError("cut off, or too long")
        inner = _pickled_text(data)
    except (ValueError, zlib.error, MemoryError) as wrong:
        raise ValueError(f"the tests are neither JSON nor packed as LiveCodeBench does: {type(wrong).__name__}: {ascii(wrong)[:100]}") from wrong
    return _json(inner, "the packed tests")


def _pickled_text(data: bytes) -> str:
    """The text of a pickle of one text: its opcodes are read, none is carried out. ValueError for any other pickle."""
    text: str | None = None
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in TEXT and text is None:
            text = argument
        elif opcode.name not in AROUND:
            raise ValueError(f"{opcode.name} in a pickle that is to be a text")
    if text is None:
        raise ValueError("a pickle of no text")
    return text


def _first_solution(solutions: Any) -> str:
    """Of APPS and TACO: a list of solutions, or the JSON text of one."""
    if isinstance(solutions, str):
        try:
            solutions = json.loads(solutions)
        except ValueError:
            return ""
    return solutions[0] if isinstance(solutions, list) and solutions and isinstance(solutions[0], str) else ""


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as wrong:
        raise ValueError(f"{what} is not valid JSON: {str(wrong)[:100]}") from wrong


def _text(lines: Any) -> str:
    """A text, or the list of its lines."""
    if isinstance(lines, list) and all(isinstance(line, str) for line in lines):
        return "\n".join(lines)
    if not isinstance(lines, str):
        raise ValueError("inputs and outputs of a program must be texts or lists of lines")
    return lines


def _checked(name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"the record must name the function to be called; it has {ascii(name)[:60]}")
    return name


def _head(prompt: str, entry: str) -> int:
    """Where the last definition of the function begins; -1 when there is none."""
    last = -1
    for match in re.finditer(rf"^(?:async )?def {entry}\b", prompt, re.MULTILINE):
        last = match.start()
    return last
