"""A reward server as the `offbeat reward` commands talk to it: that of the local stack, one that is named, or one that is started for the time."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from services.cli.output import say
from services.cli.session import Code, Failure, Session, read_token
from services.client import LOOPBACK, ApiError, Unreachable
from services.contracts.scoring import BatchView, GoldsView, VerifierView
from services.contracts.spec import Verifier
from services.contracts.views import ProblemDocument
from services.local.reward_alone import NoRewardServer, reward_alone
from services.local.supervisor import ProcessState

V = TypeVar("V", bound=BaseModel)
ANSWER_SECONDS = 600.0
"""A batch of completions that all reach their limits takes long."""
TRIES = 5
"""Of a request that cannot be sent."""


class RewardApi:
    """Safe to use from several threads."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=f"{self.url}/v1/", headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=5.0), trust_env=httpx.URL(url).host not in LOOPBACK,
        )  # fmt: skip

    def close(self) -> None:
        self._http.close()

    def verifiers(self) -> list[VerifierView]:
        return TypeAdapter(list[VerifierView]).validate_json(self._send("GET", "verifiers").content)

    def check(self, rewards: Sequence[Verifier]) -> None:
        """Raises ApiError, with what is wrong with each verifier."""
        self._send("POST", "rubric/check", {"rewards": [verifier.model_dump(mode="json") for verifier in rewards]})

    def score(self, rewards: Sequence[Verifier], items: Sequence[dict[str, Any]]) -> BatchView:
        body = {"rewards": [verifier.model_dump(mode="json") for verifier in rewards], "items": items}
        return BatchView.model_validate_json(self._send("POST", "score/batch", body).content)

    def gold(self, verifier: Verifier, items: Sequence[dict[str, Any]]) -> GoldsView:
        body = {"verifier": verifier.model_dump(mode="json"), "items": items}
        return GoldsView.model_validate_json(self._send("POST", "gold/check", body).content)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """The answer; waits while the server has too much to do. Raises ApiError, Unreachable."""
        content = None if body is None else json.dumps(body).encode()  # ASCII: whatever is in the data, the body is text
        failed = 0
        while True:
            try:
                answer = self._http.request(method, path, content=content)
            except httpx.TransportError as error:
                failed += 1
                if failed >= TRIES:
                    raise Unreachable(f"the reward server {self.url} does not answer: {error}") from error
                time.sleep(0.2 * 2**failed)
                continue
            if answer.status_code == 429:
                time.sleep(float(answer.headers.get("Retry-After", "1")))
                continue
            if not answer.is_success:
                raise ApiError(answer.status_code, _problem(answer))
            return answer


def _problem(answer: httpx.Response) -> ProblemDocument:
    """What the server says is wrong, or whatever stands in front of it."""
    try:
        return ProblemDocument.model_validate_json(answer.content)
    except ValidationError:
        return ProblemDocument(title=answer.reason_phrase or "Error", status=answer.status_code, detail=ascii(answer.text[:200]))


@contextlib.contextmanager
def reward_api(session: Session, *, server: str | None, token_file: Path | None) -> Iterator[RewardApi]:
    """The server that was named, else a ready one of the local stack, else one that is started and ends with the block."""
    with contextlib.ExitStack() as stack:
        if server is not None:
            if token_file is None:
                raise Failure(
                    "no token for this reward server: name the file that holds the cluster token with --cluster-token-file", code=Code.USAGE
                )
            url, token = server, read_token(token_file)
        elif (found := _of_stack(session)) is not None:
            url, token = found
        else:
            say(session.err, "starting a reward server", "dim")
            try:
                url, token = stack.enter_context(reward_alone())
            except NoRewardServer as error:
                raise Failure(str(error)) from error
        api = RewardApi(url, token)
        stack.callback(api.close)
        yield api


def _of_stack(session: Session) -> tuple[str, str] | None:
    info = None if session.names_stack else session.stack()
    for process in info.processes.values() if info else ():
        if process.name.startswith("reward-") and process.state is ProcessState.READY and process.url:
            assert info is not None
            return process.url, read_token(info.cluster_token_file)
    return None
