"""GSPO (arXiv 2507.18071), in its token form."""

from __future__ import annotations

from torch import Tensor

from services.contracts.algorithms import Clip, Gspo
from trainer.losses.clipped import surrogate
from trainer.losses.ratio import clamped_exp
from trainer.losses.terms import Objective
from trainer.tokens import Tokens


def gspo(loss: Gspo, clip: Clip, logp_T: Tensor, anchor_T: Tensor, advantages_T: Tensor, tokens: Tokens) -> Objective:
    """The clipped surrogate of the completion's ratio s, the geometric mean of its tokens':

        s_t = sg(s) pi_t / sg(pi_t),    s = exp(mean_t(log pi_t - log anchor_t)),    J = min(s_t A_t, clip(s_t, 1 - low, 1 + high) A_t)

    Under the mean over a completion's tokens the gradient of GSPO-token is that of GSPO, as long as they share one advantage; it is still defined
    where entropy control gives them different ones. The bounds are the loss's own; `clip.off` switches them off.
    """
    mean_T = tokens.row_mean(logp_T.detach() - anchor_T.detach())[tokens.row_T]
    return surrogate(clamped_exp(mean_T + logp_T - logp_T.detach()), advantages_T, Clip(low=loss.low, high=loss.high, off=clip.off))
