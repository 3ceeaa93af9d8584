import math

import pytest

from services.studies.claims import ClaimValues
from services.studies.verdicts import Decision, Verdict, claim_number, decide, interval_text, markdown_verdicts, verdicts_of
from tests.unit.synthetic_study import a_claim, a_study, runs_at

HOLDS, DOES_NOT_HOLD, NOT_SEPARABLE, NO_DATA = Decision


def judged(*seeds: float, pooled: tuple[float, float | None, float | None] | None = None, **claim: object) -> Verdict:
    return decide(a_claim(**claim), ClaimValues(dict(enumerate(seeds)), pooled=pooled))


@pytest.mark.parametrize(
    ("seeds", "decision", "p"),
    [
        ([0.5, 0.4, 0.6, 0.3, 0.2], HOLDS, 1 / 32),
        ([-0.5, -0.4, -0.6, -0.3, -0.2], DOES_NOT_HOLD, 1.0),
        ([0.5, 0.4, 0.6, 0.3, -0.1], NOT_SEPARABLE, 2 / 32),  # four of five, and p cannot get to 0.05
        ([0.5, -0.4, 0.6, -0.3, 0.2], NOT_SEPARABLE, 10 / 32),
        ([0.0, 0.0, 0.0, 0.0, 0.0], NOT_SEPARABLE, 1.0),
        ([0.5, 0.4, 0.6, 0.3, 0.0], NOT_SEPARABLE, 2 / 32),  # a seed without a difference has no sign
        ([0.5, 0.4, 0.6, 0.3, 0.2, 0.7, -0.1], HOLDS, 2 / 128),
        ([0.5, 0.4, 0.6, 0.9, 0.8, 0.7, 0.9, -0.1, -0.1], NOT_SEPARABLE, 4 / 512),  # p is small, but two seeds disagree
        ([-0.5, -0.4, -0.6, -0.3, -0.2, -0.7, 0.1], DOES_NOT_HOLD, 127 / 128),
        ([0.5, 0.4, 0.6], HOLDS, 1 / 8),
        ([0.5, 0.4, -0.1], NOT_SEPARABLE, 2 / 8),
        ([-0.5, -0.4, -0.6, -0.1], DOES_NOT_HOLD, 1.0),
        ([0.5, 0.4], NOT_SEPARABLE, 1 / 4),
        ([0.5], NOT_SEPARABLE, 1 / 2),
    ],
)
def test_one_sided_rule(seeds, decision, p):
    greater = judged(*seeds, direction="greater")
    less = judged(*(-value for value in seeds), direction="less")
    assert (greater.decision, greater.p, greater.n) == (decision, pytest.approx(p), len(seeds))
    assert (less.decision, less.p) == (decision, pytest.approx(p))
    assert greater.effect == pytest.approx(sum(seeds) / len(seeds))


def test_the_threshold_is_what_the_sign_is_taken_of():
    seeds = [0.5, 0.4, 0.6, 0.3, 0.2]
    assert judged(*seeds, threshold=0.1).decision is HOLDS
    assert judged(*seeds, threshold=0.25).decision is NOT_SEPARABLE
    assert judged(*seeds, threshold=1.0).decision is DOES_NOT_HOLD
    assert judged(*[0.1 + 0.2] * 5, threshold=0.3).decision is NOT_SEPARABLE  # equal but for rounding


def test_few_seeds_say_what_they_cannot():
    three = judged(0.5, 0.4, 0.6)
    assert three.why == "3 of 3 seeds above 0; with 3 seeds p cannot be below 0.125"
    assert three.low == pytest.approx(0.5 - 4.302653 * 0.1 / math.sqrt(3))
    one = judged(0.5)
    assert (one.low, one.high, one.effect_size) == (None, None, None)
    assert one.why == "1 seed: there is no interval, and at least 3 are needed to decide"
    assert judged(0.5, 0.4).low is None


def test_without_a_seed_there_are_no_data():
    verdict = decide(a_claim(), ClaimValues({}, ("seed 0: n1 failed",)))
    assert (verdict.decision, verdict.effect, verdict.p, verdict.n) == (NO_DATA, None, None, 0)
    assert verdict.excluded == ("seed 0: n1 failed",)


