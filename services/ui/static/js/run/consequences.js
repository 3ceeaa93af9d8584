// What will happen when a knob is turned, in a sentence.
import { number } from "../format.js";

const WORDS = {
  "staleness.max_lag": (from, to, { batch }) =>
    to > from
      ? `Up to ${(to + 1) * batch} groups may be outstanding instead of ${(from + 1) * batch}: rollout servers wait less, and trained tokens may be up to ${to} versions old.`
      : `At most ${(to + 1) * batch} groups may be outstanding instead of ${(from + 1) * batch}. Groups that were issued before keep the bound of their issue, so the lag falls over up to ${from} versions.`,
  "staleness.min_lag": (from, to) =>
    to > from
      ? `No trained token is younger than ${to} versions. A lag cannot exist before its versions do: the bound rises by one a version.`
      : `Tokens may be as young as ${to} versions, at once.`,
  "staleness.order": (_, to) => (to === "fifo" ? "Batches take the next groups in issue order, with no selection by length." : "Batches take the finished groups with the earliest deadlines."),
  "clip.high": (from, to) => `Tokens of advantage above 0 are ${to > from ? "clipped later: rare tokens may gain more, which holds entropy up" : "clipped earlier: less is learned from rare tokens"}. The ratio's upper bound becomes ${number(1 + to)}.`,
  "clip.low": (from, to) => `Tokens of advantage below 0 are ${to > from ? "clipped later" : "clipped earlier"}. The ratio's lower bound becomes ${number(1 - to)}.`,
  "clip.off": (_, to) => (to ? "Nothing is clipped." : "The bounds of the ratio hold again."),
  "entropy.target": (from, to) => `The entropy controller steers to ${number(to)} instead of ${number(from)} nats a token, over the following versions.`,
  learning_rate: (from, to) => `Steps become ${number(to / from, 2)} times as large, before the schedule.`,
  updates_per_batch: (from, to, { batch }) => `${number(to)} optimiser updates are made on each batch, of ${number(batch / to)} groups each, instead of ${number(from)}. From the second on the policy is ahead of the batch.`,
  temperature: () => "New groups are sampled at it. Those that are outstanding keep theirs, and are trained on at theirs.",
  group_size: (_, to) => `New groups have ${number(to)} completions. Those that are outstanding keep theirs.`,
  kv_policy: (_, to) => (to === "keep" ? "At a load, running requests go on with keys and values of the old policy." : "At a load, the prefix of running requests is computed again."),
};

/** `context`: {batch: groups of a batch}. */
export function consequence(knob, from, to, context) {
  return WORDS[knob]?.(from, to, context) ?? `${knob} becomes ${String(to)} instead of ${String(from)}.`;
}
