"""What is kept of single tokens with a sample: the right numbers at the right completion, and no more of them than the bound."""

from __future__ import annotations

import pytest

from services.contracts.messages import ScoredGroup, TokenMeasures, pack_floats
from services.contracts.spec import RunSpec
from tests.unit.tiny_policy import sampled_group, tiny_policy
from trainer import step
from trainer.session import measured_of
from trainer.step import make_optimizer, train_step

HALF = 2e-3
"""Relative rounding of a float16."""


def spec(**fields: object) -> RunSpec:
    return RunSpec.model_validate({"batch_groups": 4, "group_size": 2, "versions": 10, "learning_rate": 0.0} | fields)


def groups() -> list[ScoredGroup]:
    return [sampled_group(tiny_policy(), i, (1.0, 0.0), version=0, temperature=1.0 + 0.5 * (i % 2)) for i in range(4)]


def tokens_of(batch: list[ScoredGroup], settings: RunSpec) -> dict[tuple[int, int], TokenMeasures]:
    policy = tiny_policy()
    return train_step(policy, make_optimizer(policy, settings), batch, settings, 0).tokens


@pytest.mark.parametrize("updates", [1, 2])
def test_each_completion_has_its_own_tokens_ratios(updates: int) -> None:
    """The policy is that which sampled, up to a shift that each completion's reported log-probabilities are given here."""
    batch = []
    for g, group in enumerate(groups()):
        shifted = [
            c.model_copy(update={"logprobs": _shifted(c.logprob_values, by=0.1 * (2 * g + i))}) for i, c in enumerate(group.completed.completions)
        ]
        batch.append(group.model_copy(update={"completed": group.completed.model_copy(update={"completions": tuple(shifted)})}))
    kept = tokens_of(batch, spec(updates_per_batch=updates))
    assert set(kept) == {(group.group.index, g) for group in batch for g in range(2)}
    for g, group in enumerate(batch):
        for i, completion in enumerate(group.completed.completions):
            found = kept[group.group.index, i]
            assert found.log_ratio_values == pytest.approx([-0.1 * (2 * g + i)] * completion.length, abs=HALF)
            assert len(found.entropy_values) == completion.length
            assert min(found.entropy_values) > 0


def _shifted(values: list[float], *, by: float) -> bytes:
    return pack_floats([value + by for value in values])


def test_entropies_are_those_of_the_tokens_own_places() -> None:
    """Mean over all tokens as the step measures it exactly."""
    batch, settings = groups(), spec()
    policy = tiny_policy()
    result = train_step(policy, make_optimizer(policy, settings), batch, settings, 0)
    entropies = [value for found in result.tokens.values() for value in found.entropy_values]
    assert sum(entropies) / len(entropies) == pytest.approx(result.values["entropy_nats"], rel=HALF)


def test_no_more_than_the_bound_is_kept_and_only_whole_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = groups()
    lengths = {(group.group.index, g): c.length for group in batch for g, c in enumerate(group.completed.completions)}
    most = sum(lengths.values()) - 1
    monkeypatch.setattr(step, "MOST_TOKENS", most)
    kept = tokens_of(batch, spec(updates_per_batch=2))
    assert 0 < len(kept) < len(lengths)
    assert sum(lengths[place] for place in kept) <= most
    assert all(len(found.entropy_values) == lengths[place] for place, found in kept.items())


def test_nothing_is_kept_for_a_run_without_samples() -> None:
    assert tokens_of(groups(), spec(record={"samples": 0})) == {}


def test_a_sample_has_an_entry_for_each_completion_or_none_at_all() -> None:
    batch = groups()
    kept = tokens_of(batch, spec())
    first = batch[0]
    assert measured_of(first, kept) == (kept[first.group.index, 0], kept[first.group.index, 1])
    del kept[first.group.index, 0]
    assert measured_of(first, kept) == (None, kept[first.group.index, 1])
    assert measured_of(first, {}) == ()
