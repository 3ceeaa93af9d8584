import io
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from services.cli import study_attended, study_following
from services.cli.__main__ import app
from services.cli.session import ROOT, Code, Parts
from services.cli.studies import from_checkout, load_study
from services.cli.study_following import StudyWatched, grid, panel, progress
from services.client import ApiError, Unreachable
from services.contracts.messages import Role
from services.contracts.states import TERMINAL, RunState
from services.contracts.study import StudySpec
from services.contracts.topics import StudyKeys
from services.contracts.views import (
    EvaluationsView,
    FleetView,
    MemberView,
    ProblemDocument,
    StepsView,
    StepView,
    StudiesView,
    StudyRunView,
    StudySummary,
    StudyValidationView,
    StudyView,
)
from services.studies import study_report
from services.studies.study_data import RunData
from services.studies.verdicts import Verdict, verdicts_of
from tests.unit.test_cli import HOSTILE, FakeStack

STUDY = """
name = "mine"
seeds = [0, 1]
budget = { rollouts = 512 }
[[arms]]
name = "n1"
[[arms]]
name = "n2"
set = { updates_per_batch = 2 }
[[arms]]
name = "n4"
set = { updates_per_batch = 4 }
[[claims]]
id = "F1"
text = "more updates, less entropy"
metric = "steps.entropy_nats.end"
arms = ["n1", "n2"]
direction = "greater"
[[claims]]
id = "F2"
text = "all the more"
metric = "steps.entropy_nats.end"
arms = ["n2", "n4"]
direction = "greater"
"""
MOVES = {RunState.QUEUED: RunState.STARTING, RunState.STARTING: RunState.RUNNING}


