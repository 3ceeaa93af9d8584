"""Tries a solution. The verdict on each test is made here, outside of the sandbox: what is expected never gets where the solution runs.

A test that hits a limit, or ends its process, is failed; the tests after it get a fresh session while the time lasts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from typing import Any, NamedTuple

from reward_server.sandbox.jobs import Cause, Limits, Refused, Reply, Sandbox, Session, Stopped
from reward_server.verifiers.code import examiner
from reward_server.verifiers.code.bench import Bench, Budget, Unusable, limits_within, two_sessions
from reward_server.verifiers.code.compare import same, same_output
from reward_server.verifiers.code.languages import Commands
from reward_server.verifiers.code.task import CallTest, ExaminedTest, ProgramTest, Task, Test
from reward_server.verifiers.verdict import Unjudged, shown
from services.contracts.messages import Outcome

EXAMINER = inspect.getsource(examiner)


class Rules(NamedTuple):
    """How a solution is tried."""

    seconds: float
    """All tests together."""
    each: float
    """One test."""
    memory_bytes: int
    tolerance: float
    tuples_are_lists: bool
    stop_at_failure: bool
    commands: Commands | None = None
    build_seconds: float = 0.0


class Trial(NamedTuple):
    """How one test went."""

    passed: bool
    why: str = ""
    cause: Cause | None = None
    """Limit that was hit."""
    killed: bool = False
    """By somebody else."""


def run(sandbox: Sandbox, code: str, task: Task, rules: Rules) -> list[Trial]:
    """As many of the tests, in their order, as the time and the rules allow. Raises Unjudged.

    A solution that was killed is tried once more within the same time: it may have been for what another did, a right answer must not fail for that,
    and one that brings it about itself gains nothing.
    """
    budget = Budget(rules.seconds, rules.each)
    trials = _run(sandbox, code, task, rules, budget)
    return _run(sandbox, code, task, rules, budget) if any(trial.killed for trial in trials) and budget.left > 0 else trials


def _run(sandbox: Sandbox, code: str, task: Task, rules: Rules, budget: Budget) -> list[Trial]:
    programs = [test for test in task.tests if isinstance(test, ProgramTest)]
    others = [test for test in task.tests if not isinstance(test, ProgramTest)]
    trials: list[Trial] = []
    try:
        with two_sessions(sandbox) if any(isinstance(test, ExaminedTest) for test in others) else nullcontext():
            for tests, prepare in ((others, _loader(code, budget)), (programs, _builder(code, rules))):
                with closing(_trials(sandbox, code, tests, prepare, budget, rules)) as found:
                    for trial in found:
                        trials.append(trial)
                        if rules.stop_at_failure and not trial.passed:
                            return trials
    except Refused as reason:
        raise Unjudged(Outcome.ERROR, f"no place to run code: {reason}", cause="sandbox", tier=sandbox.tier.value) from reason
    return trials


def _trials(
    sandbox: Sandbox, code: str, tests: Sequence[Test], prepare: Callable[[Session], None], budget: Budget, rules: Rules
) -> Generator[Trial, None, None]:  # fmt: skip
    def limits() -> Limits:
        seconds = budget.left + rules.build_seconds
        return limits_within(seconds, memory_bytes=rules.memory_bytes, commands=rules.commands is not None)

    bench = Bench(sandbox, prepare, limits)
    with closing(bench):
        for done, test in enumerate(tests):
            if budget.left <= 0:
                return
            try:
                bench.session()
            except (Unusable, Stopped) as fault:  # it would be the same for each test
                cause, killed = (fault.cause, fault.killed) if isinstance(fault, Stopped) else (None, False)
                yield from [Trial(False, str(fault), cause, killed)] * (len(tests) - done)
                return
            try:
                yield _trial(sandbox, bench.session(), code, test, budget, rules)
            except Stopped as stopped:
                bench.close()
                yield Trial(False, stopped.detail or "ended its process", stopped.cause, stopped.killed)


def _trial(sandbox: Sandbox, session: Session, code: str, test: Test, budget: Budget, rules: Rules) -> Trial:
    """Raises Stopped when the solution's session is over."""
    if isinstance(test, ExaminedTest):
        return _examined(sandbox, session, test, budget, rules)
    if isinstance(test, CallTest):
        reply = _called(session, test.function, test.args, test.kwargs, budget)
        if reply.error:
            return Trial(False, f"raised {shown(reply.error)}")
        right = any(same(reply.value, one, tolerance=rules.tolerance, tuples_are_lists=rules.tuples_are_lists) for one in test.accepted)
        return Trial(right, "" if right else f"returned {_value(reply.value)}")
    with budget.request() as seconds:
        if rules.commands is None:
            reply = session.program(code, test.stdin, seconds=seconds)
        else:
            reply = session.command(list(rules.commands.run), test.stdin, seconds=seconds)
    if reply.error or reply.exit_code:
        return Trial(False, f"ended with {shown(reply.error or f'exit code {reply.exit_code}')}")
    right = same_output(reply.output, test.stdout, tolerance=rules.tolerance)
    return Trial(right, "" if right else f"printed {shown(reply.output)}")


