import io
import json
import signal
import threading
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from services.cli import attended, demo, doctor, following, replay
from services.cli.__main__ import app
from services.cli.replay import CAUTION
from services.cli.session import Code, Parts
from services.client import ApiError, Unreachable
from services.contracts.messages import FinishReason, LogLevel, Role, Severity
from services.contracts.spec import RunSpec, knobs_of
from services.contracts.states import RunState
from services.contracts.views import (
    CheckpointsView,
    CompletionView,
    ConservationView,
    DeadLettersView,
    DeadLetterView,
    EvaluationsView,
    EvaluationView,
    EventView,
    FleetView,
    KnobAnswer,
    KnobsView,
    LogView,
    MemberView,
    ProblemDocument,
    ReplayView,
    RunPage,
    RunView,
    SamplesView,
    SampleView,
    StepsView,
    StepView,
    ValidationView,
)
from services.local.stack import StackInfo, StackSettings

HOSTILE = "\x1b[2J\x1b]0;owned\x07<script>\u202e"


@dataclass
class FakeApi:
    """One run that makes a version every time it is looked at; what was asked of it is in `asked`."""

    spec: RunSpec = field(default_factory=lambda: RunSpec(name="demo", versions=12))
    state: RunState = RunState.PAUSED
    version: int | None = None
    reason: str = ""
    stops_at: tuple[int, RunState] | None = None
    on_look: Callable[[int], None] = lambda version: None
    away: int = 0
    """So many questions are not answered."""
    asked: list[str] = field(default_factory=list)
    submitted: RunSpec | None = None
    events_told: int = 1
    trainer_busy: int = 0
    """How often the trainer is still seen at work after a pause."""

    def _view(self) -> RunView:
        return RunView(
            run_id="demo-1", name=self.spec.name, state=self.state, reason=self.reason, created_at=0.0, started_at=0.0, ended_at=None,
            version=self.version, versions=self.spec.versions, trainer="trainer-0", spec=self.spec,
        )  # fmt: skip

    def _known(self, run_id: str) -> None:
        if self.away:
            self.away -= 1
            raise Unreachable("http://api does not answer: refused")
        if run_id != "demo-1":
            raise ApiError(404, ProblemDocument(title="No such run", status=404, detail=f"run {run_id!r} is not known"))

    def submit(self, spec: RunSpec, idempotency_key: str | None = None) -> RunView:
        assert idempotency_key
        self.asked.append("submit")
        self.spec = self.submitted = spec
        self.state = RunState.QUEUED
        return self._view()

    def validate(self, spec: RunSpec) -> ValidationView:
        if spec.model.path == "nowhere":
            raise ApiError(422, ProblemDocument(title="Invalid spec", status=422, detail="model.path: nowhere has no config.json"))
        return ValidationView(valid=True, spec=spec, prompts=33, first_prompt="17=", first_prompt_tokens=4, rewards_checked=True)

    def run(self, run_id: str) -> RunView:
        self._known(run_id)
        if self.state in (RunState.QUEUED, RunState.RUNNING):
            self.state = RunState.RUNNING
            self.version = (self.version or 0) + 1
            if self.version >= self.spec.versions:
                self.state = RunState.COMPLETED
            if self.stops_at and self.version >= self.stops_at[0]:
                self.state = self.stops_at[1]
            self.on_look(self.version)
        return self._view()

    def runs(self, *, state: RunState | None = None, limit: int = 50) -> RunPage:
        return RunPage(runs=[self._view()] if state in (None, self.state) else [], next=None)

    def steps(self, run_id: str, *, first: int = 0) -> StepsView:
        values = {"reward_mean": 0.5, "entropy_nats": 1.0, "seconds": 1.0, "tokens": 64.0}
        made = [
            StepView(version=v, count=1, at=float(v), values=values, lags={0: 32, 1: 32}, window=(0, 2), groups=[v])
            for v in range(first, self.version or 0)
        ]
        return StepsView(run_id=run_id, steps=made, recorded=len(made))

    def events(self, run_id: str, after: str | None = None) -> Iterator[EventView]:
        if after is None:
            for i in range(1, self.events_told + 1):
                yield EventView(
                    id=f"{i}-0", run_id=run_id, event="told", text=f"Event {i} {HOSTILE}", severity=Severity.INFO, version=None, at=0.0, data={}
                )

    def evaluations(self, run_id: str) -> EvaluationsView:
        one = EvaluationView(
            name="all", domain="in", version=4, at=4.0, prompts=3, samples=2, temperature=1.0, top_p=1.0, max_tokens=8, values={"reward_mean": 0.5}
        )
        return EvaluationsView(run_id=run_id, evaluations=[one])

    def samples(self, run_id: str, *, last: int | None = None, limit: int = 20) -> SamplesView:
        done = CompletionView(text=HOSTILE, tokens=[1], versions=[0], lags=[0], finish=FinishReason.STOP, reward=1.0, parts=[], advantage=0.0)
        sample = SampleView(
            run_id=run_id, index=0, prompt_id="p", prompt="17=", answer=17, trained_version=0, issued_version=0, max_lag=2, server="r", attempt=1,
            completions=[done],
        )  # fmt: skip
        return SamplesView(run_id=run_id, samples=[sample], next=None)

    def conservation(self, run_id: str) -> ConservationView:
        self._known(run_id)
        zero = dict.fromkeys(
            ("queued", "running", "generated", "scored", "taken", "replaying", "dead", "cancelled", "outstanding", "superseded", "unreadable"), 0
        )
        return ConservationView(run_id=run_id, issued=8, consumed=8, holds=True, **zero)

    def knobs(self, run_id: str) -> KnobsView:
        return KnobsView(run_id=run_id, version=self.version, knobs=knobs_of(self.spec), changes=[])

    def checkpoints(self, run_id: str) -> CheckpointsView:
        return CheckpointsView(run_id=run_id, checkpoints=[])

    def fleet(self) -> FleetView:
        busy = self.state in (RunState.STARTING, RunState.RUNNING) or self.trainer_busy > 0
        if self.state is RunState.PAUSED and self.trainer_busy:
            self.trainer_busy -= 1
        return FleetView(
            members=[
                MemberView(
                    member_id="trainer-0", role=Role.TRAINER, url="", pid=7, host="h", ready=True, detail=HOSTILE, assigned=None,
                    run_id="demo-1" if busy else None, version=None, idle_seconds=3.0, started_at=0.0, beat_at=0.0,
                )
            ]
        )  # fmt: skip

    def __enter__(self) -> "FakeApi":
        return self

    def __exit__(self, *_: object) -> None:
        self.asked.append("close")

    def logs(self, *, follow: bool = False, **wanted: Any) -> Iterator[LogView]:
        self.asked.append(f"logs {wanted} follow={follow}")
        for i, (level, trace) in enumerate([(LogLevel.INFO, None), (LogLevel.ERROR, f"Traceback\n  frame\nValueError: {HOSTILE}")]):
            yield LogView(
                id=f"{i}-0", at=0.0, level=level, logger="a.b", role="trainer", member=f"t-{i}", host="h", pid=1, run_id=None if i else "demo-1",
                version=None, text=f"line {i} {HOSTILE}\nsecond", traceback=trace, data={"index": i},
            )  # fmt: skip

    def _move(self, run_id: str, action: str, state: RunState) -> RunView:
        self._known(run_id)
        self.asked.append(action)
        if self.state in (RunState.COMPLETED, RunState.CANCELLED):
            raise ApiError(409, ProblemDocument(title="Not possible", status=409, detail=f"a {self.state} run cannot {action}; possible: nothing"))
        self.state = state
        return self._view()

    def pause(self, run_id: str) -> RunView:
        return self._move(run_id, "pause", RunState.PAUSED)

    def resume(self, run_id: str) -> RunView:
        return self._move(run_id, "resume", RunState.QUEUED)

    def cancel(self, run_id: str) -> RunView:
        return self._move(run_id, "cancel", RunState.CANCELLED)

    def set_knobs(self, run_id: str, values: dict[str, Any]) -> KnobAnswer:
        self.asked.append(f"set {values}")
        if "seed" in values:
            raise ApiError(422, ProblemDocument(title="Invalid knobs", status=422, detail="seed: not a knob; knobs are clip.high"))
        return KnobAnswer(run_id=run_id, version=9, knobs=knobs_of(self.spec))

    def dead_letters(self, run_id: str | None = None) -> DeadLettersView:
        letter = DeadLetterView(
            id="5-0", run_id="demo-1", stream="prompts", reason=f"tried 5 times {HOSTILE}", at=0.0, index=3, prompt_id="p", prompt="17=",
            replayable=True, raw="",
        )  # fmt: skip
        return DeadLettersView(letters=[letter])

    def replay_run(self, run_id: str, overrides: dict[str, Any]) -> RunView:
        self._known(run_id)
        self.asked.append(f"replay {overrides}")
        self.state = RunState.QUEUED
        return self._view()

    def replay(self, run_id: str, letter: str) -> ReplayView:
        return ReplayView(run_id=run_id, letter=letter, index=3)


