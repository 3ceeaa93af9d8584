"""What a run does, seen through the API: the staleness window, knobs, agreement of the two ends, learning, and the cost of a publication."""

from __future__ import annotations

import statistics
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.contracts.messages import Role
from services.contracts.states import RunState
from services.contracts.views import SampleView

from .conftest import Stack

BATCH, SIZE = 8, 4


def lags_of(sample: SampleView) -> list[int]:
    return [lag for completion in sample.completions for lag in completion.lags]


@pytest.mark.parametrize("order", ["ready", "fifo"])
@pytest.mark.parametrize(("min_lag", "max_lag"), [(0, 0), (0, 2), (2, 2), (1, 4)])
def test_every_trained_token_keeps_the_window(stack: Stack, min_lag: int, max_lag: int, order: str) -> None:
    versions = 12
    run_id = stack.submit(
        name="window", versions=versions, batch_groups=BATCH, group_size=SIZE, staleness={"min_lag": min_lag, "max_lag": max_lag, "order": order}
    )
    stack.finish(run_id)
    samples = stack.samples(run_id)
    assert len(samples) == versions * BATCH
    assert len({s.index for s in samples}) == len(samples), "a group was trained on twice"
    for sample in samples:
        for completion in sample.completions:
            assert completion.lags == [sample.trained_version - v for v in completion.versions]
        floor = min(min_lag, sample.trained_version)  # lag k cannot exist before version k
        assert floor <= min(lags_of(sample)) <= max(lags_of(sample)) <= max_lag
    if order == "fifo":
        assert [s.index for s in sorted(samples, key=lambda s: (s.trained_version, s.index))] == list(range(len(samples)))
    counts = stack.client.conservation(run_id)
    assert counts.holds
    assert (counts.consumed, counts.dead) == (versions * BATCH, 0)
    assert counts.cancelled <= (max_lag + 1) * BATCH


def test_trainer_and_sampler_agree_at_lag_0_and_the_reward_service_is_right(stack: Stack) -> None:
    run_id = stack.submit(name="synchronous", versions=6, batch_groups=BATCH, group_size=SIZE, staleness={"max_lag": 0})
    stack.finish(run_id)
    for step in stack.steps(run_id):
        mismatch = step.values["mismatch_lag0_nats"]
        assert mismatch is not None
        assert mismatch < 1e-3
    for sample in stack.samples(run_id):
        for completion in sample.completions:
            terms = completion.text.split("+")
            right = all(len(t) == 1 and t in "123456789" for t in terms) and sum(map(int, terms)) == sample.answer
            assert completion.reward == float(right), (sample.prompt, completion.text)


def test_knobs_hold_from_the_version_that_was_answered(stack: Stack) -> None:
    run_id = stack.submit(name="knobs", versions=30, batch_groups=BATCH, group_size=SIZE, staleness={"max_lag": 0})
    stack.reach(run_id, 4)
    answer = stack.client.set_knobs(run_id, {"staleness.max_lag": 2, "updates_per_batch": 2, "learning_rate": 1e-5, "group_size": 6})
    stack.finish(run_id)
    assert answer.version >= 5
    for step in stack.steps(run_id):
        after = step.version >= answer.version
        assert step.window == ((0, 2) if after else (0, 0))
        assert step.values["updates"] == (2 if after else 1)
        assert step.values["learning_rate"] == pytest.approx(1e-5 if after else 3e-4)
    for sample in stack.samples(run_id):
        after = sample.issued_version >= answer.version
        assert len(sample.completions) == (6 if after else SIZE)
        assert max(lags_of(sample)) <= (2 if after else 0)
    changed = [e for e in stack.client.events(run_id) if e.event == "knobs_changed"]
    assert [e.version for e in changed] == [answer.version]


def test_pausing_and_resuming_loses_nothing(stack: Stack) -> None:
    run_id = stack.submit(name="pause", versions=25, batch_groups=BATCH, group_size=SIZE, checkpoint={"every": 10})
    stack.reach(run_id, 5)
    stack.client.pause(run_id)
    stack.wait(run_id, lambda run: run.state is RunState.PAUSED)
    assert stack.client.conservation(run_id).holds
    stack.client.resume(run_id)
    stack.finish(run_id)
    assert [step.version for step in stack.steps(run_id)] == list(range(25))
    indices = [s.index for s in stack.samples(run_id)]
    assert len(set(indices)) == len(indices) == 25 * BATCH


def test_runs_wait_for_the_fleet_and_follow_one_another(stack: Stack) -> None:
    before = {name: p.pid for name, p in stack.info.processes.items()}
    runs = [stack.submit(name=f"queue{i}", versions=4, batch_groups=4, group_size=4) for i in range(3)]
    for run_id in runs:
        stack.finish(run_id)
    ended = [stack.client.run(run_id).ended_at or 0.0 for run_id in runs]
    assert ended == sorted(ended)
    assert {name: p.pid for name, p in stack.info.processes.items()} == before


def test_a_cancelled_run_leaves_nothing_outstanding(stack: Stack) -> None:
    run_id = stack.submit(name="cancel", versions=500, batch_groups=BATCH, group_size=SIZE)
    stack.reach(run_id, 3)
    stack.client.cancel(run_id)
    stack.wait(run_id, lambda run: run.state is RunState.CANCELLED and stack.client.conservation(run_id).outstanding == 0)
    assert stack.client.conservation(run_id).holds
    following = stack.submit(name="next", versions=2, batch_groups=4, group_size=4)
    stack.finish(following)


