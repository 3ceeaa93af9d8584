"""Every measure of a step against a plain loop over its tokens."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contracts.measures import BINNED, BINS, STEP_KEYS, known_step_key
from services.contracts.spec import RunSpec
from tests.unit.tiny_policy import sampled_group, tiny_policy
from trainer.measures import Measures, budget_measures, forking_threshold, group_measures, mismatch_measures, moved_measures, update_measures
from trainer.step import make_optimizer, train_step
from trainer.tokens import Tokens

CORRECT_AT, FORKING, BOUNDS = 1.0, 1.2, (0.8, 1.25)
OF_A_FIFTH = ("entropy_top20_share", "log_ratio_low_nats", "log_ratio_high_nats")
"""Keys that rank the tokens of an update among each other, as bins of entropy do: there, two halves of an update are not the same as the whole."""


@dataclass
class Token:
    logp: float
    entropy: float
    drift: float
    behaviour: float
    proximal: float
    ratio: float
    weight: float
    lag: int
    rejected: bool
    dual: bool
    # of its completion
    row: int
    place: int
    length: int
    advantage: float
    reward: float
    fifth: int = -1

    @property
    def l(self) -> float:  # noqa: E743
        return self.logp - self.behaviour

    @property
    def up(self) -> bool:
        return self.advantage > 0 and self.ratio > BOUNDS[1]

    @property
    def down(self) -> bool:
        return self.advantage < 0 and self.ratio < BOUNDS[0]

    @property
    def pull(self) -> float:
        """Gradient of its term of the loss by logp."""
        return 0.0 if self.up or self.down or self.dual else -self.ratio * self.advantage * self.weight

    def bins(self) -> dict[str, str]:
        return {
            "lag": next(name for name in BINS["lag"] if self.lag in lags_of(name)),
            "advantage": "positive" if self.advantage > 0 else "negative" if self.advantage < 0 else "zero",
            "clip": "up" if self.up else "down" if self.down else "kept",
            "position": str(10 * self.place // self.length),
            "correct": "right" if self.reward >= CORRECT_AT else "wrong",
            "entropy": BINS["entropy"][self.fifth],
        }


def lags_of(name: str) -> range:
    first, _, last = name.rstrip("+").partition("-")
    return range(int(first), 10**6 if name.endswith("+") else int(last or first) + 1)


def drawn_update(seed: int, lengths: Sequence[int]) -> list[Token]:
    """Tokens that are all different, as float32 holds them."""
    draw = random.Random(seed)

    def normal(scale: float) -> float:
        return float(torch.tensor(draw.gauss(0, scale)))

    tokens = []
    for row, length in enumerate(lengths):
        advantage, reward = (0.0 if draw.random() < 0.2 else normal(1)), draw.choice([0.0, 0.5, 1.0, 2.0])
        for place in range(length):
            behaviour = -abs(normal(1.5))
            proximal = float(torch.tensor(behaviour + normal(0.2)))
            logp = float(torch.tensor(proximal + normal(0.2)))
            tokens.append(
                Token(
                    logp=logp,
                    entropy=abs(normal(1.5)),
                    drift=normal(0.1),
                    behaviour=behaviour,
                    proximal=proximal,
                    ratio=float(torch.tensor(math.exp(logp - behaviour))),
                    weight=abs(normal(1)),
                    lag=draw.choice([0, 0, 1, 2, 3, 5, 9, 31, 32, 70]),
                    rejected=draw.random() < 0.1,
                    dual=advantage < 0 and draw.random() < 0.1,
                    row=row,
                    place=place,
                    length=length,
                    advantage=advantage,
                    reward=reward,
                )
            )
    ranked = sorted(tokens, key=lambda token: token.entropy)
    for rank, token in enumerate(ranked):
        token.fifth = rank * 5 // len(ranked)
    return tokens


def column(tokens: Sequence[Token], of: Callable[[Token], float]) -> torch.Tensor:
    return torch.tensor([of(token) for token in tokens])


def as_tokens(tokens: Sequence[Token]) -> Tokens:
    rewards = {token.row: token.reward for token in tokens}
    order = {row: i for i, row in enumerate(sorted(rewards))}
    return Tokens(
        behaviour_T=column(tokens, lambda t: t.behaviour), proximal_T=column(tokens, lambda t: t.proximal),
        advantages_T=column(tokens, lambda t: t.advantage), lags_T=column(tokens, lambda t: t.lag).long(),
        row_T=column(tokens, lambda t: order[t.row]).long(), position_T=column(tokens, lambda t: t.place).long(),
        rewards_R=torch.tensor([rewards[row] for row in order]),
    )  # fmt: skip


def measured(tokens: Sequence[Token], **changes: object) -> Measures:
    arguments: dict[str, object] = {
        "logp_T": column(tokens, lambda t: t.logp), "entropy_T": column(tokens, lambda t: t.entropy), "drift_T": column(tokens, lambda t: t.drift),
        "gradient_T": torch.tensor([t.pull / len(tokens) for t in tokens], dtype=torch.float64), "tokens": as_tokens(tokens),
        "ratio_T": column(tokens, lambda t: t.ratio), "clipped_up_T": column(tokens, lambda t: t.up),
        "clipped_down_T": column(tokens, lambda t: t.down), "dual_clipped_T": column(tokens, lambda t: t.dual),
        "rejected_T": column(tokens, lambda t: t.rejected), "weight_T": column(tokens, lambda t: t.weight),
        "bounds": BOUNDS, "forking_nats": FORKING, "correct_at": CORRECT_AT, "first": True,
    }  # fmt: skip
    return update_measures(**(arguments | changes))  # type: ignore[arg-type]


def by_hand(updates: Sequence[Sequence[Token]]) -> dict[str, float]:
    """What the tokens of a step's updates come to, one key after the other. The first update is the step's first."""
    tokens = [token for update in updates for token in update]
    values: dict[str, float] = {}
    binned = defaultdict(list)
    for token in tokens:
        for by, name in token.bins().items():
            binned[f"{by}/{name}"].append(token)

    def each(key: str, worth: Callable[[Sequence[Token]], float]) -> None:
        values[key] = worth(tokens)
        for by in BINNED.get(key, ()):
            for name in BINS[by]:
                if inside := binned[f"{by}/{name}"]:
                    values[f"{key}/{by}/{name}"] = worth(inside)

    def mean(key: str, of: Callable[[Token], float]) -> None:
        each(key, lambda some: fmean(map(of, some)))

    def ess(weights: Sequence[float]) -> float:
        return sum(weights) ** 2 / (len(weights) * sum(weight**2 for weight in weights))

    def covariance(key: str, of: Callable[[Token], float]) -> None:
        x, y = fmean(t.logp for t in tokens), fmean(map(of, tokens))
        mean(key, lambda t: (t.logp - x) * (of(t) - y))

    mean("entropy_nats", lambda t: t.entropy)
    for sign in BINS["advantage"]:
        if same := binned[f"advantage/{sign}"]:
            values[f"entropy_{sign}_nats"] = fmean(t.entropy for t in same)
    mean("entropy_estimate_nats", lambda t: -t.logp)
    if own := [-t.logp - t.entropy for t in updates[0] if t.lag == 0]:
        values["entropy_gap_nats"] = fmean(own)
        values["entropy_gap_error_nats"] = math.sqrt(sum(gap**2 for gap in own)) / len(own)
    values["entropy_top20_share"] = sum(t.entropy for t in tokens if t.fifth == 4) / sum(t.entropy for t in tokens)
    mean("forking_share", lambda t: t.entropy > FORKING)
    mean("entropy_change_predicted", lambda t: t.pull * t.drift)
    mean("entropy_change_predicted_positive", lambda t: t.pull * t.drift if t.advantage > 0 else 0.0)
    mean("entropy_change_predicted_negative", lambda t: t.pull * t.drift if t.advantage < 0 else 0.0)
    covariance("covariance_logp_advantage", lambda t: t.advantage)
    covariance("covariance_logp_weighted_advantage", lambda t: math.exp(t.logp) * t.advantage)

    mean("log_ratio_mean_nats", lambda t: t.l)
    values["log_ratio_std_nats"] = math.sqrt(fmean((t.l - values["log_ratio_mean_nats"]) ** 2 for t in tokens))
    for key, share in {"log_ratio_low_nats": 0.001, "log_ratio_high_nats": 0.999}.items():
        values[key] = sum(len(u) * sorted(t.l for t in u)[round(share * (len(u) - 1))] for u in updates) / len(tokens)
    values["log_ratio_abs_max_nats"] = max(abs(t.l) for t in tokens)
    mean("ratio_behaviour_mean", lambda t: math.exp(t.l))
    values["ratio_behaviour_max"] = max(math.exp(t.l) for t in tokens)
    mean("ratio_proximal_mean", lambda t: math.exp(t.logp - t.proximal))
    values["ratio_proximal_max"] = max(math.exp(t.logp - t.proximal) for t in tokens)
    mean("kl_behaviour_k1_nats", lambda t: -t.l)
    mean("kl_behaviour_k2_nats", lambda t: t.l**2 / 2)
    mean("kl_behaviour_k3_nats", lambda t: math.exp(t.l) - 1 - t.l)
    mean("kl_proximal_k1_nats", lambda t: t.proximal - t.logp)
    mean("kl_proximal_k3_nats", lambda t: math.exp(t.logp - t.proximal) - 1 - (t.logp - t.proximal))
    mean("kl_lag_k3_nats", lambda t: math.exp(t.proximal - t.behaviour) - 1 - (t.proximal - t.behaviour))
    mean("m2_behaviour", lambda t: t.l**2)
    mean("chi2_behaviour", lambda t: math.exp(2 * t.l) - 1)
    each("ess_share", lambda some: ess([math.exp(t.l) for t in some]))
    completions = [[t.l for t in update if t.row == row] for update in updates for row in sorted({t.row for t in update})]
    values["chi2_completion"] = fmean(math.exp(2 * sum(ls)) - 1 for ls in completions)
    for key, of in {"ess_completion_share": sum, "ess_geometric_share": fmean}.items():
        values[key] = ess([math.exp(of(ls)) for ls in completions])
        for bin, some in binned_completions(updates).items():
            values[f"{key}/{bin}"] = ess([math.exp(of(t.l for t in row)) for row in some])
    values["entropy_completion_nats"] = sum(t.entropy for t in tokens) / len(completions)
    values["lag_mean"], values["lag_max"] = fmean(t.lag for t in tokens), max(t.lag for t in tokens)

    mean("clip_up_share", lambda t: t.up)
    mean("clip_down_share", lambda t: t.down)
    mean("clip_region_share", lambda t: t.up or t.down)
    if mass := sum(abs(t.weight * t.ratio * t.advantage) for t in tokens):
        values["clip_mass_share"] = sum(abs(t.weight * t.ratio * t.advantage) for t in tokens if t.up or t.down) / mass
    mean("dual_clip_share", lambda t: t.dual)
    mean("beyond_unclipped_share", lambda t: (t.advantage < 0 and t.ratio > BOUNDS[1]) or (t.advantage > 0 and t.ratio < BOUNDS[0]))
    mean("rejected_share", lambda t: t.rejected)
    mean("effective_tokens_share", lambda t: t.advantage != 0)
    return values


def binned_completions(updates: Sequence[Sequence[Token]]) -> dict[str, list[list[Token]]]:
    """Completions by the means of their tokens' lags and entropies, the fifths being those of their own update."""
    binned = defaultdict(list)
    for update in updates:
        rows = [[t for t in update if t.row == row] for row in sorted({t.row for t in update})]
        rows.sort(key=lambda row: fmean(t.entropy for t in row))
        for rank, row in enumerate(rows):
            lag = round(fmean(t.lag for t in row))
            binned["lag/" + next(name for name in BINS["lag"] if lag in lags_of(name))].append(row)
            binned["entropy/" + BINS["entropy"][5 * rank // len(rows)]].append(row)
    return binned


LENGTHS = st.lists(st.integers(1, 25), min_size=1, max_size=12)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), lengths=LENGTHS)
def test_an_update_measures_what_a_loop_over_its_tokens_does(seed: int, lengths: list[int]) -> None:
    tokens = drawn_update(seed, lengths)
    assert measured(tokens).as_values() == pytest.approx(by_hand([tokens]), rel=1e-6, abs=1e-7)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), lengths=LENGTHS, more=LENGTHS)
