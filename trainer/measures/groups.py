"""What is measured of a group of completions, trained on or not."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.measures.sums import Measures


def group_measures(rewards_G: Sequence[float], *, lengths_G: Sequence[int], truncated_G: Sequence[bool], correct_at: float) -> Measures:
    """Of one group: its rewards, its completions' lengths in tokens, and which of them were cut off. A reward of `correct_at` or more is correct."""
    members, correct = len(rewards_G), sum(reward >= correct_at for reward in rewards_G)
    return Measures(
        sums={
            "reward_mean": (sum(rewards_G), members),
            "correct_share": (correct, members),
            "completion_tokens_mean": (sum(lengths_G), members),
            "truncated_share": (sum(truncated_G), members),
            "zero_signal_share": (min(rewards_G) == max(rewards_G), 1),
            "all_right_share": (correct == members, 1),
            "all_wrong_share": (correct == 0, 1),
        }
    )
