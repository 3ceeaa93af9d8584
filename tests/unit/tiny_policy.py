"""A policy of some 50,000 weights, the same for the same seed, and groups that it might have sampled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from services.contracts.messages import (
    Completion,
    CompletionGroup,
    FinishReason,
    PromptGroup,
    ScoredGroup,
    VersionSpan,
    pack_floats,
    pack_ints,
)
from tests.unit.sample_messages import prompt_group, scored
from trainer.batching import Trajectory, pack
from trainer.policy import Policy

VOCABULARY = 29


def tiny_policy(seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    return Policy(LlamaForCausalLM(config))


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    """A copy."""
    return {name: tensor.detach().clone() for name, tensor in policy.model.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def logprobs(policy: Policy, group: PromptGroup, tokens: Sequence[int]) -> list[float]:
    """Of a completion's tokens, at the group's temperature, in nats."""
    trajectory = Trajectory(group.prompt_ids, tokens, [0.0] * len(tokens), [0] * len(tokens), 0.0)
    with torch.no_grad():
        return policy.forward(pack([trajectory])[0], temperature=group.temperature)[0].tolist()


def sampled_group(
    policy: Policy, index: int, rewards: Sequence[float], *, version: int = 0, temperature: float = 1.0, lengths: Sequence[int] = (4, 7)
) -> ScoredGroup:
    """Random completions, with the log-probabilities that `policy` gives them. `lengths` of the completions in turn."""
    draw = torch.Generator().manual_seed(index)
    group = prompt_group(index, temperature=temperature, group_size=len(rewards), prompt_tokens=pack_ints([1 + index % 5, 3]))
    completions = []
    for g in range(len(rewards)):
        tokens = torch.randint(VOCABULARY, (lengths[g % len(lengths)],), generator=draw).tolist()
        completions.append(
            Completion(
                tokens=pack_ints(tokens),
                logprobs=pack_floats(logprobs(policy, group, tokens)),
                text="",
                finish=FinishReason.STOP,
                spans=(VersionSpan(version=version, start=0, end=len(tokens)),),
            )
        )
    return scored(CompletionGroup(group=group, completions=tuple(completions), server="s", attempt=1, started_at=0.0), rewards)
