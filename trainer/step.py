"""One step: a batch becomes one version of the policy. Advantages, packs, and N optimiser updates of the clipped surrogate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.contracts.messages import FinishReason, ScoredGroup
from services.contracts.spec import RunSpec
from trainer.advantages import group_advantages
from trainer.batching import Pack, Trajectory, minibatches, pack
from trainer.losses import anchor_logps, clipped_surrogate
from trainer.measures import Measures, group_measures, mismatch_measures, token_measures
from trainer.policy import Policy
from trainer.schedules import learning_rate_factor


@dataclass(frozen=True)
class StepResult:
    """What a step measured."""

    values: dict[str, float]
    lags: dict[int, int]
    """Trained tokens by lag."""
    advantages: tuple[tuple[float, ...], ...]
    """Of each group of the batch, in its order."""


@dataclass(frozen=True)
class Piece:
    """A pack with the temperature at which its tokens were sampled and its log-probabilities under the policy at the start of the step."""

    pack: Pack
    temperature: float
    proximal_T: Tensor


def make_optimizer(policy: Policy, spec: RunSpec) -> torch.optim.Optimizer:
    settings = spec.optimizer
    return torch.optim.AdamW(
        policy.model.parameters(), lr=spec.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon,
        weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip


def train_step(policy: Policy, optimizer: torch.optim.Optimizer, groups: Sequence[ScoredGroup], spec: RunSpec, version: int) -> StepResult:
    """Train on one batch at `version` and make the policy's next version. `spec` has the knobs in force at it."""
    advantages = [
        tuple(group_advantages(torch.tensor(g.rewards), normalise=spec.advantage.normalise, epsilon=spec.advantage.epsilon).tolist()) for g in groups
    ]
    parts = minibatches(list(zip(groups, advantages, strict=True)), spec.updates_per_batch, seed=spec.seed + version)
    pieces = [_pieces(policy, part) for part in parts]  # all under the policy at the start of the step
    rate = spec.learning_rate * learning_rate_factor(spec.optimizer.schedule, version, versions=spec.versions, warmup=spec.optimizer.warmup)
    for settings in optimizer.param_groups:
        settings["lr"] = rate
    measured, norms = Measures(), []
    for minibatch in pieces:
        tokens = sum(piece.pack.tokens for piece in minibatch)
        optimizer.zero_grad(set_to_none=True)
        for piece in minibatch:
            data = piece.pack
            logp_T, entropy_T = policy.forward(data, temperature=piece.temperature)
            anchor_T, weight_T = anchor_logps(spec.correction.anchor, data.behaviour_T, piece.proximal_T, truncation=spec.correction.truncation)
            surrogate = clipped_surrogate(
                logp_T, anchor_T, data.advantages_T, weight_T,
                clip_low=spec.clip.low, clip_high=spec.clip.high, clip_off=spec.clip.off, denominator=tokens,
            )  # fmt: skip
            surrogate.loss.backward()
            lags_T = version - data.versions_T
            measured += token_measures(
                logp_T=logp_T, entropy_T=entropy_T, behaviour_T=data.behaviour_T, advantages_T=data.advantages_T, lags_T=lags_T,
                surrogate=surrogate, proximal_T=piece.proximal_T,
            )  # fmt: skip
            measured += mismatch_measures(piece.proximal_T, behaviour_T=data.behaviour_T, lags_T=lags_T)
        norms.append(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), spec.optimizer.grad_clip).item())
        optimizer.step()
    for group in groups:
        completions = group.completed.completions
        measured += group_measures(
            group.rewards,
            lengths_G=[len(c.token_ids) for c in completions],
            truncated_G=[c.finish is FinishReason.LENGTH for c in completions],
        )
    values = measured.as_values() | {
        "tokens": float(sum(measured.lags.values())), "gradient_norm": sum(norms) / len(norms), "learning_rate": rate, "updates": float(len(norms)),
    }  # fmt: skip
    return StepResult(values=values, lags=dict(measured.lags), advantages=tuple(advantages))


def _pieces(policy: Policy, part: Iterable[tuple[ScoredGroup, tuple[float, ...]]]) -> list[Piece]:
    """The packs of a mini-batch: one temperature to a pack, since a change of that knob leaves groups of two temperatures in a batch."""
    by_temperature: dict[float, list[Trajectory]] = defaultdict(list)
    for group, advantages in part:
        by_temperature[group.group.temperature] += _trajectories(group, advantages)
    pieces = []
    for temperature, trajectories in sorted(by_temperature.items()):
        for packed in pack(trajectories):
            data = packed.to(policy.device)
            with torch.no_grad():
                proximal_T, _ = policy.forward(data, temperature=temperature)
            pieces.append(Piece(data, temperature, proximal_T))
    return pieces


def _trajectories(group: ScoredGroup, advantages: Sequence[float]) -> list[Trajectory]:
    return [
        Trajectory(
            prompt_ids=group.group.prompt_ids, completion_ids=c.token_ids, behaviour_logps=c.logprob_values, versions=c.versions, advantage=advantage
        )
        for c, advantage in zip(group.completed.completions, advantages, strict=True)
    ]
