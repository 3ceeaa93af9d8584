"""The messages: they come through the codec as they went in, and what is not one of them is refused with a reason."""

from __future__ import annotations

import math
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.contracts import messages
from services.contracts.messages import (
    MESSAGES,
    Completion,
    CompletionGroup,
    DeadLetter,
    EvaluationRecord,
    FinishReason,
    LoadedWeights,
    LoadWeights,
    LogLevel,
    LogLine,
    Member,
    Message,
    PromptGroup,
    Role,
    RunEvent,
    Sample,
    ScoredGroup,
    Severity,
    VersionPublished,
    VersionSpan,
    pack_floats,
    pack_ints,
    unpack_floats,
    unpack_ints,
)
from services.contracts.spec import KvPolicy
from services.runtime.codec import Undecodable, decode, encode
from tests.unit.sample_messages import completed, completion, prompt_group, score, scored, step_record

GROUP = prompt_group(3, answer={"numbers": [1, 2.5, None, True], "text": "π"})
DONE = completed(GROUP, versions=(4, 4, 5))
SCORED = scored(DONE, [1.0, -0.25])
EXAMPLES: dict[str, Message] = {
    example.kind: example
    for example in (
        GROUP,
        DONE,
        SCORED,
        VersionPublished(run_id="r", version=7),
        step_record(6, [3]),
        EvaluationRecord(
            run_id="r",
            name="held-out",
            domain="out",
            version=40,
            at=1005.5,
            prompts=12,
            samples=16,
            temperature=1.0,
            top_p=0.9,
            max_tokens=16,
            values={"pass_at_1": 0.25},
        ),
        RunEvent(run_id="r", event="knobs_changed", text="turned", severity=Severity.WARNING, version=3, data={"clip.low": 0.1}),
        LogLine(
            at=1006.5,
            level=LogLevel.ERROR,
            logger="trainer",
            role="trainer",
            member="t-0",
            host="h",
            pid=3,
            run_id="r",
            version=3,
            text="why",
            traceback="Traceback\nValueError: why",
            data={"index": 1, "error": "why"},
        ),
        Sample(scored=SCORED, trained_version=6, advantages=(1.0, -1.0)),
        DeadLetter(run_id="r", stream="prompts", reason="why", group=GROUP, raw=b"\xff\x00"),
        Member(member_id="m", role=Role.ROLLOUT, url="http://h:1", pid=1, host="h", started_at=1.5, version=3),
    )
}


def test_there_is_an_example_of_every_message() -> None:
    assert EXAMPLES.keys() == MESSAGES.keys()
    assert {m.kind for m in vars(messages).values() if isinstance(m, type) and issubclass(m, Message) and m is not Message} == MESSAGES.keys()


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_message_comes_out_as_it_went_in_to_the_byte(kind: str) -> None:
    data = encode(EXAMPLES[kind])
    back = decode(MESSAGES[kind], data)
    assert back == EXAMPLES[kind]
    assert type(back) is MESSAGES[kind]
    assert encode(back) == data


def test_weight_requests_come_through_the_codec_too() -> None:
    request = LoadWeights(
        run_id="r", version=3, transport="shm", kv_policy=KvPolicy.KEEP, canary=(1, 2), expected=(-0.1,), tolerance=1e-3, source={"path": "/x"}
    )
    assert decode(LoadWeights, encode(request)) == request


@pytest.mark.parametrize("kind", MESSAGES)
def test_another_schema_version_is_refused(kind: str) -> None:
    tree = EXAMPLES[kind].model_dump() | {"schema_version": 2}
    with pytest.raises(Undecodable, match=rf"^not a valid {MESSAGES[kind].__name__}: schema_version: Input should be less than or equal to 1$"):
        decode(MESSAGES[kind], msgspec.msgpack.encode(tree))


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_field_too_many_or_too_few_is_named(kind: str) -> None:
    tree = EXAMPLES[kind].model_dump()
    with pytest.raises(Undecodable, match=r"^not a valid \w+: surprise: Extra inputs are not permitted$"):
        decode(MESSAGES[kind], msgspec.msgpack.encode(tree | {"surprise": 1}))
    needed = next(name for name, field in MESSAGES[kind].model_fields.items() if field.is_required())
    del tree[needed]
    with pytest.raises(Undecodable, match=rf"^not a valid \w+: {needed}: Field required$"):
        decode(MESSAGES[kind], msgspec.msgpack.encode(tree))


