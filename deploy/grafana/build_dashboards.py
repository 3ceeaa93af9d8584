"""Writes the five dashboards: `.venv/bin/python deploy/grafana/build_dashboards.py`.

Here is what they show; each JSON file in deploy/grafana/dashboards/ is made of one `Board`. A panel says in its description how to read it. Queries
are filtered by the variable `run`, whose choice the variable `study` narrows, where a metric knows its run: what a process tells of itself has none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import bargauge, common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_kinds
from grafana_foundation_sdk.models import prometheus as formats

FOLDER = Path(__file__).with_name("dashboards")
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
RUN = 'run=~"$run"'
NATS, SHARE, SECONDS, VERSIONS, NUMBER, TOKENS = "suffix: nats", "percentunit", "s", "suffix: versions", "short", "suffix: tokens"
PER_SECOND, BYTES, ON_OFF = "suffix: /s", "bytes", "bool_on_off"


@dataclass(frozen=True)
class Query:
    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    title: str
    text: str
    """How to read it."""
    unit: str
    queries: tuple[Query, ...]
    kind: str = "lines"
    """lines; bars and numbers: of the last value; buckets: heat map of a histogram; cells: heat map with a row for each series."""
    limits: tuple[float, ...] = ()
    """Drawn as lines: where the alerts are."""


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Board:
    name: str
    title: str
    text: str
    rows: tuple[Row, ...]


class Annotation(models.AnnotationQuery):
    """With the text of its marks, which the SDK's own class leaves out."""

    mark = ""

    def to_json(self) -> dict[str, object]:
        return super().to_json() | {"titleFormat": self.mark}


# -- queries ------------------------------------------------------------------------------------------------------------------------------


def among(label: str, values: Sequence[str]) -> str:
    return f'{label}="{values[0]}"' if len(values) == 1 else f'{label}=~"{"|".join(values)}"'


def step(*names: str, by: str = "") -> str:
    """Measurements of a step; with `by`, those of its bins."""
    return f'offbeat_trainer_step{{{RUN}, {among("name", names)}, by="{by}"}}'


def steps(*names: str) -> tuple[Query, ...]:
    return (Query(step(*names), "{{run}} {{name}}"),)


def binned(name: str, by: str) -> tuple[Query, ...]:
    return (Query(step(name, by=by), "{{run}} {{bin}}"),)


def by_lag(name: str) -> tuple[Query, ...]:
    """Mean over the runs in each bucket of lag. Rows are drawn in the order of their names, hence 02-3 for 2-3."""
    ordered = f'label_replace({step(name, by="lag")}, "bin", "0$1", "bin", "([0-9](-.*)?)")'
    return (Query(f"avg by (bin) ({ordered})", "{{bin}}"),)


def evaluated(*names: str) -> tuple[Query, ...]:
    return (Query(f"offbeat_evaluation{{{RUN}, {among('name', names)}}}", "{{run}} {{set}} {{name}}"),)


def of_run(metric: str, *labels: str) -> tuple[Query, ...]:
    return (Query(f"{metric}{{{RUN}}}", " ".join(f"{{{{{label}}}}}" for label in ("run", *labels))),)


def per_second(metric: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) (rate({metric}[$__rate_interval]))"


def rate(metric: str, *by: str) -> tuple[Query, ...]:
    return (Query(per_second(metric, *by), " ".join(f"{{{{{label}}}}}" for label in by)),)


def latest(metric: str, *labels: str) -> tuple[Query, ...]:
    """A metric as it is, of processes."""
    return (Query(metric, " ".join(f"{{{{{label}}}}}" for label in labels)),)


def prefix_hits() -> tuple[Query, ...]:
    hits, asked = (per_second(f"vllm:prefix_cache_{what}_total", "instance") for what in ("hits", "queries"))
    return (Query(f"{hits} / {asked}", "{{instance}}"),)


def firing(alert: str, watched: str) -> tuple[Query, ...]:
    """1 for each run of which the alert fires, 0 for the other runs that have the metric `watched`."""
    fires = f'max by (run) (ALERTS{{alertname="{alert}", alertstate="firing", {RUN}}})'
    return (Query(f"{fires} or max by (run) ({watched}{{{RUN}}}) * 0", "{{run}}"),)


