"""The Python client of the public API: typed, synchronous, and what the `offbeat` command itself uses.

client = Client("http://127.0.0.1:8700", token)          # or Client.local()
run = client.submit({"name": "demo", "versions": 50})
for event in client.events(run.run_id, follow=True):
    print(event.text)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from httpx_sse import ServerSentEvent, SSEError, connect_sse
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from services.contracts.messages import LogLevel, Role
from services.contracts.spec import Knobs, RunSpec
from services.contracts.states import RunState
from services.contracts.study import StudySpec
from services.contracts.views import (
    CheckpointsView,
    ConservationView,
    DeadLettersView,
    EvaluationsView,
    EventsView,
    EventView,
    FleetView,
    KnobAnswer,
    KnobsView,
    LogsView,
    LogView,
    ProblemDocument,
    PromptsView,
    ReplayView,
    RunPage,
    RunView,
    SamplesView,
    SampleView,
    SchemaView,
    StepsView,
    StudiesView,
    StudyValidationView,
    StudyView,
    ValidationView,
)

V = TypeVar("V", bound=BaseModel)
F = TypeVar("F", EventView, LogView)

TIMEOUT_SECONDS = 60.0
"""A submission with a large data set is checked for long."""
SILENCE_SECONDS = 30.0
"""A stream of events that is silent for longer than its heartbeats allow is dead."""
PATIENCE_SECONDS = 60.0
"""How long a follower of events tries to reach the API again."""
PAGE = 1_000
SAMPLES_PAGE = 200
LOGS_PAGE = 1_000
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ApiError(RuntimeError):
    """The API refused the request; the text says why, field by field."""

    def __init__(self, status: int, problem: ProblemDocument) -> None:
        lines = [f"{problem.title} ({status})" + (f": {problem.detail}" if problem.detail else "")]
        super().__init__("\n".join([*lines, *(f"  {error.field}: {error.problem}" for error in problem.errors)]))
        self.status, self.problem = status, problem


class Unreachable(ConnectionError):
    """The API does not answer, or cannot just now; trying again later may help."""


class LocalState(BaseModel):
    """What `offbeat up` writes into state.json of its home, as far as it matters here."""

    model_config = ConfigDict(extra="ignore")
    api_url: str
    token_file: Path


class Client:
    """One API. Safe to use from several threads; `close` it, or use it as a context."""

    def __init__(self, url: str, token: str, *, timeout: float = TIMEOUT_SECONDS) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=f"{self.url}/v1/",
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(timeout, connect=5.0),
            trust_env=httpx.URL(url).host not in LOOPBACK,  # a proxy of the environment is not the way to this machine
        )

    @classmethod
    def local(cls, home: Path | str = ".offbeat") -> Client:
        """Of the local stack that runs in `home`. Raises Unreachable when none does."""
        path = Path(home) / "state.json"
        try:
            state = LocalState.model_validate_json(path.read_bytes())
            return cls(state.api_url, state.token_file.read_text().strip())
        except (OSError, ValidationError) as error:
            raise Unreachable(f"no local stack in {home}: start one with `offbeat up` ({error})") from error

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # -- specs and runs ---------------------------------------------------------------------------------------------------------------

    def validate(self, spec: RunSpec | dict[str, Any]) -> ValidationView:
        """Would this spec be accepted? Raises ApiError with every field that is wrong."""
        return self._ask(ValidationView, "POST", "validate", json=_tree(spec))

    def schema(self) -> SchemaView:
        return self._ask(SchemaView, "GET", "schema")

    def submit(self, spec: RunSpec | dict[str, Any], idempotency_key: str | None = None) -> RunView:
        """Queue a run. With a key, sending the same again (after a lost answer, say) makes no second run."""
        return self._ask(RunView, "POST", "runs", json=_tree(spec), headers={"Idempotency-Key": idempotency_key} if idempotency_key else {})

    def runs(self, *, state: RunState | None = None, name: str | None = None, cursor: str | None = None, limit: int = 50) -> RunPage:
        """Newest first; `next` of the answer is the `cursor` of the next page. `name`: any part of a run's name, or how its id begins."""
        return self._ask(RunPage, "GET", "runs", params=_given(state=state, name=name, cursor=cursor, limit=limit))

    def run(self, run_id: str) -> RunView:
        return self._ask(RunView, "GET", f"runs/{_part(run_id)}")

    def pause(self, run_id: str) -> RunView:
        return self._ask(RunView, "POST", f"runs/{_part(run_id)}/pause")

    def resume(self, run_id: str) -> RunView:
        return self._ask(RunView, "POST", f"runs/{_part(run_id)}/resume")

    def cancel(self, run_id: str) -> RunView:
        return self._ask(RunView, "POST", f"runs/{_part(run_id)}/cancel")

    def set_knobs(self, run_id: str, values: Knobs) -> KnobAnswer:
        """Turn knobs, nested or by dotted name; the answer says from which version on they hold."""
        return self._ask(KnobAnswer, "PATCH", f"runs/{_part(run_id)}/knobs", json=values)

    def knobs(self, run_id: str) -> KnobsView:
        return self._ask(KnobsView, "GET", f"runs/{_part(run_id)}/knobs")

    # -- studies ----------------------------------------------------------------------------------------------------------------------

    def validate_study(self, spec: StudySpec | dict[str, Any]) -> StudyValidationView:
        """Would this study be accepted, and what can it not tell? Raises ApiError with every field that is wrong."""
        return self._ask(StudyValidationView, "POST", "studies/validate", json=_tree(spec))

    def submit_study(self, spec: StudySpec | dict[str, Any], idempotency_key: str | None = None) -> StudyView:
        """Queue all runs of a study. With a key, sending the same again (after a lost answer, say) makes no second study."""
        return self._ask(StudyView, "POST", "studies", json=_tree(spec), headers={"Idempotency-Key": idempotency_key} if idempotency_key else {})

    def studies(self) -> StudiesView:
        """Newest first."""
        return self._ask(StudiesView, "GET", "studies")

    def study(self, study_id: str) -> StudyView:
        return self._ask(StudyView, "GET", f"studies/{_part(study_id)}")

    def pause_study(self, study_id: str) -> StudyView:
        """Pause every run that goes on or waits."""
        return self._ask(StudyView, "POST", f"studies/{_part(study_id)}/pause")

    def resume_study(self, study_id: str) -> StudyView:
        """Go on with every run that is paused or has failed; make those that are missing."""
        return self._ask(StudyView, "POST", f"studies/{_part(study_id)}/resume")

    def cancel_study(self, study_id: str) -> StudyView:
        """End every run for good."""
        return self._ask(StudyView, "POST", f"studies/{_part(study_id)}/cancel")

    # -- what a run recorded ----------------------------------------------------------------------------------------------------------

    def steps(self, run_id: str, *, first: int = 0, last: int | None = None, points: int | None = None) -> StepsView:
        """What the versions in [first, last] measured; with `points`, as means over so many equal stretches at most."""
        return self._ask(StepsView, "GET", f"runs/{_part(run_id)}/steps", params=_given(**{"from": first, "to": last, "points": points}))

    def evaluations(self, run_id: str, *, first: int = 0, last: int | None = None, name: str | None = None) -> EvaluationsView:
        """What the policy did on the evaluation sets, or on the one of this name, at the versions in [first, last]."""
        params = _given(**{"from": first, "to": last, "set": name})
        return self._ask(EvaluationsView, "GET", f"runs/{_part(run_id)}/evaluations", params=params)

    def samples(self, run_id: str, *, first: int = 0, last: int | None = None, limit: int = 20) -> SamplesView:
        """The newest `limit` groups trained on in the versions [first, last], each once."""
        found: list[SampleView] = []
        cursor: str | None = None
        for page in self._sample_pages(run_id, first=first, last=last, limit=limit):
            found, cursor = found + page.samples, page.next
        return SamplesView(run_id=run_id, samples=found, next=cursor)

    def each_sample(self, run_id: str) -> Iterator[SampleView]:
        """All groups trained on that are kept, newest first, each once. Asks page by page: all of them may be larger than memory."""
        for page in self._sample_pages(run_id, first=0, last=None, limit=None):
            yield from page.samples

    def _sample_pages(self, run_id: str, *, first: int, last: int | None, limit: int | None) -> Iterator[SamplesView]:
        """Pages without what an earlier one had."""
        seen: set[int] = set()
        cursor: str | None = None
        while True:
            wanted = SAMPLES_PAGE if limit is None else min(SAMPLES_PAGE, limit - len(seen))
            params = _given(**{"from": first, "to": last, "cursor": cursor, "limit": wanted})
            page = self._ask(SamplesView, "GET", f"runs/{_part(run_id)}/samples", params=params)
            yield page.model_copy(update={"samples": [sample for sample in page.samples if sample.index not in seen]})
            seen |= {sample.index for sample in page.samples}
            cursor = page.next
            if cursor is None or (limit is not None and len(seen) >= limit):
                return

    def events(self, run_id: str, after: str | None = None, *, follow: bool = False) -> Iterator[EventView]:
        """Events after the id `after`, oldest first. With `follow` it goes on until the run has ended, through restarts of the API."""
        return self._follow(f"runs/{_part(run_id)}/events", {}, after, _event) if follow else self._list_events(run_id, after)

    def checkpoints(self, run_id: str) -> CheckpointsView:
        return self._ask(CheckpointsView, "GET", f"runs/{_part(run_id)}/checkpoints")

    def conservation(self, run_id: str) -> ConservationView:
        return self._ask(ConservationView, "GET", f"runs/{_part(run_id)}/conservation")

    def prompts(self, run_id: str) -> PromptsView:
        """Which prompts the run trains on."""
        return self._ask(PromptsView, "GET", f"runs/{_part(run_id)}/prompts")

    def replay_run(self, run_id: str, overrides: dict[str, Any]) -> RunView:
        """A new run on the recorded groups of this one, with these fields changed."""
        return self._ask(RunView, "POST", f"runs/{_part(run_id)}/replay", json=overrides)

    # -- dead letters and fleet -------------------------------------------------------------------------------------------------------

    def dead_letters(self, run_id: str | None = None, *, limit: int = 100) -> DeadLettersView:
        return self._ask(DeadLettersView, "GET", "dead-letters", params=_given(run=run_id, limit=limit))

    def replay(self, run_id: str, letter: str) -> ReplayView:
        return self._ask(ReplayView, "POST", f"dead-letters/{_part(run_id)}/{_part(letter)}/replay")

    def fleet(self) -> FleetView:
        return self._ask(FleetView, "GET", "fleet")

    def logs(
        self,
        *,
        run: str | None = None,
        role: Role | None = None,
        member: str | None = None,
        level: LogLevel | None = None,
        text: str | None = None,
        after: str | None = None,
        limit: int = 200,
        follow: bool = False,
    ) -> Iterator[LogView]:
        """The newest `limit` lines that the processes logged, after the id `after`, oldest first. With `follow` it goes on without an end, through
        restarts of the API; with `after` too it begins there, whatever the limit."""
        wanted = _given(run=run, role=role, member=member, level=level, text=text)
        if follow:
            return self._follow("logs", {**wanted, "limit": min(limit, LOGS_PAGE)}, after, _lines)
        return iter(self._list_logs(wanted, after, limit))

    # -- how ------------------------------------------------------------------------------------------------------------------------

    def _ask(self, view: type[V], method: str, path: str, **request: Any) -> V:
        try:
            answer = self._http.request(method, path, **request)
        except httpx.HTTPError as error:
            raise Unreachable(f"{self.url} does not answer: {error}") from error
        self._raise_for(answer)
        return view.model_validate_json(answer.content)

    def _raise_for(self, answer: httpx.Response) -> None:
        if answer.is_success:
            return
        try:
            problem = ProblemDocument.model_validate_json(answer.content)
        except ValidationError:
            problem = ProblemDocument(title=answer.reason_phrase or "Error", status=answer.status_code, detail=answer.text[:200])
        error = ApiError(answer.status_code, problem)
        if answer.status_code in (502, 503, 504):
            raise Unreachable(f"{self.url}: {error}") from error
        raise error

    def _list_events(self, run_id: str, after: str | None) -> Iterator[EventView]:
        while True:
            page = self._ask(
                EventsView, "GET", f"runs/{_part(run_id)}/events", params=_given(after=after, limit=PAGE), headers={"Accept": "application/json"}
            )
            yield from page.events
            if len(page.events) < PAGE:
                return
            after = page.events[-1].id

    def _list_logs(self, wanted: dict[str, Any], after: str | None, limit: int) -> list[LogView]:
        found: list[LogView] = []
        cursor: str | None = None
        while len(found) < limit:
            params = _given(**wanted, after=after, cursor=cursor, limit=min(LOGS_PAGE, limit - len(found)))
            page = self._ask(LogsView, "GET", "logs", params=params, headers={"Accept": "application/json"})
            found += page.lines
            cursor = page.next
            if cursor is None:
                break
        return found[::-1]

    def _follow(self, path: str, params: dict[str, Any], after: str | None, read: Callable[[str], list[F]]) -> Iterator[F]:
        heard = time.monotonic()
        while True:
            began = time.monotonic()
            try:
                for message in self._stream(path, params, after):
                    if not message.data:  # httpx-sse makes one of each comment, once it knows an id
                        continue
                    if message.event == "end":
                        return
                    after, heard = message.id, time.monotonic()
                    yield from read(message.data)
                reason: Exception | None = None  # the server ended: it may be on its way back
            except (httpx.HTTPError, SSEError, Unreachable) as error:
                reason = error
            if time.monotonic() - began > SILENCE_SECONDS:  # the heartbeats of a silent stream kept it open till now
                heard = time.monotonic()
            if time.monotonic() - heard > PATIENCE_SECONDS:
                raise Unreachable(f"{self.url} does not answer: {reason or 'its stream of events ends at once'}") from reason
            time.sleep(0.5)

    def _stream(self, path: str, params: dict[str, Any], after: str | None) -> Iterator[ServerSentEvent]:
        headers = {"Last-Event-ID": after} if after else {}
        timeout = httpx.Timeout(SILENCE_SECONDS, connect=5.0)
        with connect_sse(self._http, "GET", path, params=params, headers=headers, timeout=timeout) as source:
            if not source.response.is_success:
                source.response.read()
                self._raise_for(source.response)
            yield from source.iter_sse()


def _event(data: str) -> list[EventView]:
    return [EventView.model_validate_json(data)]


def _lines(data: str) -> list[LogView]:
    return _LINES.validate_json(data)


_LINES = TypeAdapter(list[LogView])


def _tree(spec: RunSpec | StudySpec | dict[str, Any]) -> dict[str, Any]:
    return spec if isinstance(spec, dict) else spec.model_dump(mode="json")


def _given(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


def _part(text: str) -> str:
    """A part of a path: an id with a slash in it must not name another route."""
    return quote(text, safe="")