@pytest.mark.parametrize(
    ("seeds", "decision"),
    [
        ([0.1, 0.2, 0.15, 0.1, 0.12], HOLDS),
        ([0.1, 0.2, 0.15, 0.1, 1.5], NOT_SEPARABLE),  # four inside, their mean is not
        ([0.1, 0.2, 0.15, 0.1, 0.35], HOLDS),
        ([0.1, 0.2, 0.5, 0.6, 0.35], NOT_SEPARABLE),
        ([0.1, 0.7, 0.5, 0.6, 0.35], DOES_NOT_HOLD),
        ([0.3, 0.3, 0.3], HOLDS),  # the bounds belong to it
        ([0.1, 0.1, 0.35], NOT_SEPARABLE),  # of three, all must be inside
        ([0.1, 0.7, 0.35, 0.5], NOT_SEPARABLE),
        ([0.6, 0.7, 0.35], DOES_NOT_HOLD),
        ([0.1, 0.2], NOT_SEPARABLE),
    ],
)
def test_within_rule(seeds, decision):
    verdict = judged(*seeds, direction="within", low=0.0, high=0.3)
    assert (verdict.decision, verdict.p, verdict.effect_size) == (decision, None, None)


@pytest.mark.parametrize(
    ("seeds", "decision", "reads"),
    [
        ([0.5, 0.4, 0.6, 0.3, 0.2], HOLDS, "differs"),
        ([-0.5, -0.4, -0.6, -0.3, -0.2], HOLDS, "differs"),
        ([0.01, 0.01, 0.9, 0.01, 0.01], NOT_SEPARABLE, "not separable"),  # one sign, but the interval spans 0
        ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, -0.01], NOT_SEPARABLE, "not separable"),  # the interval excludes 0, but one seed disagrees
        ([0.5, 0.4], NOT_SEPARABLE, "not separable"),
    ],
)
def test_two_sided_rule(seeds, decision, reads):
    verdict = judged(*seeds, direction="two-sided")
    assert (verdict.decision, verdict.reads) == (decision, reads)


def test_a_correlation_needs_the_seeds_and_the_whole_on_its_side():
    fields = {"statistic": "spearman", "arms": [], "against": "steps.reward_mean.end", "threshold": 0.8}
    seeds = [0.9, 0.95, 0.85, 0.9, 1.0]
    agreed = judged(*seeds, pooled=(0.88, 0.8, 0.93), **fields)
    assert (agreed.decision, agreed.effect, agreed.low, agreed.high) == (HOLDS, 0.88, 0.8, 0.93)
    torn = judged(*seeds, pooled=(0.3, 0.1, 0.6), **fields)
    assert (torn.decision, torn.p) == (NOT_SEPARABLE, 1 / 32)
    assert "over all runs" in torn.why


def test_planted_effects_are_found_and_the_null_is_not():
    study = a_study(
        a_claim(id="F1"), a_claim(id="F1.opposite", direction="less"), a_claim(id="F2", metric="steps.kl_behaviour_k3_nats.end"),
        a_claim(id="F3", statistic="level", arms=["n1"], direction="within", low=0.9, high=1.1),
    )  # fmt: skip
    runs = runs_at(study, {"n1": [1.0, 1.05, 0.95, 1.0, 1.02], "n4": [0.5, 0.6, 0.45, 0.5, 0.52]})
    verdicts = verdicts_of(study, runs)
    assert [verdict.decision for verdict in verdicts] == [HOLDS, DOES_NOT_HOLD, NOT_SEPARABLE, HOLDS]
    assert verdicts[0].effect == pytest.approx(0.49)
    assert verdicts[0].per_seed == pytest.approx({0: 0.5, 1: 0.45, 2: 0.5, 3: 0.5, 4: 0.5})
    assert [verdict.decision for verdict in verdicts_of(study, [])] == [NO_DATA] * 4


def test_markdown_is_a_table_that_no_text_breaks():
    held = judged(0.5, 0.4, 0.6, 0.3, 0.2, text="a | b\n<script>[x](y)`")
    table = markdown_verdicts([held, decide(a_claim(id="F2"), ClaimValues({}))])
    lines = table.splitlines()
    assert lines[2] == r"| F1 | a \| b \<script\>\[x\](y)\` | **holds** | 0.400 \[0.204, 0.596\] | 5 | 0.031 |"
    assert lines[3] == "| F2 | planted | **no data** | - | 0 | - |"
    assert len(lines) == 4


def test_claims_of_one_number_belong_together():
    assert [claim_number(name) for name in ("F3", "F3.higher", "F10.a.b")] == ["F3", "F3", "F10"]
    assert interval_text(judged(1.0)) == "1.000"


def test_the_interval_of_a_mean_correlation_ends_at_1():
    seeds = [0.4, 0.8, 1.0]
    of_correlations = judged(*seeds, statistic="monotone", arms=["a", "b", "c"])
    assert (of_correlations.low, of_correlations.high) == (pytest.approx(0.7333333 - 4.302653 * 0.3055050 / math.sqrt(3), abs=1e-6), 1.0)
    assert judged(*seeds).high == pytest.approx(0.7333333 + 4.302653 * 0.3055050 / math.sqrt(3), abs=1e-6)