@dataclass
class FakeStudies:
    """One study, of which every look takes the first two runs that move one version on."""

    spec: StudySpec | None = None
    runs: dict[tuple[str, int], StudyRunView] = field(default_factory=dict)
    fails: dict[tuple[str, int], str] = field(default_factory=dict)
    """Runs that fail at their first version, with the reason."""
    on_look: Callable[[int], None] = lambda look: None
    looks: int = 0
    away: int = 0
    asked: list[str] = field(default_factory=list)
    trainer_busy: int = 0
    cancelled_at: float | None = None

    def _cell(self, arm: str, seed: int, **fields: Any) -> StudyRunView:
        assert self.spec is not None
        default = {"run_id": StudyKeys("mine-1").run_id(arm, seed), "state": RunState.QUEUED, "reason": "", "version": None}
        times = {"started_at": None, "ended_at": None}
        return StudyRunView(arm=arm, seed=seed, versions=self.spec.run(arm, seed).versions, **{**default, **times, **fields})

    def fill(self, spec: StudySpec, state: RunState, version: int | None = None) -> None:
        self.spec = spec
        self.runs = {cell: self._cell(*cell, state=state, version=version) for cell in spec.cells()}

    def _view(self) -> StudyView:
        assert self.spec is not None
        runs = list(self.runs.values())
        states = [run.state.value if run.state else "missing" for run in runs]
        return StudyView(
            study_id="mine-1", name=self.spec.name, created_at=0.0, cancelled_at=self.cancelled_at, spec=self.spec, runs=runs,
            counts={state: states.count(state) for state in states}, warnings=list(self.spec.warnings),
        )  # fmt: skip

    def _set(self, state: RunState, *of: RunState | None) -> StudyView:
        self.runs = {
            cell: self._cell(*cell, state=state, version=run.version, reason=run.reason) if run.state in of else run
            for cell, run in self.runs.items()
        }
        return self._view()

    def submit_study(self, spec: StudySpec, idempotency_key: str | None = None) -> StudyView:
        assert idempotency_key
        self.asked.append("submit")
        self.fill(spec, RunState.QUEUED)
        return self._view()

    def validate_study(self, spec: StudySpec) -> StudyValidationView:
        self.asked.append("validate")
        if spec.base:
            raise ApiError(422, ProblemDocument(title="Invalid study", status=422, detail="base.model.path: nowhere has no config.json"))
        return StudyValidationView(valid=True, spec=spec, runs=6, versions=24, rewards_checked=True, warnings=[])

    def study(self, study_id: str) -> StudyView:
        if self.away:
            self.away -= 1
            raise Unreachable("http://api does not answer: refused")
        if study_id != "mine-1":
            raise ApiError(404, ProblemDocument(title="Unknown study", status=404, detail=f"study {study_id!r} is not known"))
        self.looks += 1
        moving = [cell for cell, run in self.runs.items() if run.state in study_following.MOVING][:2]
        for cell in moving:
            self.runs[cell] = self._moved(self.runs[cell])
        self.on_look(self.looks)
        return self._view()

    def _moved(self, run: StudyRunView) -> StudyRunView:
        cell = (run.arm, run.seed)
        if run.state in MOVES:
            return self._cell(*cell, state=MOVES[run.state], version=run.version)
        version = (run.version or 0) + 1
        if cell in self.fails:
            return self._cell(*cell, state=RunState.FAILED, version=version, reason=self.fails.pop(cell))
        return self._cell(*cell, state=RunState.COMPLETED if version >= run.versions else RunState.RUNNING, version=version)

    def studies(self) -> StudiesView:
        view = self._view()
        one = StudySummary(
            study_id=view.study_id, name=view.name, created_at=0.0, cancelled_at=None, arms=3, seeds=2, claims=2, counts=view.counts
        )  # fmt: skip
        return StudiesView(studies=[one])

    def pause_study(self, study_id: str) -> StudyView:
        self.asked.append("pause")
        return self._set(RunState.PAUSED, *study_following.MOVING)

    def resume_study(self, study_id: str) -> StudyView:
        self.asked.append("resume")
        if study_id != "mine-1":
            raise ApiError(404, ProblemDocument(title="Unknown study", status=404, detail=f"study {study_id!r} is not known"))
        return self._set(RunState.QUEUED, RunState.PAUSED, RunState.FAILED, None)

    def cancel_study(self, study_id: str) -> StudyView:
        self.asked.append("cancel")
        return self._set(RunState.CANCELLED, *(state for state in RunState if state not in TERMINAL))

    def steps(self, run_id: str) -> StepsView:
        _, arm, _ = run_id.split(".")
        entropy = {"n1": 1.0, "n2": 0.8, "n4": 0.5}[arm]
        values = {"reward_mean": 0.5, "entropy_nats": entropy, "kl_behaviour_k3_nats": 0.01}
        made = [StepView(version=v, count=1, at=float(v), values=values, lags={0: 64}, window=(0, 0), groups=[v]) for v in range(4)]
        return StepsView(run_id=run_id, steps=made, recorded=len(made))

    def evaluations(self, run_id: str) -> EvaluationsView:
        return EvaluationsView(run_id=run_id, evaluations=[])

    def fleet(self) -> FleetView:
        busy = self.trainer_busy > 0
        self.trainer_busy -= busy
        member = MemberView(
            member_id="trainer-0", role=Role.TRAINER, url="", pid=7, host="h", ready=True, detail="", assigned=None,
            run_id=StudyKeys("mine-1").run_id("n1", 0) if busy else None, version=None, idle_seconds=3.0, started_at=0.0, beat_at=0.0,
        )  # fmt: skip
        return FleetView(members=[member])


