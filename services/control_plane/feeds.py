"""What a run's prompts come from: its data source with its tokenizer. A group is a pure function of the spec in force, its index and the version."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from services.contracts.messages import PromptGroup, pack_ints
from services.contracts.spec import RunSpec
from services.control_plane.data import PromptItem, Source, issue, open_source
from services.runtime.tokenizer import ModelError, PromptTokenizer

LOOK_AHEAD = 64
"""Prompts that are tokenized before a run is accepted: enough to catch a data set that does not fit the model, and soon done."""
KEPT_IDS = 20_000
"""Prompts of the largest source of which all ids are kept with the run: some hundred kilobytes."""


@dataclass(frozen=True)
class Feed:
    """The prompts of one run."""

    spec: RunSpec
    """As submitted: what the data and the order of prompts depend on is no knob."""
    source: Source
    tokenizer: PromptTokenizer

    def prompt(self, n: int) -> tuple[PromptItem, list[int]]:
        """The n-th prompt in issue order and its tokens. Raises DataError."""
        item = issue(self.source, n, seed=self.spec.seed)
        limit = self.spec.model.max_model_len - self.spec.sampling.max_tokens
        return item, self.tokenizer.encode(item, chat=self.spec.data.chat, system=self.spec.data.system, limit=limit)

    def prompt_ids(self) -> list[str] | None:
        """Those of the source, in its order; None where they are too many to keep."""
        count = len(self.source)
        return [self.source.item_id(place) for place in range(count)] if count <= KEPT_IDS else None

    def group(self, run_id: str, n: int, *, spec: RunSpec, version: int) -> PromptGroup:
        """Group n of the run, issued at `version` under `spec`, the one in force then. Raises DataError."""
        item, tokens = self.prompt(n)
        return PromptGroup(
            run_id=run_id, index=n, prompt_id=item.id, prompt=item.text, prompt_tokens=pack_ints(tokens), answer=item.answer,
            group_size=spec.group_size, seed=group_seed(spec.seed, n), temperature=spec.temperature, top_p=spec.sampling.top_p,
            max_tokens=spec.sampling.max_tokens, max_lag=spec.staleness.max_lag, issued_version=version,
        )  # fmt: skip


def open_feed(spec: RunSpec) -> Feed:
    """Raises ModelError or DataError, which say what to change."""
    return Feed(spec, open_source(spec.data, seed=spec.seed), open_tokenizer(spec))


def open_tokenizer(spec: RunSpec) -> PromptTokenizer:
    """The tokenizer of the run's model, whose folder must hold a configuration too. Raises ModelError."""
    tokenizer = PromptTokenizer(spec.model.path)
    if not (tokenizer.folder / "config.json").is_file():
        raise ModelError(f"{tokenizer.folder} has no config.json: give the folder of a Hugging Face causal language model")
    return tokenizer


def group_seed(seed: int, n: int) -> int:
    """31 bits that depend on the run's seed and the group's index alone, so that runs with equal seeds sample with equal seeds."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{n}".encode(), digest_size=4).digest(), "big") >> 1
