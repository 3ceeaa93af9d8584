import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer import entropy
from trainer.entropy import CHUNK_ELEMENTS


def logprob_and_entropy(*args, **options):
    """Those two alone."""
    logp_T, entropy_T, drift_T = entropy.logprob_and_entropy(*args, **options)
    assert drift_T is None
    return logp_T, entropy_T


def case(T=37, V=53, D=16, *, scale=1.0, seed=0):
    """Random hidden states, head, bias and targets, float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TD, weight_VD, bias_V = (torch.randn(*s, generator=generator, dtype=torch.float64) * scale for s in ((T, D), (V, D), (V,)))
    return hidden_TD, weight_VD, bias_V, torch.randint(0, V, (T,), generator=generator)


def reference(hidden_TD, weight_VD, targets_T, *, temperature, bias_V=None):
    """log softmax and -sum p log p of the whole T x V matrix, in the inputs' type."""
    logits_TV = (hidden_TD @ weight_VD.T + (0 if bias_V is None else bias_V)) / temperature
    log_p_TV = logits_TV.log_softmax(-1)
    return log_p_TV.gather(1, targets_T[:, None])[:, 0], -(log_p_TV.exp() * log_p_TV).sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("chunk_elements", [1, 53 * 10, 1 << 24])
@pytest.mark.parametrize("with_bias", [False, True])
def test_float32_values_equal_a_float64_reference(temperature, chunk_elements, with_bias):
    hidden_TD, weight_VD, bias_V, targets_T = case()
    bias = bias_V if with_bias else None
    expected = reference(hidden_TD, weight_VD, targets_T, temperature=temperature, bias_V=bias)
    got = logprob_and_entropy(
        hidden_TD.float(),
        weight_VD.float(),
        targets_T,
        temperature=temperature,
        bias_V=None if bias is None else bias.float(),
        chunk_elements=chunk_elements,
    )
    for value_T, expected_T in zip(got, expected, strict=True):
        assert value_T.dtype == torch.float32
        assert torch.allclose(value_T.double(), expected_T, atol=1e-5, rtol=0)


def test_known_distributions():
    # A head of one row per token and hidden size 1: uniform over 4, then a distribution that is nearly certain.
    weight_VD = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    logp_T, entropy_T = logprob_and_entropy(torch.tensor([[0.0], [math.log(3.0)], [200.0]]), weight_VD, torch.tensor([2, 0, 0]), temperature=1.0)
    half = -(0.5 * math.log(0.5) + 3 * (1 / 6) * math.log(1 / 6))
    assert logp_T.tolist() == pytest.approx([-math.log(4), math.log(0.5), 0.0], abs=1e-6)
    assert entropy_T.tolist() == pytest.approx([math.log(4), half, 0.0], abs=1e-6)


def test_a_large_offset_of_all_logits_changes_nothing():
    hidden_TD, weight_VD, bias_V, targets_T = (x.float() if x.is_floating_point() else x for x in case())
    plain = logprob_and_entropy(hidden_TD, weight_VD, targets_T, temperature=1.0, bias_V=bias_V)
    moved = logprob_and_entropy(hidden_TD, weight_VD, targets_T, temperature=1.0, bias_V=bias_V + 1000)
    for a, b in zip(plain, moved, strict=True):
        assert torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_elements", [3 * 11, 1 << 24])
