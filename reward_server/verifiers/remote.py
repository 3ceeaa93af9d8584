"""`remote`: a service of the user's judges the completion.

It gets `POST` with `{"prompt": ..., "completion": ..., "answer": ..., "options": ...}` and replies `{"score": 0.5, "detail": "why"}`; a score of null
says that the answer cannot be verified. Requests are signed with the server's key: docs/verifiers.md says how to check that.
"""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from reward_server.verifiers.verdict import Options, Tools, Unjudged, Verdict
from services.contracts.messages import Outcome


class RemoteOptions(Options):
    url: str = Field(min_length=1, max_length=2000)
    """Address of the service."""
    seconds: float = Field(10.0, gt=0, le=120)
    """Time for one attempt."""
    attempts: int = Field(3, ge=1, le=10)
    """Tries at a request before it is given up; answers of 4xx but 429 are final."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Passed on as they are."""

    @field_validator("url")
    @classmethod
    def _web(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return url


class Reply(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)
    score: float | None = Field(allow_inf_nan=False, strict=True)
    detail: str = ""


def score(text: str, *, prompt: str, answer: JsonValue, options: RemoteOptions, tools: Tools) -> Verdict:
    """The service's figure."""
    body = json.dumps({"prompt": prompt, "completion": text, "answer": answer, "options": options.options}).encode()  # ASCII, whatever is in it
    raw = tools.post(options.url, body, seconds=options.seconds, attempts=options.attempts)
    try:
        reply = Reply.model_validate_json(raw)
    except ValidationError as wrong:
        raise Unjudged(Outcome.ERROR, f"the service's reply is no score: {wrong.errors()[0]['msg']}", cause="remote") from wrong
    return Verdict(reply.score, Outcome.OK if reply.score is not None else Outcome.UNVERIFIABLE, reply.detail[:1000])
