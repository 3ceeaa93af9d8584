"""One step: what it makes of a batch, and what it measures on the way."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from services.contracts.algorithms import Clip, Grpo
from services.contracts.messages import PromptGroup, ScoredGroup
from services.contracts.spec import Optimizer, RunSpec
from tests.unit.tiny_policy import logprobs, same_bits, sampled_group, tiny_policy, weights
from trainer.policy import Policy
from trainer.step import StepResult, make_optimizer, train_step


def spec(**fields: object) -> RunSpec:
    return RunSpec.model_validate({"batch_groups": 4, "group_size": 2, "versions": 10, "learning_rate": 1e-3} | fields)


def stepped(groups: list[ScoredGroup], settings: RunSpec, *, version: int = 0, policy: Policy | None = None) -> tuple[Policy, StepResult]:
    policy = policy or tiny_policy()
    return policy, train_step(policy, make_optimizer(policy, settings), groups, settings, version)


def batch(rewards: tuple[float, ...] = (1.0, 0.0), *, groups: int = 4, version: int = 0, temperature: float = 1.0) -> list[ScoredGroup]:
    return [sampled_group(tiny_policy(), i, rewards, version=version, temperature=temperature) for i in range(groups)]


def logprob_of(policy: Policy, scored: ScoredGroup) -> list[float]:
    """Of each completion as a whole."""
    group: PromptGroup = scored.group
    return [sum(logprobs(policy, group, c.token_ids)) for c in scored.completed.completions]


def test_what_was_rewarded_gets_likelier_and_what_was_not_less_likely() -> None:
    groups = batch()
    after, _ = stepped(groups, spec())
    for group in groups:
        (good, bad), (good_before, bad_before) = logprob_of(after, group), logprob_of(tiny_policy(), group)
        assert good > good_before
        assert bad < bad_before


def test_the_same_step_twice_gives_the_same_bits() -> None:
    first, one = stepped(batch(), spec(updates_per_batch=2))
    second, two = stepped(batch(), spec(updates_per_batch=2))
    assert same_bits(weights(first), weights(second))
    assert one == two


def test_groups_without_a_difference_teach_nothing() -> None:
    policy, result = stepped(batch((1.0, 1.0)), spec())
    assert same_bits(weights(policy), weights(tiny_policy()))
    assert result.advantages == ((0.0, 0.0),) * 4
    assert result.values["zero_signal_share"] == 1.0
    assert result.values["gradient_norm"] == 0.0


def test_advantages_are_told_in_the_order_of_the_batch() -> None:
    rewards = [(1.0, 0.0), (0.0, 3.0), (2.0, 2.0), (0.0, 1.0)]
    groups = [sampled_group(tiny_policy(), i, r) for i, r in enumerate(rewards)]
    _, result = stepped(groups, spec(advantage=Grpo(normalise="none"), updates_per_batch=4))
    assert result.advantages == ((0.5, -0.5), (-1.5, 1.5), (0.0, 0.0), (-0.5, 0.5))
    assert result.values["reward_mean"] == pytest.approx(9 / 8)


def test_every_token_is_counted_under_its_lag() -> None:
    groups = [sampled_group(tiny_policy(), i, (1.0, 0.0), version=v, lengths=(3, 5)) for i, v in enumerate((4, 4, 5, 6))]
    _, result = stepped(groups, spec(updates_per_batch=2), version=6)
    assert result.lags == {2: 16, 1: 8, 0: 8}
    assert (result.values["tokens"], result.values["lag_mean"], result.values["lag_max"]) == (32.0, (2 * 16 + 8) / 32, 2.0)


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_a_batch_makes_as_many_updates_as_it_is_told_to(updates: int) -> None:
    policy = tiny_policy()
    settings = spec(updates_per_batch=updates)
    optimizer = make_optimizer(policy, settings)
    result = train_step(policy, optimizer, batch(), settings, 0)
    assert result.values["updates"] == updates
    assert {int(state["step"]) for state in optimizer.state.values()} == {updates}


def test_ratios_are_1_on_the_policy_s_own_samples_before_the_first_update() -> None:
    _, result = stepped(batch(), spec())
    assert result.values["ratio_behaviour_mean"] == pytest.approx(1, abs=1e-5)
    assert result.values["mismatch_lag0_nats"] < 1e-5
    assert result.values["clip_up_share"] == result.values["clip_down_share"] == 0.0


def test_the_second_update_sees_the_first() -> None:
    _, one = stepped(batch(), spec(learning_rate=0.02))
    _, two = stepped(batch(), spec(learning_rate=0.02, updates_per_batch=2))
    assert one.values["kl_proximal_k3_nats"] < 1e-9
    assert two.values["kl_proximal_k3_nats"] > 1e-4, "the proximal policy is that of the start of the step"


def test_groups_of_two_temperatures_in_a_batch_are_each_judged_at_their_own() -> None:
    groups = [sampled_group(tiny_policy(), i, (1.0, 0.0), temperature=t) for i, t in enumerate((1.0, 0.5, 1.0, 2.0))]
    _, result = stepped(groups, spec(temperature=2.0))
    assert result.values["mismatch_lag0_nats"] < 1e-5
    mixed_up = [
        g.model_copy(update={"completed": g.completed.model_copy(update={"group": g.group.model_copy(update={"temperature": 1.0})})}) for g in groups
    ]
    assert stepped(mixed_up, spec())[1].values["mismatch_lag0_nats"] > 0.05, "it would be seen"


def test_the_learning_rate_follows_the_schedule_and_the_knob() -> None:
    settings = spec(learning_rate=0.01, optimizer=Optimizer(schedule="linear", warmup=2))
    rates = [stepped(batch(), settings, version=v)[1].values["learning_rate"] for v in (0, 1, 2, 6, 9)]
    assert rates[0] < rates[1] <= 0.01
    assert all(a > b for a, b in pairwise(rates[2:]))
    assert stepped(batch(), spec(learning_rate=0.0))[1].values["learning_rate"] == 0.0
    assert same_bits(weights(stepped(batch(), spec(learning_rate=0.0))[0]), weights(tiny_policy()))


def test_a_knob_that_was_turned_reaches_an_optimiser_that_is_there_already() -> None:
    policy = tiny_policy()
    optimizer = make_optimizer(policy, spec(learning_rate=0.01))
    train_step(policy, optimizer, batch(), spec(learning_rate=0.01), 0)
    before = weights(policy)
    train_step(policy, optimizer, batch(), spec(learning_rate=0.0), 1)
    assert same_bits(weights(policy), before)


def test_a_clipped_token_has_no_pull() -> None:
    """Samples of a policy that gave them other probabilities: with no room for the ratio, and every ratio beyond it, nothing moves."""
    rewarded_and_already_likelier = sampled_group(tiny_policy(), 1, (1.0, 0.0), lengths=(1,))
    completions = tuple(
        c.model_copy(update={"logprobs": torch.tensor([c.logprob_values[0] + shift]).numpy().tobytes()})
        for c, shift in zip(rewarded_and_already_likelier.completed.completions, (-1.0, 1.0), strict=True)
    )
    group = rewarded_and_already_likelier.model_copy(
        update={"completed": rewarded_and_already_likelier.completed.model_copy(update={"completions": completions})}
    )
    settings = spec(batch_groups=1, clip=Clip(low=0.2, high=0.2))
    policy, result = stepped([group], settings)
    assert (result.values["clip_up_share"], result.values["clip_down_share"]) == (0.5, 0.5)
    assert same_bits(weights(policy), weights(tiny_policy()))
    unclipped, _ = stepped([group], spec(batch_groups=1, clip=Clip(off=True)))
    assert not same_bits(weights(unclipped), weights(tiny_policy()))