def quantiles(histogram: str, *by: str) -> tuple[Query, ...]:
    """Median and 95th percentile."""
    counted = f"sum by ({', '.join(('le', *by))}) (rate({histogram}_bucket[$__rate_interval]))"
    labels = "".join(f"{{{{{label}}}}} " for label in by)
    return tuple(Query(f"histogram_quantile({q}, {counted})", f"{labels}{name}") for q, name in ((0.5, "median"), (0.95, "p95")))


def of_arms(values: str, *by: str) -> str:
    """Mean over the runs of each arm. `values` has the label `run`; `by`: labels that are kept apart. Runs that have ended have a last value."""
    kept = "".join(f", {label}" for label in by)
    runs = 'max by (run, arm) (last_over_time(offbeat_run_info{study=~"$study", run=~"$run", arm!=""}[$__range]))'
    return f"avg by (arm{kept}) (max by (run{kept}) (last_over_time({values}[$__range])) * on (run) group_left (arm) {runs})"


def arms(name: str) -> tuple[Query, ...]:
    return (Query(of_arms(step(name)), "{{arm}}"),)


def arms_evaluated(name: str) -> tuple[Query, ...]:
    return (Query(of_arms(f'offbeat_evaluation{{{RUN}, name="{name}"}}', "set"), "{{arm}} {{set}}"),)


def seeds(name: str) -> tuple[Query, ...]:
    """Every run of the study, by arm and seed."""
    runs = 'max by (run, arm, seed) (offbeat_run_info{study=~"$study", run=~"$run", arm!=""})'
    return (Query(f"max by (run) ({step(name)}) * on (run) group_left (arm, seed) {runs}", "{{arm}} {{seed}}"),)


# -- what is shown ------------------------------------------------------------------------------------------------------------------------

ENTROPY = Board(
    "entropy",
    "Offbeat: entropy",
    "Does the policy keep its entropy, what takes it away, and does its control hold?",
    (
        Row(
            "Policy",
            (
                Panel(
                    "Policy entropy", "Exact entropy of the next token, mean over trained tokens, and its estimate by the sampled tokens. They "
                    "part where the tokens are stale.", NATS, steps("entropy_nats", "entropy_estimate_nats"),
                ),
                Panel(
                    "Entropy by sign of the advantage", "Tokens whose advantage is positive are made more likely: where their entropy is low, it "
                    "is lowered further.", NATS, binned("entropy_nats", "advantage"),
                ),
                Panel(
                    "Entropy by lag", "Entropy of the current policy on tokens of each lag, in versions: 02-3 is a lag of 2 or 3. Mean over runs.",
                    NATS, by_lag("entropy_nats"), "cells",
                ),
                Panel("Entropy by place", "By decile of the place in the completion: 0 is its beginning.", NATS, binned("entropy_nats", "position")),
                Panel(
                    "Where entropy is held", "Share of tokens above the threshold of forking tokens that was set at the start, and share of all "
                    "entropy that the fifth of tokens with the most of it holds.", SHARE, steps("forking_share", "entropy_top20_share"),
                ),
                Panel(
                    "Entropy of a completion", "Sum over a completion's tokens: falls too where completions get shorter.", NATS,
                    steps("entropy_completion_nats"),
                ),
            ),
        ),
        Row(
            "Budget",
            (
                Panel(
                    "Signed entropy budget", "Predicted change by an update, per unit step on the logits: of all tokens, and what those of "
                    "positive and of negative advantage add to it. Below zero takes entropy away.", NATS,
                    steps("entropy_change_predicted", "entropy_change_predicted_positive", "entropy_change_predicted_negative"),
                ),
                Panel(
                    "Realised change of entropy", "On the same probe tokens, before and after a step; every few versions.", NATS,
                    steps("entropy_change_realised"),
                ),
                Panel(
                    "Covariance of likelihood and advantage", "Positive: what is likely already is made more likely, which lowers entropy.", NATS,
                    steps("covariance_logp_advantage", "covariance_logp_weighted_advantage"),
                ),
            ),
        ),
        Row(
            "Prompts",
            (
                Panel(
                    "Prompt entropy in and out of domain", "Exact entropy over the evaluation sets' prompts, no sampling in it: the first sign of "
                    "a policy that narrows. Needs evaluation sets.", NATS, steps("prompt_entropy_in_nats", "prompt_entropy_out_nats"),
                ),
            ),
        ),
        Row(
            "Control",
            (
                Panel(
                    "Entropy and its target", "What the controller is to hold. Empty without a controller.", NATS,
                    steps("entropy_nats", "control_target_nats"),
                ),
                Panel("Distance from the target", "Last measured entropy less the target.", NATS, steps("control_error_nats")),
                Panel(
                    "State of the controller", "Weight of the tokens of positive advantage, coefficient of the entropy in the loss, and the reward "
                    "guard: 1 while it is awake. Which of them there are depends on the method.", NUMBER,
                    steps("control_weight", "control_coefficient", "control_guard"),
                ),
            ),
        ),
        Row(
            "Collapse",
            (
                Panel(
                    "Entropy left", "Mean of 5 minutes as a share of the highest of the last day. The alert is at half, where the rest goes "
                    "quickly, and at a tenth.", SHARE, of_run("offbeat:entropy_left:ratio"), limits=(0.1, 0.5),
                ),
                Panel(
                    "Half-life of entropy", "Versions until half of what is left is gone, at the pace of the last 10 minutes. The alert is below "
                    "100. A billion where entropy does not fall.", VERSIONS, of_run("offbeat:entropy_half_life:versions"), limits=(100,),
                ),
                Panel(
                    "Collapse alert", "On while the alert of this name fires for the run.", ON_OFF,
                    firing("OffbeatEntropyCollapse", "offbeat:entropy_left:ratio"), "numbers",
                ),
            ),
        ),
    ),
)  # fmt: skip

