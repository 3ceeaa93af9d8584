// Which curves of a run are shown together. Keys are those of docs/metrics.md; a line with `of` is computed from the columns of several.
import { number, percent } from "../format.js";

const LAGS = ["0", "1", "2-3", "4-7", "8-15", "16-31", "32+"];
const LAG_COLOURS = [3, 1, 7, 4, 2, 5, 6];

const byLag = (key) => LAGS.map((lag, i) => ({ label: `lag ${lag}`, key: `${key}/lag/${lag}`, colour: LAG_COLOURS[i], thin: true }));
const share = (key, over, label, line) => ({ label, keys: [key, ...over], of: (top, ...below) => top.map((value, i) => below.reduce((left, column) => left / column[i], value)), colour: line });

/** [{id, title, unit, format, lines: [{label, key | keys and of, colour, dash, stepped, bandTo}]}] */
export const PANELS = [
  {
    id: "entropy", title: "Policy entropy", unit: "nats a token",
    lines: [
      { label: "all tokens", key: "entropy_nats", colour: 1 },
      { label: "advantage above 0", key: "entropy_positive_nats", colour: 3, thin: true },
      { label: "advantage below 0", key: "entropy_negative_nats", colour: 2, thin: true },
      { label: "target", key: "control_target_nats", colour: 6, dash: true },
    ],
  },
  { id: "reward", title: "Reward", unit: "training and held-out", heldOut: "reward_mean", lines: [{ label: "training", key: "reward_mean", colour: 1 }] },
  {
    id: "lag", title: "Lag of trained tokens", unit: "versions, window shaded",
    lines: [
      { label: "greatest requested", key: "window_high", colour: 6, dash: true, stepped: true, bandTo: 1 },
      { label: "least requested", key: "window_low", colour: 6, dash: true, stepped: true },
      { label: "mean achieved", key: "lag_mean", colour: 1 },
      { label: "greatest achieved", key: "lag_max", colour: 2, thin: true },
    ],
  },
  { id: "kl", title: "KL of sampler to policy by lag", unit: "nats a token, k3", lines: [{ label: "all", key: "kl_behaviour_k3_nats", colour: 8 }, ...byLag("kl_behaviour_k3_nats")] },
  { id: "ess", title: "Effective sample size by lag", unit: "share of tokens", format: percent, lines: [{ label: "all", key: "ess_share", colour: 8 }, ...byLag("ess_share")] },
  {
    id: "clip", title: "Clipped tokens", unit: "share", format: percent,
    lines: [
      { label: "above the upper bound", key: "clip_up_share", colour: 3 },
      { label: "below the lower bound", key: "clip_down_share", colour: 2 },
      { label: "of the gradient's mass", key: "clip_mass_share", colour: 6, dash: true },
    ],
  },
  {
    id: "idle", title: "Idle time", unit: "share of each version's time", format: percent,
    lines: [
      share("idle_trainer_seconds", ["seconds"], "trainer", 1),
      share("idle_rollout_seconds", ["seconds", "rollout_servers"], "rollout servers", 2),
      share("idle_reward_seconds", ["seconds", "reward_servers"], "reward servers", 3),
    ],
  },
  {
    id: "time", title: "Time of a version", unit: "seconds",
    lines: [
      { label: "whole", key: "seconds", colour: 8 }, { label: "training", key: "train_seconds", colour: 1 },
      { label: "waiting for a batch", key: "batch_wait_seconds", colour: 2 }, { label: "publishing", key: "publish_deliver_seconds", colour: 3 },
      { label: "evaluating", key: "evaluation_wait_seconds", colour: 4 },
    ],
  },
  {
    id: "length", title: "Completions", unit: "share", format: percent,
    lines: [
      { label: "correct", key: "correct_share", colour: 3 }, { label: "cut off", key: "truncated_share", colour: 2 },
      { label: "groups without signal", key: "zero_signal_share", colour: 6 },
    ],
  },
  {
    id: "budget", title: "Change of entropy by a step", unit: "nats a token",
    lines: [
      { label: "by tokens of advantage above 0", key: "entropy_change_predicted_positive", colour: 3 },
      { label: "below 0", key: "entropy_change_predicted_negative", colour: 2 },
      { label: "realised", key: "entropy_change_realised", colour: 8, points: true },
    ],
  },
  {
    id: "gradient", title: "Gradient", unit: "norm before it is clipped",
    lines: [{ label: "norm", key: "gradient_norm", colour: 1 }],
  },
  {
    id: "mismatch", title: "Trainer against sampler", unit: "nats",
    lines: [{ label: "canary", key: "canary_nats", colour: 1 }, { label: "tokens of lag 0", key: "mismatch_lag0_nats", colour: 2 }],
    format: (value) => number(value, 5),
  },
];

/** What is computed here of a step, beside what it measured. */
export const OWN_KEYS = ["window_low", "window_high", "reward_servers"];

export const keysOf = (line) => line.keys ?? [line.key];
export const KEYS = [...new Set(PANELS.flatMap((panel) => panel.lines.flatMap(keysOf)))];
export const ASKED_KEYS = KEYS.filter((key) => !OWN_KEYS.includes(key));