def test_updates_add_up_to_the_step(seed: int, lengths: list[int], more: list[int]) -> None:
    first, second = drawn_update(seed, lengths), drawn_update(seed + 1, more)
    both = Measures() + measured(first) + measured(second, first=False)
    assert both.as_values() == pytest.approx(by_hand([first, second]), rel=1e-6, abs=1e-7)
    assert both.lags == {lag: sum(t.lag == lag for t in [*first, *second]) for lag in {t.lag for t in [*first, *second]}}


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), lengths=st.lists(st.integers(1, 25), min_size=2, max_size=12), data=st.data())
def test_two_halves_of_an_update_add_up_to_it(seed: int, lengths: list[int], data: st.DataObject) -> None:
    tokens = drawn_update(seed, lengths)
    cut = data.draw(st.integers(1, len(lengths) - 1))
    halves = measured([t for t in tokens if t.row < cut]) + measured([t for t in tokens if t.row >= cut])

    def without_ranks(measures: Measures) -> dict[str, float]:
        return {key: value for key, value in measures.as_values().items() if key not in OF_A_FIFTH and "/entropy/" not in key}

    assert without_ranks(halves) == pytest.approx(without_ranks(measured(tokens)), rel=1e-6, abs=1e-7)


def test_every_value_has_a_documented_key_and_every_key_and_bin_a_value() -> None:
    tokens = drawn_update(0, [20] * 100 + [1] * 200)
    everything = measured(tokens) + mismatch_measures(as_tokens(tokens)) + budget_measures(torch.ones(2), torch.zeros(2))
    everything += moved_measures(torch.zeros(2), torch.ones(2))
    everything += group_measures([1.0], lengths_G=[1], truncated_G=[False], correct_at=1.0)
    values = everything.as_values()
    assert [key for key in values if not known_step_key(key)] == []
    bins = {f"{key}/{by}/{name}" for key, ways in BINNED.items() for by in ways for name in BINS[by]}
    assert bins <= set(values)
    of_the_loop = {"tokens", "updates", "loss", "learning_rate", "gradient_norm", "forking_threshold_nats", "canary_nats", "rollout_servers"}
    of_the_loop |= {key for key in STEP_KEYS if key.startswith(("control_", "staleness_", "skipped_", "prompt_")) or key.endswith("seconds")}
    assert set(STEP_KEYS) - set(values) == of_the_loop


