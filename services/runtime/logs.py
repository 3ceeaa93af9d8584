"""JSON logs on standard error: one object a line, with role, run and version."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from pythonjsonlogger.json import JsonFormatter

_context: ContextVar[dict[str, Any] | None] = ContextVar("offbeat_log_context", default=None)
_process: dict[str, Any] = {}


class _WithContext(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        for key, value in {**_process, **(_context.get() or {})}.items():
            setattr(record, key, value)
        return True


def set_up(*, role: str, member: str, level: str = "INFO") -> None:
    """Log to standard error, each line stamped with the process's role and fleet id."""
    _process.update(role=role, member=member)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter("%(levelname)s %(name)s %(message)s", rename_fields={"levelname": "level", "name": "logger"}, timestamp="at"))
    handler.addFilter(_WithContext())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for noisy in ("httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@contextlib.contextmanager
def context(**fields: Any) -> Iterator[None]:
    """Stamp what is logged inside with these fields."""
    token = _context.set({**(_context.get() or {}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def stamp(**fields: Any) -> None:
    """Stamp what this process logs from now on with these fields; None removes one."""
    for key, value in fields.items():
        if value is None:
            _process.pop(key, None)
        else:
            _process[key] = value
