"""The codec under garbage: whatever the bytes, they are a message or Undecodable."""

from __future__ import annotations

import pickle

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.contracts.messages import CompletionGroup, Member, PromptGroup, StepRecord, VersionPublished
from services.runtime.codec import Undecodable, decode, encode
from tests.unit.sample_messages import completed, prompt_group, step_record

WHOLE = encode(completed(prompt_group(), versions=(0, 1, 1)))


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("garbage was executed",)


@pytest.mark.parametrize(
    ("garbage", "reason"),
    [
        (b"", "not a MessagePack PromptGroup: "),
        (b"\xc1", "not a MessagePack PromptGroup: "),
        (b'{"run_id": "r"}', "not a MessagePack PromptGroup: "),
        (pickle.dumps(Bomb()), "not a"),
        (msgspec.msgpack.encode([1, 2, 3]), "not a valid PromptGroup: message: Input should be a valid dictionary or instance of PromptGroup"),
        (msgspec.msgpack.encode(None), "not a valid PromptGroup: message: "),
        (msgspec.msgpack.encode({1: 2}), "not a valid PromptGroup: run_id: Field required"),
        (b"\x81\xa1a\xa2\xff\xfe", "not a MessagePack PromptGroup: "),  # a text that is not UTF-8
        (b"\x81\x81\xc0\xc0\xc0", "not a MessagePack PromptGroup: "),  # a map for a key
        (b"\x91" * 200_000 + b"\xc0", "not a MessagePack PromptGroup: "),  # nested beyond every stack
        (b"\xdd\xff\xff\xff\xff", "not a MessagePack PromptGroup: "),  # an array that says that it is 4 GB long
        (b"\xc6\xff\xff\xff\xff", "not a MessagePack PromptGroup: "),
        (b"\xd6\xff\x00\x00\x00\x00", "not a valid PromptGroup: message: "),  # MessagePack's own type for a time
        (b"\xc7\x01\x05x", "not a valid PromptGroup: message: "),  # an extension type
    ],
    ids=range(14),
)
def test_garbage_is_refused_with_a_reason(garbage: bytes, reason: str) -> None:
    with pytest.raises(Undecodable) as caught:
        decode(PromptGroup, garbage)
    assert str(caught.value).startswith(reason)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("length", [*range(0, len(WHOLE), 7), len(WHOLE) - 1])
def test_a_message_that_was_cut_off_is_refused(length: int) -> None:
    with pytest.raises(Undecodable, match=r"^not a MessagePack CompletionGroup: "):
        decode(CompletionGroup, WHOLE[:length])


def test_what_follows_a_message_is_refused() -> None:
    with pytest.raises(Undecodable, match="trailing"):
        decode(CompletionGroup, WHOLE + b"\x00")


def test_another_message_is_refused() -> None:
    with pytest.raises(Undecodable, match=r"^not a valid StepRecord: "):
        decode(StepRecord, encode(VersionPublished(run_id="r", version=1)))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([PromptGroup, CompletionGroup, StepRecord, Member]))
@example(b"\x80", PromptGroup)
def test_any_bytes_are_a_message_or_undecodable(data: bytes, model: type[PromptGroup]) -> None:
    with pytest.raises(Undecodable):
        decode(model, data)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_a_byte_that_was_changed_gives_a_whole_message_or_none(place: int, difference: int) -> None:
    data = bytearray(WHOLE)
    data[place] ^= difference
    try:
        done = decode(CompletionGroup, bytes(data))
    except Undecodable:
        return
    for one in done.completions:
        assert len(one.token_ids) == len(one.logprob_values) == len(one.versions) == 3


@given(st.dictionaries(st.integers(0, 2000), st.integers(0, 2**40)), st.dictionaries(st.text(), st.floats(allow_nan=False)))
def test_any_step_comes_out_as_it_went_in(lags: dict[int, int], values: dict[str, float]) -> None:
    step = step_record(3, [1]).model_copy(update={"lags": lags, "values": values})
    assert decode(StepRecord, encode(step)) == step