STALENESS = Board(
    "staleness",
    "Offbeat: staleness",
    "How old are the tokens that are trained on, why, and what does it do to the update?",
    (
        Row(
            "Lag",
            (
                Panel(
                    "Lag achieved", "Trained tokens by lag, in versions. The window beside it says what was asked for.", TOKENS,
                    (Query(f"sum by (le) (increase(offbeat_trainer_lag_versions_bucket{{{RUN}}}[$__rate_interval]))", "{{le}}"),), "buckets",
                ),
                Panel(
                    "Lag requested and achieved", "min and max: the window in force. least and greatest: what the trained tokens had. greatest "
                    "above max is a broken promise, but for a while after max was lowered.", VERSIONS,
                    of_run("offbeat_trainer_window_versions", "bound"),
                ),
                Panel("Mean lag", "Of the trained tokens of a step, and the greatest.", VERSIONS, steps("lag_mean", "lag_max")),
                Panel(
                    "Staleness control", "What the controller asks for as greatest lag. Empty without a staleness target.", VERSIONS,
                    steps("staleness_wish_versions"),
                ),
                Panel(
                    "Staleness control: measure and target", "The target, in the unit of its metric, beside KL and effective sample size.", NUMBER,
                    steps("staleness_target", "kl_behaviour_k3_nats", "ess_share"),
                ),
            ),
        ),
        Row(
            "Waits",
            (
                Panel(
                    "Prompts wait for generation", "From issue to the start of generation: long where there are too few rollout servers.", SECONDS,
                    quantiles("offbeat_rollout_prompt_wait_seconds"),
                ),
                Panel(
                    "Completions wait for a verdict", "From the end of generation to the start of scoring.", SECONDS,
                    quantiles("offbeat_reward_wait_seconds"),
                ),
                Panel(
                    "Where a version's time goes", "Training, and what the trainer waits for: a batch (too little generation), the staleness rules "
                    "(stragglers, a tight window), an evaluation, delivery.", SECONDS,
                    steps("train_seconds", "batch_wait_seconds", "publish_wait_seconds", "evaluation_wait_seconds", "publish_prepare_seconds",
                          "publish_deliver_seconds", "checkpoint_seconds"),
                ),
            ),
        ),
        Row(
            "Divergence",
            (
                Panel(
                    "KL to the sampler", "Of the sampler to the current policy (k1, k3), and to the policy at the start of the step: lag alone, "
                    "without the step's own updates. The alert is at 0.1.", NATS,
                    steps("kl_behaviour_k1_nats", "kl_behaviour_k3_nats", "kl_lag_k3_nats"), limits=(0.1,),
                ),
                Panel("KL by lag", "k3 of tokens of each lag. Mean over runs.", NATS, by_lag("kl_behaviour_k3_nats"), "cells"),
                Panel(
                    "Effective sample size", "Share of the tokens, or completions, that a batch counts for under its importance weights. That of "
                    "completions with the product of their tokens' weights is near zero for long ones. The alert is at half of the tokens.", SHARE,
                    steps("ess_share", "ess_completion_share", "ess_geometric_share"), limits=(0.5,),
                ),
                Panel("Effective sample size by lag", "Of the tokens of each lag. Mean over runs.", SHARE, by_lag("ess_share"), "cells"),
                Panel(
                    "Clipped", "Share of trained tokens beyond the bounds of the ratio, up (advantage positive) and down.", SHARE,
                    steps("clip_up_share", "clip_down_share"),
                ),
                Panel(
                    "Clipped up by lag", "Share of the tokens of each lag with positive advantage. Mean over runs.", SHARE, by_lag("clip_up_share"),
                    "cells",
                ),
                Panel(
                    "Clipped down by lag", "Share of the tokens of each lag with negative advantage. Mean over runs.", SHARE,
                    by_lag("clip_down_share"), "cells",
                ),
                Panel(
                    "Gradient lost", "Share of the gradient that clipping takes away, and share of tokens that the off-policy correction rejects.",
                    SHARE, steps("clip_mass_share", "rejected_share"),
                ),
                Panel("Second moment of the log-ratio", "M2 (arXiv 2510.01161), which holds it below 0.04.", NUMBER, steps("m2_behaviour")),
                Panel(
                    "Mismatch at lag 0", "Mean difference of log-probability between trainer and sampler under the same weights: what is left is "
                    "arithmetic, not staleness.", NATS, steps("mismatch_lag0_nats"),
                ),
            ),
        ),
    ),
)  # fmt: skip

