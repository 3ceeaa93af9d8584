"""Every loss against its formula, written out token by token in plain Python floats, and against difference quotients of that formula."""

import math
import random
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.algorithms import Aspo, Cispo, Clip, ClippedSurrogate, Dppo, Gspo, Loss, Normaliser, Sapo, Topr
from tests.unit.token_batch import batch, flat
from trainer.losses import MAX_LOG_RATIO, normalised, objective

CLIP = Clip(low=0.2, high=0.28)
LOSSES = [
    ClippedSurrogate(), ClippedSurrogate(dual_clip=1.8), Cispo(low=0.6, high=0.5), Gspo(low=0.1, high=0.15), Sapo(), Dppo(),
    Dppo(low=0.1, high=0.12, truncation=1.5, penalty=0.01), Topr(), Topr(level="completion"), Aspo(dual_clip=1.6),
]  # fmt: skip
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)


def test_every_kind_of_loss_is_tested():
    assert {type(loss) for loss in LOSSES} == set(get_args(get_args(Loss)[0]))


# -- the references ----------------------------------------------------------------------------------------------------------------------------
# Each gives the objective of the tokens of one completion. `now` is what is differentiated; `then`, equal to it, stands under stop-gradients.


def clamp(x, low, high):
    return min(max(x, low), high)


def clipped_term(r, a, low, high):
    return min(r * a, clamp(r, 1 - low, 1 + high) * a)


def reference(loss, clip, now, then, anchor, a):
    r_now = [math.exp(x - q) for x, q in zip(now, anchor, strict=True)]
    r_then = [math.exp(x - q) for x, q in zip(then, anchor, strict=True)]
    match loss.kind:
        case "clip":
            terms = [clipped_term(r, a, clip.low, clip.high) for r in r_now]
            return [max(term, loss.dual_clip * a) if a < 0 and loss.dual_clip else term for term in terms]
        case "cispo":
            return [clamp(r, 1 - loss.low, 1 + loss.high) * a * x for r, x in zip(r_then, now, strict=True)]
        case "gspo":  # the paper's own form: one term to a completion
            s = math.prod(r_now) ** (1 / len(now))
            return [clipped_term(s, a, loss.low, loss.high)] * len(now)
        case "sapo":
            tau = loss.tau_positive if a > 0 else loss.tau_negative
            return [4 / tau / (1 + math.exp(-tau * (r - 1))) * a for r in r_now]
        case "dppo":
            values = []
            for x, x0, q, r in zip(now, then, anchor, r_then, strict=True):
                masked = (a > 0 and math.exp(x0) - math.exp(q) > loss.high) or (a < 0 and math.exp(q) - math.exp(x0) > loss.low)
                values.append((not masked) * min(r, loss.truncation) * math.exp(x - x0) * a - loss.penalty * (x - q) ** 2)
            return values
        case "topr":
            ratios = r_then if loss.level == "token" else [math.prod(r_then)] * len(now)
            return [(1 if a > 0 else min(r, 1)) * a * x for r, x in zip(ratios, now, strict=True)]
        case "aspo":
            values = []
            for x, x0, r in zip(now, then, r_then, strict=True):
                bounded = min(r, 1 + clip.high) if a > 0 else max(r, 1 - clip.low)
                weight = min(1 / bounded if a > 0 else bounded, loss.dual_clip)
                values.append(weight * a * (math.exp(x - x0) if bounded == r else 1))
            return values
    raise AssertionError(loss.kind)


def some_completions():
    """Completions of 1 to 6 tokens with probabilities between 0.02 and 1 and ratios far and near; some of advantage 0."""
    generator = random.Random(3)
    anchor = [[math.log(generator.uniform(0.05, 0.7)) for _ in range(generator.randint(1, 6))] for _ in range(40)]
    logp = [[min(q + generator.gauss(0, 0.4), -0.01) for q in row] for row in anchor]
    advantages = [generator.choice([0.0, generator.gauss(0, 1), generator.gauss(0, 1)]) for _ in anchor]
    return anchor, logp, advantages


