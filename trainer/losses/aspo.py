"""ASPO (arXiv 2510.06062)."""

from __future__ import annotations

import torch
from torch import Tensor

from services.contracts.algorithms import Aspo, Clip
from trainer.losses.clipped import beyond
from trainer.losses.ratio import carried, importance_ratio
from trainer.losses.terms import Objective


def aspo(loss: Aspo, clip: Clip, logp_T: Tensor, anchor_T: Tensor, advantages_T: Tensor) -> Objective:
    """The clipped surrogate with 1/r in place of r for A > 0, each weight at most c:

        A > 0:  J = min(1 / r, c) A pi / sg(pi)  up to r = 1 + high, then constant
        A < 0:  J = min(r, c) A pi / sg(pi)      down to r = 1 - low, then constant

    A weight held at c keeps its gradient (the paper's soft dual clip); a token beyond a bound has none. `clip.off` leaves the dual clip alone.
    """
    ratio_T = importance_ratio(logp_T, anchor_T).detach()
    up_T, down_T = beyond(ratio_T, advantages_T, clip)
    bounded_T = torch.where(up_T | down_T, ratio_T.clamp(1 - clip.low, 1 + clip.high), ratio_T)
    weight_T = torch.where(advantages_T > 0, 1 / bounded_T, bounded_T)
    dual_T = (advantages_T != 0) & (weight_T > loss.dual_clip)
    weight_T = weight_T.clamp(max=loss.dual_clip)
    values_T = torch.where(up_T | down_T, weight_T, carried(weight_T, logp_T)) * advantages_T
    return Objective(values_T=values_T, ratio_T=ratio_T, clipped_up_T=up_T, clipped_down_T=down_T, dual_clipped_T=dual_T)