def test_every_value_of_a_real_step_has_a_documented_key() -> None:
    policy, spec = tiny_policy(), RunSpec(batch_groups=4, group_size=2, updates_per_batch=2)
    groups = [sampled_group(policy, i, (1.0, 0.0)) for i in range(4)]
    values = train_step(policy, make_optimizer(policy, spec), groups, spec, 0).values
    assert {"entropy_nats", "entropy_change_predicted_positive", "entropy_change_realised", "entropy_gap_nats", "all_right_share"} <= set(values)
    assert [key for key in values if not known_step_key(key)] == []


def test_a_key_with_nothing_behind_it_is_left_out() -> None:
    assert Measures().as_values() == {}
    tokens = [token for token in drawn_update(1, [9] * 20) if token.lag and token.advantage > 0]
    values = measured(tokens, drift_T=None, bounds=None, forking_nats=None).as_values()
    assert values["entropy_positive_nats"] == values["entropy_nats"]
    absent = {"entropy_negative_nats", "entropy_zero_nats", "entropy_gap_nats", "entropy_gap_error_nats", "entropy_change_predicted", "forking_share"}
    assert not (absent | {"entropy_change_predicted_positive", "beyond_unclipped_share", "entropy_nats/lag/0"}) & set(values)
    assert mismatch_measures(as_tokens(tokens)).as_values() == {}
    assert measured([]).as_values() == {}