@dataclass
class Bench:
    """The command with everything around it replaced."""

    api: FakeStudies
    stack: FakeStack
    home: Path
    reported: Sequence[RunData] = ()

    def __call__(self, *args: str) -> Result:
        out, err = (Console(file=io.StringIO(), width=400, highlight=False) for _ in range(2))
        parts = Parts(client=lambda url, token: self.api, up=self.stack.up, down=self.stack.down, status=self.stack.status, out=out, err=err)  # type: ignore[arg-type, return-value]
        result = CliRunner().invoke(app, ["--home", str(self.home), "study", *args], obj=parts)
        self.out, self.err = out.file.getvalue(), err.file.getvalue()  # type: ignore[attr-defined]
        return result


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Its reports have verdicts and no figures, which take seconds to draw."""
    for name in ("OFFBEAT_URL", "OFFBEAT_TOKEN_FILE", "OFFBEAT_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(study_following, "POLL_S", 0.0)
    (tmp_path / "token").write_text("a-token-of-sixteen\n")
    bench = Bench(FakeStudies(), FakeStack(tmp_path, running=False), tmp_path)

    def write(folder: Path, study: StudyView, runs: Sequence[RunData]) -> tuple[Path, list[Verdict]]:
        bench.reported = runs
        return folder / "report.html", verdicts_of(study.spec, runs)

    monkeypatch.setattr(study_report, "write_study_report", write)
    return bench


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(STUDY)
    return str(path)


@pytest.fixture
def spec(file: str) -> StudySpec:
    return load_study(Path(file))


def interrupting(at: int) -> Callable[[int], None]:
    """SIGINT to this very process at that look."""

    def look(number: int) -> None:
        if number == at:
            signal.raise_signal(signal.SIGINT)

    return look


@pytest.mark.parametrize("command", ["run", "check", "ls", "show", "watch", "report", "resume", "cancel"])
def test_every_command_has_help_with_an_example_and_json(command: str):
    result = CliRunner().invoke(app, ["study", command, "--help"])
    assert result.exit_code == 0
    assert f"Example: offbeat study {command}" in result.output
    assert "--json" in result.output


# -- running ------------------------------------------------------------------------------------------------------------------------------


def test_run_brings_up_runs_reports_and_takes_down(bench: Bench, file: str):
    assert bench("run", file).exit_code == 0
    assert bench.api.asked == ["submit"]
    assert bench.stack.calls == ["up", "down 180"]
    assert bench.stack.settings is not None
    assert bench.stack.settings.owner is not None
    for arm in ("n1", "n2", "n4"):
        assert f"{arm}, seed 1: completed" in bench.out
    assert "24/24 versions  6 completed" in bench.out
    lines = {line.split()[0]: line for line in bench.out.splitlines() if line.startswith("F")}
    assert "not separable" in lines["F1"], "two seeds decide nothing"
    assert "0.200" in lines["F1"]
    assert "0.300" in lines["F2"]
    assert bench.err.count("no claim is decided") == 2, "before anything runs, and with the verdicts"
    assert bench.out.splitlines()[-1] == f"report: {bench.home / 'runs' / 'mine-1' / 'report.html'}"
    assert [(run.arm, run.seed, run.spec.updates_per_batch, len(run.steps)) for run in bench.reported][3:] == [
        ("n1", 1, 1, 4), ("n2", 1, 2, 4), ("n4", 1, 4, 4),
    ]  # fmt: skip


def test_run_as_json_prints_one_document_with_verdicts_and_report(bench: Bench, file: str, tmp_path: Path):
    assert bench("run", file, "--json", "--out", str(tmp_path / "there")).exit_code == 0
    told = json.loads(bench.out)
    assert told["report"].startswith(str(tmp_path / "there"))
    assert [(one["claim"]["id"], one["decision"], one["n"]) for one in told["verdicts"]] == [("F1", "not separable", 2), ("F2", "not separable", 2)]
    assert {run["state"] for run in told["study"]["runs"]} == {"completed"}


def test_run_of_some_arms_and_more_seeds(bench: Bench, file: str):
    assert bench("run", file, "--arms", "n2, n4", "--seeds", "5").exit_code == 0
    assert bench.api.spec is not None
    assert [arm.name for arm in bench.api.spec.arms] == ["n2", "n4"]
    assert bench.api.spec.seeds == (0, 1, 2, 3, 4)
    assert "claims are left out: F1" in bench.err
    (line,) = (line for line in bench.out.splitlines() if line.startswith("F2"))
    assert "holds" in line


def test_side_by_side_is_how_many_the_stack_is_started_with(bench: Bench, file: str):
    assert bench("run", file, "--side-by-side", "3").exit_code == 0
    assert bench.stack.settings is not None
    assert (bench.stack.settings.trainers, bench.stack.settings.rollouts, bench.stack.settings.rewards) == (3, 3, 1)


def test_a_stack_that_runs_is_used_as_it_is(bench: Bench, file: str):
    bench.stack.running = True
    assert bench("run", file, "--side-by-side", "3").exit_code == 0
    assert bench.stack.calls == []
    assert "the one that runs stays as it is" in bench.err


def test_a_failed_run_is_named_and_the_others_go_on(bench: Bench, file: str):
    bench.api.fails[("n2", 0)] = f"the loss is not finite {HOSTILE}"
    assert bench("run", file).exit_code == Code.FAILED
    assert "n2, seed 0 is failed: the loss is not finite" in bench.err
    assert "1 of 6 runs are not completed" in bench.err
    assert f"`offbeat --home {bench.home} study resume mine-1` goes on" in bench.err
    assert "n4, seed 1: completed" in bench.out
    assert "report: " in bench.out
    assert not {"\x1b", "\x07", "\u202e"} & set(bench.out + bench.err)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (STUDY.replace("rollouts = 512", "rollouts = 0"), "budget.rollouts: Input should be greater than or equal to 1 (got 0)"),
        (STUDY.replace('arms = ["n1", "n2"]', 'arms = ["n1", "n9"]'), "claims.F1.arms: there is no arm n9"),
        (STUDY.replace("updates_per_batch = 2", "updates_per_bach = 2"), "arms.n2.set.updates_per_bach: no such field"),
        ("[[[", "cannot be read as TOML"),
    ],
)  # fmt: skip
def test_a_bad_study_is_a_usage_error_before_anything_starts(bench: Bench, tmp_path: Path, text: str, said: str):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    assert bench("run", str(path)).exit_code == Code.USAGE
    assert said in bench.err
    assert (bench.api.asked, bench.stack.calls) == ([], [])


def test_an_unknown_arm_is_a_usage_error(bench: Bench, file: str):
    assert bench("run", file, "--arms", "n1,n9").exit_code == Code.USAGE
    assert "--arms: there is no arm n9; there are n1, n2, n4" in bench.err
    assert bench.stack.calls == []


def test_a_study_that_is_not_there_points_to_studies(bench: Bench):
    assert bench("check", "nowhere.toml").exit_code == Code.USAGE
    assert "cannot read nowhere.toml: No such file or directory; examples are in deploy/studies" in bench.err


# -- interrupts ---------------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_pauses_all_runs_waits_for_the_trainers_and_says_how_to_go_on(bench: Bench, file: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study_attended.time, "sleep", lambda seconds: None)
    bench.api.on_look, bench.api.trainer_busy = interrupting(at=6), 3
    assert bench("run", file).exit_code == Code.INTERRUPTED
    assert bench.api.asked == ["submit", "pause"]
    assert bench.api.trainer_busy == 0
    assert {run.state for run in bench.api.runs.values()} <= {RunState.PAUSED, RunState.COMPLETED}
    assert f"study mine-1 is paused: `offbeat --home {bench.home} study resume mine-1` goes on" in bench.err
    assert bench.stack.calls == ["up", "down 180"]


def test_a_second_ctrl_c_waits_for_nothing(bench: Bench, file: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study_attended.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(study_following, "POLL_S", 0.0)
    bench.api.on_look, bench.api.trainer_busy = interrupting(at=1), 10**9
    assert bench("run", file).exit_code == Code.INTERRUPTED
    assert "not waiting for the checkpoints" in bench.err
    assert bench.stack.calls == ["up", "down 180"]


def test_ctrl_c_while_the_report_is_written_does_not_say_paused(bench: Bench, file: str, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(study_attended, "make_report", interrupted)
    assert bench("run", file).exit_code == Code.INTERRUPTED
    assert "study mine-1 is completed: `offbeat study report mine-1` writes its report" in bench.err


# -- going on, looking, ending ------------------------------------------------------------------------------------------------------------


def test_resume_starts_the_stack_and_goes_on_to_the_report(bench: Bench, spec: StudySpec):
    bench.api.fill(spec, RunState.PAUSED, version=2)
    assert bench("resume", "mine-1").exit_code == 0
    assert bench.api.asked == ["resume"]
    assert bench.stack.calls == ["up", "down 180"]
    assert "report: " in bench.out


def test_resume_after_a_crash_goes_on_with_runs_that_never_heard_of_it(bench: Bench, spec: StudySpec):
    bench.api.fill(spec, RunState.RUNNING, version=2)
    bench.api.runs["n4", 1] = bench.api._cell("n4", 1, run_id=None, state=None)
    assert bench("resume", "mine-1").exit_code == 0
    assert {run.state for run in bench.api.runs.values()} == {RunState.COMPLETED}


def test_resume_on_a_running_stack_returns_at_once(bench: Bench, spec: StudySpec):
    bench.stack.running = True
    bench.api.fill(spec, RunState.FAILED)
    assert bench("resume", "mine-1").exit_code == 0
    assert bench.stack.calls == []
    assert bench.out.startswith("study mine-1: ")


def test_watch_follows_through_an_api_that_is_away_and_leaves_the_study_alone(bench: Bench, spec: StudySpec):
    bench.stack.running = True
    bench.api.fill(spec, RunState.QUEUED)
    bench.api.on_look = lambda look: setattr(bench.api, "away", 3 if look == 4 else 0)
    assert bench("watch", "mine-1").exit_code == 0
    assert bench.out.count("trying again for") == 1
    assert bench.api.asked == []


def test_interrupting_watch_only_detaches(bench: Bench, spec: StudySpec):
    bench.stack.running = True
    bench.api.fill(spec, RunState.QUEUED)
    bench.api.on_look = interrupting(at=3)
    assert bench("watch", "mine-1").exit_code == Code.INTERRUPTED
    assert bench.api.asked == []
    assert "which goes on" in bench.err


def test_watch_gives_up_on_an_api_that_stays_away(bench: Bench, spec: StudySpec, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study_following, "PATIENCE_S", 0.05)
    monkeypatch.setattr(study_following, "POLL_S", 0.01)
    bench.stack.running = True
    bench.api.fill(spec, RunState.QUEUED)
    bench.api.on_look = lambda look: setattr(bench.api, "away", 10**6 if look == 2 else 0)
    assert bench("watch", "mine-1").exit_code == Code.NO_STACK
    assert "has not answered for" in bench.err


def test_show_and_ls_tell_every_run_and_claim(bench: Bench, spec: StudySpec):
    bench.stack.running = True
    bench.api.fill(spec, RunState.PAUSED, version=3)
    bench.api.runs["n4", 1] = bench.api._cell("n4", 1, run_id=None, state=None)
    bench.api.runs["n2", 0] = bench.api._cell("n2", 0, state=RunState.FAILED, version=1, reason=f"disk full {HOSTILE}")
    assert bench("show", "mine-1").exit_code == 0
    assert "4 paused · 1 failed · 1 missing" in bench.out
    assert "paused 3/4" in bench.out
    assert "not made" in bench.out
    assert "disk full" in bench.out
    assert "more updates, less entropy" in bench.out
    assert not {"\x1b", "\x07"} & set(bench.out)
    assert bench("ls").exit_code == 0
    assert "mine-1" in bench.out
    bench("show", "mine-1", "--json")
    assert json.loads(bench.out)["study_id"] == "mine-1"


def test_cancel_tells_what_became_of_the_runs(bench: Bench, spec: StudySpec):
    bench.stack.running = True
    bench.api.fill(spec, RunState.RUNNING, version=1)
    assert bench("cancel", "mine-1").exit_code == 0
    assert bench.out == "study mine-1: 6 cancelled\n"


def test_an_unknown_study_is_not_found(bench: Bench):
    bench.stack.running = True
    assert bench("show", "nobody").exit_code == Code.NOT_FOUND
    assert "study 'nobody' is not known" in bench.err


def test_check_needs_no_stack_and_asks_one_that_runs(bench: Bench, file: str):
    assert bench("check", file).exit_code == 0
    assert "3 arms x 2 seeds = 6 runs, 24 versions in all" in bench.out
    assert "were not looked at" in bench.out
    assert "no claim is decided" in bench.err
    assert bench.api.asked == []
    bench.stack.running = True
    assert bench("check", file, "--json").exit_code == 0
    assert json.loads(bench.out)["data_checked"] is True
    assert bench.api.asked == ["validate"]


def test_check_says_what_the_api_refuses(bench: Bench, tmp_path: Path):
    path = tmp_path / "study.toml"
    path.write_text('name = "x"\nseeds = [0, 1, 2, 3, 4]\nbudget = { updates = 3 }\nbase = { learning_rate = 1e-3 }\n[[arms]]\nname = "a"\n')
    bench.stack.running = True
    assert bench("check", str(path)).exit_code == Code.USAGE
    assert "nowhere has no config.json" in bench.err


def test_a_study_that_no_fleet_can_start_says_what_is_missing(bench: Bench, spec: StudySpec, monkeypatch: pytest.MonkeyPatch):
    bench.stack.running = True
    bench.api.fill(spec, RunState.QUEUED)
    monkeypatch.setattr(bench.api, "_moved", lambda run: run)
    bench.api.on_look = interrupting(at=5)
    assert bench("watch", "mine-1").exit_code == Code.INTERRUPTED
    assert bench.out.count("waiting for a rollout server to register") == 1, "the fleet has a trainer only"


# -- what is drawn ------------------------------------------------------------------------------------------------------------------------


def test_progress_counts_what_is_still_to_come(spec: StudySpec):
    api = FakeStudies()
    api.fill(spec, RunState.COMPLETED, version=4)
    assert progress(api._view()) == (24, 24)
    api.runs["n1", 0] = api._cell("n1", 0, state=RunState.FAILED, version=1)
    api.runs["n2", 0] = api._cell("n2", 0, state=RunState.PAUSED, version=1)
    api.runs["n4", 0] = api._cell("n4", 0, run_id=None, state=None)
    assert progress(api._view()) == (14, 21), "a failed run will publish no more; a paused one 3, one that was not made 4"


def test_the_time_left_follows_the_newest_pace(spec: StudySpec):
    api = FakeStudies()
    api.fill(spec, RunState.RUNNING, version=0)
    watched = StudyWatched(api._view())
    for at, version in ((0.0, 0), (10.0, 0), (700.0, 1), (900.0, 2)):
        api.fill(spec, RunState.RUNNING, version=version)
        watched.saw(api._view(), at)
        assert watched.eta_seconds == {0.0: None, 10.0: None, 700.0: None, 900.0: 400.0}[at], at


def test_the_live_table_has_a_cell_for_every_run(spec: StudySpec):
    api = FakeStudies()
    api.fill(spec, RunState.RUNNING, version=2)
    api.runs["n2", 1] = api._cell("n2", 1, state=RunState.FAILED, version=1, reason=f"no memory {HOSTILE}")
    console = Console(file=io.StringIO(), width=120, highlight=False)
    watched = StudyWatched(api._view())
    watched.saw(api._view(), 0.0)
    console.print(panel(watched))
    console.print(grid(api._view()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = {line.split()[0]: line.split()[1:] for line in text.split("╯")[1].splitlines() if line.strip()}
    assert rows == {"arm": ["seed", "0", "seed", "1"], "n1": ["2/4", "2/4"], "n2": ["2/4", "failed", "1/4"], "n4": ["2/4", "2/4"]}
    assert "11/21 versions" in text
    assert "n2, seed 1: no memory" in text
    assert not {"\x1b", "\x07"} & set(text)


def test_models_of_the_checkout_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    study = from_checkout(load_study(ROOT / "deploy/studies/paper.toml"))
    models = {study.run(arm.name, 0).model.path for arm in study.arms}
    assert models == {str(ROOT / "deploy/models/tiny"), str(ROOT / "deploy/models/tiny-addition")}
