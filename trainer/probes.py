"""Entropy on tokens that are not trained on at that moment: the trained ones again after the step, and the prompts of frozen probe sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.contracts.evaluation import Probe
from trainer.batching import Trajectory, pack
from trainer.measures import Measures, budget_measures, moved_measures
from trainer.minibatch import Forward, Minibatch, forward
from trainer.policy import Policy


@torch.no_grad()
def realised_change(policy: Policy, minibatch: Minibatch, before: Forward, *, most: int) -> Measures:
    """Change of the exact entropy by the step, and how far it moved the policy, on about `most` tokens of one of its mini-batches; `before` was
    measured on all of them before the step."""
    probe = minibatch.head(most)
    after = forward(policy, probe, gradient=False)
    chosen_T = minibatch.row_T < len(probe.sources)
    return budget_measures(before.entropy_T[chosen_T], after.entropy_T) + moved_measures(before.logp_T[chosen_T], after.logp_T)


class PromptProbes:
    """The prompts of frozen probe sets, packed once."""

    def __init__(self, probes: Sequence[Probe], *, temperature: float, device: torch.device) -> None:
        """Entropies are taken at `temperature`, whatever the knob is turned to: the series stays one series."""
        self.temperature = temperature
        sequences = [(probe.domain, _continuation(tokens)) for probe in probes for tokens in probe.prompts if len(tokens) > 1]
        self._packs = [packed.to(device) for packed in pack([sequence for _, sequence in sequences])]
        self._rows = {domain: torch.tensor([of == domain for of, _ in sequences], device=device) for domain in dict.fromkeys(d for d, _ in sequences)}

    @torch.no_grad()
    def values(self, policy: Policy) -> dict[str, float]:
        """`prompt_entropy_DOMAIN_nats`: mean exact entropy of the next token over all places of the prompts but the last, under teacher forcing."""
        if not self._packs:
            return {}
        entropy_T = torch.cat([policy.forward(packed, temperature=self.temperature)[1] for packed in self._packs]).double()
        row_T = torch.cat([packed.row_T for packed in self._packs])
        return {f"prompt_entropy_{domain}_nats": float(entropy_T[of_R[row_T]].mean()) for domain, of_R in self._rows.items()}


def _continuation(tokens: Sequence[int]) -> Trajectory:
    """A prompt as a completion of its own first token: the entropies of its places are then those of trained tokens."""
    rest = list(tokens[1:])
    return Trajectory(prompt_ids=tokens[:1], completion_ids=rest, behaviour_logps=[0.0] * len(rest), versions=[0] * len(rest), advantage=0.0)