def test_the_gap_is_that_of_the_first_updates_fresh_tokens_only() -> None:
    tokens = drawn_update(2, [30])
    assert "entropy_gap_nats" in measured(tokens).as_values()
    assert not {"entropy_gap_nats", "entropy_gap_error_nats"} & set(measured(tokens, first=False).as_values())


def test_on_policy_tokens_have_no_divergence_and_a_whole_ess() -> None:
    tokens = drawn_update(3, [5, 5])
    for token in tokens:
        token.logp = token.behaviour
    values = measured(tokens).as_values()
    assert {values[key] for key in values if key.startswith(("kl_behaviour", "chi2", "m2", "log_ratio"))} == {0.0}
    assert [values[key] for key in ("ess_share", "ess_completion_share", "ess_geometric_share", "ratio_behaviour_max")] == [1.0] * 4


def test_k3_keeps_its_digits_close_to_the_sampler() -> None:
    # l = 1e-3: k3 = l^2 / 2 + l^3 / 6; a float32 difference exp(l) - 1 - l would be off by a tenth of it.
    tokens = drawn_update(4, [100])
    for token in tokens:
        token.behaviour, token.logp = 0.0, 1e-3
    assert measured(tokens).as_values()["kl_behaviour_k3_nats"] == pytest.approx(0.5e-6 + 1e-9 / 6, rel=1e-4)


