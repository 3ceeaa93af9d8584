"""Plain data across a job's wall: what goes in comes out, and nothing else does."""

import collections
import enum
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_server.sandbox import plain
from reward_server.sandbox.plain import MAX_DEPTH, MAX_EQUAL_HASHES, MAX_INT_BITS, NotPlain, decode, encode

hashable = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()) | st.binary(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=4),
    max_leaves=8,
)
values = st.recursive(
    hashable,
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.sets(hashable, max_size=4) | st.dictionaries(hashable, inner, max_size=4)
    ),
    max_leaves=20,
)


def same(a: object, b: object) -> bool:
    """Equal, and of the same types all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(same, a.items(), b.items()))
    return a == b


@given(values)
def test_values_come_back_as_they_were(value: object) -> None:
    text = encode(value)
    assert text.isascii()
    assert same(decode(text), value)


def test_numbers_that_are_none_come_back() -> None:
    assert math.isnan(decode(encode(math.nan)))
    assert decode(encode([math.inf, -math.inf, -0.0])) == [math.inf, -math.inf, 0.0]
    assert math.copysign(1, decode(encode(-0.0))) == -1


def test_lone_surrogates_come_back() -> None:
    assert decode(encode("\ud800 \x00")) == "\ud800 \x00"


@given(st.text(max_size=200) | st.text('[]{}",:0123456789eE.-nultrefasNI \\bytdics', max_size=60))
def test_any_text_is_decoded_or_refused(text: str) -> None:
    try:
        value = decode(text)
    except NotPlain:
        return
    assert same(decode(encode(value)), value) or value != value or "NaN" in text


GARBAGE = [
    "", "[", "[1", "1 2", " ", "{}", '{"a":1}', '{"tuple":1}', '{"bytes":"0"}', '{"bytes":[]}', '{"set":[[1]]}', '{"dict":[1]}', '{"dict":[[1],2]}',
    '{"tuple":[],"set":[]}', "[" * 100_000, "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2),
    '{"tuple":[' * 100 + "]}" * 100, "9" * 5_000, "-" + "9" * 5_000,
    str(1 << MAX_INT_BITS), "nul", '"\n"', "\x00",
]  # fmt: skip


@pytest.mark.parametrize("text", GARBAGE, ids=lambda text: text[:12].encode("unicode_escape").decode() or "empty")
def test_garbage_is_refused(text: str) -> None:
    with pytest.raises(NotPlain):
        decode(text)


def test_members_with_the_same_hash_are_few() -> None:
    modulus = 2**61 - 1
    alike = [n * modulus for n in range(MAX_EQUAL_HASHES + 1)]
    assert decode(json.dumps({"set": alike[:-1]})) == set(alike[:-1])
    for text in (json.dumps({"set": alike}), json.dumps({"frozenset": alike}), json.dumps({"dict": [part for n in alike for part in (n, 0)]})):
        with pytest.raises(NotPlain, match="hash"):
            decode(text)


class Colour(enum.IntEnum):
    RED = 3


class Liar(list):
    def __eq__(self, other: object) -> bool:
        return True

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([1, 2, 3])

    def __len__(self) -> int:
        return 3

    __hash__ = None  # type: ignore[assignment]


class LyingText(str):
    def __eq__(self, other: object) -> bool:
        return True

    def __str__(self) -> str:
        return "right"

    __hash__ = str.__hash__


class LyingNumber(int):
    def __repr__(self) -> str:
        return '0,"ok"'

    def __int__(self) -> int:
        return 42


class LyingFloat(float):
    def __repr__(self) -> str:
        return "]"


class LyingDict(dict):
    def items(self):  # type: ignore[no-untyped-def]
        return [("a", "right")]


class LyingBytes(bytes):
    def hex(self, *_: object) -> str:
        return '"'


@pytest.mark.parametrize(
    ("value", "plainly"),
    [
        (Liar([0]), [0]), (LyingText("wrong"), "wrong"), (LyingNumber(7), 7), (LyingFloat(1.5), 1.5), (LyingDict(a=1), {"a": 1}),
        (LyingBytes(b"x"), b"x"),
        (Colour.RED, 3), (collections.Counter("aab"), {"a": 2, "b": 1}), (collections.namedtuple("P", "x y")(1, 2), (1, 2)),
        (collections.OrderedDict([(1, 2)]), {1: 2}), (True, True),
    ],
)  # fmt: skip
def test_subclasses_are_taken_for_the_data_of_their_base(value: object, plainly: object) -> None:
    assert same(decode(encode(value)), plainly)


@pytest.mark.parametrize("value", [object(), len, 1j, range(3), bytearray(b"x"), (n for n in "ab"), type, [object()], {1: object()}, {"a": {len}}])
def test_what_is_not_plain_is_refused(value: object) -> None:
    with pytest.raises(NotPlain, match="is not plain data"):
        encode(value)


def test_the_name_in_the_message_is_the_true_one() -> None:
    class Meta(type):
        __name__ = property(lambda cls: "int")  # type: ignore[assignment]

    with pytest.raises(NotPlain, match="type Hidden "):
        encode(Meta("Hidden", (), {})())


def test_what_is_too_deep_or_large_is_refused() -> None:
    nested: list[object] = []
    for _ in range(MAX_DEPTH):
        nested = [nested]
    with pytest.raises(NotPlain, match="deep"):
        encode(nested)
    assert decode(encode(nested, MAX_DEPTH + 1), MAX_DEPTH + 1) == nested
    nested.append(nested)
    with pytest.raises(NotPlain, match="deep"):
        encode(nested)
    assert decode(encode(1 << (MAX_INT_BITS - 1))) == 1 << (MAX_INT_BITS - 1)
    with pytest.raises(NotPlain, match="bits"):
        encode(1 << MAX_INT_BITS)


def test_a_poisoned_json_module_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dumps", "loads", "JSONEncoder", "JSONDecoder"):
        monkeypatch.setattr(json, name, lambda *_, **__: "right")
    monkeypatch.setattr(plain.json, "loads", lambda *_: 1 / 0)
    assert decode(encode({"a": (1, "x")})) == {"a": (1, "x")}
