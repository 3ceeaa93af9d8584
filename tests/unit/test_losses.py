import math

import pytest
import torch

from services.contracts.algorithms import Anchor
from trainer.losses import MAX_LOG_RATIO, anchor_logps, clipped_surrogate

CLIP = {"clip_low": 0.2, "clip_high": 0.28, "clip_off": False}


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def surrogate(log_ratios, advantages, *, weights=None, denominator=1.0, **clip):
    """The loss of tokens with these log-ratios to the anchor, and its gradient with respect to their log-probabilities."""
    anchor_T = doubles(*[-1.5] * len(log_ratios))
    logp_T = (anchor_T + doubles(*log_ratios)).requires_grad_()
    weight_T = doubles(*(weights or [1.0] * len(log_ratios)))
    result = clipped_surrogate(logp_T, anchor_T, doubles(*advantages), weight_T, denominator=denominator, **{**CLIP, **clip})
    (grad_T,) = torch.autograd.grad(result.loss, logp_T)
    return result, grad_T


def written_out(log_ratios, advantages, weights, denominator, *, low=0.2, high=0.28):
    """-sum w min(r A, clip(r) A) / denominator in plain floats."""
    total = 0.0
    for x, a, w in zip(log_ratios, advantages, weights, strict=True):
        r = math.exp(x)
        total += w * min(r * a, min(max(r, 1 - low), 1 + high) * a)
    return -total / denominator


def test_loss_and_gradient_equal_the_formula_and_its_finite_differences():
    generator = torch.Generator().manual_seed(0)
    log_ratios = (torch.randn(200, generator=generator, dtype=torch.float64) * 0.5).tolist()
    advantages = torch.randn(200, generator=generator, dtype=torch.float64).tolist()
    weights = (torch.rand(200, generator=generator, dtype=torch.float64) * 2).tolist()
    result, grad_T = surrogate(log_ratios, advantages, weights=weights, denominator=37.0)
    assert result.loss.item() == pytest.approx(written_out(log_ratios, advantages, weights, 37.0), abs=1e-12)
    assert 20 < int(result.clipped_up_T.sum()) < 80
    assert 20 < int(result.clipped_down_T.sum()) < 80
    step = 1e-6
    for t in range(200):
        shifted = [[*log_ratios[:t], log_ratios[t] + s, *log_ratios[t + 1 :]] for s in (step, -step)]
        above, below = (written_out(x, advantages, weights, 37.0) for x in shifted)
        assert grad_T[t].item() == pytest.approx((above - below) / (2 * step), abs=1e-8)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [
        (1.0, 2.0, None),
        (1.0, -2.0, None),
        (1.27, 2.0, None),
        (1.29, 2.0, "up"),
        (1.29, -2.0, None),  # a token to be made rarer that has become likelier: still pushed down
        (0.81, -2.0, None),
        (0.79, -2.0, "down"),
        (0.79, 2.0, None),  # a token to be made likelier that has become rarer: still pulled up
        (5.0, 0.0, None),
        (0.1, 0.0, None),
    ],
)
def test_each_region_moves_the_token_as_it_should(ratio, advantage, clipped):
    result, grad_T = surrogate([math.log(ratio)], [advantage])
    assert result.ratio_T.item() == pytest.approx(ratio)
    assert (bool(result.clipped_up_T), bool(result.clipped_down_T)) == (clipped == "up", clipped == "down")
    # Descent moves log-probability against the gradient: up for A > 0, down for A < 0, not at all where clipped.
    assert grad_T.item() == pytest.approx(0.0 if clipped else -ratio * advantage)


def test_with_clip_off_every_token_keeps_its_gradient():
    result, grad_T = surrogate([1.0, -2.0], [1.0, -1.0], clip_off=True)
    assert not result.clipped_up_T.any()
    assert not result.clipped_down_T.any()
    assert grad_T.tolist() == pytest.approx([-math.e, math.exp(-2)])
    assert result.loss.item() == pytest.approx(-(math.e - math.exp(-2)))