def test_a_runaway_ratio_stays_finite() -> None:
    tokens = drawn_update(5, [100, 3])
    for token in tokens:
        token.behaviour = token.logp - 700
    values = measured(tokens).as_values()
    assert all(math.isfinite(value) for value in values.values())
    assert values["log_ratio_abs_max_nats"] == pytest.approx(700, rel=1e-6)
    assert [values["ratio_behaviour_max"], values["ratio_behaviour_mean"]] == pytest.approx([math.exp(20)] * 2)


def test_the_two_signs_of_the_budget_add_up_to_it() -> None:
    values = measured(drawn_update(6, [7] * 12)).as_values()
    positive, negative = values["entropy_change_predicted_positive"], values["entropy_change_predicted_negative"]
    assert abs(positive) > 1e-3 < abs(negative)
    assert positive + negative == pytest.approx(values["entropy_change_predicted"])


def test_the_predicted_change_is_what_a_small_step_makes_of_free_logits() -> None:
    """A softmax table as the policy: one step along the loss's gradient, and the exact entropies before and after it."""
    draw, step = torch.Generator().manual_seed(7), 1e-5
    logits_TV = torch.randn(200, 11, generator=draw, dtype=torch.float64).requires_grad_()
    targets_T = torch.randint(0, 11, (200,), generator=draw)
    advantages_T = torch.randn(20, generator=draw, dtype=torch.float64).repeat_interleave(10)
    log_p_TV = logits_TV.log_softmax(-1)
    logp_T = log_p_TV.gather(1, targets_T[:, None])[:, 0]
    logp_T.retain_grad()
    entropy_T = -(log_p_TV.exp() * log_p_TV).sum(-1)
    (-(advantages_T * logp_T).mean()).backward()
    assert logits_TV.grad is not None
    after_TV = (logits_TV - step * len(targets_T) * logits_TV.grad).log_softmax(-1)
    realised = budget_measures(entropy_T.detach(), -(after_TV.exp() * after_TV).sum(-1).detach()).as_values()["entropy_change_realised"]
    slope_TV = log_p_TV.exp() * (log_p_TV + entropy_T[:, None])
    drift_T = slope_TV.gather(1, targets_T[:, None])[:, 0] - (log_p_TV.exp() * slope_TV).sum(-1)
    none_T = torch.zeros(200, dtype=torch.bool)
    batch = Tokens(logp_T, logp_T, advantages_T, none_T.long(), torch.arange(200) // 10, torch.arange(200) % 10, torch.zeros(20))
    predicted = update_measures(
        logp_T=logp_T, entropy_T=entropy_T, drift_T=drift_T, gradient_T=logp_T.grad, tokens=batch, ratio_T=torch.ones(200), clipped_up_T=none_T,
        clipped_down_T=none_T, dual_clipped_T=none_T, rejected_T=none_T, weight_T=torch.ones(200), bounds=None, forking_nats=None, correct_at=1.0,
        first=True,
    ).as_values()["entropy_change_predicted"]  # fmt: skip
    assert abs(realised) > 1e-8
    assert realised == pytest.approx(step * predicted, rel=1e-3)


def test_measures_leave_no_trace_in_the_graph() -> None:
    tokens = drawn_update(8, [4])
    logp_T = column(tokens, lambda t: t.logp).requires_grad_()
    measures = measured(tokens, logp_T=logp_T, entropy_T=logp_T)
    assert all(isinstance(number, float | int) for pair in measures.sums.values() for number in pair)
    (logp_T * 2).sum().backward()
    assert logp_T.grad is not None
    assert logp_T.grad.tolist() == [2.0] * 4


def test_mismatch_is_taken_at_lag_zero_only() -> None:
    tokens = drawn_update(9, [3])
    for token, behaviour, lag in zip(tokens, (-1.1, -0.7, -9.0), (0, 0, 1), strict=True):
        token.proximal, token.behaviour, token.lag = -1.0, behaviour, lag
    assert mismatch_measures(as_tokens(tokens)).as_values() == pytest.approx({"mismatch_lag0_nats": 0.2}, abs=1e-6)


def test_the_realised_change_is_a_mean_over_the_probe() -> None:
    halves = [budget_measures(torch.tensor(before), torch.tensor(after)) for before, after in (([1.0, 2.0], [0.5, 2.5]), ([1.0], [0.4]))]
    assert (halves[0] + halves[1]).as_values() == pytest.approx({"entropy_change_realised": -0.2}, abs=1e-6)
    assert budget_measures(torch.empty(0), torch.empty(0)).as_values() == {}


def test_a_fifth_of_the_tokens_is_above_the_forking_threshold() -> None:
    entropy_T = torch.randperm(1000).float()
    assert int((entropy_T > forking_threshold(entropy_T)).sum()) == 199
    assert forking_threshold(torch.tensor([0.3])) == pytest.approx(0.3)


def test_group_measures() -> None:
    groups = [([1.0, 0.0], [4, 6], [False, True]), ([0.5, 0.5], [2, 4], [False, False]), ([1.0, 2.0], [2, 2], [False, False])]
    measures = [group_measures(r, lengths_G=n, truncated_G=t, correct_at=1.0) for r, n, t in groups]
    assert (measures[0] + measures[1] + measures[2]).as_values() == pytest.approx(
        {
            "reward_mean": 5 / 6, "correct_share": 0.5, "completion_tokens_mean": 20 / 6, "truncated_share": 1 / 6,
            "zero_signal_share": 1 / 3, "all_right_share": 1 / 3, "all_wrong_share": 1 / 3,
        }
    )  # fmt: skip
