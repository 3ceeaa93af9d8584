"""Text to tokens and back, on the `tokenizers` library alone: the dispatcher and the rollout servers agree with transformers without importing it.

`PromptTokenizer.encode` gives what `AutoTokenizer(...)(text)` and `apply_chat_template(..., add_generation_prompt=True)` give; tests hold it to that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import jinja2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import JsonValue
from tokenizers import Tokenizer

LONGEST_CHARACTER = 4
"""Tokens that a character can have: one for each of its bytes."""


class DataError(ValueError):
    """A data set or one of its prompts cannot be used; the message says which, and what to do."""


class ModelError(ValueError):
    """A model's folder is not there or lacks a file; the message says what to do."""


class ChatMessage(TypedDict):
    role: str
    content: str


Prompt = str | list[ChatMessage]


@dataclass(frozen=True, slots=True)
class PromptItem:
    """One prompt of a data source."""

    id: str
    """Names the prompt in its source, for people: `train.jsonl:12`."""
    prompt: Prompt
    answer: JsonValue
    """What the verifiers compare with."""

    @property
    def text(self) -> str:
        """The prompt as one text, for people and verifiers."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.prompt)


class PromptTokenizer:
    """The tokenizer of the model at `model_path`: a folder, or a name that the local Hugging Face cache holds."""

    def __init__(self, model_path: str | Path) -> None:
        self.folder = model_folder(model_path)
        if not (self.folder / "tokenizer.json").is_file():
            raise ModelError(f"{self.folder} has no tokenizer.json: save the model's fast tokenizer there with save_pretrained")
        try:
            self._tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise ModelError(f"{self.folder / 'tokenizer.json'} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _read_json(self.folder / "tokenizer_config.json")
        self._specials = _special_tokens(config)
        self._template = _chat_template(self.folder, config)
        self.eos_ids = self._eos_ids()
        """Tokens of which each ends a completion, as `generate` of transformers has them."""

    @property
    def vocabulary_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The text that each token adds to those before it. A character of several tokens comes with its last one; the others add nothing.

        Tokens are decoded with those since the piece before, on which their spaces depend.
        """
        pieces: list[str] = []
        began, read = 0, 0
        for end in range(1, len(token_ids) + 1):
            before = self._tokenizer.decode(list(token_ids[began:read]), skip_special_tokens=False)
            with_it = self._tokenizer.decode(list(token_ids[began:end]), skip_special_tokens=False)
            whole = not with_it.endswith("\ufffd") or end - read >= LONGEST_CHARACTER
            pieces.append(with_it[len(before) :] if whole else "")
            if whole:
                began, read = read, end
        return pieces

    def encode(self, item: PromptItem, *, chat: bool, system: str | None = None, limit: int | None = None) -> list[int]:
        """The item's prompt as token ids.

        A list of messages, and with `chat` a text too (as the user's), goes through the chat template, with the header of the assistant's turn at the
        end; `system` is put first unless the prompt brings a system message of its own. Other texts get what the tokenizer adds, such as a BOS.
        Raises DataError for a prompt of more than `limit` tokens (the context's length minus what the completion may take), or of none.
        """
        if isinstance(item.prompt, str) and not chat:
            if system is not None:
                raise DataError(f"prompt {item.id} is a text, which takes no system message: set data.chat = true, or leave data.system out")
            ids = self._tokenizer.encode(item.prompt).ids
        else:
            messages = [ChatMessage(role="user", content=item.prompt)] if isinstance(item.prompt, str) else item.prompt
            if system is not None and messages[0]["role"] != "system":
                messages = [ChatMessage(role="system", content=system), *messages]
            ids = self._tokenizer.encode(self._render(messages, prompt_id=item.id), add_special_tokens=False).ids
        if not ids:
            raise DataError(f"prompt {item.id} has no tokens: remove it, or use a model whose tokenizer begins every text with a BOS token")
        if limit is not None and len(ids) > limit:
            raise DataError(
                f"prompt {item.id} has {len(ids)} tokens and the limit is {limit} (model.max_model_len minus sampling.max_tokens): "
                "remove it, or raise model.max_model_len, or lower sampling.max_tokens"
            )
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def _eos_ids(self) -> tuple[int, ...]:
        for name in ("generation_config.json", "config.json"):
            value = _read_json(self.folder / name).get("eos_token_id")
            if value is not None:
                return tuple(value) if isinstance(value, list) else (value,)
        eos = self._tokenizer.token_to_id(self._specials.get("eos_token", ""))
        if eos is None:
            raise ModelError(f"{self.folder} names no end-of-sequence token: set eos_token_id in its generation_config.json")
        return (eos,)

    def _render(self, messages: list[ChatMessage], *, prompt_id: str) -> str:
        if self._template is None:
            raise DataError(
                f"prompt {prompt_id} needs a chat template and the model in {self.folder} has none: set data.chat = false, or use an instruct model"
            )
        try:
            return self._template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._specials)
        except jinja2.TemplateError as error:
            raise DataError(f"prompt {prompt_id} does not fit the model's chat template: {error}") from error


def model_folder(path: str | Path) -> Path:
    """The folder of a model given by its folder or by the name under which the local Hugging Face cache holds it. Nothing is downloaded."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(path), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise ModelError(
            f"model {str(path)!r} is neither a folder nor in the local Hugging Face cache: give a folder, or run `hf download {path}` first"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    return loaded


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on: as texts, whichever of its two forms the file has them in."""
    tokens = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token") and not isinstance(value, bool)
    }
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def _chat_template(folder: Path, config: dict[str, Any]) -> jinja2.Template | None:
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is None:
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelError(f"the chat template of {folder} cannot be read: {error}") from error


class _Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for supervised training; in a prompt it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    """jinja2's own filter escapes HTML, which no chat template means."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