def test_pieces_with_the_whole_denominator_add_up_to_the_loss_of_the_whole():
    log_ratios, advantages = [0.1, -0.4, 0.5, 0.0], [1.0, -1.0, 2.0, -0.5]
    whole, _ = surrogate(log_ratios, advantages, denominator=4)
    parts = [surrogate(log_ratios[i:j], advantages[i:j], denominator=4)[0].loss for i, j in ((0, 1), (1, 4))]
    assert sum(parts).item() == pytest.approx(whole.loss.item(), abs=1e-12)


def test_huge_log_ratios_stay_finite_and_stop_the_gradient():
    result, grad_T = surrogate([1000.0, -1000.0], [-1.0, 1.0])
    assert result.ratio_T.tolist() == pytest.approx([math.exp(MAX_LOG_RATIO), math.exp(-MAX_LOG_RATIO)])
    assert torch.isfinite(result.loss)
    assert grad_T.tolist() == [0.0, 0.0]


def test_gradient_flows_through_the_current_policy_only():
    tensors = [doubles(-1.0, -2.0).requires_grad_() for _ in range(2)]
    logp_T, proximal_T = tensors
    anchor_T, weight_T = anchor_logps(Anchor.DECOUPLED, doubles(-1.5, -1.5), proximal_T, truncation=5.0)
    clipped_surrogate(logp_T, anchor_T, doubles(1.0, -1.0), weight_T, denominator=2, **CLIP).loss.backward()
    assert logp_T.grad is not None
    assert proximal_T.grad is None


BEHAVIOUR_T, PROXIMAL_T = doubles(-1.0, -1.0, -1.0), doubles(-1.0 + math.log(1.5), -1.0 + math.log(3.0), -1.0 + math.log(0.25))


@pytest.mark.parametrize(
    ("anchor", "anchor_T", "weights"),
    [
        (Anchor.BEHAVIOUR, BEHAVIOUR_T, [1, 1, 1]),
        (Anchor.PROXIMAL, PROXIMAL_T, [1, 1, 1]),
        (Anchor.DECOUPLED, PROXIMAL_T, [1.5, 2.0, 0.25]),
    ],
)
def test_anchor_and_weight(anchor, anchor_T, weights):
    got_T, weight_T = anchor_logps(anchor, BEHAVIOUR_T, PROXIMAL_T, truncation=2.0)
    assert torch.equal(got_T, anchor_T)
    assert weight_T.tolist() == pytest.approx(weights)


def test_decoupled_weight_does_not_overflow():
    _, weight_T = anchor_logps(Anchor.DECOUPLED, doubles(-1e4), doubles(-1.0), truncation=2.0)
    assert weight_T.tolist() == [2.0]


def test_only_the_behaviour_anchor_does_without_the_proximal_policy():
    assert anchor_logps(Anchor.BEHAVIOUR, BEHAVIOUR_T, None, truncation=2.0)[0] is BEHAVIOUR_T
    for anchor in (Anchor.PROXIMAL, Anchor.DECOUPLED):
        with pytest.raises(ValueError, match="proximal"):
            anchor_logps(anchor, BEHAVIOUR_T, None, truncation=2.0)


def test_decoupled_loss_is_an_importance_weighted_surrogate():
    # On the first update current = proximal: the ratio is 1, nothing is clipped, and the gradient is -(prox / mu) A, truncated.
    logp_T = PROXIMAL_T.clone().requires_grad_()
    anchor_T, weight_T = anchor_logps(Anchor.DECOUPLED, BEHAVIOUR_T, PROXIMAL_T, truncation=2.0)
    result = clipped_surrogate(logp_T, anchor_T, doubles(1.0, 1.0, -1.0), weight_T, denominator=1, **CLIP)
    result.loss.backward()
    assert logp_T.grad is not None
    assert logp_T.grad.tolist() == pytest.approx([-1.5, -2.0, 0.25])
