"""Runs in a session of its own: test code, whose calls of the solution are answered from outside, one after the other.

The supervisor calls `begin` and then `resume` with each answer; both give the next request, or how the test ended. The test runs in a thread, which
waits where it calls the solution. Not imported by the server: its text is what the session loads.
"""

import builtins
import queue
import random
import threading
from typing import Any

_requests: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
_answers: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()


class SolutionFailed(Exception):
    """The solution raised what Python has no name for."""


def begin(setup: str, source: str, functions: dict[str, str]) -> list[Any]:
    """The first request: `["call", function, args, kwargs]`; or the end: `["passed"]`, `["failed", why]`, `["broken", why]` (a fault of the test)."""
    names: dict[str, Any] = {"__name__": "test"}
    try:
        exec(compile(setup, "setup", "exec"), names)
        test = compile(source, "test", "exec")
    except Exception as wrong:
        return ["broken", f"{type(wrong).__name__}: {wrong}"[:300]]
    names.update({alias: _relayed(function) for alias, function in functions.items()})
    random.seed(0)  # the same test for every completion
    threading.Thread(target=_run, args=(test, names), daemon=True).start()
    return _requests.get()


def resume(value: Any, error: str) -> list[Any]:
    """The next request, after the solution's value, or what it raised."""
    _answers.put([value, error])
    return _requests.get()


def _run(test: Any, names: dict[str, Any]) -> None:
    try:
        exec(test, names)
    except BaseException as wrong:
        _requests.put(["failed", f"{type(wrong).__name__}: {wrong}"[:300]])
    else:
        _requests.put(["passed"])


def _relayed(function: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        _requests.put(["call", function, list(args), kwargs])
        value, error = _answers.get()
        if error:
            kind, _, message = error.partition(": ")
            known = getattr(builtins, kind, None)
            raise (known if isinstance(known, type) and issubclass(known, Exception) else SolutionFailed)(message)
        return value

    return call
