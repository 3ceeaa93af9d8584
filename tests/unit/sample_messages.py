"""Messages as they cross the streams, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.contracts.messages import (
    Completion,
    CompletionGroup,
    FinishReason,
    Outcome,
    Part,
    PromptGroup,
    Score,
    ScoredGroup,
    StepRecord,
    VersionSpan,
    pack_floats,
    pack_ints,
)


def prompt_group(index: int = 0, *, run_id: str = "r", **fields: Any) -> PromptGroup:
    values: dict[str, Any] = {
        "prompt_id": f"p{index}", "prompt": "7=", "prompt_tokens": pack_ints([7, 5]), "answer": "7", "group_size": 2, "seed": 100 * index,
        "temperature": 1.0, "top_p": 1.0, "max_tokens": 8, "max_lag": 2, "issued_version": 0, "issued_at": 1000.25,
    } | fields  # fmt: skip
    return PromptGroup(run_id=run_id, index=index, **values)


def completion(tokens: Sequence[int] = (3, 4, 2), *, versions: Sequence[int] | None = None, text: str = "3+4") -> Completion:
    """`versions` of each token; default: all of version 0."""
    versions = [0] * len(tokens) if versions is None else versions
    starts = [i for i, version in enumerate(versions) if i == 0 or version != versions[i - 1]]
    ends = [*starts[1:], len(versions)]
    return Completion(
        tokens=pack_ints(list(tokens)), logprobs=pack_floats([-0.5 * (i + 1) for i in range(len(tokens))]), text=text, finish=FinishReason.STOP,
        spans=tuple(VersionSpan(version=versions[s], start=s, end=e) for s, e in zip(starts, ends, strict=True)),
    )  # fmt: skip


def completed(group: PromptGroup, *, versions: Sequence[int] = (0, 0, 0), attempt: int = 1, server: str = "rollout-0") -> CompletionGroup:
    done = completion(range(3, 3 + len(versions)), versions=versions)
    return CompletionGroup(group=group, completions=(done,) * group.group_size, server=server, attempt=attempt, started_at=1001.5, finished_at=1002.5)


def score(reward: float | None) -> Score:
    outcome = Outcome.OK if reward is not None else Outcome.TIMEOUT
    return Score(reward=reward, parts=(Part(verifier="sum_to_target", weight=1.0, score=reward, outcome=outcome),), seconds=0.25)


def scored(done: CompletionGroup, rewards: Sequence[float] | None = None) -> ScoredGroup:
    """`rewards` default to 1, 0, 0, ..."""
    rewards = [float(i == 0) for i in range(len(done.completions))] if rewards is None else rewards
    return ScoredGroup(completed=done, scores=tuple(score(reward) for reward in rewards), server="reward-0", scored_at=1003.5)


def step_record(version: int, groups: Sequence[int], *, run_id: str = "r") -> StepRecord:
    return StepRecord(run_id=run_id, version=version, at=1004.5, values={"entropy_nats": 1.5}, lags={0: 3, 1: 2}, window=(0, 2), groups=tuple(groups))