def _examined(sandbox: Sandbox, session: Session, test: ExaminedTest, budget: Budget, rules: Rules) -> Trial:
    """The test code in a session of its own, its calls answered by the solution in the other. Raises Stopped when the solution's is over."""
    with sandbox.open(limits_within(budget.left, memory_bytes=rules.memory_bytes)) as room:
        request = _asked(room, budget, "load")
        request = _asked(room, budget, "begin", test.setup, test.source, test.functions)
        while True:
            match request:
                case ["call", str() as function, list() as args, dict() as kwargs] if budget.left > 0:
                    reply = _called(session, function, args, kwargs, budget)
                    request = _asked(room, budget, "resume", reply.value, reply.error)
                case ["call", *_]:
                    return Trial(False, "out of time", Cause.TIME)
                case ["passed"]:
                    return Trial(True)
                case ["failed", str() as why]:
                    return Trial(False, shown(why))
                case ["stopped", Cause() as cause, bool() as killed]:
                    return Trial(False, "the test itself hit a limit", cause, killed)
                case _:
                    raise Unjudged(Outcome.UNVERIFIABLE, f"the test cannot be run: {ascii(request)[:200]}", tier=sandbox.tier.value)


def _asked(room: Session, budget: Budget, name: str, *args: Any) -> Any:
    """What the examiner says. Its own limits are a `stopped`, its own death nothing that can be judged by."""
    try:
        with budget.request() as seconds:
            reply = room.load(EXAMINER, seconds=seconds) if name == "load" else room.call(name, list(args), {}, seconds=seconds)
    except Stopped as stopped:
        return ["stopped", stopped.cause, stopped.killed] if stopped.cause else ["broken", stopped.detail]
    return ["broken", reply.error] if reply.error else reply.value


def _called(session: Session, function: str, args: list[Any], kwargs: dict[str, Any], budget: Budget) -> Reply:
    try:
        with budget.request() as seconds:
            return session.call(function, args, kwargs, seconds=seconds)
    except ValueError as wrong:
        raise Unjudged(Outcome.UNVERIFIABLE, f"the arguments of a test are no plain data: {wrong}") from wrong


def _loader(code: str, budget: Budget) -> Callable[[Session], None]:
    def load(session: Session) -> None:
        with budget.request() as seconds:
            reply = session.load(code, seconds=seconds)
        if reply.error:
            raise Unusable(f"does not load: {shown(reply.error)}")

    return load


def _builder(code: str, rules: Rules) -> Callable[[Session], None]:
    def build(session: Session) -> None:
        commands = rules.commands
        if commands is None:
            return
        session.write(commands.file, code.encode())
        for argv in commands.build:
            reply = session.command(list(argv), "", seconds=rules.build_seconds)
            if reply.error or reply.exit_code:
                raise Unusable(f"does not build: {shown(reply.error or reply.output)}")

    return build


def _value(value: Any) -> str:
    try:
        return shown(repr(value))
    except (RecursionError, ValueError):  # nested too deep; an int of too many digits
        return f"a {type(value).__name__}"