REWARD = Board(
    "reward",
    "Offbeat: reward and quality",
    "Does the policy get better, where it was not trained too, and what does it pay for it?",
    (
        Row(
            "Reward",
            (
                Panel("Training reward", "Mean over the completions of a batch.", NUMBER, of_run("offbeat_trainer_reward")),
                Panel("Correct in training", "Share of completions that reach `shaping.correct_at`.", SHARE, steps("correct_share")),
                Panel("Held-out reward", "Mean over the answers of each evaluation set.", NUMBER, evaluated("reward_mean")),
                Panel(
                    "Held-out accuracy", "Share of a prompt's answers that are correct, and of prompts whose most frequent answer is.", SHARE,
                    evaluated("correct_mean", "majority_at_k"),
                ),
                Panel(
                    "pass@k", "Unbiased. pass@1 that rises while pass@k for large k falls is sharpening: nothing new is found.", SHARE,
                    (Query(f'offbeat_evaluation{{{RUN}, name=~"pass_at_.+"}}', "{{run}} {{set}} {{name}}"),),
                ),
                Panel("Version evaluated", "Of the last evaluation of each set.", VERSIONS, of_run("offbeat_evaluation_version", "set")),
            ),
        ),
        Row(
            "Diversity",
            (
                Panel(
                    "Diversity of answers", "n-gram diversity and Jaccard distance: higher is more diverse. self-BLEU: lower is.", NUMBER,
                    evaluated("ngram_diversity", "jaccard_distance", "self_bleu"),
                ),
                Panel(
                    "Different correct answers", "Among a prompt's samples, and the effective number of final answers.", NUMBER,
                    evaluated("unique_correct", "effective_answers"),
                ),
                Panel(
                    "Entropy of final answers", "Of the shares of the final answers among a prompt's samples.", NATS,
                    evaluated("answer_entropy_nats"),
                ),
            ),
        ),
        Row(
            "Calibration",
            (
                Panel(
                    "Calibration error", "Expected calibration error of two confidences: agreement among samples, and likelihood of the answer.",
                    SHARE, evaluated("consistency_ece", "likelihood_ece"),
                ),
                Panel("Over-confidence", "Mean confidence less share of correct answers.", SHARE, evaluated("consistency_gap", "likelihood_gap")),
                Panel(
                    "Confidence where wrong", "Mean confidence over wrong answers: rises with collapse.", SHARE,
                    evaluated("consistency_confidence_wrong", "likelihood_confidence_wrong"),
                ),
            ),
        ),
        Row(
            "Completions",
            (
                Panel("Length in training", "Mean over the completions of a batch.", TOKENS, steps("completion_tokens_mean")),
                Panel("Length held out", "Mean over the answers of each evaluation set.", TOKENS, evaluated("length_mean")),
                Panel("Cut off", "Share of completions at the longest length allowed, in training.", SHARE, steps("truncated_share")),
                Panel(
                    "Groups without a signal", "Share of groups whose rewards are all equal, all right, all wrong.", SHARE,
                    steps("zero_signal_share", "all_right_share", "all_wrong_share"),
                ),
                Panel("Groups passed over", "Groups that dynamic sampling let go for a version.", NUMBER, steps("skipped_groups")),
                Panel(
                    "Outcomes", "Completions judged, by verifier and outcome. Of `code`, a solution that meets a limit is judged all the same.",
                    PER_SECOND, rate("offbeat_reward_verifications_total", "verifier", "outcome"),
                ),
            ),
        ),
    ),
)  # fmt: skip