class FakeStack:
    """A stack that is up at once."""

    def __init__(self, home: Path, *, running: bool) -> None:
        self.info = StackInfo(
            home=home, pid=1, start_ticks=1, api_url="http://api", redis_url="redis://:hidden@h", token_file=home / "token",
            cluster_token_file=home / "token", data=home / "runs", processes={},
        )  # fmt: skip
        self.running = running
        self.calls: list[str] = []
        self.settings: StackSettings | None = None
        self.on_down: Callable[[], None] = lambda: None

    def up(self, home: Path, settings: StackSettings, *, progress: Callable[[StackInfo], None]) -> StackInfo:
        self.calls.append("up")
        self.running, self.settings = True, settings
        progress(self.info)
        return self.info

    def down(self, home: Path, *, timeout_s: float = 180.0) -> bool:
        self.calls.append(f"down {timeout_s:g}")
        self.on_down()
        was, self.running = self.running, False
        return was

    def status(self, home: Path) -> StackInfo | None:
        return self.info if self.running else None


@dataclass
class Bench:
    """The command with everything around it replaced."""

    api: FakeApi
    stack: FakeStack
    home: Path

    def __call__(self, *args: str, input: str | None = None, width: int = 200) -> Result:
        out, err = (Console(file=io.StringIO(), width=width, highlight=False) for _ in range(2))
        parts = Parts(client=lambda url, token: self.api, up=self.stack.up, down=self.stack.down, status=self.stack.status, out=out, err=err)  # type: ignore[arg-type, return-value]
        result = CliRunner().invoke(app, ["--home", str(self.home), *args], obj=parts, input=input)
        self.out, self.err = out.file.getvalue(), err.file.getvalue()  # type: ignore[attr-defined]
        return result


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    for name in ("OFFBEAT_URL", "OFFBEAT_TOKEN_FILE", "OFFBEAT_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(following, "POLL_S", 0.0)
    (tmp_path / "token").write_text("a-token-of-sixteen\n")
    return Bench(FakeApi(), FakeStack(tmp_path, running=True), tmp_path)


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('name = "mine"\nversions = 5\n[staleness]\nmax_lag = 1\n')
    return path


def commands() -> list[list[str]]:
    return [
        ["up"], ["down"], ["demo"], ["fleet"], ["logs"], ["doctor"], ["model", "make-tiny"], ["model", "smollm2"],
        ["dead-letters", "ls"], ["dead-letters", "replay"],
        *(["run", name] for name in ("submit", "ls", "show", "watch", "pause", "resume", "cancel", "set", "logs", "report", "export")),
    ]  # fmt: skip


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example_and_json(command: list[str]):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert f"Example: offbeat {' '.join(command)}" in result.output
    assert "--json" in result.output


def test_root_help_documents_the_exit_codes():
    text = CliRunner().invoke(app, ["--help"]).output
    for code in Code:
        assert f"\n{code.value:<4}" in "\n".join(line.strip() for line in text.splitlines()), code


# -- submitting ---------------------------------------------------------------------------------------------------------------------------


def test_submit_replaces_fields_of_the_file_and_prints_the_id(bench: Bench, spec_file: Path):
    result = bench("run", "submit", str(spec_file), "--set", "staleness.max_lag=4", "--set", "clip.off=true", "--set", "name=other")
    assert result.exit_code == 0
    assert bench.out == "demo-1\n"
    assert bench.api.submitted is not None
    assert (bench.api.submitted.staleness.max_lag, bench.api.submitted.clip.off, bench.api.submitted.name) == (4, True, "other")
    assert bench.api.submitted.versions == 5


def test_submit_reads_standard_input(bench: Bench):
    assert bench("run", "submit", "-", input='name = "piped"').exit_code == 0
    assert bench.api.submitted is not None
    assert bench.api.submitted.name == "piped"


@pytest.mark.parametrize(
    ("text", "sets", "said"),
    [
        ("versoins = 5", [], "versoins: Extra inputs are not permitted"),
        ("versions = 0", [], "versions: Input should be greater than or equal to 1 (got 0)"),
        ("", ["staleness.min_lag=9"], "staleness.min_lag (9) is above staleness.max_lag (2)"),
        ("[[[", [], "cannot be read as TOML"),
        ("", ["clip"], "'clip' is no assignment"),
        ("", ["name.deep=1"], "name: Input should be a valid string"),
    ],
)
def test_a_spec_that_is_not_valid_is_a_usage_error_that_names_the_field(bench: Bench, tmp_path: Path, text: str, sets: list[str], said: str):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    result = bench("run", "submit", str(path), *(part for one in sets for part in ("--set", one)))
    assert result.exit_code == Code.USAGE
    assert said in bench.err
    assert "Traceback" not in bench.err
    assert bench.api.submitted is None


def test_a_spec_file_that_is_not_there_or_no_text_is_a_usage_error(bench: Bench, tmp_path: Path):
    assert bench("run", "submit", str(tmp_path / "none.toml")).exit_code == Code.USAGE
    assert "No such file" in bench.err
    (tmp_path / "bytes.toml").write_bytes(b"name = '\xff'")
    assert bench("run", "submit", str(tmp_path / "bytes.toml")).exit_code == Code.USAGE
    assert "not UTF-8" in bench.err


def test_check_asks_the_api_and_submits_nothing(bench: Bench, spec_file: Path):
    assert bench("run", "submit", str(spec_file), "--check").exit_code == 0
    assert "33 prompts" in bench.out
    assert bench("run", "submit", str(spec_file), "--check", "--set", "model.path=nowhere").exit_code == Code.USAGE
    assert "nowhere has no config.json" in bench.err
    assert bench.api.asked == []


def test_submit_and_watch_ends_with_the_run(bench: Bench, spec_file: Path):
    result = bench("run", "submit", str(spec_file), "--watch")
    assert result.exit_code == 0
    assert "version 5/5  reward 0.500  entropy 1.000 nats" in bench.out


# -- looking ------------------------------------------------------------------------------------------------------------------------------


def test_ls_shows_and_filters(bench: Bench):
    assert bench("run", "ls").exit_code == 0
    assert "demo-1" in bench.out
    bench("run", "ls", "--state", "failed", "--json")
    assert json.loads(bench.out) == []


def test_show_has_state_groups_knobs_and_a_spec_that_can_be_read_again(bench: Bench):
    assert bench("run", "show", "demo-1").exit_code == 0
    assert "all: 8 issued = 8 consumed" in bench.out
    assert "staleness.max_lag=2" in bench.out
    assert RunSpec.model_validate(tomllib.loads(bench.out.partition("\n\n")[2])) == bench.api.spec


def test_json_output_is_one_document(bench: Bench):
    for command in (["run", "show", "demo-1"], ["run", "ls"], ["fleet"], ["dead-letters", "ls"], ["run", "set", "demo-1", "clip.high=0.3"]):
        assert bench(*command, "--json").exit_code == 0
        json.loads(bench.out)
        assert bench.out.isascii()


def test_text_from_elsewhere_cannot_drive_the_terminal(bench: Bench):
    bench.api.reason = HOSTILE
    for command in (["fleet"], ["dead-letters", "ls"], ["run", "ls"], ["run", "show", "demo-1"], ["run", "watch", "demo-1"]):
        bench(*command)
        assert not {"\x1b", "\x07", "\u202e"} & set(bench.out + bench.err), command
        assert "owned" not in bench.out
        assert "<script>" in bench.out + bench.err


def test_unknown_run_is_not_found(bench: Bench):
    assert bench("run", "show", "nobody").exit_code == Code.NOT_FOUND
    assert bench.err == "offbeat: No such run (404): run 'nobody' is not known\n"


def test_no_stack_is_said_with_what_to_do(bench: Bench):
    bench.stack.running = False
    assert bench("run", "ls").exit_code == Code.NO_STACK
    assert "offbeat up" in bench.err


def test_api_that_does_not_answer_is_not_reachable(bench: Bench):
    bench.api.away = 1
    assert bench("run", "show", "demo-1").exit_code == Code.NO_STACK
    assert bench.err == "offbeat: http://api does not answer: refused\n"


def test_another_api_needs_an_address_and_a_token_file(bench: Bench):
    assert bench("--url", "ftp//x", "run", "ls").exit_code == Code.USAGE
    assert bench("--url", "http://elsewhere", "run", "ls").exit_code == Code.USAGE
    assert "--token-file" in bench.err
    assert bench("--url", "http://elsewhere", "--token-file", str(bench.home / "no"), "run", "ls").exit_code == Code.USAGE
    bench.stack.running = False
    assert bench("--url", "http://elsewhere", "--token-file", str(bench.home / "token"), "run", "ls").exit_code == 0


def test_debug_shows_the_traceback(bench: Bench, capfd: pytest.CaptureFixture[str]):
    assert "Traceback" not in bench("run", "show", "nobody").output
    assert "Traceback" in bench("--debug", "run", "show", "nobody").output


# -- steering -----------------------------------------------------------------------------------------------------------------------------


def test_set_sends_typed_values_and_tells_the_version(bench: Bench):
    assert bench("run", "set", "demo-1", "staleness.max_lag=4", "clip.off=true", "kv_policy=keep").exit_code == 0
    assert bench.api.asked == ["set {'staleness.max_lag': 4, 'clip.off': True, 'kv_policy': 'keep'}"]
    assert "holds from version 9 on" in bench.out


def test_a_field_that_is_no_knob_is_refused(bench: Bench):
    assert bench("run", "set", "demo-1", "seed=1").exit_code == Code.USAGE
    assert "not a knob" in bench.err


def test_an_illegal_move_fails(bench: Bench):
    bench.api.state = RunState.COMPLETED
    assert bench("run", "pause", "demo-1").exit_code == Code.FAILED
    assert "a completed run cannot pause" in bench.err


def test_pause_and_cancel_tell_the_new_state(bench: Bench):
    bench.api.state = RunState.RUNNING
    bench("run", "pause", "demo-1")
    assert bench.out == "run demo-1 is paused\n"
    bench("run", "cancel", "demo-1")
    assert bench.out == "run demo-1 is cancelled\n"


def test_replay_names_the_group(bench: Bench):
    assert bench("dead-letters", "replay", "demo-1", "5-0").exit_code == 0
    assert bench.out == "group 3 of demo-1 will be generated again\n"


def test_a_replay_that_is_not_followed_says_what_its_data_are(bench: Bench):
    assert bench("replay", "demo-1", "--set", "clip.high=0.4", "--no-watch").exit_code == 0
    assert (bench.out, bench.err) == ("demo-1\n", f"{CAUTION}\n")
    assert bench.api.asked == ["replay {'clip.high': 0.4}"]
    assert bench("replay", "demo-1", "--no-watch", "--json").exit_code == 0
    told = json.loads(bench.out)
    assert (told["run_id"], told["caution"], bench.err) == ("demo-1", CAUTION, "")


def test_a_replay_as_json_is_one_document_with_what_its_data_are(bench: Bench):
    assert bench("replay", "demo-1", "--json").exit_code == 0
    told = json.loads(bench.out)
    assert (told["state"], told["caution"]) == ("completed", f"{CAUTION} ESS was not measured.")


def test_a_replay_that_is_followed_says_it_with_its_report(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    shown: list[str] = []
    monkeypatch.setattr(replay, "make_report", lambda client, run_id, folder: run_id)
    monkeypatch.setattr(replay, "show", lambda session, reported, *, as_json: shown.append(reported))
    assert bench("replay", "demo-1").exit_code == 0
    assert shown == ["demo-1"]
    assert bench.out.endswith(f"{CAUTION} ESS was not measured.\n")


# -- watching -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "code"),
    [(RunState.COMPLETED, 0), (RunState.FAILED, Code.FAILED), (RunState.PAUSED, Code.FAILED), (RunState.CANCELLED, Code.FAILED)],
)
def test_watch_ends_when_the_run_moves_no_more(bench: Bench, end: RunState, code: int):
    bench.api.state, bench.api.stops_at, bench.api.reason = RunState.RUNNING, (3, end), "the disk is full"
    assert bench("run", "watch", "demo-1").exit_code == code
    assert "version 3/12" in bench.out
    assert ("the disk is full" in bench.err) == bool(code)
    assert ("run resume demo-1" in bench.err) == (end in (RunState.FAILED, RunState.PAUSED))


def test_watch_outlives_an_api_that_is_away_for_a_while(bench: Bench):
    bench.api.state = RunState.RUNNING
    bench.api.on_look = lambda version: setattr(bench.api, "away", 3 if version == 4 else 0)
    assert bench("run", "watch", "demo-1").exit_code == 0
    assert bench.out.count("trying again for") == 1
    assert "version 12/12" in bench.out


def test_watch_shows_only_the_newest_of_what_happened_before(bench: Bench):
    bench.api.state, bench.api.events_told = RunState.RUNNING, 30
    assert bench("run", "watch", "demo-1").exit_code == 0
    assert "20 earlier events are not shown" in bench.out
    assert "Event 20 " not in bench.out
    assert all(bench.out.count(f"Event {i} ") == 1 for i in range(21, 31))


def test_watch_gives_up_on_an_api_that_stays_away(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(following, "PATIENCE_S", 0.05)
    monkeypatch.setattr(following, "POLL_S", 0.01)
    bench.api.state = RunState.RUNNING
    bench.api.on_look = lambda version: setattr(bench.api, "away", 10**6 if version == 4 else 0)
    assert bench("run", "watch", "demo-1").exit_code == Code.NO_STACK
    assert "has not answered for" in bench.err


def test_interrupting_watch_only_detaches(bench: Bench):
    bench.api.state = RunState.RUNNING
    bench.api.on_look = interrupting(at=4)
    assert bench("run", "watch", "demo-1").exit_code == Code.INTERRUPTED
    assert bench.api.asked == []
    assert bench.api.state is RunState.RUNNING
    assert "which goes on" in bench.err


# -- demo and resume: runs that the command answers for -----------------------------------------------------------------------------------


def interrupting(at: int) -> Callable[[int], None]:
    """SIGINT to this very process when the run is at that version."""

    def look(version: int) -> None:
        if version == at:
            signal.raise_signal(signal.SIGINT)

    return look


@pytest.fixture
def demo_bench(bench: Bench, spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(demo, "DEMO", spec_file)
    bench.stack.running = False
    return bench


def test_demo_brings_up_trains_reports_and_takes_down(demo_bench: Bench):
    bench = demo_bench
    assert bench("demo", "--set", "versions=12").exit_code == 0
    assert bench.stack.calls == ["up", "down 180"]
    assert bench.stack.settings is not None
    assert bench.stack.settings.owner is not None
    folder = bench.home / "runs/demo-1"
    assert "Of the evaluations on all, 1" in (folder / "report.html").read_text()
    assert str(folder / "report.html") in bench.out
    assert str(folder / "entropy.png") in bench.out
    assert "0.500 → 0.500" in bench.out
    assert "&lt;script&gt;" in (folder / "report.html").read_text()


def test_demo_as_json_prints_one_document_with_the_paths(demo_bench: Bench):
    assert demo_bench("demo", "--json").exit_code == 0
    told = json.loads(demo_bench.out)
    assert told["report"].endswith("runs/demo-1/report.html")
    assert [Path(plot).stem for plot in told["plots"]] == ["entropy", "idle", "lag", "reward"]
    assert told["summary"]["reward_last"] == 0.5


def test_demo_leaves_a_stack_alone_that_was_running(demo_bench: Bench):
    demo_bench.stack.running = True
    assert demo_bench("demo").exit_code == 0
    assert demo_bench.stack.calls == ["up"]


def test_interrupted_demo_pauses_waits_for_the_trainer_and_takes_down(demo_bench: Bench, monkeypatch: pytest.MonkeyPatch):
    bench = demo_bench
    monkeypatch.setattr(attended.time, "sleep", lambda seconds: None)
    bench.api.on_look, bench.api.trainer_busy = interrupting(at=2), 3
    assert bench("demo").exit_code == Code.INTERRUPTED
    assert bench.api.asked == ["submit", "pause"]
    assert bench.api.trainer_busy == 0
    assert bench.stack.calls == ["up", "down 180"]
    assert f"`offbeat --home {bench.home} run resume demo-1` goes on" in bench.err


def test_a_second_interrupt_waits_for_nothing(demo_bench: Bench, monkeypatch: pytest.MonkeyPatch):
    bench = demo_bench
    monkeypatch.setattr(attended.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    bench.api.on_look, bench.api.trainer_busy = interrupting(at=2), 10**9
    assert bench("demo").exit_code == Code.INTERRUPTED
    assert "not waiting for the checkpoint" in bench.err
    assert bench.stack.calls == ["up", "down 180"]


def test_an_interrupt_while_the_stack_ends_hurries_it(demo_bench: Bench):
    bench = demo_bench
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    bench.stack.on_down = lambda: signal.raise_signal(signal.SIGINT)
    assert bench("demo").exit_code == 0
    assert bench.stack.calls == ["up", "down 180", "down 3"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def test_an_interrupt_while_the_stack_starts_takes_down_what_was_started(demo_bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def interrupted(home: Path, settings: StackSettings, *, progress: Callable[[StackInfo], None]) -> StackInfo:
        demo_bench.stack.running = True
        signal.raise_signal(signal.SIGINT)
        return demo_bench.stack.info

    monkeypatch.setattr(demo_bench.stack, "up", interrupted)
    assert demo_bench("demo").exit_code == Code.INTERRUPTED
    assert "before there was a run" in demo_bench.err
    assert demo_bench.api.asked == []
    assert demo_bench.stack.calls == ["down 180"]


def test_sigterm_is_an_interrupt_too(demo_bench: Bench):
    demo_bench.api.on_look = lambda version: signal.raise_signal(signal.SIGTERM) if version == 2 else None
    assert demo_bench("demo").exit_code == Code.INTERRUPTED
    assert demo_bench.api.asked == ["submit", "pause"]


def test_an_interrupt_during_the_submission_waits_for_the_runs_id(demo_bench: Bench, monkeypatch: pytest.MonkeyPatch):
    submit = demo_bench.api.submit

    def interrupted(spec: RunSpec, idempotency_key: str | None = None) -> RunView:
        signal.raise_signal(signal.SIGINT)
        return submit(spec, idempotency_key)

    monkeypatch.setattr(demo_bench.api, "submit", interrupted)
    assert demo_bench("demo").exit_code == Code.INTERRUPTED
    assert demo_bench.api.asked == ["submit", "pause"]
    assert "run resume demo-1" in demo_bench.err


def test_failed_demo_still_reports_and_takes_down(demo_bench: Bench):
    demo_bench.api.stops_at, demo_bench.api.reason = (3, RunState.FAILED), "the engine is gone"
    assert demo_bench("demo").exit_code == Code.FAILED
    assert "the engine is gone" in demo_bench.err
    assert (demo_bench.home / "runs/demo-1/report.html").is_file()
    assert demo_bench.stack.calls == ["up", "down 180"]


def test_resume_without_a_stack_starts_one_and_takes_it_down(demo_bench: Bench):
    demo_bench.api.state, demo_bench.api.version = RunState.PAUSED, 5
    assert demo_bench("run", "resume", "demo-1").exit_code == 0
    assert demo_bench.api.asked == ["resume"]
    assert demo_bench.stack.calls == ["up", "down 180"]
    assert "version 12/12" in demo_bench.out


def test_resume_can_leave_the_stack_up(demo_bench: Bench):
    assert demo_bench("run", "resume", "demo-1", "--keep-up").exit_code == 0
    assert demo_bench.stack.calls == ["up"]
    assert demo_bench.stack.settings is not None
    assert demo_bench.stack.settings.owner is None


def test_resume_on_a_running_stack_returns_at_once(bench: Bench):
    assert bench("run", "resume", "demo-1").exit_code == 0
    assert bench.api.asked == ["resume"]
    assert bench.stack.calls == []


def test_resume_goes_on_with_a_run_that_was_never_paused(demo_bench: Bench):
    demo_bench.api.state, demo_bench.api.version = RunState.RUNNING, 5
    assert demo_bench("run", "resume", "demo-1").exit_code == 0
    assert "is running already" in demo_bench.err
    assert demo_bench.api.asked == []


def test_resume_of_a_run_that_has_ended_is_refused_and_leaves_nothing_up(demo_bench: Bench):
    demo_bench.api.state = RunState.CANCELLED
    assert demo_bench("run", "resume", "demo-1").exit_code == Code.FAILED
    assert "nothing to go on with" in demo_bench.err
    assert demo_bench.stack.calls == ["up", "down 180"]


# -- the stack, files and models ----------------------------------------------------------------------------------------------------------


def test_up_passes_the_numbers_on_and_hides_the_store(demo_bench: Bench):
    assert demo_bench("up", "--rollout-servers", "2", "--trainers", "3", "--json").exit_code == 0
    assert demo_bench.stack.settings is not None
    assert (demo_bench.stack.settings.rollouts, demo_bench.stack.settings.rewards, demo_bench.stack.settings.trainers) == (2, 1, 3)
    assert json.loads(demo_bench.out)["api_url"] == "http://api"
    assert "hidden" not in demo_bench.out


def test_up_in_the_foreground_takes_the_stack_down_on_interrupt(demo_bench: Bench):
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM))
    timer.start()
    assert demo_bench("up", "--foreground").exit_code == 0
    assert demo_bench.stack.calls == ["up", "down 180"]


def test_down_says_whether_something_ran(bench: Bench):
    bench("down", "--json")
    assert json.loads(bench.out) == {"was_running": True}
    bench("down")
    assert "no stack was running" in bench.out


def test_logs_are_cut_filtered_and_harmless(bench: Bench):
    logs = bench.home / "logs"
    logs.mkdir()
    (logs / "trainer-0.log").write_text("".join(f'{{"run": "demo-1", "n": {i}}}\n' for i in range(5)) + '{"run": "other"}\n')
    (logs / "rollout-0.log").write_text(f"demo-1 {HOSTILE}\n")
    assert bench("run", "logs", "demo-1", "-n", "2").exit_code == 0
    assert [line.partition("  ")[0] for line in bench.out.splitlines()] == ["rollout-0", "trainer-0", "trainer-0"]
    assert bench.out.splitlines()[-1].endswith('"n": 4}')
    assert "\x1b" not in bench.out
    assert bench("run", "logs", "--process", "nothing").exit_code == Code.NOT_FOUND
    assert "rollout-0, trainer-0" in bench.err


def test_logs_of_the_fleet_are_asked_for_and_shown_harmlessly(bench: Bench):
    assert bench("logs", "--run", "demo-1", "--role", "trainer", "--level", "warning", "-n", "7").exit_code == 0
    assert "logs {'run': 'demo-1', 'role': <Role.TRAINER: 'trainer'>, 'member': None, 'level': <LogLevel.WARNING: 'warning'>," in bench.api.asked[0]
    assert "'limit': 7} follow=False" in bench.api.asked[0]
    first, second, *trace = bench.out.splitlines()
    assert first.partition("info")[2].startswith("     t-0 [demo-1] line 0 ")
    assert first.endswith("⏎second index=0")
    assert " error    t-1 line 1 " in second
    assert [part.split(":")[0] for part in trace] == ["    Traceback", "      frame", "    ValueError"]
    assert not set(bench.out) & {"\x1b", "\u202e", "\x07"}
    assert bench("logs", "--follow", "--json").exit_code == 0
    assert bench.api.asked[-2].endswith("follow=True")
    assert [json.loads(line)["id"] for line in bench.out.splitlines()] == ["0-0", "1-0"]
    for wrong in (["--level", "loud"], ["--role", "cook"], ["-n", "0"]):
        assert bench("logs", *wrong).exit_code == Code.USAGE


def test_making_a_model_does_not_overwrite_one(bench: Bench, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("make-tiny", "smollm2"):
        assert bench("model", name, "--out", str(tmp_path)).exit_code == Code.USAGE
        assert "--force" in bench.err


def test_doctor_fails_with_what_to_install_when_something_needed_is_missing(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    rows = (("vLLM", "no_such_module", ("no-such-distribution",), True, "deploy/install.sh cpu"), *doctor.PACKAGES)
    monkeypatch.setattr(doctor, "PACKAGES", rows)
    assert bench("doctor", "--json").exit_code == Code.FAILED
    told = json.loads(bench.out)
    check = next(check for check in told["checks"] if check["name"] == "vLLM")
    assert (check["state"], check["found"], check["advice"]) == ("missing", "not installed", "install it: deploy/install.sh cpu")
    assert not any(can for what, can in told["can_run"].items() if what.startswith("local stack"))


def test_doctor_does_not_import_what_it_looks_for(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    import builtins

    real, imported = builtins.__import__, []

    def watched(name: str, *args: Any, **kwargs: Any) -> Any:
        imported.append(name.partition(".")[0])
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", watched)
    bench("doctor")
    assert not {"torch", "vllm", "transformers", "matplotlib"} & set(imported)
    assert "This machine can run:" in bench.out