@each_loss
def test_values_and_gradient_equal_the_formula_and_its_difference_quotients(loss):
    anchor, logp, advantages = some_completions()
    tokens, logp_T = batch(advantages, anchor), flat(logp).requires_grad_()
    found = objective(loss, CLIP, logp_T, flat(anchor), tokens)
    rows = list(zip(logp, anchor, advantages, strict=True))
    assert found.values_T.tolist() == pytest.approx([v for x, q, a in rows for v in reference(loss, CLIP, x, x, q, a)], abs=1e-12)
    normalised(found.values_T, tokens, Normaliser.SEQUENCE, max_tokens=8).backward()
    step, quotients = 1e-6, []
    for x, q, a in rows:
        for t in range(len(x)):
            above, below = (
                math.fsum(reference(loss, CLIP, [*x[:t], x[t] + shift, *x[t + 1 :]], x, q, a)) / len(x) / len(rows) for shift in (step, -step)
            )
            quotients.append((above - below) / (2 * step))
    assert logp_T.grad.tolist() == pytest.approx(quotients, abs=1e-8)


UP, DOWN, DUAL = "clipped_up_T", "clipped_down_T", "dual_clipped_T"
REGIONS = [
    (ClippedSurrogate(), {UP, DOWN}), (ClippedSurrogate(dual_clip=1.8), {UP, DOWN, DUAL}), (Cispo(), set()), (Gspo(low=0.1, high=0.15), {UP, DOWN}),
    (Sapo(), set()), (Dppo(), {UP, DOWN}), (Topr(), set()), (Aspo(dual_clip=1.6), {UP, DOWN, DUAL}),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "regions"), REGIONS, ids=repr)
def test_the_completions_of_that_test_reach_every_region(loss, regions):
    anchor, logp, advantages = some_completions()
    found = objective(loss, CLIP, flat(logp), flat(anchor), batch(advantages, anchor))
    for region in (UP, DOWN, DUAL):
        assert bool(getattr(found, region).any()) == (region in regions), region


# -- where each loss pushes --------------------------------------------------------------------------------------------------------------------


def push(loss, ratios, advantage, *, anchor=0.1, clip=CLIP):
    """Gradient of the objective of one completion with these ratios: what ascent adds to each log-probability; and its objective."""
    anchor_rows = [[math.log(anchor)] * len(ratios)]
    logp_T = (flat(anchor_rows) + flat([ratios]).log()).requires_grad_()
    found = objective(loss, clip, logp_T, flat(anchor_rows), batch([advantage], anchor_rows))
    (gradient_T,) = torch.autograd.grad(found.values_T.sum(), logp_T)
    return gradient_T.tolist(), found


@each_loss
@pytest.mark.parametrize("advantage", [1.5, -0.5, 0.0])
def test_on_policy_every_loss_is_reinforce(loss, advantage):
    gradient, found = push(loss, [1.0, 1.0], advantage)
    assert gradient == pytest.approx([advantage, advantage])
    assert not (found.clipped_up_T | found.clipped_down_T | found.dual_clipped_T).any()