FLEET = Board(
    "fleet",
    "Offbeat: fleet",
    "Who works, who waits for whom, what is lost, and what will run out?",
    (
        Row(
            "Fleet",
            (
                Panel("Members", "Living processes by role.", NUMBER, (Query("max by (role) (offbeat_fleet_members)", "{{role}}"),)),
                Panel("Runs", "Those that have not ended for good, by state.", NUMBER, (Query("max by (state) (offbeat_runs)", "{{state}}"),)),
                Panel(
                    "Jobs of trainers", "On Kubernetes: those that are active; and what failed in the last hour, by reason.",
                    NUMBER,
                    (
                        Query("max(offbeat_trainer_jobs)", "active"),
                        Query("sum by (reason) (increase(offbeat_trainer_job_failures_total[1h]))", "{{reason}}"),
                    ),
                ),
                Panel(
                    "Versions", "Of the runs, as trainers announce them, and of what each rollout server holds.", VERSIONS,
                    (*of_run("offbeat_trainer_version"), Query("offbeat_rollout_version", "{{instance}}")),
                ),
                Panel(
                    "Idle", "Share of the time in which a process waited for work.", SHARE,
                    (Query("clamp(deriv(offbeat_idle_seconds[$__rate_interval]), 0, 1)", "{{job}} {{instance}}"),),
                ),
                Panel(
                    "Waiting for Redis", "Seconds since start, by process; and 1 while Redis is away.", SECONDS,
                    (Query("offbeat_store_away_seconds", "{{job}} {{instance}}"), Query("offbeat:store_away:max", "{{instance}} away now")),
                ),
                Panel(
                    "API requests", "Answered requests by route and status. 503 is Redis that is away.", PER_SECOND,
                    rate("offbeat_http_request_seconds_count", "route", "status"),
                ),
                Panel("API latency", "From request to answer, of all routes.", SECONDS, quantiles("offbeat_http_request_seconds")),
            ),
        ),
        Row(
            "Throughput",
            (
                Panel(
                    "Tokens sampled", "By each rollout server, evaluations included.", PER_SECOND, rate("offbeat_rollout_tokens_total", "instance"),
                ),
                Panel(
                    "Tokens trained on", "Of the runs. Lower than what is sampled where dynamic sampling lets groups go.", PER_SECOND,
                    (Query(f"sum by (run) (rate(offbeat_trainer_tokens_total{{{RUN}}}[$__rate_interval]))", "{{run}}"),),
                ),
                Panel(
                    "Groups generated", "By how they ended: superseded ones were taken over by another server, failed ones are tried again.",
                    PER_SECOND, rate("offbeat_rollout_groups_total", "end"),
                ),
                Panel(
                    "Groups scored", "By how they ended: superseded ones were scored by another server, failed ones are tried again.", PER_SECOND,
                    rate("offbeat_reward_groups_total", "end"),
                ),
                Panel("Groups being generated", "At once, by each rollout server.", NUMBER, latest("offbeat_rollout_running_groups", "instance")),
                Panel(
                    "Generation of a group", "From its start to the end of its last completion.", SECONDS,
                    quantiles("offbeat_rollout_generation_seconds"),
                ),
                Panel(
                    "Trainer starved", "Share of the steps' time that was spent waiting for a batch, over 10 minutes. The alert is at half.", SHARE,
                    of_run("offbeat:trainer_starved:ratio"), limits=(0.5,),
                ),
                Panel("Phases of a version", "Seconds spent in each phase, per second.", SHARE, rate("offbeat_trainer_phase_seconds_sum", "phase")),
            ),
        ),
        Row(
            "Publication",
            (
                Panel(
                    "Stages of a publication", "Copying the weights, delivering them, standstill of generation.", SECONDS,
                    quantiles("offbeat_trainer_publish_seconds", "stage"),
                ),
                Panel(
                    "Versions in 5 minutes", "Of each run on the fleet. None for 10 minutes is an alert.", NUMBER,
                    of_run("offbeat:publications:changes5m"),
                ),
                Panel(
                    "Standstill at a load", "Of generation, while a rollout server takes new weights.", SECONDS,
                    quantiles("offbeat_rollout_load_stall_seconds", "instance"),
                ),
                Panel(
                    "Loads", "Of weights by rollout servers, by result. A failed load leaves the old weights serving.", PER_SECOND,
                    rate("offbeat_rollout_loads_total", "result"),
                ),
                Panel(
                    "Servers fenced", "Rollout servers kept out, by reason, since the trainer's start.", NUMBER,
                    (Query("sum by (reason) (offbeat_trainer_servers_fenced_total)", "{{reason}}"),),
                ),
                Panel(
                    "Canary", "Difference of log-probability of the same tokens between trainer and each rollout server: stays far below the "
                    "tolerance.", NATS, latest("offbeat_trainer_canary_difference", "server"),
                ),
            ),
        ),
        Row(
            "Queues and conservation",
            (
                Panel("Outstanding groups", "By place. Their sum is bounded by the window.", NUMBER, of_run("offbeat_queue_groups", "place")),
                Panel(
                    "What became of groups", "Counted since the run was made. issued is the sum of the others and of those outstanding.", NUMBER,
                    of_run("offbeat_groups", "fate"),
                ),
                Panel(
                    "Conservation broken", "On where issued groups are not all accounted for: never.", ON_OFF,
                    of_run("offbeat:conservation_broken:max"), "numbers",
                ),
                Panel(
                    "Dead letters", "Entries given up, by stream, since the start of the processes.", NUMBER,
                    (Query("sum by (stream) (offbeat_dead_letters_total)", "{{stream}}"),),
                ),
                Panel(
                    "Entries lost", "Gaps in the numbering of a stream, since start: never.", NUMBER,
                    latest("offbeat_bus_sequence_gaps_total", "job", "instance"),
                ),
                Panel(
                    "Lines of logs lost", "Dropped by a process while Redis was away, since its start. Its standard error has them.", NUMBER,
                    latest("offbeat_log_records_dropped_total", "job", "instance"),
                ),
            ),
        ),
        Row(
            "Verifiers",
            (
                Panel("Scoring of a group", "Time to judge all completions of a group.", SECONDS, quantiles("offbeat_reward_group_seconds")),
                Panel(
                    "Failures of verifiers", "Share of completions that could not be judged, by verifier. The alert is at 5 %.", SHARE,
                    latest("offbeat:verifier_failures:ratio", "verifier"), limits=(0.05,),
                ),
                Panel(
                    "Time of a verifier", "For one completion, waiting for a judge or the sandbox included.", SECONDS,
                    quantiles("offbeat_reward_verification_seconds", "verifier"),
                ),
                Panel(
                    "Completions that wait", "For a thread of a reward server: those of the streams, and of HTTP requests.", NUMBER,
                    latest("offbeat_reward_waiting", "instance", "source"),
                ),
                Panel(
                    "Requests refused", "HTTP requests to reward servers that were answered with 429.", PER_SECOND,
                    rate("offbeat_reward_refused_total", "instance"),
                ),
                Panel(
                    "Sandbox", "The tier under which each reward server runs untrusted code.", ON_OFF,
                    latest("offbeat_reward_sandbox_info", "instance", "tier"), "numbers",
                ),
            ),
        ),
        Row(
            "vLLM",
            (
                Panel(
                    "Requests in vLLM", "Completions that run, and that wait for room in a batch or in the KV cache.", NUMBER,
                    (Query("vllm:num_requests_running", "{{instance}} running"), Query("vllm:num_requests_waiting", "{{instance}} waiting")),
                ),
                Panel(
                    "KV cache", "Share in use. Near 1 with requests that wait: fewer sequences at once, or more memory.", SHARE,
                    latest("vllm:kv_cache_usage_perc", "instance"),
                ),
                Panel(
                    "Tokens in vLLM", "Tokens of prompts that were read, and of completions that were sampled.", PER_SECOND,
                    (Query(per_second("vllm:prompt_tokens_total", "instance"), "{{instance}} prompts"),
                     Query(per_second("vllm:generation_tokens_total", "instance"), "{{instance}} completions")),
                ),
                Panel("Prefix cache", "Share of prompt tokens that were found in it.", SHARE, prefix_hits()),
                Panel("Time between tokens", "Of one request, in vLLM.", SECONDS, quantiles("vllm:inter_token_latency_seconds")),
                Panel(
                    "Time to the first token", "Of one request, in vLLM, waiting included.", SECONDS, quantiles("vllm:time_to_first_token_seconds"),
                ),
                Panel("Preemptions", "Requests put off for want of KV cache.", PER_SECOND, rate("vllm:num_preemptions_total", "instance")),
            ),
        ),
        Row(
            "Machines",
            (
                Panel(
                    "Memory", "Resident, by process. vLLM's engine and verifiers are processes of their own and not in it.", BYTES,
                    latest("offbeat_process_resident_memory_bytes", "job", "instance"),
                ),
                Panel(
                    "CPU", "Cores used by each process. vLLM's engine and verifiers are not in it.", NUMBER,
                    rate("offbeat_process_cpu_seconds_total", "job", "instance"),
                ),
                Panel(
                    "Open files", "Files and connections, as a share of what the process may open.", SHARE,
                    (Query("offbeat_process_open_fds / offbeat_process_max_fds", "{{job}} {{instance}}"),),
                ),
                Panel(
                    "Disk of the checkpoints", "Free share. The alert is at a tenth, or where it will be full in 4 hours.", SHARE,
                    latest("offbeat:disk_free:ratio", "instance"), limits=(0.1,),
                ),
                Panel(
                    "Free disk", "Where the trainers write their checkpoints.", BYTES,
                    (Query('offbeat_trainer_disk_bytes{kind="free"}', "{{instance}}"),),
                ),
            ),
        ),
    ),
)  # fmt: skip

