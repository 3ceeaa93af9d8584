"""Messages as bytes: MessagePack of the pydantic fields. Nothing that can execute is ever decoded."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)


class Undecodable(ValueError):
    """These bytes are not the message that they should be; the text says why."""


def encode(message: BaseModel) -> bytes:
    return msgspec.msgpack.encode(message.model_dump())


def decode(model: type[M], data: bytes) -> M:
    """The message in `data`. Raises Undecodable for garbage, another schema version, or missing and unknown fields."""
    try:
        return model.model_validate(msgspec.msgpack.decode(data))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Undecodable(f"not a MessagePack {model.__name__}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "message"
        raise Undecodable(f"not a valid {model.__name__}: {where}: {first['msg']}") from error
