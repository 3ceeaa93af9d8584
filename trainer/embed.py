"""`python -m trainer.embed`: embeddings of prompts, for subsets of a data set by clusters.

By the policy: the mean of its last hidden states (after the final norm) over the tokens of the prompt, as in arXiv 2511.05993. By a model of the
sentence-transformers library: what that model makes of the prompt's text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

from services.contracts.spec import RunSpec
from services.runtime.tokenizer import DataError, ModelError, PromptItem, PromptTokenizer
from trainer.batching import MAX_TOKENS, Trajectory, pack
from trainer.policy import Policy

CHUNK = 512
"""Prompts between two lines of progress."""
SENTENCE_TRANSFORMERS = "sentence-transformers:"


def pooled(policy: Policy, prompts: Sequence[Sequence[int]], *, max_tokens: int = MAX_TOKENS) -> NDArray[np.float32]:
    """Mean last hidden state over the tokens of each prompt, (P, D)."""
    # a pack gives the hidden states that predict its completion: begun after the first token and ended by any one, that is all of the prompt's
    trajectories = [Trajectory(tokens[:1], [*tokens[1:], 0], [0.0] * len(tokens), [0] * len(tokens), advantage=0.0) for tokens in prompts]
    count_P = torch.tensor([len(tokens) for tokens in prompts], dtype=torch.float32)
    sums: torch.Tensor | None = None
    for one in pack(trajectories, max_tokens=max_tokens):
        with torch.no_grad():
            hidden_TD = policy.hidden(one.to(policy.device)).float().cpu()
        if sums is None:
            sums = torch.zeros(len(prompts), hidden_TD.shape[1])
        sums.index_add_(0, one.row_T, hidden_TD)
    assert sums is not None
    return (sums / count_P[:, None]).numpy()


def by_policy(spec: RunSpec, items: Sequence[PromptItem]) -> Iterator[NDArray[np.float32]]:
    """Embeddings of the prompts as the run would put them to the policy, CHUNK of them together."""
    tokenizer = PromptTokenizer(spec.model.path)
    limit = spec.model.max_model_len - spec.sampling.max_tokens
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = Policy.load(spec.model.path, dtype=spec.model.dtype, device=device)
    for start in range(0, len(items), CHUNK):
        chunk = items[start : start + CHUNK]
        yield pooled(policy, [tokenizer.encode(item, chat=spec.data.chat, system=spec.data.system, limit=limit) for item in chunk])


def by_sentence_transformer(name: str, items: Sequence[PromptItem]) -> Iterator[NDArray[np.float32]]:
    """Embeddings of the prompts' texts by an installed model, CHUNK of them together."""
    try:
        import sentence_transformers
    except ImportError:
        raise ModelError("the embedding needs the package sentence-transformers: install it, or use --embedding policy") from None
    try:
        model = sentence_transformers.SentenceTransformer(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"the sentence-transformers model {name!r} is not on this machine: give a folder or a model that is ({error})") from None
    for start in range(0, len(items), CHUNK):
        yield np.asarray(model.encode([item.text for item in items[start : start + CHUNK]]), dtype=np.float32)


def embeddings(embedding: str, spec: RunSpec, items: Sequence[PromptItem]) -> Iterator[NDArray[np.float32]]:
    """Raises DataError, ModelError or ValueError, which say what to change."""
    if embedding == "policy":
        return by_policy(spec, items)
    return by_sentence_transformer(embedding.removeprefix(SENTENCE_TRANSFORMERS), items)


def read(path: Path) -> list[PromptItem]:
    """What `python -m services.control_plane.data` wrote."""
    with path.open("rb") as lines:
        rows = [msgspec.json.decode(line) for line in lines]
    return [PromptItem(id=row["id"], prompt=row["prompt"], answer=None) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.embed", description="Write the embeddings of prompts, a row each.")
    parser.add_argument("--spec", type=Path, required=True, help="run spec as JSON: the policy, and how prompts are put to it")
    parser.add_argument("--prompts", type=Path, required=True, help="file with a JSON object with id and prompt a line")
    parser.add_argument("--embedding", default="policy", help="policy, or sentence-transformers:NAME")
    parser.add_argument("--out", type=Path, required=True, help="file to write: a float32 array in numpy's format")
    arguments = parser.parse_args()
    disable_progress_bar()  # of loading the weights: standard error is for the prompts
    spec, items = RunSpec.model_validate_json(arguments.spec.read_bytes()), read(arguments.prompts)
    parts: list[NDArray[np.float32]] = []
    try:
        for part in embeddings(arguments.embedding, spec, items):
            parts.append(part)
            print(f"{sum(map(len, parts))} of {len(items)} prompts embedded", file=sys.stderr, flush=True)
    except (DataError, ModelError, ValueError) as error:
        print(str(error).replace("\n", " "), file=sys.stderr)
        return 1
    np.save(arguments.out, np.concatenate(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
