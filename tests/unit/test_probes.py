"""Entropies of prompts and of trained tokens after the step, against what the policy says of each sequence alone."""

from __future__ import annotations

import math

import pytest
import torch

from services.contracts.evaluation import Probe
from tests.unit.tiny_policy import sampled_group, tiny_policy
from trainer.batching import Trajectory, pack
from trainer.minibatch import assemble, forward
from trainer.policy import Policy
from trainer.probes import PromptProbes, realised_change

CPU = torch.device("cpu")


def probe(domain: str, *prompts: list[int]) -> Probe:
    return Probe(name=f"{domain}-{len(prompts)}", domain=domain, prompts=list(prompts))


def entropies(policy: Policy, tokens: list[int], *, temperature: float) -> list[float]:
    """Of each place of the sequence but the last."""
    rest = tokens[1:]
    (packed,) = pack([Trajectory(tokens[:1], rest, [0.0] * len(rest), [0] * len(rest), 0.0)])
    return policy.forward(packed, temperature=temperature)[1].tolist()  # type: ignore[no-any-return]


def test_prompt_entropy_is_the_mean_over_all_places_of_the_prompts_of_a_domain() -> None:
    policy = tiny_policy()
    sets = [probe("in", [1, 2, 3], [4, 5]), probe("in", [2, 2, 2, 2]), probe("out", [6, 3, 1])]
    found = PromptProbes(sets, temperature=0.7, device=CPU).values(policy)
    inside = [e for tokens in ([1, 2, 3], [4, 5], [2, 2, 2, 2]) for e in entropies(policy, tokens, temperature=0.7)]
    outside = entropies(policy, [6, 3, 1], temperature=0.7)
    assert found == {
        "prompt_entropy_in_nats": pytest.approx(sum(inside) / 6), "prompt_entropy_out_nats": pytest.approx(sum(outside) / 2),
    }  # fmt: skip


def test_prompts_of_one_token_and_no_probes_at_all_give_nothing() -> None:
    assert PromptProbes([], temperature=1.0, device=CPU).values(tiny_policy()) == {}
    assert PromptProbes([probe("in", [1], [])], temperature=1.0, device=CPU).values(tiny_policy()) == {}


@pytest.mark.parametrize("most", [1, 12, 10_000])
def test_realised_change_compares_the_same_tokens_before_and_after(most: int) -> None:
    policy = tiny_policy()
    groups = [(sampled_group(policy, i, (1.0, 0.0), lengths=(3, 6)), (1.0, -1.0), (True, True)) for i in range(3)]
    minibatch = assemble(groups, device=CPU)
    assert minibatch is not None
    before = forward(policy, minibatch, gradient=False)
    assert realised_change(policy, minibatch, before, most=most).as_values() == pytest.approx(
        {"entropy_change_realised": 0, "kl_step_k3_nats": 0}, abs=1e-7
    )
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.3)
    after = forward(policy, minibatch, gradient=False)
    rows = len(minibatch.head(most).sources)
    chosen_T = minibatch.row_T < rows
    expected = float((after.entropy_T.double() - before.entropy_T.double())[chosen_T].mean())
    ratios = (after.logp_T.double() - before.logp_T.double())[chosen_T].tolist()
    moved = sum(math.exp(ratio) - 1 - ratio for ratio in ratios) / len(ratios)
    assert not math.isclose(expected, 0, abs_tol=1e-4)
    assert moved > 1e-4
    found = realised_change(policy, minibatch, before, most=most).as_values()
    assert found == pytest.approx({"entropy_change_realised": expected, "kl_step_k3_nats": moved}, rel=1e-4)


def test_the_head_of_a_minibatch_is_its_first_completions_up_to_so_many_tokens() -> None:
    groups = [(sampled_group(tiny_policy(), i, (1.0, 0.0), lengths=(3, 6)), (1.0, -1.0), (True, True)) for i in range(3)]
    minibatch = assemble(groups, device=CPU)
    assert minibatch is not None
    assert [len(minibatch.head(most).sources) for most in (1, 3, 4, 9, 10, 999)] == [1, 1, 2, 2, 3, 6]
    assert minibatch.head(9).tokens == 9
