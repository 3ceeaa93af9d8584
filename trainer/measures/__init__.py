"""What a step measures on the tokens and groups that it trains on: sums that add up over updates, and their means at the end. Pure functions.

`services.contracts.measures` lists every key with its meaning. `_T` runs over the trained tokens of a mini-batch, `_R` over its completions, `_G`
over a group's members, `_K` over what is summed, `_B` over bins. With l = logp of the current policy - logp of another policy q, on tokens that q
sampled (Schulman, "Approximating KL divergence", 2020):

    KL(q || current):  k1 = mean(-l), unbiased, may be negative;  k2 = mean(l^2) / 2;  k3 = mean(exp(l) - 1 - l), never negative, less variance
    M2:                mean(l^2)  (M2PO, arXiv 2510.01161)
    chi2(current, q):  mean(w^2) - 1 with w = exp(l)
    ESS share:         (sum w)^2 / (count * sum w^2): the share of the tokens (or completions) that the batch is worth

The log-ratio is clamped before exp as in the losses. The entropy budget follows from the drift of trainer.entropy.
"""

from trainer.measures.bins import forking_threshold
from trainer.measures.groups import group_measures
from trainer.measures.sums import Measures
from trainer.measures.update import budget_measures, mismatch_measures, moved_measures, update_measures

__all__ = ["Measures", "budget_measures", "forking_threshold", "group_measures", "mismatch_measures", "moved_measures", "update_measures"]
