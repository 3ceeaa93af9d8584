"""Plain data as JSON text, for both sides of a job's wall. Standard library only.

None, bool, int, float, str and list are themselves; bytes, tuple, set, frozenset and dict are objects of one member, named in TAGS. The encoder takes
subclasses for their base type, from the data that the base type holds, and calls no method of theirs: an overridden `__eq__` or `__iter__` stays
behind. The decoder builds nothing but these types, whatever the text; it is what stands between untrusted replies and the server.

Names are bound here, once, and not looked up where the job's code could have put others (see `child.own_builtins`).
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

try:
    from _json import encode_basestring_ascii as _quoted  # in C: no patch of the json module reaches it
except ImportError:  # an interpreter without it
    from json.encoder import py_encode_basestring_ascii as _quoted

MAX_DEPTH = 64
"""Of a value."""
IN_REQUEST, IN_REPLY = 3, 1
"""Levels around a value on its way in and out. What comes out can so always be sent in again."""
MAX_INT_BITS = 13_000
"""Python writes and reads integers of at most 4,300 decimal digits."""
MAX_INT_DIGITS = 4_300
MAX_EQUAL_HASHES = 16
"""Members of a set or dict with the same hash: code may choose thousands of integers so, and then it takes minutes to build."""
TAGS = BYTES, TUPLE, SET, FROZENSET, DICT = "bytes", "tuple", "set", "frozenset", "dict"


class NotPlain(ValueError):
    """A value is not plain data, or too deep or large; or a text is not the encoding of any."""


def encode(value: Any, depth: int = MAX_DEPTH) -> str:
    """ASCII. Raises NotPlain."""
    kind = type(value)
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if depth == 0:
        raise NotPlain(f"value nested more than {MAX_DEPTH} deep")
    if issubclass(kind, str):
        return _quoted(value)
    if issubclass(kind, int):
        if int.bit_length(value) > MAX_INT_BITS:
            raise NotPlain(f"integer of more than {MAX_INT_BITS} bits")
        return int.__repr__(value)
    if issubclass(kind, float):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text := float.__repr__(value), text)
    if issubclass(kind, list):
        return _sequence(list.__iter__(value), depth)
    if issubclass(kind, tuple):
        return _tagged(TUPLE, _sequence(tuple.__iter__(value), depth))
    if issubclass(kind, dict):
        return _tagged(DICT, _sequence((part for pair in dict.items(value) for part in pair), depth))
    if issubclass(kind, set):
        return _tagged(SET, _sequence(set.__iter__(value), depth))
    if issubclass(kind, frozenset):
        return _tagged(FROZENSET, _sequence(frozenset.__iter__(value), depth))
    if issubclass(kind, bytes):
        return _tagged(BYTES, f'"{bytes.hex(value)}"')
    raise NotPlain(f"value of type {type.__dict__['__name__'].__get__(kind)} is not plain data")


def _sequence(values: Any, depth: int) -> str:
    return "[" + ",".join([encode(value, depth - 1) for value in values]) + "]"


def _tagged(tag: str, text: str) -> str:
    return f'{{"{tag}":{text}}}'


def _integer(digits: str) -> int:
    if len(digits) > MAX_INT_DIGITS:
        raise NotPlain(f"integer of more than {MAX_INT_DIGITS} digits")
    if int.bit_length(number := int(digits)) > MAX_INT_BITS:
        raise NotPlain(f"integer of more than {MAX_INT_BITS} bits")
    return number


_scan: Any = vars(json.JSONDecoder(parse_int=_integer))["scan_once"]  # in C, too


def decode(text: str, depth: int = MAX_DEPTH) -> Any:
    """Raises NotPlain, whatever the text."""
    try:
        found, end = _scan(text, 0)
    except NotPlain:
        raise
    except (ValueError, RecursionError, StopIteration) as wrong:
        raise NotPlain(f"not JSON: {type(wrong).__name__}") from None
    if end != len(text):
        raise NotPlain("text goes on behind the value")
    return _rebuilt(found, depth)


def _rebuilt(found: Any, depth: int) -> Any:
    if not isinstance(found, list | dict):
        return found
    if depth == 0:
        raise NotPlain(f"value nested more than {MAX_DEPTH} deep")
    if isinstance(found, list):
        return [_rebuilt(value, depth - 1) for value in found]
    if len(found) != 1:
        raise NotPlain("an object must have one member, its tag")
    [(tag, content)] = found.items()
    if tag == BYTES and isinstance(content, str):
        try:
            return bytes.fromhex(content)
        except ValueError:
            raise NotPlain("bytes that are no hexadecimal digits") from None
    if tag not in TAGS or tag == BYTES or not isinstance(content, list):
        raise NotPlain("no such tag, or not its content")
    values = [_rebuilt(value, depth - 1) for value in content]
    if tag == TUPLE:
        return tuple(values)
    if tag == DICT:
        if len(values) % 2:
            raise NotPlain("a dict with a key that has no value")
        return dict(zip(_hashable(values[::2]), values[1::2], strict=True))
    return set(_hashable(values)) if tag == SET else frozenset(_hashable(values))


def _hashable(values: list[Any]) -> list[Any]:
    try:
        hashes = sorted(map(hash, values))
    except TypeError:
        raise NotPlain("a set or dict of values that cannot be in one") from None
    run = 1
    for before, after in pairwise(hashes):
        run = run + 1 if before == after else 1
        if run > MAX_EQUAL_HASHES:
            raise NotPlain("too many members with the same hash")
    return values