@pytest.mark.parametrize(
    ("loss", "ratio", "advantage", "expected", "region"),
    [
        (ClippedSurrogate(), 1.27, 2.0, 2.54, None),
        (ClippedSurrogate(), 1.29, 2.0, 0.0, UP),
        (ClippedSurrogate(), 1.29, -2.0, -2.58, None),  # to be made rarer, has become likelier: still pushed down
        (ClippedSurrogate(), 0.81, -2.0, -1.62, None),
        (ClippedSurrogate(), 0.79, -2.0, 0.0, DOWN),
        (ClippedSurrogate(), 0.79, 2.0, 1.58, None),  # to be made likelier, has become rarer: still pulled up
        (ClippedSurrogate(), 5.0, -1.0, -5.0, None),
        (ClippedSurrogate(dual_clip=3), 2.9, -1.0, -2.9, None),
        (ClippedSurrogate(dual_clip=3), 3.1, -1.0, 0.0, DUAL),
        (ClippedSurrogate(dual_clip=3), 3.1, 1.0, 0.0, UP),
        (Cispo(), 0.01, 1.0, 0.01, None),
        (Cispo(), 4.0, 1.0, 4.0, None),
        (Cispo(), 9.0, 1.0, 5.0, None),  # the weight is clipped, the gradient stays
        (Cispo(), 9.0, -1.0, -5.0, None),
        (Cispo(low=0.5), 0.01, -1.0, -0.5, None),
        (Gspo(), 1.0005, 1.0, 0.0, UP),
        (Gspo(), 1.0003, 1.0, 1.0003, None),
        (Gspo(), 0.9996, -1.0, 0.0, DOWN),
        (Gspo(), 0.9998, -1.0, -0.9998, None),
        (Gspo(), 0.5, 1.0, 0.5, None),
        (Dppo(), 2.4, 1.0, 2.4, None),  # 0.1 -> 0.24: far by ratio, not by probability
        (Dppo(), 2.6, 1.0, 0.0, UP),
        (Dppo(), 2.6, -1.0, -2.6, None),
        (Dppo(), 0.001, -1.0, -0.001, None),
        (Dppo(penalty=0.1), 2.6, 1.0, -0.2 * math.log(2.6), UP),  # the penalty still pulls back
        (Dppo(penalty=0.1), 0.5, 1.0, 0.5 + 0.2 * math.log(2), None),
        (Topr(), 0.01, 1.0, 1.0, None),
        (Topr(), 50.0, 1.0, 1.0, None),
        (Topr(), 0.01, -1.0, -0.01, None),
        (Topr(), 50.0, -1.0, -1.0, None),
        (Aspo(), 0.5, 1.0, 2.0, None),  # upside down: the rarer, the harder
        (Aspo(), 0.1, 1.0, 3.0, DUAL),
        (Aspo(), 1.27, 1.0, 1 / 1.27, None),
        (Aspo(), 1.29, 1.0, 0.0, UP),
        (Aspo(), 0.79, -1.0, 0.0, DOWN),
        (Aspo(), 2.0, -1.0, -2.0, None),
        (Aspo(), 5.0, -1.0, -3.0, DUAL),
        (Aspo(), 5.0, 0.0, 0.0, None),
    ],
)
def test_each_region_pushes_as_it_should(loss, ratio, advantage, expected, region):
    (gradient,), found = push(loss, [ratio], advantage)
    assert gradient == pytest.approx(expected, abs=1e-12)
    assert found.ratio_T.item() == pytest.approx(ratio)
    for name in (UP, DOWN, DUAL):
        assert bool(getattr(found, name)) == (name == region), name


def test_gspo_clips_completions_not_tokens():
    gradient, found = push(Gspo(), [2.0, 0.5], 1.0)  # far tokens that even out
    assert gradient == pytest.approx([1.0, 1.0])
    assert found.ratio_T.tolist() == pytest.approx([1.0, 1.0])
    gradient, found = push(Gspo(), [1.0, 1.001, 1.001], 1.0)  # the near one is held back with the rest
    assert gradient == [0.0, 0.0, 0.0]
    assert found.clipped_up_T.all()


def test_dppo_masks_likely_tokens_that_fell():
    gradient, found = push(Dppo(), [0.6], -1.0, anchor=0.5)  # 0.5 -> 0.3
    assert gradient == [0.0]
    assert found.clipped_down_T.all()
    assert push(Dppo(), [0.8], -1.0, anchor=0.5)[0] == pytest.approx([-0.8])  # 0.5 -> 0.4
    assert push(Dppo(), [0.6], 1.0, anchor=0.5)[0] == pytest.approx([0.6])


def test_dppo_holds_the_weight_of_a_token_that_was_all_but_impossible():
    assert push(Dppo(), [1000.0], 1.0, anchor=1e-5)[0] == pytest.approx([20.0])
    assert push(Dppo(truncation=2000), [1000.0], 1.0, anchor=1e-5)[0] == pytest.approx([1000.0])