def test_the_reward_rises_and_a_publication_is_quick(stack: Stack) -> None:
    run_id = stack.submit(name="learn", versions=80, updates_per_batch=2, learning_rate=1e-4)
    stack.finish(run_id)
    steps = stack.steps(run_id)
    rewards = [step.values["reward_mean"] or 0.0 for step in steps]
    assert statistics.mean(rewards[-10:]) > statistics.mean(rewards[:10])
    assert all(0 < (step.values["entropy_nats"] or 0) < 5.6 for step in steps)
    stalls = [step.values["publish_stall_seconds"] or 0.0 for step in steps]
    assert statistics.median(stalls) < 0.25, "the figure of the docs is 0.1 s on an idle machine; this is a guard against another order of magnitude"


def test_weights_travel_over_the_network_too(stack: Stack) -> None:
    run_id = stack.submit(
        name="gloo", versions=8, batch_groups=BATCH, group_size=SIZE, staleness={"max_lag": 1}, weights={"transport": "gloo", "timeout": 30}
    )
    stack.finish(run_id)
    steps = stack.steps(run_id)
    assert len(steps) == 8
    assert all((step.values["canary_nats"] or 0.0) < 1e-3 and step.values["rollout_servers"] == 1 for step in steps)
    assert (steps[0].values["mismatch_lag0_nats"] or 0.0) < 1e-3


METRICS = {
    "control-plane": {"offbeat_runs", "offbeat_fleet_members", "offbeat_queue_groups", "offbeat_groups", "offbeat_conservation_broken"},
    "rollout-0": {
        "offbeat_rollout_version", "offbeat_rollout_tokens", "offbeat_rollout_prompt_wait_seconds", "offbeat_rollout_generation_seconds",
        "offbeat_rollout_load_stall_seconds", "offbeat_idle_seconds",
    },
    "reward-0": {"offbeat_reward_verifications", "offbeat_reward_wait_seconds", "offbeat_reward_group_seconds", "offbeat_idle_seconds"},
    "trainer-0": {
        "offbeat_trainer_version", "offbeat_trainer_entropy_nats", "offbeat_trainer_reward", "offbeat_trainer_lag_versions",
        "offbeat_trainer_window_versions", "offbeat_trainer_tokens", "offbeat_trainer_phase_seconds", "offbeat_trainer_publish_seconds",
        "offbeat_trainer_canary_difference", "offbeat_trainer_step", "offbeat_idle_seconds",
    },
}  # fmt: skip
STEP_VALUES = {
    "entropy_nats", "reward_mean", "ratio_behaviour_mean", "ratio_proximal_mean", "kl_behaviour_k3_nats", "kl_proximal_k3_nats",
    "mismatch_lag0_nats", "clip_up_share", "clip_down_share", "ess_share", "idle_trainer_seconds", "idle_rollout_seconds", "idle_reward_seconds",
}  # fmt: skip


def test_every_process_tells_its_metrics(stack: Stack) -> None:
    run_id = stack.submit(name="metrics", versions=200, batch_groups=BATCH, group_size=SIZE, staleness={"max_lag": 0})
    stack.reach(run_id, 4)
    time.sleep(1.0)
    found = {}
    for name, wanted in METRICS.items():
        text = httpx.get(f"{stack.info.processes[name].url}/metrics", trust_env=False).text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert wanted <= set(families), f"{name} lacks {wanted - set(families)}"
        found[name] = families
    stack.client.cancel(run_id)
    steps = {s.labels["name"] for s in found["trainer-0"]["offbeat_trainer_step"].samples if s.labels["run"] == run_id}
    assert steps >= STEP_VALUES
    lags = {
        s.labels["le"]: s.value
        for s in found["trainer-0"]["offbeat_trainer_lag_versions"].samples
        if s.labels.get("run") == run_id and "le" in s.labels
    }
    assert lags["0.0"] == lags["+Inf"] > 0
    outcomes = {(s.labels["verifier"], s.labels["outcome"]) for s in found["reward-0"]["offbeat_reward_verifications"].samples}
    assert ("sum_to_target", "ok") in outcomes


def test_every_process_s_log_is_served(stack: Stack) -> None:
    run_id = stack.submit(name="logged", versions=2, batch_groups=BATCH, group_size=SIZE)
    stack.finish(run_id)
    wait = time.monotonic() + 60
    processes = {(Role.CONTROL_PLANE, "control-plane"), (Role.ROLLOUT, "rollout-0"), (Role.REWARD, "reward-0"), (Role.TRAINER, "trainer-0")}
    while not (told := {(line.role, line.member) for line in stack.client.logs(limit=20_000)}) >= processes:
        assert time.monotonic() < wait, told
        time.sleep(0.2)
    expected = {("trainer-0", "trains the run"), ("rollout-0", "serves the run")}
    while not (said := {(line.member, line.text) for line in stack.client.logs(run=run_id)}) >= expected:
        assert time.monotonic() < wait, said
        time.sleep(0.2)
    secrets = [(stack.home / name).read_text().strip() for name in ("token", "cluster-token", "redis-password")]
    whole = "".join(line.model_dump_json() for line in stack.client.logs(limit=20_000))
    assert [secret for secret in secrets if secret in whole] == []
