"""The catalogue of what is measured: keys of StepRecord.values and of EvaluationRecord.values, and what a whole run comes to. Each with its meaning.

A step's key may have bins: `entropy_nats/lag/2-3` is the entropy over the tokens whose lag was 2 or 3. `BINS` lists the bins of each way to divide.
"""

from __future__ import annotations

BINS: dict[str, tuple[str, ...]] = {
    "lag": ("0", "1", "2-3", "4-7", "8-15", "16-31", "32+"),
    "advantage": ("positive", "negative", "zero"),
    "clip": ("kept", "up", "down"),
    "position": tuple(str(decile) for decile in range(10)),
    "correct": ("right", "wrong"),
    "entropy": ("lowest", "low", "middle", "high", "highest"),
}
"""Ways to divide trained tokens. `position` is the decile of the place in the completion, `entropy` the fifth of the update's token entropies."""

STEP_KEYS: dict[str, str] = {
    # entropy
    "entropy_nats": "Exact entropy of the current policy's next-token distribution, mean over trained tokens",
    "entropy_positive_nats": "Exact entropy, mean over tokens of positive advantage",
    "entropy_negative_nats": "Exact entropy, mean over tokens of negative advantage",
    "entropy_zero_nats": "Exact entropy, mean over tokens of zero advantage",
    "entropy_estimate_nats": "Mean of -logp of the trained tokens: estimates the entropy where the current policy sampled them",
    "entropy_gap_nats": "Estimate less exact entropy, over tokens of lag 0 in the first update of a step, their own policy's: 0 but for chance",
    "entropy_gap_error_nats": "Standard error of entropy_gap_nats",
    "entropy_completion_nats": "Sum of the exact entropies of a completion's tokens, mean over completions",
    "entropy_top20_share": "Share of all entropy that the fifth of an update's tokens with the highest entropy holds",
    "forking_share": "Share of tokens whose entropy is above forking_threshold_nats",
    "forking_threshold_nats": "80th percentile of the token entropies in the run's first update",
    "prompt_entropy_in_nats": "Exact entropy of the next token over the prompts of the evaluation sets in the domain of training",
    "prompt_entropy_out_nats": "Exact entropy of the next token over the prompts of the evaluation sets out of the domain of training",
    # entropy budget
    "entropy_change_predicted": "Change of entropy by the update, to first order, per unit step on the logits: mean over tokens of -r A w drift",
    "entropy_change_predicted_positive": "What tokens of positive advantage add to entropy_change_predicted",
    "entropy_change_predicted_negative": "What tokens of negative advantage add to entropy_change_predicted",
    "entropy_change_realised": "Exact entropy after the step less before it, mean over the probe tokens, in nats",
    # covariance
    "covariance_logp_advantage": "Covariance of logp and advantage over trained tokens; in a bin, the mean of its tokens' terms, centred on all",
    "covariance_logp_weighted_advantage": "Covariance of logp and advantage times probability; in a bin as above",
    # distance from the sampler and from the policy at the start of the step
    "log_ratio_mean_nats": "Mean logp of the current policy less that of the sampler",
    "log_ratio_std_nats": "Standard deviation of that log-ratio",
    "log_ratio_low_nats": "0.1th percentile of that log-ratio within an update, mean over updates",
    "log_ratio_high_nats": "99.9th percentile of that log-ratio within an update, mean over updates",
    "log_ratio_abs_max_nats": "Greatest magnitude of that log-ratio",
    "ratio_behaviour_mean": "Mean importance ratio of the current policy to the sampler",
    "ratio_behaviour_max": "Greatest importance ratio of the current policy to the sampler",
    "ratio_proximal_mean": "Mean importance ratio of the current policy to the policy at the start of the step",
    "ratio_proximal_max": "Greatest importance ratio of the current policy to the policy at the start of the step",
    "kl_behaviour_k1_nats": "KL of the sampler to the current policy, estimator k1",
    "kl_behaviour_k2_nats": "KL of the sampler to the current policy, estimator k2",
    "kl_behaviour_k3_nats": "KL of the sampler to the current policy, estimator k3",
    "kl_proximal_k1_nats": "KL of the policy at the start of the step to the current one, estimator k1 on the sampler's tokens",
    "kl_proximal_k3_nats": "KL of the policy at the start of the step to the current one, estimator k3 on the sampler's tokens",
    "kl_step_k3_nats": "KL of the policy before the step to the one after it, estimator k3 on the probe tokens",
    "kl_lag_k3_nats": "KL of the sampler to the policy at the start of the step, estimator k3: lag alone, without the step's own updates",
    "m2_behaviour": "Mean squared log-ratio of the current policy to the sampler: M2, twice k2",
    "chi2_behaviour": "Chi-squared divergence of the sampler to the current policy, by tokens: mean of ratio^2 - 1",
    "chi2_completion": "The same by completions, whose ratio is the product of their tokens'",
    "ess_share": "Effective sample size of the trained tokens under the weights current/sampler, as a share of their number",
    "ess_completion_share": "The same of completions, whose weight is the product of their tokens'; bins by a completion's mean lag and entropy",
    "ess_geometric_share": "The same of completions, whose weight is the geometric mean of their tokens'; bins as above",
    "mismatch_lag0_nats": "Mean |logp of the trainer - logp of the sampler| over tokens of lag 0, before any update of the step",
    "lag_mean": "Mean lag of the trained tokens, in versions",
    "lag_max": "Greatest lag of a trained token, in versions",
    # clipping
    "clip_up_share": "Share of trained tokens of positive advantage beyond the ratio's upper bound",
    "clip_down_share": "Share of trained tokens of negative advantage beyond the ratio's lower bound",
    "clip_region_share": "Both together",
    "clip_mass_share": "Share of the sum of |w A r| that lies on clipped tokens: the gradient that clipping takes away",
    "dual_clip_share": "Share of trained tokens of negative advantage whose objective the dual clip bounds",
    "beyond_unclipped_share": "Share of trained tokens beyond a bound on the side that is not clipped: A < 0 above the upper, A > 0 below the lower",
    "rejected_share": "Share of trained tokens that the off-policy correction rejects",
    "effective_tokens_share": "Share of trained tokens whose advantage is not zero",
    # completions and groups
    "reward_mean": "Mean reward of the completions",
    "correct_share": "Share of the completions whose reward reaches `shaping.correct_at`",
    "completion_tokens_mean": "Mean length of the completions, in tokens",
    "truncated_share": "Share of the completions that were cut off at the longest length allowed",
    "zero_signal_share": "Share of the groups whose rewards are all equal",
    "all_right_share": "Share of the groups whose completions are all correct",
    "all_wrong_share": "Share of the groups whose completions are all wrong",
    "skipped_groups": "Groups that dynamic sampling let go for this version",
    "skipped_reward_mean": "Their mean reward",
    "skipped_tokens": "Their tokens",
    # the step and its time
    "tokens": "Trained tokens",
    "updates": "Optimiser updates",
    "learning_rate": "Learning rate of the step",
    "gradient_norm": "Norm of the gradient before it is clipped, mean over updates",
    "loss": "The loss, mean over updates",
    "control_weight": "Entropy control: factor of the loss of tokens with positive advantage",
    "control_guard": "Entropy control: 1 while the reward guard is awake",
    "control_coefficient": "Entropy control: coefficient of the entropy in the loss, or EntroPIC's alpha",
    "control_target_nats": "Entropy control: the entropy that is to be held",
    "control_error_nats": "Entropy control: last measured entropy less the target",
    "staleness_target": "Staleness control: what is to be held, in the unit of its metric",
    "staleness_wish_versions": "Staleness control: the greatest lag that the controller asks for",
    "rollout_servers": "Rollout servers that confirmed the version",
    "seconds": "From one version to the next",
    "train_seconds": "Of these, training itself",
    "batch_wait_seconds": "Of these, waiting for a batch",
    "publish_prepare_seconds": "Of these, copying the weights for a publication",
    "publish_wait_seconds": "Of these, waiting until the staleness rules let servers load",
    "evaluation_wait_seconds": "Of these, waiting for an evaluation to be generated",
    "publish_deliver_seconds": "Of these, delivering the weights to the rollout servers",
    "checkpoint_seconds": "Of these, writing a checkpoint",
    "publish_stall_seconds": "Time that generation stood still for the publication",
    "canary_nats": "Mean absolute difference of the canary's log-probabilities between trainer and rollout servers",
    "idle_trainer_seconds": "Time that trainers had nothing to do, summed over them",
    "idle_rollout_seconds": "Time that rollout servers had nothing to do, summed over them",
    "idle_reward_seconds": "Time that reward servers had nothing to do, summed over them",
}
"""Key -> meaning."""

