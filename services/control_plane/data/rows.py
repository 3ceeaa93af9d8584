"""What a source is, and how a row of one becomes a prompt: shared by every source that reads rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from services.contracts.spec import Data
from services.runtime.tokenizer import ChatMessage, DataError, Prompt, PromptItem

ROLES = ("system", "user", "assistant", "tool")


class Source(Protocol):
    """A finite, random-access collection of prompts. Equal arguments of `open_source` give equal items in equal places."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> PromptItem: ...

    def item_id(self, index: int) -> str:
        """`self[index].id`, without making the prompt."""
        ...


def item_from_row(row: Mapping[str, Any], data: Data, *, item_id: str) -> PromptItem:
    """The row's prompt and answer. `item_id` names the row in errors too."""
    prompt = _field(row, data.prompt_field, "prompt_field", item_id)
    answer = _field(row, data.answer_field, "answer_field", item_id)
    return PromptItem(id=item_id, prompt=_prompt(prompt, data.prompt_field, item_id), answer=_answer(answer, data.answer_field, item_id))


def _field(row: Mapping[str, Any], name: str, setting: str, item_id: str) -> Any:
    if name not in row:
        raise DataError(f"{item_id} has no field {name!r}: add it, or set data.{setting} to one of those there ({', '.join(sorted(row)) or 'none'})")
    if row[name] is None:
        raise DataError(f"{item_id}: {name!r} is null: give it a value, or remove the row")
    return row[name]


def _prompt(value: Any, name: str, item_id: str) -> Prompt:
    if isinstance(value, str):
        if not value:
            raise DataError(f"{item_id}: {name!r} is an empty text: give it a prompt, or remove the row")
        return value
    if not isinstance(value, list):
        raise DataError(f"{item_id}: {name!r} is {_kind(value)}: it must be a text or a list of chat messages")
    if not value:
        raise DataError(f"{item_id}: {name!r} is an empty list: give it at least one chat message, or remove the row")
    return [_message(message, f"{item_id}: message {place} of {name!r}") for place, message in enumerate(value, start=1)]


def _message(value: Any, where: str) -> ChatMessage:
    if not isinstance(value, Mapping):
        raise DataError(f'{where} is {_kind(value)}: it must be an object such as {{"role": "user", "content": "..."}}')
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}: use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where} has {_kind(content)} as its content: it must be a text")
    return ChatMessage(role=role, content=content)


def _answer(value: Any, name: str, item_id: str) -> Any:
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, list):
        return [_answer(entry, name, item_id) for entry in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _answer(entry, name, item_id) for key, entry in value.items()}
    raise DataError(f"{item_id}: {name!r} holds {_kind(value)}: use texts, numbers, truth values, lists and objects only")


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