STUDY = Board(
    "study",
    "Offbeat: study",
    "The arms of a study side by side, while it runs. What it decides is in its report (`offbeat study report`).",
    (
        Row(
            "Arms: last values, mean over their runs",
            (
                Panel("Entropy of the arms", "Exact, of the last step of each run.", NATS, arms("entropy_nats"), "bars"),
                Panel("Training reward of the arms", "Mean of the batch of each run's last step.", NUMBER, arms("reward_mean"), "bars"),
                Panel("Held-out accuracy of the arms", "Of the last evaluation that was scraped.", SHARE, arms_evaluated("correct_mean"), "bars"),
                Panel(
                    "Different correct answers of the arms", "Among a prompt's samples, at the last evaluation that was scraped.", NUMBER,
                    arms_evaluated("unique_correct"), "bars",
                ),
                Panel("KL of the arms", "Of the sampler to the current policy, k3.", NATS, arms("kl_behaviour_k3_nats"), "bars"),
                Panel("Effective sample size of the arms", "Of the trained tokens, at each run's last step.", SHARE, arms("ess_share"), "bars"),
                Panel("Lag of the arms", "Mean of the trained tokens, at each run's last step.", VERSIONS, arms("lag_mean"), "bars"),
                Panel(
                    "Version of the arms", "How far their runs are: runs follow one another where there is one trainer.", VERSIONS,
                    (Query(of_arms(f"offbeat_trainer_version{{{RUN}}}"), "{{arm}}"),), "bars",
                ),
            ),
        ),
        Row(
            "Runs: arm and seed",
            (
                Panel("Entropy of the runs", "By arm and seed, over wall time; curves over versions are in the report.", NATS, seeds("entropy_nats")),
                Panel("Training reward of the runs", "Mean of the batch, by arm and seed.", NUMBER, seeds("reward_mean")),
                Panel(
                    "Calibration error of the arms", "Likelihood of the answer as confidence, at the last evaluation that was scraped.", SHARE,
                    arms_evaluated("likelihood_ece"), "bars",
                ),
                Panel("Time of a version", "From one version to the next, by arm and seed.", SECONDS, seeds("seconds")),
            ),
        ),
    ),
)  # fmt: skip

