"""The loss of an update: policy loss, correction, entropy control and bonus put together, against the sum written out token by token."""

import math
from typing import Any

import pytest
import torch

from services.contracts.spec import RunSpec
from tests.unit.token_batch import batch, flat
from trainer.control.actuators import STILL, Actuators
from trainer.objective import UpdateLoss, update_loss

MU = [[-1.0, -2.0, -0.7], [-0.4, -1.5]]
PROXIMAL = [[-1.3, -1.2, -0.7], [-0.9, -1.4]]
LOGP = [[-1.1, -1.3, -0.6], [-0.8, -1.9]]
ENTROPY = [[0.3, 1.2, 0.8], [0.5, 0.1]]
ADVANTAGES = [1.5, -0.5]
A_T = [1.5, 1.5, 1.5, -0.5, -0.5]
PROXIMAL_T, MU_T, LOGP_T, ENTROPY_T = (flat(rows).tolist() for rows in (PROXIMAL, MU, LOGP, ENTROPY))
WEIGHT_T = [min(math.exp(p - m), 1.5) for p, m in zip(PROXIMAL_T, MU_T, strict=True)]
RATIO_T = [math.exp(x - p) for x, p in zip(LOGP_T, PROXIMAL_T, strict=True)]
DECOUPLED = {"anchor": "decoupled", "weight": "truncate", "truncation": 1.5}


def update(actuators: Actuators = STILL, **changes: Any) -> tuple[UpdateLoss, list[float], list[float]]:
    """The loss with its gradients by log-probability and by entropy."""
    logp_T, entropy_T = flat(LOGP).requires_grad_(), flat(ENTROPY).requires_grad_()
    found = update_loss(
        RunSpec.model_validate(changes), actuators, logp_T, entropy_T, batch(ADVANTAGES, MU, PROXIMAL), generator=torch.Generator().manual_seed(0)
    )
    found.loss.backward()
    return found, *([0.0] * 5 if leaf.grad is None else leaf.grad.tolist() for leaf in (logp_T, entropy_T))


def clipped(r: float, a: float) -> float:
    return min(r * a, min(max(r, 0.8), 1.2) * a)


def test_each_term_has_the_weight_of_correction_and_of_control() -> None:
    control = {"method": "positive_reweighting", "schedule": "constant", "start": 0.3}
    found, _, _ = update(Actuators(positive_weight=0.3), correction=DECOUPLED, entropy=control)
    terms = [w * (0.3 if a > 0 else 1.0) * clipped(r, a) for w, r, a in zip(WEIGHT_T, RATIO_T, A_T, strict=True)]
    assert found.loss.item() == pytest.approx(-sum(terms) / 5)
    assert found.bounds == pytest.approx((0.8, 1.2))


def test_a_bonus_adds_the_mean_entropy_and_pushes_it_up() -> None:
    plain, still, nothing = update(entropy={"method": "bonus"})
    found, gradient, pull = update(Actuators(entropy_coefficient=0.1), entropy={"method": "bonus"})
    assert found.loss.item() == pytest.approx(plain.loss.item() - 0.1 * sum(ENTROPY_T) / 5)
    assert gradient == still
    assert nothing == [0.0] * 5
    assert pull == pytest.approx([-0.1 / 5] * 5), "descent raises it"


@pytest.mark.parametrize("alpha", [-0.5, 0.5])
def test_the_extra_loss_of_entropic_is_corrected_like_the_main_one(alpha: float) -> None:
    """So that the weight of a sure token is 1 + alpha or 1 - alpha by the sign of its advantage, whatever its correction."""
    wide = {"correction": DECOUPLED, "clip": {"off": True}, "entropy": {"method": "entropic"}}
    _, gradient, _ = update(Actuators(high_probability=alpha, threshold=0.0), **wide)
    _, plain, _ = update(**wide)
    assert gradient == pytest.approx([g * (1 + alpha if a > 0 else 1 - alpha) for g, a in zip(plain, A_T, strict=True)])


def test_kl_cov_clips_nothing_and_its_penalty_is_corrected_and_gone_where_the_token_is_rejected() -> None:
    control = {"method": "kl_cov", "fraction": 1.0, "coefficient": 2.0}
    found, _, _ = update(correction=DECOUPLED, entropy=control)
    terms = [w * (-r * a + 2 * abs(x - p)) for w, r, a, x, p in zip(WEIGHT_T, RATIO_T, A_T, LOGP_T, PROXIMAL_T, strict=True)]
    assert found.loss.item() == pytest.approx(sum(terms) / 5)
    assert found.bounds is None
    masked = DECOUPLED | {"weight": "mask", "reject_below": 0.9, "reject_above": 2.0}
    found, gradient, _ = update(correction=masked, entropy=control)
    ratios = [math.exp(p - m) for p, m in zip(PROXIMAL_T, MU_T, strict=True)]
    rejected = [not 0.9 <= w <= 2.0 for w in ratios]
    assert found.corrected.rejected_T.tolist() == rejected
    assert any(rejected)
    assert [g == 0 for g in gradient] == rejected


def test_bapo_searches_the_bounds_that_the_loss_then_has() -> None:
    found, _, _ = update(entropy={"method": "bapo", "positive_share": 0.99}, clip={"low": 0.0, "high": 0.0})
    assert found.bounds == pytest.approx((0.68, 3.0)), "not those of `clip`: the first that shut out both tokens of A < 0, whose ratio is 0.67"
