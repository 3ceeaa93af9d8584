"""`length`: the completion is as long as it is to be. Inside the window 1, outside of it less with each unit, down to 0."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, JsonValue, model_validator

from reward_server.verifiers.extract import after_thinking
from reward_server.verifiers.verdict import Options, Tools, Unjudged, Verdict
from services.contracts.messages import Outcome

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class LengthOptions(Options):
    unit: Literal["characters", "words", "tokens"] = "characters"
    """What is counted. Tokens need `tokenizer`."""
    least: int = Field(0, ge=0)
    """Shortest length that scores 1."""
    most: int | None = Field(None, ge=0)
    """Longest length that scores 1; default: there is none."""
    fade: int = Field(0, ge=0)
    """Units beyond the window over which the score falls from 1 to 0; 0: at once."""
    part: Literal["all", "answer", "thinking"] = "all"
    """All of the completion, what comes after the thinking part, or the thinking part."""
    tokenizer: Path | None = None
    """A tokenizer.json, or the folder of a model that has one, on the reward server."""

    @model_validator(mode="after")
    def _window(self) -> LengthOptions:
        if self.most is not None and self.least > self.most:
            raise ValueError(f"least ({self.least}) is above most ({self.most})")
        if (self.unit == "tokens") != (self.tokenizer is not None):
            raise ValueError("give a tokenizer with unit = 'tokens', and only then")
        return self


def score(text: str, *, prompt: str, answer: JsonValue, options: LengthOptions, tools: Tools) -> Verdict:
    """From 1 inside the window to 0 at `fade` beyond it."""
    if options.part != "all":
        visible = after_thinking(text, prompt)
        text = visible if options.part == "answer" else text.removesuffix(visible)
    length = _length(text, options)
    beyond = max(options.least - length, 0 if options.most is None else length - options.most, 0)
    value = 1.0 if not beyond else max(0.0, 1 - beyond / options.fade) if options.fade else 0.0
    return Verdict(value, detail=f"{length} {options.unit}")


def _length(text: str, options: LengthOptions) -> int:
    if options.unit == "characters":
        return len(text)
    if options.unit == "words":
        return len(text.split())
    assert options.tokenizer is not None, "the options say so"
    clean = text.encode(errors="replace").decode()  # the library takes no half of a surrogate pair
    return len(_tokenizer(options.tokenizer).encode(clean, add_special_tokens=False).ids)


@lru_cache(8)
def _tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise Unjudged(Outcome.ERROR, f"there is no tokenizer {file} on this reward server", cause="verifier")
    return Tokenizer.from_file(str(file))