BINNED: dict[str, tuple[str, ...]] = {
    "entropy_nats": ("lag", "advantage", "clip", "position", "correct"),
    "covariance_logp_advantage": ("advantage",),
    "covariance_logp_weighted_advantage": ("advantage",),
    "ratio_behaviour_mean": ("lag", "entropy"),
    "kl_behaviour_k1_nats": ("lag", "entropy"),
    "kl_behaviour_k2_nats": ("lag", "entropy"),
    "kl_behaviour_k3_nats": ("lag", "entropy"),
    "chi2_behaviour": ("lag", "entropy"),
    "m2_behaviour": ("lag", "entropy"),
    "ess_share": ("lag", "entropy"),
    "ess_completion_share": ("lag", "entropy"),
    "ess_geometric_share": ("lag", "entropy"),
    "clip_up_share": ("lag", "entropy"),
    "clip_down_share": ("lag", "entropy"),
}
"""Key -> the ways in which it is divided."""

EVALUATION_KEYS: dict[str, str] = {
    "reward_mean": "Mean reward of the answers",
    "correct_mean": "avg@k: share of a prompt's answers that are correct, mean over prompts",
    "pass_at_1": "Chance that 1 sample is correct, unbiased, mean over prompts",
    "pass_at_2": "Chance that one of 2 samples is correct, unbiased, mean over prompts",
    "pass_at_4": "Chance that one of 4 samples is correct, unbiased, mean over prompts",
    "pass_at_8": "Chance that one of 8 samples is correct, unbiased, mean over prompts",
    "pass_at_16": "Chance that one of 16 samples is correct, unbiased, mean over prompts",
    "pass_at_32": "Chance that one of 32 samples is correct, unbiased, mean over prompts",
    "pass_at_64": "Chance that one of 64 samples is correct, unbiased, mean over prompts",
    "majority_at_k": "maj@k: share of the prompts whose most frequent final answer among all samples is correct; ties count in part",
    "entropy_estimate_nats": "Mean of -logp over the sampled tokens: estimates the entropy of the policy that the sampler drew from, nats per token",
    "length_mean": "Mean length of the answers, in tokens, the end of the sequence left out",
    "truncated_share": "Share of the answers that were cut off at the longest length allowed",
    "distinct_1": "Different tokens over all tokens of a prompt's answers, mean over prompts",
    "distinct_2": "Different 2-grams over all 2-grams of a prompt's answers, mean over prompts",
    "distinct_3": "Different 3-grams over all 3-grams of a prompt's answers, mean over prompts",
    "distinct_4": "Different 4-grams over all 4-grams of a prompt's answers, mean over prompts",
    "ngram_diversity": "Mean of distinct_1 to distinct_4, mean over prompts",
    "self_bleu": "BLEU-4 of each answer against the prompt's others, 0 to 1, lower is more diverse; first 8 answers of the first 64 prompts",
    "jaccard_distance": "1 - shared over all 3-grams of two answers, mean over pairs of a prompt's first 16 answers, then over prompts",
    "unique_correct": "Different correct final answers among a prompt's samples, mean over prompts",
    "unique_correct_share": "Different correct final answers over correct answers, mean over the prompts with a correct one",
    "answer_entropy_nats": "Entropy of the final answers' shares among a prompt's samples, nats, mean over prompts",
    "effective_answers": "exp of the answer entropy: effective number of final answers, mean over prompts",
    "consistency_ece": "Expected calibration error, ten bins of equal mass; confidence: share of the prompt's samples with the same final answer",
    "consistency_brier": "Mean squared difference of that confidence and being correct",
    "consistency_auroc": "Chance that a correct answer has more of that confidence than a wrong one",
    "consistency_gap": "Mean of that confidence - share of correct answers: positive is over-confident",
    "consistency_confidence_wrong": "Mean of that confidence over wrong answers",
    "likelihood_ece": "Expected calibration error, ten bins of equal mass; confidence: exp of the mean log-probability of the answer's tokens",
    "likelihood_brier": "Mean squared difference of that likelihood and being correct",
    "likelihood_auroc": "Chance that a correct answer has more of that likelihood than a wrong one",
    "likelihood_gap": "Mean of that likelihood - share of correct answers: positive is over-confident",
    "likelihood_confidence_wrong": "Mean of that likelihood over wrong answers",
}
"""Key of EvaluationRecord.values -> meaning."""

