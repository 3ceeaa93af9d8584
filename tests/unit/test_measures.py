import math

import pytest
import torch

from trainer.losses import SurrogateLoss, clipped_surrogate
from trainer.measures import KEYS, Measures, group_measures, mismatch_measures, token_measures


def tokens(ratios, *, advantages, entropies=None, lags=None, proximal_ratios=None) -> Measures:
    """Measures of tokens with these ratios of the current policy to the sampler, whose log-probability is -1 everywhere."""
    behaviour_T = torch.full((len(ratios),), -1.0)
    logp_T = behaviour_T + torch.tensor(ratios).log()
    advantages_T = torch.tensor(advantages)
    surrogate = clipped_surrogate(
        logp_T, behaviour_T, advantages_T, torch.ones_like(logp_T), clip_low=0.2, clip_high=0.2, clip_off=False, denominator=1
    )
    return token_measures(
        logp_T=logp_T,
        entropy_T=torch.tensor(entropies or [1.0] * len(ratios)),
        behaviour_T=behaviour_T,
        advantages_T=advantages_T,
        lags_T=torch.tensor(lags or [0] * len(ratios)),
        surrogate=surrogate,
        proximal_T=None if proximal_ratios is None else logp_T - torch.tensor(proximal_ratios).log(),
    )


def test_token_measures_by_hand():
    values = tokens(
        [2.0, 0.5, 1.0, 1.0],
        advantages=[1.0, -1.0, 0.0, 2.0],
        entropies=[0.5, 1.5, 2.0, 1.0],
        lags=[0, 2, 2, 1],
        proximal_ratios=[1.0, 1.0, 1.0, 4.0],
    ).as_values()
    ln2 = math.log(2)
    assert values == pytest.approx(
        {
            "entropy_nats": 1.25,
            "entropy_positive_nats": 0.75,
            "entropy_negative_nats": 1.5,
            "entropy_zero_nats": 2.0,
            "entropy_estimate_nats": 1.0,  # the log-probabilities are -1 + (ln 2, -ln 2, 0, 0)
            "ratio_behaviour_mean": 4.5 / 4,
            "ratio_behaviour_max": 2.0,
            "kl_behaviour_k1_nats": 0.0,
            "kl_behaviour_k3_nats": ((2 - 1 - ln2) + (0.5 - 1 + ln2)) / 4,
            "ratio_proximal_mean": 7 / 4,
            "ratio_proximal_max": 4.0,
            "kl_proximal_k1_nats": -2 * ln2 / 4,
            "kl_proximal_k3_nats": (4 - 1 - 2 * ln2) / 4,
            "ess_share": 4.5**2 / (4 * 6.25),
            "clip_up_share": 0.25,
            "clip_down_share": 0.25,
            "lag_mean": 1.25,
            "lag_max": 2.0,
        },
        abs=1e-6,
    )


def test_on_policy_tokens_have_no_divergence_and_a_whole_ess():
    values = tokens([1.0] * 5, advantages=[1.0] * 5).as_values()
    assert (values["kl_behaviour_k1_nats"], values["kl_behaviour_k3_nats"], values["ess_share"], values["ratio_behaviour_max"]) == (0, 0, 1, 1)


def test_k3_keeps_its_digits_close_to_the_sampler():
    # l = 1e-3: k3 = l^2 / 2 + l^3 / 6; a float32 difference exp(l) - 1 - l would be off by a tenth of it.
    behaviour_T, logp_T = torch.zeros(100), torch.full((100,), 1e-3)
    none_T = torch.zeros(100, dtype=torch.bool)
    surrogate = SurrogateLoss(loss=torch.tensor(0.0), ratio_T=logp_T.exp(), clipped_up_T=none_T, clipped_down_T=none_T)
    measures = token_measures(
        logp_T=logp_T, entropy_T=logp_T, behaviour_T=behaviour_T, advantages_T=behaviour_T, lags_T=none_T.long(), surrogate=surrogate
    )
    assert measures.as_values()["kl_behaviour_k3_nats"] == pytest.approx(0.5e-6 + 1e-9 / 6, rel=1e-4)


def test_packs_add_up_to_the_whole():
    ratios, advantages, lags = [2.0, 0.5, 1.0, 1.1, 0.3], [1.0, -1.0, 0.0, 2.0, -1.0], [0, 2, 2, 1, 2]
    whole = tokens(ratios, advantages=advantages, lags=lags, proximal_ratios=ratios)
    parts = sum(
        (tokens(ratios[i:j], advantages=advantages[i:j], lags=lags[i:j], proximal_ratios=ratios[i:j]) for i, j in ((0, 1), (1, 5))), Measures()
    )
    assert parts.as_values() == pytest.approx(whole.as_values(), abs=1e-6)
    assert parts.lags == {0: 1, 1: 1, 2: 3}


def test_a_key_with_nothing_behind_it_is_left_out():
    assert Measures().as_values() == {}
    values = tokens([1.0, 1.0], advantages=[1.0, 1.0]).as_values()
    assert values["entropy_positive_nats"] == 1.0
    assert not {"entropy_negative_nats", "entropy_zero_nats", "kl_proximal_k1_nats", "mismatch_lag0_nats", "reward_mean"} & set(values)
    assert mismatch_measures(torch.tensor([-1.0]), behaviour_T=torch.tensor([-2.0]), lags_T=torch.tensor([1])).as_values() == {}
    assert tokens([], advantages=[]).as_values() == {}


def test_mismatch_is_taken_at_lag_zero_only():
    measures = mismatch_measures(torch.tensor([-1.0, -1.0, -1.0]), behaviour_T=torch.tensor([-1.1, -0.7, -9.0]), lags_T=torch.tensor([0, 0, 1]))
    assert measures.as_values() == pytest.approx({"mismatch_lag0_nats": 0.2}, abs=1e-6)


def test_group_measures():
    total = group_measures([1.0, 0.0], lengths_G=[4, 6], truncated_G=[False, True]) + group_measures(
        [0.5, 0.5], lengths_G=[2, 4], truncated_G=[False, False]
    )
    assert total.as_values() == pytest.approx({"reward_mean": 0.5, "completion_tokens_mean": 4.0, "truncated_share": 0.25, "zero_signal_share": 0.5})


def test_every_value_has_a_documented_key_and_every_key_a_value():
    everything = tokens([2.0, 0.5, 1.0], advantages=[1.0, -1.0, 0.0], proximal_ratios=[1.0, 1.0, 1.0])
    everything += mismatch_measures(torch.tensor([-1.0]), behaviour_T=torch.tensor([-1.0]), lags_T=torch.tensor([0]))
    everything += group_measures([1.0], lengths_G=[1], truncated_G=[False])
    assert set(everything.as_values()) == set(KEYS)


def test_measures_leave_no_trace_in_the_graph():
    logp_T = torch.tensor([-1.0], requires_grad=True)
    surrogate = clipped_surrogate(
        logp_T, logp_T.detach(), torch.tensor([1.0]), torch.tensor([1.0]), clip_low=0.2, clip_high=0.2, clip_off=False, denominator=1
    )
    measures = token_measures(
        logp_T=logp_T,
        entropy_T=logp_T,
        behaviour_T=logp_T.detach(),
        advantages_T=torch.tensor([1.0]),
        lags_T=torch.tensor([0]),
        surrogate=surrogate,
    )
    assert all(isinstance(total, float) for total, _ in measures.sums.values())
    surrogate.loss.backward()
    assert logp_T.grad is not None
    assert logp_T.grad.tolist() == [-1.0]