BOARDS = (ENTROPY, STALENESS, REWARD, FLEET, STUDY)
MARKS = {
    "Alerts": ('ALERTS{alertname=~"Offbeat.+", alertstate="firing"}', "red", "{{alertname}} {{run}}"),
    "Knobs": (f"changes(offbeat_trainer_knob_changes{{{RUN}}}[2m]) > 0", "purple", "knobs of {{run}} turned"),
    "Restarts": ("time() - offbeat_process_start_time_seconds < 120", "orange", "{{job}} {{instance}} started"),
}
"""Name -> query, colour, text. Grafana asks for annotations every 60 s: each is true for two such steps."""


# -- from that to Grafana -----------------------------------------------------------------------------------------------------------------


def thresholds(limits: Sequence[float]) -> dashboard.ThresholdsConfig:
    steps = [models.Threshold(color="green"), *(models.Threshold(value=limit, color="orange") for limit in limits)]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def drawn(panel: Panel) -> timeseries.Panel | bargauge.Panel | stat.Panel | heatmap.Panel:
    """A panel of the kind that is asked for, without its queries."""
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    if panel.kind == "bars":
        return bargauge.Panel().reduce_options(last).orientation(kinds.VizOrientation.HORIZONTAL)
    if panel.kind == "numbers":
        alarm = [models.Threshold(color="green"), models.Threshold(value=1, color="red")]
        return stat.Panel().reduce_options(last).thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(alarm))
    if panel.kind in ("buckets", "cells"):
        colours = heatmap.HeatmapColorOptions().mode(heatmap_kinds.HeatmapColorMode.SCHEME).scheme("Viridis").steps(64)
        return heatmap.Panel().calculate(False).color(colours).cell_values(heatmap.CellValues().unit(panel.unit)).show_legend()
    lines = timeseries.Panel().line_width(1).fill_opacity(0).show_points(kinds.VisibilityMode.AUTO).thresholds(thresholds(panel.limits))
    if panel.limits:
        lines.thresholds_style(common.GraphThresholdsStyleConfig().mode(kinds.GraphThresholdsStyleMode.DASHED))
    legend = common.VizLegendOptions().display_mode(kinds.LegendDisplayMode.LIST).placement(kinds.LegendPlacement.BOTTOM).show_legend(True)
    return lines.legend(legend)