RUN_KEYS: dict[str, str] = {
    "entropy_half_life": "First version whose entropy is at most half the mean of the first five versions",
    "entropy_auc": "Area under the entropy's curve over versions, divided by the versions that it spans: nats per token",
    "entropy_log_slope": "Slope of log(entropy) over the last fifth of the run, per version",
    "entropy_floor": "Least mean entropy of five versions in a row, nats per token",
    "fit_r2": "Share of the reward's variance that reward = b - a exp(entropy) explains, in means over 5 versions up to the best of them",
    "fit_a": "a of that fit: reward per unit of exp(entropy)",
    "fit_ceiling": "b - a of that fit: the reward to be expected at entropy 0",
    "budget_slope": "Slope of the realised change of entropy on the predicted one, over the steps",
    "budget_r2": "Share of the realised change's variance that the predicted one explains",
}
"""What a whole run comes to -> meaning."""

REDUCERS: dict[str, str] = {
    "first": "mean over the first five versions (evaluations: the first)",
    "end": "mean over the last five versions (evaluations: the last)",
    "mid": "mean over the five versions around the middle (evaluations: the one nearest to it)",
    "change": "end - first",
    "mean": "mean over the run",
    "last_third": "mean over the last third",
    "slope": "slope of a straight line through the run, per version",
    "min": "least value",
    "max": "greatest value",
}
"""How a curve becomes a number."""

AT_KL = "value where the KL of the policy before a step to the one after it, summed over versions, reaches N thousandths of a nat"
"""What the reducers `at_kl_Nm` are: at an equal distance gone. `kl_step_k3_nats` is measured every `measure.probe_every` versions and stands for
those up to the next; a run without it has the sum of `kl_behaviour_k3_nats`."""


def known_step_key(key: str) -> bool:
    """Is there such a key, with or without a bin?"""
    base, *rest = key.split("/")
    if base not in STEP_KEYS:
        return False
    return not rest or (len(rest) == 2 and rest[0] in BINNED.get(base, ()) and rest[1] in BINS[rest[0]])
