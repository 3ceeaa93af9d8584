"""Corrections against their definitions, written out completion by completion in plain Python floats."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.algorithms import Anchor, Correction, Weighting
from tests.unit.token_batch import batch, flat
from trainer.corrections import correct

DECOUPLED = {"anchor": Anchor.DECOUPLED}
LN = math.log


def weighed(rows, correction):
    """Corrected tokens of completions with these weights proximal/behaviour; the current policy is the proximal one."""
    behaviour = [[-3.0] * len(row) for row in rows]
    proximal = [[-3.0 + LN(w) for w in row] for row in rows]
    return correct(correction, flat(proximal), batch([1.0] * len(rows), behaviour, proximal))


@pytest.mark.parametrize("anchor", list(Anchor))
def test_the_anchor_is_the_policy_that_it_names(anchor):
    tokens = batch([1.0], [[-1.0, -2.0]], [[-1.1, -1.9]])
    found = correct(Correction(anchor=anchor), flat([[-1.2, -1.8]]), tokens)
    assert torch.equal(found.anchor_T, tokens.behaviour_T if anchor is Anchor.BEHAVIOUR else tokens.proximal_T)


ROWS = [[1.5, 3.0, 0.25], [1.2, 1.25], [0.8, 0.5]]  # products 1.125, 1.5, 0.4; geometric means 1.04, 1.22, 0.63
BOUNDS = {"truncation": 2.0, "reject_below": 0.5, "reject_above": 2.0}


@pytest.mark.parametrize(
    ("weight", "settings", "expected"),
    [
        (Weighting.NONE, BOUNDS, [1.5, 3.0, 0.25, 1.2, 1.25, 0.8, 0.5]),
        (Weighting.TRUNCATE, BOUNDS, [1.5, 2.0, 0.25, 1.2, 1.25, 0.8, 0.5]),
        (Weighting.MASK, {"reject_below": 0.45, "reject_above": 2.0}, [1.5, 0, 0, 1.2, 1.25, 0.8, 0.5]),
        (Weighting.SEQUENCE_TRUNCATE, {"truncation": 1.3}, [1.125] * 3 + [1.3] * 2 + [0.4] * 2),
        (Weighting.SEQUENCE_MASK, {"reject_below": 0.45, "reject_above": 1.3}, [1.125] * 3 + [0] * 4),
        (Weighting.GEOMETRIC_MASK, {"reject_below": 0.65, "reject_above": 1.2}, [1.5, 3.0, 0.25, 0, 0, 0, 0]),
        (Weighting.GEOMETRIC_MASK, {"reject_below": 0.6, "reject_above": 1.2}, [1.5, 3.0, 0.25, 0, 0, 0.8, 0.5]),
    ],
)
def test_weights_by_value(weight, settings, expected):
    found = weighed(ROWS, Correction(weight=weight, **DECOUPLED, **settings))
    assert found.weight_T.tolist() == pytest.approx(expected)
    assert found.rejected_T.tolist() == [w == 0 for w in expected]


def test_no_gradient_flows_through_a_correction():
    tokens = batch([1.0], [[-1.0, -2.0]], [[-1.1, -1.9]])
    tokens.proximal_T.requires_grad_()
    assert not correct(Correction(**DECOUPLED), flat([[-1.2, -1.8]]).requires_grad_(), tokens).weight_T.requires_grad


REJECTING = [Weighting.NONE, Weighting.MASK, Weighting.SEQUENCE_MASK, Weighting.GEOMETRIC_MASK]


@pytest.mark.parametrize("anchor", [Anchor.BEHAVIOUR, Anchor.PROXIMAL])
@pytest.mark.parametrize("weight", REJECTING)
def test_other_anchors_only_keep_or_reject(anchor, weight):
    bounds = {"reject_below": 0.65, "reject_above": 1.2, "truncation": 1.3}
    found = weighed(ROWS, Correction(anchor=anchor, weight=weight, **bounds))
    decoupled = weighed(ROWS, Correction(anchor=Anchor.DECOUPLED, weight=weight, **bounds))
    assert torch.equal(found.rejected_T, decoupled.rejected_T)
    assert torch.equal(found.weight_T, (~decoupled.rejected_T).double())
    assert found.rejected_T.any() == (weight is not Weighting.NONE)


@pytest.mark.parametrize("weight", [Weighting.TRUNCATE, Weighting.SEQUENCE_TRUNCATE])
def test_a_truncated_weight_needs_the_anchor_that_has_one(weight):
    with pytest.raises(ValueError, match=f"'{weight.value}' needs correction.anchor 'decoupled': under 'behaviour' there is no weight to truncate"):
        Correction(weight=weight)
    assert Correction().weighting is Weighting.NONE
    assert Correction(anchor=Anchor.DECOUPLED).weighting is Weighting.TRUNCATE


def test_bounds_themselves_are_not_rejected():
    found = weighed([[1.0]], Correction(weight=Weighting.MASK, reject_below=1.0, reject_above=2.0, **DECOUPLED))
    assert found.weight_T.tolist() == [1.0]
    found = weighed([[1.0]], Correction(weight=Weighting.MASK, reject_below=0.5, reject_above=1.0, **DECOUPLED))
    assert found.weight_T.tolist() == [1.0]


# -- M2PO --------------------------------------------------------------------------------------------------------------------------------------


def m2_rejected(log_ratios, advantages, bound):
    """The rejections of M2PO on one-token completions with these log-ratios current/behaviour."""
    behaviour = [[-20.0]] * len(log_ratios)
    tokens = batch(advantages, behaviour)
    return correct(Correction(m2=bound), flat([[-20.0 + x] for x in log_ratios]), tokens).rejected_T.tolist()


def m2_reference(log_ratios, advantages, bound):
    """Mask the largest, one square at a time, until the mean of those left is within the bound."""
    left = [i for i, (x, a) in enumerate(zip(log_ratios, advantages, strict=True)) if x * a > 0]
    rejected = set()
    while left and math.fsum(log_ratios[i] ** 2 for i in left) / len(left) > bound:
        largest = max(log_ratios[i] ** 2 for i in left)
        gone = {i for i in left if log_ratios[i] ** 2 == largest}
        rejected |= gone
        left = [i for i in left if i not in gone]
    return [i in rejected for i in range(len(log_ratios))]


@pytest.mark.parametrize(
    ("log_ratios", "advantages", "bound", "expected"),
    [
        ([0.1, 0.2, 0.5], [1, 1, 1], 0.04, [False, False, True]),  # (0.01 + 0.04 + 0.25) / 3 = 0.1 > 0.04; (0.01 + 0.04) / 2 = 0.025
        ([0.1, 0.2, 0.3], [1, 1, 1], 0.05, [False, False, False]),  # 0.14 / 3 = 0.047
        ([-0.1, -0.2, -0.5], [-1, -1, -1], 0.04, [False, False, True]),
        ([0.5, -0.5, 0.5], [-1, 1, 0], 0.04, [False, False, False]),  # moved against their push, or not pushed: neither counted nor masked
        ([0.1, 0.5, -0.9], [1, 1, 1], 0.2, [False, False, False]),  # (0.01 + 0.25) / 2 = 0.13; -0.9 does not count
        ([0.0, 0.0, 0.0, 0.5], [1, 1, 1, 1], 0.1, [False, False, False, True]),  # unmoved tokens do not thin out the mean
        ([1.0], [1], 0.04, [True]),
        ([1.0, 2.0], [1, 1], 0.04, [True, True]),
    ],
)
def test_m2_masks_the_largest_squares_until_the_mean_is_within_the_bound(log_ratios, advantages, bound, expected):
    assert m2_reference(log_ratios, advantages, bound) == expected
    assert m2_rejected(log_ratios, advantages, bound) == expected


@given(
    tokens=st.lists(st.tuples(st.integers(-40, 40).map(lambda n: n / 16), st.sampled_from([-1.0, 0.0, 1.0])), max_size=30),
    bound=st.sampled_from([1e-4, 0.04, 0.5, 10.0]),
)
def test_m2_equals_masking_one_square_at_a_time(tokens, bound):  # sixteenths are exact in floating point: equal squares do occur
    log_ratios, advantages = [x for x, _ in tokens], [a for _, a in tokens]
    assert m2_rejected(log_ratios, advantages, bound) == m2_reference(log_ratios, advantages, bound)


# -- OPSM --------------------------------------------------------------------------------------------------------------------------------------


def test_opsm_drops_bad_completions_that_the_policy_has_left():
    behaviour = [[-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0], [-1.0]]
    current = [[-1.0, -2.2], [-1.0, -1.8], [-1.0, -9.0], [-0.1]]  # mean log(behaviour/current): 0.6, 0.4, 4, -0.9
    found = correct(Correction(opsm=0.5), flat(current), batch([-1.0, -1.0, 1.0, -1.0], behaviour))
    assert found.rejected_T.tolist() == [True, True, False, False, False, False, False]
    assert found.weight_T.tolist() == [0, 0, 1, 1, 1, 1, 1]


def test_rejections_add_up():
    behaviour, proximal = [[-5.0, -5.0], [-5.0, -5.0], [-5.0]], [[-5.0, -5.0 + LN(3)], [-5.0, -5.0], [-5.0]]
    current = [[-5.0, -5.0], [-6.0, -6.0], [-4.0]]
    correction = Correction(weight=Weighting.MASK, m2=0.5, opsm=0.9, **DECOUPLED)
    found = correct(correction, flat(current), batch([1.0, -1.0, 1.0], behaviour, proximal))
    assert found.rejected_T.tolist() == [False, True, True, True, True]  # by its weight; the bad completion; by its square
    assert found.weight_T.tolist() == [1, 0, 0, 0, 0]


# -- edges -------------------------------------------------------------------------------------------------------------------------------------

CORRECTIONS = [
    Correction(anchor=anchor, weight=weight, m2=m2, opsm=m2)
    for anchor in Anchor
    for weight in (Weighting if anchor is Anchor.DECOUPLED else REJECTING)
    for m2 in (None, 0.04)
]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=repr)
def test_no_tokens_and_one_token(correction):
    none = correct(correction, torch.zeros(0, dtype=torch.float64), batch([], []))
    assert none.anchor_T.shape == none.weight_T.shape == none.rejected_T.shape == (0,)
    one = correct(correction, flat([[-1.0]]), batch([-1.0], [[-1.0]]))  # on-policy: nothing to correct
    assert (one.anchor_T.tolist(), one.weight_T.tolist(), one.rejected_T.tolist()) == ([-1.0], [1.0], [False])


def test_all_can_be_rejected():
    found = weighed([[9.0, 9.0], [0.1]], Correction(weight=Weighting.MASK, **DECOUPLED))
    assert found.rejected_T.all()
    assert found.weight_T.tolist() == [0, 0, 0]


LOGPS = st.floats(-1e4, 0, width=32)


@given(
    correction=st.sampled_from(CORRECTIONS),
    rows=st.lists(
        st.tuples(st.sampled_from([-1.0, 0.0, 2.0]), st.lists(st.tuples(LOGPS, LOGPS, LOGPS), min_size=1, max_size=4)), min_size=1, max_size=4
    ),
)
def test_extreme_log_ratios_give_neither_nan_nor_infinity(correction, rows):
    current, behaviour, proximal = ([[token[i] for token in row] for _, row in rows] for i in range(3))
    tokens = batch([a for a, _ in rows], behaviour, proximal, dtype=torch.float32)
    logp_T = flat(current, torch.float32).requires_grad_()
    found = correct(correction, logp_T, tokens)
    assert found.weight_T.isfinite().all()
    assert (found.weight_T >= 0).all()
    assert (found.weight_T[found.rejected_T] == 0).all()
    assert found.weight_T.dtype == torch.float32
    assert not found.weight_T.requires_grad


@given(correction=st.sampled_from(CORRECTIONS), order=st.permutations(range(10)))
def test_the_order_of_completions_does_not_matter(correction, order):
    generator = random.Random(1)
    lengths = [generator.randint(1, 5) for _ in range(10)]
    behaviour, proximal, current = ([[-generator.uniform(0.1, 3) for _ in range(n)] for n in lengths] for _ in range(3))
    advantages = [generator.choice([-1.0, 1.0]) for _ in lengths]

    def result(rows):
        tokens = batch([advantages[i] for i in rows], [behaviour[i] for i in rows], [proximal[i] for i in rows])
        weights = iter(correct(correction, flat([current[i] for i in rows]), tokens).weight_T.tolist())
        return {i: [next(weights) for _ in range(lengths[i])] for i in rows}

    before, after = result(range(10)), result(order)
    for i in range(10):
        assert after[i] == pytest.approx(before[i])
