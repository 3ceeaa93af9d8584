"""One step: a batch becomes one version of the policy. Advantages, mini-batches, and N optimiser updates of the policy loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from services.contracts.messages import FinishReason, ScoredGroup, TokenMeasures
from services.contracts.spec import RunSpec
from trainer.advantages import advantages
from trainer.batching import minibatches
from trainer.control.actuators import STILL, Actuators
from trainer.measures import Measures, forking_threshold, group_measures, mismatch_measures, update_measures
from trainer.minibatch import assemble, backward, forward
from trainer.objective import update_loss
from trainer.policy import Policy
from trainer.probes import realised_change
from trainer.sample_tokens import MOST_TOKENS, token_measures
from trainer.schedules import learning_rate_factor
from trainer.shaping import Outcome, shaped_rewards
from trainer.sharding import whole


@dataclass(frozen=True)
class StepResult:
    """What a step measured."""

    values: dict[str, float]
    lags: dict[int, int]
    """Trained tokens by lag."""
    advantages: tuple[tuple[float, ...], ...]
    """Of each group of the batch, in its order."""
    tokens: dict[tuple[int, int], TokenMeasures] = field(default_factory=dict)
    """By index of the group and place in it: what is kept of single tokens, as far as the bound of a step goes."""


def make_optimizer(policy: Policy, spec: RunSpec) -> torch.optim.Optimizer:
    settings = spec.optimizer
    return torch.optim.AdamW(
        policy.model.parameters(), lr=spec.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon,
        weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip


def train_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[ScoredGroup],
    spec: RunSpec,
    version: int,
    *,
    actuators: Actuators = STILL,
    forking_nats: float | None = None,
) -> StepResult:
    """Train on one batch at `version` and make the policy's next version, under the knobs in `spec` and what controllers ask for.

    `forking_nats` is the entropy above which a token counts as forking, which the run's first step defines.
    """
    rewards = [shaped_rewards(spec.shaping, _outcomes(group), max_tokens=spec.sampling.max_tokens) for group in groups]
    worth = advantages(spec.advantage, rewards, correct_at=spec.shaping.correct_at)
    rows = [(group, worth[i], _trained(group, spec)) for i, group in enumerate(groups)]
    parts = [assemble(part, device=policy.device, ranks=policy.ranks) for part in minibatches(rows, spec.updates_per_batch, seed=spec.seed + version)]
    batch = [part for part in parts if part is not None]
    later = [forward(policy, minibatch, gradient=False) for minibatch in batch[1:]]  # under the policy at the start of the step
    rate = spec.learning_rate * learning_rate_factor(spec.optimizer.schedule, version, versions=spec.versions, warmup=spec.optimizer.warmup)
    for settings in optimizer.param_groups:
        settings["lr"] = rate
    measured, norms, probed = Measures(), [], None
    losses: list[float] = []
    kept: dict[tuple[int, int], TokenMeasures] = {}
    room = MOST_TOKENS if spec.record.samples else 0
    for update, minibatch in enumerate(batch):
        now = forward(policy, minibatch, gradient=True, drift=True)
        start = later[update - 1] if update else now
        if forking_nats is None:
            forking_nats = forking_threshold(now.entropy_T.detach())
        tokens = minibatch.view(start.logp_T.detach(), version=version)
        done = update_loss(spec, actuators, now.logp_T, now.entropy_T, tokens, generator=_generator(spec.seed, version, update))
        optimizer.zero_grad(set_to_none=True)
        done.loss.backward()  # as far as the leaves
        losses.append(done.loss.item())
        backward(policy, minibatch, now)
        norms.append(whole(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), spec.optimizer.grad_clip)).item())
        optimizer.step()
        measured += update_measures(
            logp_T=now.logp_T.detach(), entropy_T=now.entropy_T.detach(), drift_T=now.drift_T, tokens=tokens, ratio_T=done.objective.ratio_T,
            clipped_up_T=done.objective.clipped_up_T, clipped_down_T=done.objective.clipped_down_T,
            dual_clipped_T=done.objective.dual_clipped_T, rejected_T=done.corrected.rejected_T, weight_T=done.weight_T,
            correct_at=spec.shaping.correct_at, first=update == 0, bounds=done.bounds, forking_nats=forking_nats, gradient_T=now.logp_T.grad,
        )  # fmt: skip
        measured += mismatch_measures(tokens)
        kept |= token_measures(minibatch, now.logp_T.detach(), now.entropy_T.detach(), most=room)
        room -= min(room, minibatch.tokens)
        if update == 0:
            probed = now
    if probed is not None and spec.measure.probe_tokens and version % spec.measure.probe_every == 0:
        measured += realised_change(policy, batch[0], probed, most=spec.measure.probe_tokens)
    for group in groups:
        measured += _group_measures(group, spec)
    values = measured.as_values() | {
        "tokens": float(sum(minibatch.tokens for minibatch in batch)), "learning_rate": rate, "updates": float(len(norms)),
    }  # fmt: skip
    if norms:
        values |= {"gradient_norm": sum(norms) / len(norms), "loss": sum(losses) / len(losses)}
    if forking_nats is not None:
        values["forking_threshold_nats"] = forking_nats
    return StepResult(values=values, lags=dict(measured.lags), advantages=tuple(worth), tokens=kept)


def _outcomes(group: ScoredGroup) -> list[Outcome]:
    return [
        Outcome(reward=reward, tokens=c.length, truncated=c.finish is FinishReason.LENGTH, logp=sum(c.logprob_values))
        for c, reward in zip(group.completed.completions, group.rewards, strict=True)
    ]


def _trained(group: ScoredGroup, spec: RunSpec) -> list[bool]:
    """Which completions of the group are trained on."""
    return [not (spec.shaping.mask_truncated and c.finish is FinishReason.LENGTH) for c in group.completed.completions]


def _group_measures(group: ScoredGroup, spec: RunSpec) -> Measures:
    completions = group.completed.completions
    return group_measures(
        group.rewards,
        lengths_G=[c.length for c in completions],
        truncated_G=[c.finish is FinishReason.LENGTH for c in completions],
        correct_at=spec.shaping.correct_at,
    )


def _generator(seed: int, version: int, update: int) -> torch.Generator:
    """Random choices of an update depend on the run's seed and its place in the run alone, so a resumed run makes the same ones."""
    return torch.Generator().manual_seed((seed << 32) ^ (version << 8) ^ update)