def test_topr_of_completions_fades_by_their_product():
    assert push(Topr(level="completion"), [0.5, 0.4, 2.0], -1.0)[0] == pytest.approx([-0.4] * 3)
    assert push(Topr(), [0.5, 0.4, 2.0], -1.0)[0] == pytest.approx([-0.5, -0.4, -1.0])
    assert push(Topr(level="completion"), [2.0, 2.0, 0.5], -1.0)[0] == pytest.approx([-1.0] * 3)


def test_sapo_fades_on_both_sides_and_faster_for_negative_advantages():
    for advantage in (1.0, -1.0):
        gates = [push(Sapo(), [ratio], advantage)[0][0] / (ratio * advantage) for ratio in (0.01, 0.5, 1.0, 1.5, 4.0, 30.0)]
        assert min(gates) > 0
        assert gates[0] < gates[1] < gates[2] > gates[3] > gates[4] > gates[5]
        assert gates[2] == pytest.approx(1)
        assert gates[5] < 1e-10
    assert -push(Sapo(), [4.0], -1.0)[0][0] < push(Sapo(), [4.0], 1.0)[0][0]
    assert -push(Sapo(tau_negative=1.0), [4.0], -1.0)[0][0] == pytest.approx(push(Sapo(), [4.0], 1.0)[0][0])


@pytest.mark.parametrize("loss", [ClippedSurrogate(), Gspo(), Aspo()], ids=repr)
def test_with_clip_off_nothing_is_clipped(loss):
    for ratio, advantage in ((2.0, 1.0), (0.5, -1.0)):
        gradient, found = push(loss, [ratio], advantage, clip=Clip(off=True))
        weight = 1 / ratio if isinstance(loss, Aspo) and advantage > 0 else ratio
        assert gradient == pytest.approx([weight * advantage])
        assert not (found.clipped_up_T | found.clipped_down_T).any()


def test_a_dual_clip_stays_with_clip_off():
    assert push(ClippedSurrogate(dual_clip=3), [4.0], -1.0, clip=Clip(off=True))[0] == [0.0]
    assert push(Aspo(), [4.0], -1.0, clip=Clip(off=True))[0] == pytest.approx([-3.0])


@pytest.mark.parametrize("loss", [ClippedSurrogate(), Sapo()], ids=repr)
def test_smooth_losses_pass_gradcheck(loss):
    anchor_T, tokens = flat([[-1.0, -2.0], [-0.5]]), batch([0.7, -1.2], [[-1.0, -2.0], [-0.5]])
    logp_T = (anchor_T + flat([[0.05, -0.1], [0.15]])).requires_grad_()  # inside the bounds
    assert torch.autograd.gradcheck(lambda x: objective(loss, CLIP, x, anchor_T, tokens).values_T, logp_T)


# -- for all losses ----------------------------------------------------------------------------------------------------------------------------


@given(
    loss=st.sampled_from(LOSSES),
    clip=st.sampled_from([CLIP, Clip(off=True)]),
    rows=st.lists(
        st.tuples(st.sampled_from([-2.0, 0.0, 3.0]), st.lists(st.tuples(st.floats(-1e4, 0), st.floats(-1e4, 0)), min_size=1, max_size=4)), max_size=4
    ),
)
def test_values_and_gradient_are_finite_for_any_log_ratio(loss, clip, rows):
    anchor = [[q for _, q in row] for _, row in rows]
    tokens = batch([a for a, _ in rows], anchor, dtype=torch.float32)
    logp_T = flat([[x for x, _ in row] for _, row in rows], torch.float32).requires_grad_()
    found = objective(loss, clip, logp_T, tokens.behaviour_T, tokens)
    (gradient_T,) = torch.autograd.grad(found.values_T.sum(), logp_T)
    assert found.values_T.isfinite().all()
    assert gradient_T.isfinite().all()
    assert found.ratio_T.isfinite().all()
    assert found.values_T.dtype == gradient_T.dtype == torch.float32


