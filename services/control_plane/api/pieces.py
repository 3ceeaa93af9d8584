"""The text of single tokens, for people who look at samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from services.runtime.tokenizer import ModelError, PromptTokenizer

log = logging.getLogger(__name__)

LONGEST = 16_384
"""Tokens of the longest completion that is taken to pieces: some hundred milliseconds."""

PieceSplitter = Callable[[Sequence[int]], list[str] | None]


def piece_splitter(model_path: str) -> PieceSplitter | None:
    """None where the model's tokenizer cannot be opened, as after its folder was moved: its samples can still be looked at."""
    try:
        return partial(_pieces, _tokenizer(model_path))
    except (ModelError, OSError) as error:
        log.warning("samples are shown without the text of single tokens", extra={"model": model_path, "error": str(error)})
        return None


def _pieces(tokenizer: PromptTokenizer, token_ids: Sequence[int]) -> list[str] | None:
    return tokenizer.pieces(token_ids) if len(token_ids) <= LONGEST else None


@lru_cache(maxsize=8)
def _tokenizer(model_path: str) -> PromptTokenizer:
    return PromptTokenizer(model_path)
