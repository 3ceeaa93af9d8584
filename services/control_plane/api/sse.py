"""JSON as server-sent events."""

from __future__ import annotations

from fastapi.sse import format_sse_event

_ENDS = str.maketrans({char: f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"})
"""Ends of lines to Python but not to JSON, which lets them stand in its strings: left as they are, the library would break the string there."""


def message(json_text: str, *, event: str | None = None, id: str | None = None) -> bytes:
    """One message of one line of JSON."""
    return format_sse_event(event=event, id=id, data_str=json_text.translate(_ENDS))