def test_gradients_of_both_outputs_equal_finite_differences(temperature, chunk_elements, drift):
    hidden_TD, weight_VD, bias_V, targets_T = case(T=7, V=11, D=5)
    inputs = [x.requires_grad_() for x in (hidden_TD, weight_VD, bias_V)]

    def both(hidden, weight, bias):
        options = {"temperature": temperature, "bias_V": bias, "chunk_elements": chunk_elements, "drift": drift}
        return entropy.logprob_and_entropy(hidden, weight, targets_T, **options)[:2]

    assert torch.autograd.gradcheck(both, inputs, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("wanted", ["logp", "entropy", "both"])
def test_float32_gradients_equal_float64_autograd(wanted):
    hidden_TD, weight_VD, _, targets_T = case(T=64, V=101, D=16)
    factors_T = torch.linspace(-1, 1, 64, dtype=torch.float64)

    def gradients(function, hidden, weight):
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        logp_T, entropy_T = function(hidden, weight, targets_T, temperature=1.3)
        loss = {"logp": (logp_T * factors_T), "entropy": entropy_T**2, "both": logp_T * factors_T + entropy_T**2}[wanted]
        return torch.autograd.grad(loss.sum(), (hidden, weight))

    expected = gradients(reference, hidden_TD.clone(), weight_VD.clone())
    got = gradients(logprob_and_entropy, hidden_TD.float(), weight_VD.float())
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert b.abs().max() > 0.1
        assert torch.allclose(a.double(), b, atol=2e-5, rtol=2e-5)


def test_what_needs_no_gradient_gets_none():
    hidden_TD, weight_VD, _, targets_T = case()
    weight_VD.requires_grad_()
    logprob_and_entropy(hidden_TD, weight_VD, targets_T, temperature=1.0)[0].sum().backward()
    assert weight_VD.grad is not None
    assert hidden_TD.grad is None
    with torch.no_grad():
        assert not logprob_and_entropy(hidden_TD, weight_VD, targets_T, temperature=1.0)[0].requires_grad


def test_bfloat16_inputs_give_float32_logits_even_under_autocast():
    hidden_TD, weight_VD, _, targets_T = case(T=64, V=200, D=64)
    hidden, weight = hidden_TD.bfloat16().requires_grad_(), weight_VD.bfloat16().requires_grad_()
    # The reference starts from the rounded inputs: what is left is the rounding of the logits, 3e-2 if they were made in bfloat16.
    expected_T, expected_entropy_T = reference(hidden.double(), weight.double(), targets_T, temperature=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp_T, entropy_T = logprob_and_entropy(hidden, weight, targets_T, temperature=1.0)
    assert torch.allclose(logp_T.double(), expected_T, atol=1e-5, rtol=1e-6)
    assert torch.allclose(entropy_T.double(), expected_entropy_T, atol=1e-5, rtol=1e-6)
    logp_T.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave back, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@contextmanager
def largest_tensor() -> Iterator[LargestTensor]:
    with LargestTensor() as mode:
        yield mode


def test_no_tensor_of_tokens_by_vocabulary_is_made():
    T, V, D = 4096, 8192, 32
    hidden_TD, weight_VD = torch.randn(T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets_T = torch.randint(0, V, (T,))

    def peak(function, **options) -> int:
        with largest_tensor() as largest:
            logp_T, entropy_T = function(hidden_TD, weight_VD, targets_T, temperature=1.0, **options)
            (logp_T.sum() + entropy_T.sum()).backward()
        return largest.elements

    with largest_tensor() as largest, torch.no_grad():
        reference(hidden_TD, weight_VD, targets_T, temperature=1.0)
    assert largest.elements >= T * V  # the measure sees such a tensor where there is one
    assert peak(logprob_and_entropy) <= CHUNK_ELEMENTS < T * V
    assert peak(logprob_and_entropy, chunk_elements=1 << 20) <= 1 << 20


def test_temperature_must_be_positive():
    hidden_TD, weight_VD, _, targets_T = case()
    with pytest.raises(ValueError, match="temperature"):
        logprob_and_entropy(hidden_TD, weight_VD, targets_T, temperature=0.0)


def test_no_tokens_give_empty_outputs_and_zero_gradient():
    weight_VD = torch.randn(5, 4, requires_grad=True)
    logp_T, entropy_T = logprob_and_entropy(torch.empty(0, 4), weight_VD, torch.empty(0, dtype=torch.int64), temperature=1.0)
    assert logp_T.shape == entropy_T.shape == (0,)
    logp_T.sum().backward()
    assert weight_VD.grad is not None
    assert weight_VD.grad.abs().sum() == 0


def drift(logits_TV, targets_T, *, temperature=1.0, **options):
    """With an identity for a head, so that the hidden states are the logits."""
    head_VV = torch.eye(logits_TV.shape[1], dtype=logits_TV.dtype)
    return entropy.logprob_and_entropy(logits_TV, head_VV, targets_T, temperature=temperature, drift=True, **options)[2]


def entropy_of(logits_TV):
    log_p_TV = logits_TV.log_softmax(-1)
    return -(log_p_TV.exp() * log_p_TV).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_elements", [3 * 19, 1 << 24])
def test_drift_is_what_a_step_on_the_log_probability_takes_off_the_entropy(temperature, chunk_elements):
    generator = torch.Generator().manual_seed(1)
    logits_TV = 2 * torch.randn(40, 19, generator=generator, dtype=torch.float64)
    targets_T = torch.randint(0, 19, (40,), generator=generator)
    tempered_TV, step = logits_TV / temperature, 1e-6
    way_TV = torch.nn.functional.one_hot(targets_T, 19) - tempered_TV.softmax(-1)
    change_T = (entropy_of(tempered_TV + step * way_TV) - entropy_of(tempered_TV - step * way_TV)) / (2 * step)
    assert change_T.abs().max() > 0.1
    got_T = drift(logits_TV, targets_T, temperature=temperature, chunk_elements=chunk_elements)
    assert torch.allclose(-got_T, change_T, atol=1e-8, rtol=1e-6)
    # Known signs: to reinforce the likeliest token takes entropy away, to reinforce a rare one adds some.
    certain_TV = torch.tensor([[3.0, 0.0, -3.0]], dtype=torch.float64)
    assert drift(certain_TV, torch.tensor([0])) > 0 > drift(certain_TV, torch.tensor([2]))


def test_drift_of_float32_logits_keeps_its_digits_under_a_large_offset():
    generator = torch.Generator().manual_seed(2)
    logits_TV = torch.randn(64, 300, generator=generator, dtype=torch.float64)
    targets_T = torch.randint(0, 300, (64,), generator=generator)
    expected_T = drift(logits_TV, targets_T)
    assert torch.allclose(drift(logits_TV.float(), targets_T).double(), expected_T, atol=1e-7)
    assert torch.allclose(drift(logits_TV.float() + 100, targets_T).double(), expected_T, atol=1e-5)


def test_the_mean_drift_over_the_policys_own_tokens_is_zero():
    logits_V = 2 * torch.randn(23, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    drift_V = drift(logits_V.expand(23, 23), torch.arange(23))
    assert drift_V.abs().max() > 0.01
    assert (logits_V.softmax(-1) * drift_V).sum().abs() < 1e-12


def test_drift_has_no_gradient_and_changes_no_other_output():
    hidden_TD, weight_VD, bias_V, targets_T = case()
    plain = entropy.logprob_and_entropy(hidden_TD.requires_grad_(), weight_VD, targets_T, temperature=1.3, bias_V=bias_V)
    with_drift = entropy.logprob_and_entropy(hidden_TD, weight_VD, targets_T, temperature=1.3, bias_V=bias_V, drift=True)
    assert plain[2] is None
    assert with_drift[2].shape == targets_T.shape
    assert not with_drift[2].requires_grad
    for value_T, same_T in zip(plain[:2], with_drift[:2], strict=True):
        assert torch.equal(value_T, same_T)
        assert same_T.requires_grad


def test_the_estimate_agrees_with_the_exact_entropy_on_its_own_samples_and_on_no_others():
    generator = torch.Generator().manual_seed(4)
    logits_TV = 1.5 * torch.randn(20_000, 31, generator=generator)

    def gap(sampler_TV):
        """Mean of -logp less exact entropy on tokens that another policy sampled, and its standard error."""
        targets_T = torch.multinomial(sampler_TV.softmax(-1), 1, generator=generator)[:, 0]
        logp_T, entropy_T = logprob_and_entropy(logits_TV, torch.eye(31), targets_T, temperature=1.0)
        gap_T = (-logp_T - entropy_T).double()
        return float(gap_T.mean()), float(gap_T.std()) / len(gap_T) ** 0.5

    mean, error = gap(logits_TV)
    assert abs(mean) < 3 * error < 0.05
    mean, error = gap(logits_TV / 1.1)
    assert mean > 10 * error
