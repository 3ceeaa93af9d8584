"""Log-probability of the sampled token, exact entropy of the full vocabulary and its drift, in one pass over the hidden states.

Shapes: `_T` trained tokens, `_t` those of a chunk, `_D` hidden size, `_V` vocabulary. Nothing of size T x V is ever made: the tokens are taken in
chunks, and the backward pass computes each chunk's logits again. With z = (W h + b) / temperature, p = softmax(z), and gradients g of the
log-probability and k of the entropy arriving from above:

    logp = z_y - logsumexp z             dlogp/dz = onehot(y) - p
    H    = logsumexp z - sum_v p_v z_v   dH/dz    = -p (log p + H)
    dL/dz = g onehot(y) - p (g + k (log p + H))

The drift says what an ascent step on log p_y does to the entropy. A step of size eta along dlogp/dz changes H, to first order in the logits, by

    dH = eta (onehot(y) - p) . dH/dz = - eta (s_y - sum_v p_v s_v) = - eta drift,    s_v = p_v (log p_v + H)

so a policy-gradient step with ratio r and advantage A changes it by - eta r A drift. The mean of the drift over the policy's own samples is zero.
Derived here from the gradients above, as Cui et al. (arXiv 2505.22617) derive its covariance form; logits are taken as free parameters.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Logits held at a time: 64 MB in float32, 110 tokens of a vocabulary of 151,936. A tiny model's whole batch is one chunk."""


def logprob_and_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float,
    bias_V: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    drift: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probability of `targets_T`, entropy of the next-token distribution at `temperature`, and with `drift` the entropy's drift: (T,), in nats.

    Gradients flow through the first two. Without `drift` the third is None.

    `hidden_TD` are the backbone's last hidden states at the positions that predict the targets; `weight_VD` and `bias_V` the language-model head.
    Logits are computed in float32 whatever the inputs' type, and under autocast too (float64 inputs stay float64). At most `chunk_elements` of them
    exist at a time, one token's at least.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    outputs = _LogProbEntropy.apply(hidden_TD, weight_VD, bias_V, targets_T, temperature, chunk_elements, drift)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor, Tensor | None]", outputs)


class _LogProbEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, temperature: float, chunk_elements: int, drift: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            chunks = _chunks(hidden_TD, weight_VD, chunk_elements)
            weight = weight_VD.to(dtype)
            lse, logp, entropy = (hidden_TD.new_empty(len(hidden_TD), dtype=dtype) for _ in range(3))
            drifts = torch.empty_like(logp) if drift else None
            for part in chunks:
                z_tV = _logits(hidden_TD[part].to(dtype), weight, bias_V, temperature)
                top_t = z_tV.amax(1)
                z_tV.sub_(top_t[:, None])
                target_t = z_tV.gather(1, targets_T[part, None])[:, 0]
                exp_tV = z_tV.exp()
                sum_t = exp_tV.sum(1)
                log_sum_t = sum_t.log()
                logp[part] = target_t - log_sum_t
                # The maximum is taken off before the product: H is a small difference of large numbers otherwise.
                mean_t = z_tV.mul_(exp_tV).sum(1) / sum_t
                entropy[part] = log_sum_t - mean_t
                lse[part] = top_t + log_sum_t
                if drifts is not None:
                    # log p + H = z - sum_v p_v z_v, so that sum_v p_v s_v = (sum e^2z z - mean z sum e^2z) / (sum e^z)^2.
                    twice_t = z_tV.mul_(exp_tV).sum(1) - mean_t * exp_tV.square_().sum(1)
                    drifts[part] = (target_t - log_sum_t).exp() * (target_t - mean_t) - twice_t / sum_t**2
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, lse, entropy)
        ctx.temperature, ctx.chunks = temperature, chunks
        if drifts is not None:
            ctx.mark_non_differentiable(drifts)
        return logp, entropy, drifts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logp_T, grad_entropy_T, _ = grads
        hidden_TD, weight_VD, bias_V, targets_T, lse_T, entropy_T = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        dtype = lse_T.dtype
        with torch.autocast(hidden_TD.device.type, enabled=False):
            weight = weight_VD.to(dtype)
            grad_hidden = torch.empty_like(hidden_TD) if for_hidden else None
            grad_weight = torch.zeros_like(weight) if for_weight else None
            grad_bias = torch.zeros_like(bias_V, dtype=dtype) if for_bias else None
            for part in ctx.chunks:
                hidden_tD = hidden_TD[part].to(dtype)
                logp_tV = _logits(hidden_tD, weight, bias_V, ctx.temperature).sub_(lse_T[part, None])
                grad_tV = logp_tV.exp()
                if grad_entropy_T is None:
                    grad_tV.mul_(0 if grad_logp_T is None else -grad_logp_T[part, None])
                else:
                    slope_tV = logp_tV.add_(entropy_T[part, None]).mul_(-grad_entropy_T[part, None])
                    grad_tV.mul_(slope_tV if grad_logp_T is None else slope_tV.sub_(grad_logp_T[part, None]))
                if grad_logp_T is not None:
                    grad_tV.scatter_add_(1, targets_T[part, None], grad_logp_T[part, None])
                grad_tV.div_(ctx.temperature)
                if grad_hidden is not None:
                    grad_hidden[part] = (grad_tV @ weight).to(hidden_TD.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(grad_tV.t(), hidden_tD)
                if grad_bias is not None:
                    grad_bias.add_(grad_tV.sum(0))
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None else grad_bias.to(bias_V.dtype),
            None,
            None,
            None,
            None,
        )


def _chunks(hidden_TD: Tensor, weight_VD: Tensor, chunk_elements: int) -> list[slice]:
    size = max(1, chunk_elements // len(weight_VD))
    return [slice(start, start + size) for start in range(0, len(hidden_TD), size)]


def _logits(hidden_tD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    """(W h + b) / temperature, a new tensor that the caller may overwrite."""
    z_tV = hidden_tD @ weight_VD.t()
    if bias_V is not None:
        z_tV.add_(bias_V)
    return z_tV if temperature == 1 else z_tV.div_(temperature)
