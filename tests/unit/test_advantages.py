import pytest
import torch

from trainer.advantages import group_advantages, has_signal


def rewards(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_std_is_the_sample_standard_deviation_plus_epsilon():
    # One right of four: mean 1/4, squared deviations 9/16 + 3/16 = 3/4, over 3 is 1/4, so std = 1/2.
    advantages_G = group_advantages(rewards(1, 0, 0, 0), normalise="std", epsilon=0.1)
    assert advantages_G.tolist() == pytest.approx([0.75 / 0.6, -0.25 / 0.6, -0.25 / 0.6, -0.25 / 0.6], abs=1e-12)


def test_without_std_only_the_mean_goes():
    assert group_advantages(rewards(1, 0, 0, 0), normalise="none", epsilon=0.1).tolist() == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("normalise", ["std", "none"])
def test_equal_rewards_and_a_lone_member_get_exact_zeros(normalise):
    # 0.1 has no exact mean in floating point; a bare division by epsilon would give advantages of about 1.
    for value in (0.1, 0.7, 1.0):
        assert group_advantages(rewards(*[value] * 7), normalise=normalise, epsilon=1e-17).tolist() == [0.0] * 7
    assert group_advantages(rewards(3.0), normalise=normalise, epsilon=1e-4).tolist() == [0.0]


def test_advantages_ignore_a_shift_of_the_rewards_and_std_their_scale():
    base_G = group_advantages(rewards(0.0, 0.3, 1.0), normalise="std", epsilon=1e-9)
    assert torch.allclose(group_advantages(rewards(5.0, 5.6, 7.0), normalise="std", epsilon=1e-9), base_G, atol=1e-7)
    assert base_G.sum().abs() < 1e-12
    assert not torch.allclose(group_advantages(rewards(5.0, 5.6, 7.0), normalise="none", epsilon=1e-9), base_G, rtol=0.01)


def test_integer_rewards_are_taken_as_numbers():
    assert group_advantages(torch.tensor([1, 0]), normalise="none", epsilon=1e-4).tolist() == [0.5, -0.5]


def test_a_group_has_signal_when_its_rewards_differ():
    assert has_signal(rewards(0, 0, 1e-9))
    assert not has_signal(rewards(1, 1, 1))
