"""BAPO's search for clip bounds: a pure function of a mini-batch's ratios and advantages. `_T` is trained tokens, `_S` the steps of the search."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from services.contracts.algorithms import Bapo, Clip


def search_bounds(settings: Bapo, ratio_T: Tensor, advantages_T: Tensor) -> Clip:
    """The first clip bounds of the search under which tokens of positive advantage have `positive_share` of the loss (BAPO, arXiv 2510.18927).

    The search starts at (low_least, high_least), raises the upper bound by `step_high` to `high_greatest` and then the lower one by `step_low` to
    `low_greatest`; where nothing reaches the share, its last bounds are taken. The order is the paper's algorithm 1; the authors' code
    (WooooDyy/BAPO, recipe/bapo/policy_loss.py) raises the lower bound first.

    Of the loss, r |A| of a token counts as long as the token has a gradient: A > 0 and r <= upper bound, A < 0 and r >= lower bound. Each step then
    lets in positive or shuts out negative tokens, and the share never falls along the search. The authors' code counts clipped tokens too, at their
    clipped value, by which a higher lower bound would *add* to the negatives it shuts out. Without any loss the bounds are those of the start.
    """
    ratio_T, mass_T = ratio_T.detach().double(), (ratio_T.detach() * advantages_T).double()
    highs = _grid(settings.high_least, settings.high_greatest, settings.step_high)
    lows = _grid(settings.low_least, settings.low_greatest, settings.step_low)
    high_S = highs + [highs[-1]] * (len(lows) - 1)
    low_S = [lows[0]] * (len(highs) - 1) + lows
    positive_S = _mass_up_to(ratio_T, mass_T.clamp(min=0), high_S, right=True)
    negative_T = (-mass_T).clamp(min=0)
    negative_S = negative_T.sum() - _mass_up_to(ratio_T, negative_T, low_S, right=False)
    reached_S = positive_S >= settings.positive_share * (positive_S + negative_S)
    step = int(reached_S.int().argmax()) if bool(reached_S.any()) else len(high_S) - 1
    return Clip(low=1 - low_S[step], high=high_S[step] - 1)


def _grid(least: float, greatest: float, step: float) -> list[float]:
    """least, least + step, ... and at the end `greatest`."""
    count = math.ceil((greatest - least) / step - 1e-9)
    return [least + i * step for i in range(count)] + [greatest]


def _mass_up_to(ratio_T: Tensor, mass_T: Tensor, bounds_S: list[float], *, right: bool) -> Tensor:
    """(S,) sum of the mass of tokens whose ratio is below each bound; with `right` also of those at it."""
    ordered_T, order_T = ratio_T.sort()
    cumulative_T = torch.cat([mass_T.new_zeros(1), mass_T[order_T].cumsum(0)])
    return cumulative_T[torch.searchsorted(ordered_T, mass_T.new_tensor(bounds_S), right=right)]
