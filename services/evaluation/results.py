"""What a policy answered to the prompts of an evaluation set, and all that is measured of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from services.evaluation.calibration import calibration, consistency, likelihood
from services.evaluation.diversity import BLEU_PROMPTS, ORDERS, answer_entropy, distinct, jaccard_distance, ngram_diversity, self_bleu
from services.evaluation.pass_at_k import KS, majority_at_k, pass_at_k

TAIL = 8192
"""Characters at an answer's end in which its final answer is looked for."""


@dataclass(frozen=True)
class Answer:
    """One completion of one prompt."""

    tokens: tuple[int, ...]
    """Without the end-of-sequence token."""
    text: str
    reward: float
    logps: tuple[float, ...]
    """Of all its sampled tokens, the end of the sequence included, nats."""
    truncated: bool
    """Cut off at the longest length allowed."""


@dataclass(frozen=True)
class PromptResult:
    """The answers to one prompt."""

    prompt_id: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class _Judged:
    """A prompt's answers with what the measures need of them, in the same order."""

    tokens: tuple[tuple[int, ...], ...]
    finals: tuple[str, ...]
    correct: tuple[bool, ...]


def final_answer(text: str) -> str:
    r"""What the answer comes to, as text: the content of the last `\boxed{}`, else what follows the last `####`, else what stands in the last
    `<answer>` tags, else all that follows the thinking part; runs of white space are one space. Two answers are the same if these are."""
    tail = text[-TAIL:].rpartition("</think>")[2]
    box = tail.rfind("\\boxed{")
    start, end = tail.rfind("<answer>"), tail.rfind("</answer>")
    if box >= 0:
        found = _braced(tail[box + len("\\boxed{") :])
    elif "####" in tail:
        found = tail.rpartition("####")[2]
    elif 0 <= start < end:
        found = tail[start + len("<answer>") : end]
    else:
        found = text.rpartition("</think>")[2]
    return " ".join(found.split())


def _braced(rest: str) -> str:
    """What comes before the brace that closes one already opened; all of it if none does."""
    depth = 1
    for at, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:at]
    return rest


def evaluate(prompts: Sequence[PromptResult], *, correct_at: float) -> dict[str, float]:
    """The values of EVALUATION_KEYS that can be had of these results: a mean over nothing, or one that is not finite, is left out. An answer is
    correct when its reward is at least `correct_at`. Means are over prompts of what is taken within a prompt, unless the key's meaning names
    something else. Prompts without answers are left out."""
    prompts = [prompt for prompt in prompts if prompt.answers]
    answers = [answer for prompt in prompts for answer in prompt.answers]
    judged = [_judged(prompt, correct_at) for prompt in prompts]
    values: dict[str, float | None] = {
        "reward_mean": _mean(answer.reward for answer in answers),
        "length_mean": _mean(len(answer.tokens) for answer in answers),
        "truncated_share": _mean(answer.truncated for answer in answers),
        "entropy_estimate_nats": _mean(-logp for answer in answers for logp in answer.logps),
    }
    values |= _success(judged) | _diversity(judged) | _calibration(prompts, judged)
    return {key: float(value) for key, value in values.items() if value is not None and math.isfinite(value)}


def _judged(prompt: PromptResult, correct_at: float) -> _Judged:
    return _Judged(
        tokens=tuple(answer.tokens for answer in prompt.answers),
        finals=tuple(final_answer(answer.text) for answer in prompt.answers),
        correct=tuple(answer.reward >= correct_at for answer in prompt.answers),
    )


def _success(judged: Sequence[_Judged]) -> dict[str, float | None]:
    fewest = min((len(one.correct) for one in judged), default=0)
    values = {f"pass_at_{k}": _mean(pass_at_k(samples=len(one.correct), correct=sum(one.correct), k=k) for one in judged) for k in KS if k <= fewest}
    return values | {
        "correct_mean": _mean(sum(one.correct) / len(one.correct) for one in judged),
        "majority_at_k": _mean(majority_at_k(one.finals, one.correct) for one in judged),
    }


def _diversity(judged: Sequence[_Judged]) -> dict[str, float | None]:
    def over_prompts(measure: Callable[[Sequence[tuple[int, ...]]], float | None], many: int | None = None) -> float | None:
        return _mean(value for one in judged[:many] if (value := measure(one.tokens)) is not None)

    right = [{final for final, yes in zip(one.finals, one.correct, strict=True) if yes} for one in judged]
    entropies = [answer_entropy(one.finals) for one in judged]
    return {f"distinct_{n}": over_prompts(partial(distinct, n=n)) for n in ORDERS} | {
        "ngram_diversity": over_prompts(ngram_diversity),
        "self_bleu": over_prompts(self_bleu, BLEU_PROMPTS),
        "jaccard_distance": over_prompts(jaccard_distance),
        "unique_correct": _mean(map(len, right)),
        "unique_correct_share": _mean(len(finals) / sum(one.correct) for finals, one in zip(right, judged, strict=True) if finals),
        "answer_entropy_nats": _mean(entropies),
        "effective_answers": _mean(map(math.exp, entropies)),
    }


def _calibration(prompts: Sequence[PromptResult], judged: Sequence[_Judged]) -> dict[str, float | None]:
    """Over all answers of all prompts; of the likelihood, over those whose log-probabilities are known."""
    correct = [yes for one in judged for yes in one.correct]
    agreed = [share for one in judged for share in consistency(one.finals)]
    logps = [answer.logps for prompt in prompts for answer in prompt.answers]
    likely = [(likelihood(one), yes) for one, yes in zip(logps, correct, strict=True) if one and math.isfinite(sum(one))]
    by_confidence = {"consistency": calibration(agreed, correct), "likelihood": calibration([c for c, _ in likely], [yes for _, yes in likely])}
    return {f"{confidence}_{key}": value for confidence, values in by_confidence.items() for key, value in values.items()}


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return math.fsum(known) / len(known) if known else None