def test_the_ratio_stops_at_its_greatest_and_so_does_the_gradient():
    gradient, found = push(ClippedSurrogate(), [1e300, 1e-300], -1.0, clip=Clip(off=True))
    assert found.ratio_T.tolist() == pytest.approx([math.exp(MAX_LOG_RATIO), math.exp(-MAX_LOG_RATIO)])
    assert gradient == [0.0, 0.0]


@given(loss=st.sampled_from(LOSSES), normaliser=st.sampled_from(list(Normaliser)), order=st.permutations(range(12)))
def test_the_order_of_completions_does_not_matter(loss, normaliser, order):
    anchor, logp, advantages = (values[:12] for values in some_completions())

    def result(rows):
        tokens, logp_T = batch([advantages[i] for i in rows], [anchor[i] for i in rows]), flat([logp[i] for i in rows]).requires_grad_()
        value = normalised(objective(loss, CLIP, logp_T, tokens.behaviour_T, tokens).values_T, tokens, normaliser, max_tokens=8)
        gradients = iter(torch.autograd.grad(value, logp_T)[0].tolist())
        return value.item(), {i: [next(gradients) for _ in logp[i]] for i in rows}

    (value, gradients), (value_again, gradients_again) = result(range(12)), result(order)
    assert value_again == pytest.approx(value, abs=1e-12)
    for i, gradient in gradients.items():
        assert gradients_again[i] == pytest.approx(gradient, abs=1e-12)


@each_loss
def test_gradient_flows_through_the_current_policy_only(loss):
    anchor, logp, advantages = some_completions()
    tokens = batch(advantages, anchor)
    logp_T, anchor_T, advantages_T = flat(logp).requires_grad_(), flat(anchor).requires_grad_(), tokens.advantages_T.clone().requires_grad_()
    found = objective(loss, CLIP, logp_T, anchor_T, tokens, advantages_T=advantages_T)
    found.values_T.sum().backward()
    assert logp_T.grad is not None
    assert anchor_T.grad is None
    assert advantages_T.grad is None
    assert not found.ratio_T.requires_grad


@each_loss
def test_shaped_advantages_stand_in_for_those_of_the_tokens(loss):
    anchor, logp, advantages = some_completions()
    shaped = [2.0 - a for a in advantages]
    logp_T, anchor_T = flat(logp), flat(anchor)
    through = objective(loss, CLIP, logp_T, anchor_T, batch(advantages, anchor), advantages_T=batch(shaped, anchor).advantages_T)
    assert torch.equal(through.values_T, objective(loss, CLIP, logp_T, anchor_T, batch(shaped, anchor)).values_T)


@each_loss
def test_no_tokens_no_objective(loss):
    tokens, logp_T = batch([], []), torch.zeros(0, dtype=torch.float64, requires_grad=True)
    found = objective(loss, CLIP, logp_T, tokens.behaviour_T, tokens)
    assert found.values_T.shape == found.clipped_up_T.shape == (0,)
    for normaliser in Normaliser:
        value = normalised(found.values_T, tokens, normaliser, max_tokens=8)
        value.backward(retain_graph=True)
        assert value.item() == 0.0


# -- normalisers -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normaliser", "expected", "share"),
    [
        (Normaliser.TOKEN, (1 + 2 + 6 + 5) / 4, [1 / 4] * 4),
        (Normaliser.SEQUENCE, ((1 + 2 + 6) / 3 + 5 / 1) / 2, [1 / 6, 1 / 6, 1 / 6, 1 / 2]),
        (Normaliser.CONSTANT, (1 + 2 + 6 + 5) / (2 * 8), [1 / 16] * 4),
    ],
)
def test_normalisers_by_value(normaliser, expected, share):
    values_T = flat([[1.0, 2.0, 6.0], [5.0]]).requires_grad_()
    value = normalised(values_T, batch([1.0, -1.0], [[0.0] * 3, [0.0]]), normaliser, max_tokens=8)
    value.backward()
    assert value.item() == pytest.approx(expected)
    assert values_T.grad.tolist() == pytest.approx(share)
