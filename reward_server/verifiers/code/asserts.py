"""Test code read as data: asserts that are no more than a call with literals become call tests. Nothing is evaluated but literals."""

from __future__ import annotations

import ast
import builtins
from typing import Any

from reward_server.verifiers.code.task import CallTest

PLAIN = (str, bytes, int, float, bool, type(None))


def parsed(source: str) -> list[ast.stmt]:
    """The statements of test code. Raises ValueError."""
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as wrong:
        raise ValueError(f"the test code is not Python: {type(wrong).__name__}: {str(wrong)[:200]}") from wrong


def call_test(statement: ast.stmt, functions: dict[str, str]) -> CallTest | None:
    """`assert f(1, [2]) == 3` as a test of the function that `f` stands for; None for anything else."""
    if not (isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare) and isinstance(statement.test.ops[0], ast.Eq)):
        return None
    if len(statement.test.ops) > 1:
        return None
    call, wanted = statement.test.left, statement.test.comparators[0]
    if not isinstance(call, ast.Call):
        call, wanted = wanted, call
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in functions):
        return None
    try:
        args = [_literal(argument) for argument in call.args]
        kwargs = {keyword.arg: _literal(keyword.value) for keyword in call.keywords if keyword.arg}
        expected = _literal(wanted)
    except ValueError:
        return None
    if len(kwargs) < len(call.keywords):  # f(**{...})
        return None
    return CallTest(functions[call.func.id], args, kwargs, (expected,))


def called_names(statements: list[ast.stmt]) -> set[str]:
    """Names that are called as functions, and that neither Python nor the statements themselves define."""
    called: set[str] = set()
    made: set[str] = set(dir(builtins))
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.add(node.func.id)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                made.add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                made.add(node.name)
            elif isinstance(node, ast.alias):
                made.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.arg):
                made.add(node.arg)
    return called - made


def says_nothing(statement: ast.stmt) -> bool:
    """`assert True, "..."`, `pass`, a docstring."""
    if isinstance(statement, ast.Assert):
        return isinstance(statement.test, ast.Constant) and statement.test.value is True
    return isinstance(statement, ast.Pass) or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))


def _literal(node: ast.expr) -> Any:
    """Raises ValueError for what is no literal of plain data."""
    try:
        value = ast.literal_eval(node)
    except (TypeError, SyntaxError, RecursionError, MemoryError) as wrong:
        raise ValueError("no literal") from wrong
    if not _plain(value):
        raise ValueError("no plain data")
    return value


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_plain(key) and _plain(one) for key, one in value.items())
    return all(map(_plain, value)) if isinstance(value, list | tuple | set | frozenset) else isinstance(value, PLAIN)
