"""Runs that were never trained: what a trainer and the servers would have recorded, put into a real store by the real ledger."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from typing import Any

from services.contracts.messages import (
    Completion,
    CompletionGroup,
    EvaluationRecord,
    FinishReason,
    LogLevel,
    LogLine,
    Outcome,
    Part,
    PromptGroup,
    Sample,
    Score,
    ScoredGroup,
    StepRecord,
    TokenMeasures,
    VersionSpan,
    pack_floats,
    pack_halves,
    pack_ints,
)
from services.contracts.spec import RunSpec
from services.contracts.states import Action
from services.contracts.topics import RETENTION, Log
from services.control_plane.store import RunStore
from services.runtime.bus import Bus, LogRow
from services.runtime.codec import encode
from services.runtime.ledger import Ledger, Plan
from services.runtime.tokenizer import PromptItem, PromptTokenizer

LAGS = ("0", "1", "2-3", "4-7")


def step_values(version: int, versions: int, *, seed: int) -> dict[str, float]:
    """Curves like those of a run that learns: entropy falls, reward rises, with noise."""
    noise, done = random.Random(seed * 1_000_003 + version), version / max(1, versions)
    entropy = 0.55 + 0.9 * math.exp(-3 * done) + noise.gauss(0, 0.02)
    reward = 0.2 + 0.55 * (1 - math.exp(-2.5 * done)) + noise.gauss(0, 0.03)
    kl, seconds = 0.004 + 0.006 * noise.random(), 0.6 + 0.1 * noise.random()
    values = {
        "entropy_nats": entropy, "entropy_positive_nats": entropy - 0.12, "entropy_negative_nats": entropy + 0.15, "reward_mean": reward,
        "correct_share": reward * 0.9, "lag_mean": 1.4 + noise.gauss(0, 0.1), "lag_max": 2.0, "kl_behaviour_k3_nats": kl, "ess_share": 0.97 - 4 * kl,
        "clip_up_share": 0.01 + 0.01 * noise.random(), "clip_down_share": 0.02, "clip_mass_share": 0.05, "clip_region_share": 0.035,
        "seconds": seconds, "train_seconds": 0.6 * seconds, "batch_wait_seconds": 0.2 * seconds, "publish_deliver_seconds": 0.1 * seconds,
        "evaluation_wait_seconds": 0.0, "idle_trainer_seconds": 0.2 * seconds, "idle_rollout_seconds": 0.3 * seconds,
        "idle_reward_seconds": 0.8 * seconds, "rollout_servers": 1.0, "truncated_share": 0.03, "zero_signal_share": 0.2 + 0.2 * done,
        "entropy_change_predicted_positive": -0.004, "entropy_change_predicted_negative": 0.003, "gradient_norm": 0.3 + 0.1 * noise.random(),
        "canary_nats": 2e-7, "mismatch_lag0_nats": 3e-7, "completion_tokens_mean": 8.0, "tokens": 1200.0, "learning_rate": 3e-4, "updates": 1.0,
    }  # fmt: skip
    for lag, of in enumerate(LAGS):
        values |= {f"kl_behaviour_k3_nats/lag/{of}": kl * (0.4 + 0.5 * lag), f"ess_share/lag/{of}": 0.99 - kl * (1 + 2 * lag)}
    return values


def recorded_run(
    bus: Bus, spec: RunSpec, *, steps: int, seed: int = 0, samples: Sequence[Sample] = (), sets: Sequence[str] = (), complete: bool = False
) -> str:
    """A run with `steps` versions behind it, on the fleet in the hands of trainer `t`. Its samples were trained on at the last version."""
    store = RunStore(bus)
    run, _ = store.create(spec)
    play(bus, run.run_id, spec, steps=steps, seed=seed, samples=samples, sets=sets, complete=complete)
    return run.run_id


def play(
    bus: Bus,
    run_id: str,
    spec: RunSpec,
    *,
    steps: int,
    seed: int = 0,
    samples: Sequence[Sample] = (),
    sets: Sequence[str] = (),
    complete: bool = False,
) -> None:
    """The same of a run that there is."""
    store, ledger = RunStore(bus), Ledger(bus, run_id)
    lifecycle = store.lifecycle(run_id)
    store.activate(run_id)
    lifecycle.move(Action.ASSIGN, trainer="t")
    ledger.announce(0, trainer="t")
    lifecycle.move(Action.START, holder="t")
    pipe = bus.redis.pipeline(transaction=False)
    for version in range(steps - 1):  # as the ledger's commit writes them, without a script for each of thousands
        pipe.xadd(
            ledger.keys.stream(Log.STEPS), {"seq": version + 1, "data": encode(step(run_id, spec, version, seed=seed))}, maxlen=RETENTION[Log.STEPS]
        )
    for version in range(0, steps + 1, max(1, steps // 10)):
        for place, name in enumerate(sets):
            record = EvaluationRecord(
                run_id=run_id, name=name, domain="in", version=version, prompts=8, samples=4, temperature=1.0, top_p=1.0, max_tokens=16,
                values={"reward_mean": 0.15 + 0.04 * place + 0.4 * version / max(1, steps), "pass_at_1": 0.2},
            )  # fmt: skip
            pipe.xadd(ledger.keys.stream(Log.EVALUATIONS), {"seq": version + 1, "data": encode(record)})
    pipe.execute()
    if steps:
        ledger.announce(steps - 1, trainer="t")
        commit(bus, run_id, spec, steps - 1, seed=seed, samples=samples)
    if complete:
        lifecycle.move(Action.COMPLETE, holder="t")


def commit(bus: Bus, run_id: str, spec: RunSpec, version: int, *, seed: int = 0, samples: Sequence[Sample] = ()) -> None:
    """One more version, through the ledger."""
    known = [sample.model_copy(update={"trained_version": version}) for sample in samples]
    Ledger(bus, run_id).commit(Plan((), ()), step(run_id, spec, version, seed=seed), known, trainer="t", keep_samples=100)


def step(run_id: str, spec: RunSpec, version: int, *, seed: int = 0) -> StepRecord:
    lags = {0: 200, 1: 500, spec.staleness.max_lag: 500}
    window = (spec.staleness.min_lag, spec.staleness.max_lag)
    return StepRecord(
        run_id=run_id, version=version, values=step_values(version, spec.versions, seed=seed), lags=lags, window=window, groups=(version,)
    )


def sample(run_id: str, tokenizer: PromptTokenizer, texts: Sequence[str], *, index: int = 0, prompt: str = "17=", **group: Any) -> Sample:
    """A group with these completions, tokenized as the model would have written them."""
    completions, measured = [], []
    for text in texts:
        ids = tokenizer.encode(PromptItem("c", text, None), chat=False)
        noise, middle = random.Random(index), len(ids) // 2
        spans = (VersionSpan(version=0, start=0, end=middle), VersionSpan(version=1, start=middle, end=len(ids))) if middle else (
            VersionSpan(version=0, start=0, end=len(ids)),
        )  # fmt: skip
        completions.append(
            Completion(tokens=pack_ints(ids), logprobs=pack_floats([-0.5] * len(ids)), spans=spans, text=text, finish=FinishReason.STOP)
        )
        measured.append(
            TokenMeasures(entropies=pack_halves([2.5 * noise.random() ** 2 for _ in ids]), log_ratios=pack_halves([noise.gauss(0, 0.3) for _ in ids]))
        )
    prompted = PromptGroup(
        run_id=run_id, index=index, prompt_id=f"sum_to_target:{index}", prompt=prompt, prompt_tokens=pack_ints([1]), answer=17, group_size=len(texts),
        seed=1, temperature=1.0, top_p=1.0, max_tokens=16, max_lag=2, issued_version=0,
    )  # fmt: skip
    done = CompletionGroup(group=prompted.model_copy(update=group), completions=tuple(completions), server="rollout-0", attempt=1, started_at=0.0)
    scores = [
        Score(reward=float(i % 2), parts=(Part(verifier="sum_to_target", weight=1.0, score=float(i % 2), outcome=Outcome.OK, detail=text[:40]),))
        for i, text in enumerate(texts)
    ]
    advantages = tuple(1.0 if i % 2 else -1.0 for i in range(len(texts)))
    return Sample(
        scored=ScoredGroup(completed=done, scores=tuple(scores), server="reward-0"),
        trained_version=0,
        advantages=advantages,
        measured=tuple(measured),
    )


def log_row(text: str = "text", *, level: LogLevel = LogLevel.INFO, role: str = "trainer", member: str = "t-0", **fields: Any) -> LogRow:
    """A line of a process's log, as it is stored."""
    line = LogLine(
        **{"at": time.time(), "level": level, "logger": "a.b", "role": role, "member": member, "host": "h", "pid": 7, "text": text, **fields}
    )
    return LogRow(level=level.value, role=role, member=member, run=line.run_id or "", data=encode(line))
