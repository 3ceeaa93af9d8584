"""JSON logs on standard error: one object a line, with role, run and version. Those of the fleet's processes go to Redis too."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from services.contracts.messages import Role
from services.runtime.log_shipping import LogShipper
from services.runtime.redaction import redacted
from services.runtime.settings import Settings

log = logging.getLogger(__name__)

_context: ContextVar[dict[str, Any] | None] = ContextVar("offbeat_log_context", default=None)
_process: dict[str, Any] = {}


class _WithContext(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        for key, value in {**_process, **(_context.get() or {})}.items():
            setattr(record, key, value)
        return True


class _Redacted(JsonFormatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def set_up(*, role: str, member: str, level: str = "INFO") -> None:
    """Log to standard error, each line stamped with the process's role and fleet id. An error that ends the process is logged as well."""
    _process.update(role=role, member=member)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacted("%(levelname)s %(name)s %(message)s", rename_fields={"levelname": "level", "name": "logger"}, timestamp="at"))
    handler.addFilter(_WithContext())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    sys.excepthook = _ended
    for noisy in ("httpx", "httpcore", "uvicorn.access", "uvicorn.error"):  # the last one, despite its name, tells that it started
        logging.getLogger(noisy).setLevel(logging.WARNING)


def set_up_member(role: Role, settings: Settings, *, member: str | None = None, ship: bool = True) -> None:
    """The same for a process of the fleet, whose log also goes to the API and the page where its settings do not say otherwise."""
    set_up(role=role, member=member or settings.member, level=settings.log_level)
    if ship and settings.ship_logs != "OFF":
        shipper = LogShipper(settings.redis_url, level=settings.ship_logs)
        shipper.addFilter(_WithContext())
        logging.getLogger().addHandler(shipper)


def dropped() -> int:
    """Lines of this process that were not shipped, since Redis was away for too long."""
    return sum(handler.dropped for handler in logging.getLogger().handlers if isinstance(handler, LogShipper))


def write_the_last() -> None:
    """Wait for the lines that are still to be shipped, before another program takes this process's place."""
    for handler in logging.getLogger().handlers:
        handler.close()


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


def _ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, Exception):
        log.critical("ended by an error: %s", kind.__name__, exc_info=(kind, error, trace))
    else:
        sys.__excepthook__(kind, error, trace)
