"""The one way from a completion to its score, which the stream's worker and the HTTP routes both take."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import JsonValue

from reward_server.rubric import Rubric
from reward_server.scoring_threads import ScoringThreads
from reward_server.verifiers.verdict import Tools
from services.contracts.messages import Score
from services.contracts.spec import Verifier
from services.runtime.metrics import RewardMetrics

HTTP = "(http)"
"""The tenant that HTTP requests are, beside the runs."""


class Scoring:
    """Judges completions and counts what came out; safe to use from several threads."""

    def __init__(self, tools: Tools, threads: ScoringThreads, metrics: RewardMetrics) -> None:
        self.tools, self.threads, self.metrics = tools, threads, metrics
        metrics.waiting.labels("http").set_function(lambda: threads.waiting(HTTP))
        metrics.waiting.labels("stream").set_function(lambda: threads.waiting() - threads.waiting(HTTP))

    def rubric(self, rewards: Sequence[Verifier], *, least: float | None = None, most: float | None = None) -> Rubric:
        """Rewards are held within `least` and `most`. Raises ValueError when a verifier or its options do not exist."""
        return Rubric(tuple(rewards), self.tools, least=least, most=most)

    def judge(self, rubric: Rubric, completion: str, *, prompt: str, answer: JsonValue) -> Score:
        """Never raises for what a model wrote."""
        score = rubric.score(completion, prompt=prompt, answer=answer)
        for part in score.parts:
            self.metrics.verifications.labels(part.verifier, part.said, part.tier).inc()
            self.metrics.failures.labels(part.verifier).inc(part.score is None)
            self.metrics.verification_seconds.labels(part.verifier).observe(part.seconds)
        return score