def test_the_place_of_what_is_wrong_is_named() -> None:
    tree = DONE.model_dump()
    tree["completions"][1]["finish"] = "tired"
    with pytest.raises(Undecodable, match=r"^not a valid CompletionGroup: completions\.1\.finish: Input should be 'stop' or 'length'$"):
        decode(CompletionGroup, msgspec.msgpack.encode(tree))


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        GROUP.index = 4  # type: ignore[misc]


# -- arrays ---------------------------------------------------------------------------------------------------------------------------


def test_arrays_are_packed_little_endian() -> None:
    assert pack_ints([1, -2, 2**31 - 1]) == struct.pack("<3i", 1, -2, 2**31 - 1)
    assert pack_floats([-0.5, 3.25]) == struct.pack("<2f", -0.5, 3.25)
    with pytest.raises(OverflowError):
        pack_ints([2**31])


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_ints_come_back(values: list[int]) -> None:
    assert unpack_ints(pack_ints(values)) == values


@given(st.lists(st.floats(width=32)))
def test_floats_come_back_with_their_bits(values: list[float]) -> None:
    packed = pack_floats(values)
    assert len(packed) == 4 * len(values)
    assert pack_floats(unpack_floats(packed)) == packed


def test_a_group_as_its_readers_see_it() -> None:
    assert GROUP.group_id == "r:3"
    assert GROUP.prompt_ids == [7, 5]
    first = DONE.completions[0]
    assert (first.token_ids, first.logprob_values, first.versions) == ([3, 4, 5], [-0.5, -1.0, -1.5], [4, 4, 5])
    assert (DONE.start_version, DONE.newest_version) == (4, 5)
    assert SCORED.rewards == [1.0, -0.25]
    assert EXAMPLES["sample"].lags == [[2, 2, 1]] * 2  # type: ignore[attr-defined]


def test_versions_may_go_back_where_a_trainer_died_before_it_could_announce_one() -> None:
    done = completed(prompt_group(), versions=(5, 5, 4))
    assert (done.start_version, done.newest_version, done.completions[0].versions) == (4, 5, [5, 5, 4])


# -- what does not fit together -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": pack_ints([3, 4])}, "8 bytes of tokens with 12 of log-probabilities"),
        ({"tokens": b"12345", "logprobs": b"12345"}, "5 bytes of tokens"),
        ({"tokens": b"", "logprobs": b"", "spans": ()}, "or none"),
        ({"spans": ()}, "do not cover the 3 tokens"),
        ({"spans": (VersionSpan(version=0, start=0, end=2),)}, "do not cover the 3 tokens"),
        ({"spans": (VersionSpan(version=0, start=1, end=3),)}, "do not cover the 3 tokens"),
        ({"spans": (VersionSpan(version=0, start=0, end=1), VersionSpan(version=1, start=2, end=3))}, "do not cover the 3 tokens"),
    ],
)
def test_tokens_log_probabilities_and_versions_must_be_as_many(changed: dict[str, Any], message: str) -> None:
    whole: dict[str, Any] = {name: getattr(completion(), name) for name in Completion.model_fields}
    with pytest.raises(ValidationError, match=message):
        Completion(**(whole | changed))


def test_a_group_must_be_whole_and_wholly_judged() -> None:
    with pytest.raises(ValidationError, match="1 completions of a group of 2"):
        CompletionGroup(group=GROUP, completions=(completion(),), server="s", attempt=1, started_at=0.0)
    with pytest.raises(ValidationError, match="1 rewards of 2 completions"):
        ScoredGroup(completed=DONE, scores=(score(1.0), score(None)), server="s")
    with pytest.raises(ValidationError, match="3 rewards of 2 completions"):
        scored(DONE, [1.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("answered", "difference"),
    [((-1.0, -2.0), 0.0), ((-1.5, -2.25), 0.375), ((-1.0,), math.inf), ((), math.inf)],
)
def test_a_canary_of_another_length_agrees_with_nothing(answered: tuple[float, ...], difference: float) -> None:
    loaded = LoadedWeights(version=1, stall_seconds=0.0, load_seconds=0.0, canary_logprobs=answered)
    assert loaded.difference((-1.0, -2.0)) == difference


def test_a_canary_that_is_not_a_number_is_below_no_tolerance() -> None:
    loaded = LoadedWeights(version=1, stall_seconds=0.0, load_seconds=0.0, canary_logprobs=(math.nan,))
    assert not loaded.difference((-1.0,)) <= 1e9


def test_a_finish_reason_is_one_of_two() -> None:
    assert {reason.value for reason in FinishReason} == {"stop", "length"}


def test_a_prompt_group_needs_no_more_than_it_is_used_for() -> None:
    assert {name for name, field in PromptGroup.model_fields.items() if not field.is_required()} == {"schema_version", "answer", "issued_at"}
