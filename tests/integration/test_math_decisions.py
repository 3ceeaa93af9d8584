"""Each row of the table of what `math` decides on purpose, by the real judge."""

import pytest

from reward_server.judges.pool import JudgePools
from reward_server.rubric import Rubric
from reward_server.verifiers import VERIFIERS, check_options
from reward_server.verifiers.math_decisions import DECISIONS
from reward_server.verifiers.verdict import Tools
from services.contracts.messages import Outcome
from services.contracts.spec import Verifier

GOLDS = [
    "0.5", "blue", r"\{1,2\}", "(1,2)", "1,2", "x=5", r"\text{(A)}", "x^2-1", "[0,1)", r"\begin{pmatrix}1\\2\end{pmatrix}", r"5\text{ cm}", r"10\%",
    "x>2", r"90^\circ", r"\$5", r"x \in [1,2]", r"-\infty", r"(-\infty, 3]\cup[5,\infty)", r"3 \pm \sqrt{2}", "6 - 5i",
    r"1\frac{1}{2}", r"so \boxed{x^2}",
]  # fmt: skip
TOPICS = {"units", "percent", "chained equalities", "repeating decimals", "scientific notation", "trailing dots"}


@pytest.fixture(scope="module")
def rubric():
    pools = JudgePools(workers=1)
    yield Rubric((Verifier(name="math"),), Tools(pools.ask))
    pools.close()


@pytest.mark.parametrize("row", DECISIONS, ids=lambda row: f"{row.topic} {row.answer}")
def test_the_verdict_is_the_one_in_the_table(rubric, row):
    score = rubric.score(rf"so it is \boxed{{{row.answer}}}", prompt="", answer=row.gold)
    assert (score.reward, score.parts[0].outcome) == (float(row.right), Outcome.OK)


def test_the_table_has_both_verdicts_of_every_topic_that_is_known_for_mistakes():
    for topic in TOPICS:
        assert {row.right for row in DECISIONS if row.topic == topic} == {True, False}, topic


@pytest.mark.parametrize("gold", GOLDS)
def test_a_gold_answer_that_math_verify_reads_passes_its_own_check(rubric, gold):
    completion = VERIFIERS["math"].gold(gold, check_options("math", {}))
    assert rubric.score(completion, prompt="", answer=gold).reward == 1.0


@pytest.mark.parametrize("gold", [r"\left(", r"\sqrt{2", r"\frac{1"])
def test_a_gold_answer_that_cannot_be_read_does_not(rubric, gold):
    completion = VERIFIERS["math"].gold(gold, check_options("math", {}))
    assert rubric.score(completion, prompt="", answer=gold).reward != 1.0