def query(panel: Panel, asked: Query, number: int) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(asked.expr).legend_format(asked.legend).ref_id("ABCDEFGH"[number])
    if panel.kind in ("bars", "numbers"):
        return target.instant()
    return target.range().format(formats.PromQueryFormat.HEATMAP if panel.kind == "buckets" else formats.PromQueryFormat.TIME_SERIES)


def variable(name: str, asked: str, text: str) -> dashboard.QueryVariable:
    made = dashboard.QueryVariable(name).label(name).description(text).datasource(SOURCE).query(asked).include_all(True).multi(True)
    everything = models.VariableOption(selected=True, text="All", value="$__all")
    return made.current(everything).refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)


def annotation(name: str) -> Annotation:
    expr, colour, mark = MARKS[name]
    made = Annotation(name=name, datasource=SOURCE, icon_color=colour, expr=expr)
    made.mark = mark
    return made


def build(board: Board) -> models.Dashboard:
    others = dashboard.DashboardLink("Offbeat").type(models.DashboardLinkType.DASHBOARDS).tags(["offbeat"]).as_dropdown(True)
    made = (
        dashboard.Dashboard(board.title)
        .uid(f"offbeat-{board.name}")
        .description(board.text)
        .tags(["offbeat"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(others.keep_time(True).include_vars(True))
        .with_variable(dashboard.DatasourceVariable("datasource").label("data source").type("prometheus"))
        .with_variable(variable("study", "label_values(offbeat_run_info, study)", "Runs of these studies; All: runs of none too").all_value(".*"))
        .with_variable(variable("run", 'label_values(offbeat_run_info{study=~"$study"}, run)', "Runs that were on the fleet in the time shown"))
    )
    number = 0
    for row in board.rows:
        made.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            number += 1
            shown = drawn(panel).id(number).title(panel.title).description(panel.text).unit(panel.unit).datasource(SOURCE).span(8).height(8)
            for place, asked in enumerate(panel.queries):
                shown.with_target(query(panel, asked, place))
            made.with_panel(shown)
    whole = made.build()
    whole.annotations = models.AnnotationContainer(list_val=[annotation(name) for name in MARKS])
    return whole


def render() -> dict[str, str]:
    """JSON by file name."""
    return {f"{board.name}.json": json.dumps(build(board), cls=JSONEncoder, indent=1, sort_keys=True) + "\n" for board in BOARDS}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in render().items():
        (FOLDER / file).write_text(text)
