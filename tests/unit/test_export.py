"""What `offbeat run export` writes, read back by the libraries that users read it with."""

import csv
import io
import json
import os
import struct
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from services.cli.__main__ import app
from services.cli.session import Code, Parts
from services.client import ApiError, Client, Unreachable
from services.contracts.messages import FinishReason, Severity
from services.contracts.spec import RunSpec
from services.contracts.states import RunState
from services.contracts.views import (
    CompletionView,
    ConservationView,
    EvaluationsView,
    EvaluationView,
    EventView,
    ProblemDocument,
    RunView,
    SamplesView,
    SampleView,
    StepsView,
    StepView,
    StudyRunView,
)
from services.studies import export_files

HOSTILE = '=HYPERLINK("x")\x1b[2J<script>\u202e,"\n'
SPEC = RunSpec(name="mine", versions=3)
STEPS = [
    StepView(version=0, count=1, at=1_763_843_000.123, values={"reward_mean": 0.25, "loss": None}, lags={0: 30}, window=(0, 2), groups=[0, 1]),
    StepView(version=1, count=1, at=1_763_843_001.5, values={"reward_mean": 1 / 3, "entropy_nats/lag/2-3": 1.5}, lags={0: 10, 2: 20}, window=(0, 3),
             groups=[2, 3]),
]  # fmt: skip
EVALUATION = EvaluationView(
    name="held-out", domain="in", version=2, at=1_763_843_002.0, prompts=3, samples=2, temperature=1.0, top_p=1.0, max_tokens=8,
    values={"pass@1": 0.5, "none": None},
)  # fmt: skip
EVENT = EventView(id="5-0", run_id="a", event="knobs_changed", text="clip.high is 0.28", severity=Severity.INFO, version=1, at=1_763_843_001.0,
                  data={"clip.high": 0.28})  # fmt: skip


def sample(run_id: str, index: int) -> SampleView:
    completion = CompletionView(
        text=HOSTILE, tokens=[7, index], versions=[0, 1], lags=[1, 0], finish=FinishReason.STOP, reward=1.0, parts=[], advantage=0.1,
        entropies=[0.5, 0.25],
    )  # fmt: skip
    completions = [completion, completion.model_copy(update={"reward": None})]
    return SampleView(
        run_id=run_id, index=index, prompt_id="p", prompt="17=", answer={"n": 17}, trained_version=1, issued_version=0, max_lag=2, server="r",
        attempt=1, completions=completions,
    )  # fmt: skip


@dataclass
class FakeApi:
    """Two runs, a and b, with the same record."""

    state: RunState = RunState.COMPLETED
    breaks_at: str = ""
    """The run whose samples do not come to their end."""
    asked: list[str] = field(default_factory=list)

    def run(self, run_id: str) -> RunView:
        if run_id not in ("a", "b"):
            raise ApiError(404, ProblemDocument(title="No such run", status=404, detail=f"run {run_id!r} is not known"))
        return RunView(
            run_id=run_id, name="mine", state=self.state, reason="", created_at=1_763_842_999.0, started_at=0.0, ended_at=None, version=2, versions=3,
            trainer=None, spec=SPEC,
        )  # fmt: skip

    def study(self, study_id: str) -> Any:
        runs = [
            StudyRunView(arm="x", seed=seed, run_id=run_id, state=None, reason="", version=None, versions=3, started_at=None, ended_at=None)
            for seed, run_id in enumerate(["a", None, "b"])
        ]
        return type("Study", (), {"runs": runs})

    def steps(self, run_id: str) -> StepsView:
        return StepsView(run_id=run_id, steps=STEPS, recorded=2)

    def evaluations(self, run_id: str) -> EvaluationsView:
        return EvaluationsView(run_id=run_id, evaluations=[EVALUATION])

    def events(self, run_id: str) -> Iterator[EventView]:
        yield EVENT.model_copy(update={"run_id": run_id})

    def each_sample(self, run_id: str) -> Iterator[SampleView]:
        self.asked.append(f"samples of {run_id}")
        yield from (sample(run_id, index) for index in (3, 2))
        if run_id == self.breaks_at:
            raise Unreachable("http://api does not answer: refused")
        yield from (sample(run_id, index) for index in (1, 0))

    def samples(self, run_id: str, *, last: int | None = None, limit: int = 20) -> SamplesView:
        return SamplesView(run_id=run_id, samples=[sample(run_id, 0)], next=None)

    def conservation(self, run_id: str) -> ConservationView:
        zero = dict.fromkeys(
            ("queued", "running", "generated", "scored", "taken", "replaying", "dead", "cancelled", "outstanding", "superseded", "unreadable"), 0
        )
        return ConservationView(run_id=run_id, issued=4, consumed=4, holds=True, **zero)


@dataclass
class Bench:
    folder: Path
    api: FakeApi = field(default_factory=FakeApi)

    def __call__(self, *args: str, terminal: bool = False) -> Result:
        out, err = (Console(file=io.StringIO(), width=200, force_terminal=terminal) for _ in range(2))
        token = self.folder / "token"
        token.write_text("a-token-of-sixteen\n")
        parts = Parts(client=lambda url, token: self.api, out=out, err=err)  # type: ignore[arg-type, return-value]
        line = ["--url", "http://api", "--token-file", str(token), "run", "export", *args, "--out", str(self.folder / "out")]
        result = CliRunner().invoke(app, line, obj=parts)
        self.out, self.err = out.file.getvalue(), err.file.getvalue()  # type: ignore[attr-defined]
        return result

    def there(self) -> set[str]:
        """Everything below the folder of the exports."""
        return {path.relative_to(self.folder / "out").as_posix() for path in (self.folder / "out").rglob("*")}

    def path(self, name: str) -> Path:
        return self.folder / "out" / name


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_without_a_format_it_writes_json_lines_csv_and_the_report(bench: Bench):
    assert bench("a").exit_code == 0
    names = {f"a/{table}.{kind}" for table in ("steps", "evaluations", "events", "samples") for kind in ("jsonl", "csv")}
    assert bench.there() >= names | {"a", "a/spec.toml", "a/export.json", "a/report.html"}
    assert bench.out == f"{bench.path('a')}\n"
    assert RunSpec.model_validate(tomllib.loads(bench.path("a/spec.toml").read_text())) == SPEC
    told = json.loads(bench.path("a/export.json").read_text())
    assert (told["run_id"], told["state"], told["version"], told["formats"]) == ("a", "completed", 2, ["jsonl", "csv", "report"])


def test_json_lines_are_what_the_api_answers(bench: Bench):
    bench("a", "--format", "jsonl")
    read = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in bench.path("a").glob("*.jsonl")}
    assert [StepView.model_validate(row) for row in read["steps"]] == STEPS
    assert [EvaluationView.model_validate(row) for row in read["evaluations"]] == [EVALUATION]
    assert [SampleView.model_validate(row) for row in read["samples"]] == [sample("a", index) for index in (3, 2, 1, 0)]
    assert [EventView.model_validate(row) for row in read["events"]] == [EVENT]
    assert all(path.read_bytes().isascii() for path in bench.path("a").glob("*.jsonl"))
    assert not list(bench.path("a").glob("*.csv"))


def test_csv_holds_every_digit_and_nothing_that_a_spreadsheet_runs(bench: Bench):
    bench("a", "--format", "csv")
    assert rows_of(bench.path("a/steps.csv")) == [
        {"run_id": "a", "version": "0", "at": "1763843000.123", "min_lag": "0", "max_lag": "2", "groups": "2", "entropy_nats/lag/2-3": "",
         "loss": "", "reward_mean": "0.25", "lag_0_tokens": "30", "lag_2_tokens": "0"},
        {"run_id": "a", "version": "1", "at": "1763843001.5", "min_lag": "0", "max_lag": "3", "groups": "2", "entropy_nats/lag/2-3": "1.5",
         "loss": "", "reward_mean": "0.3333333333333333", "lag_0_tokens": "10", "lag_2_tokens": "20"},
    ]  # fmt: skip
    (evaluation,) = rows_of(bench.path("a/evaluations.csv"))
    assert [evaluation[key] for key in ("run_id", "name", "version", "pass@1", "none")] == ["a", "held-out", "2", "0.5", ""]
    (event,) = rows_of(bench.path("a/events.csv"))
    assert (event["event"], event["severity"], json.loads(event["data"])) == ("knobs_changed", "info", {"clip.high": 0.28})
    samples = rows_of(bench.path("a/samples.csv"))
    assert [(row["index"], row["completion"]) for row in samples] == [(str(index), str(place)) for index in (3, 2, 1, 0) for place in (0, 1)]
    assert samples[0] == {
        "run_id": "a", "index": "3", "completion": "0", "trained_version": "1", "issued_version": "0", "max_lag": "2", "prompt_id": "p",
        "prompt": "17=", "answer": '{"n": 17}', "server": "r", "attempt": "1", "text": f"'{HOSTILE}", "finish": "stop", "reward": "1.0",
        "advantage": "0.1", "parts": "[]", "tokens": "[7, 3]", "versions": "[0, 1]",
        "lags": "[1, 0]", "entropies": "[0.5, 0.25]", "log_ratios": "",
    }  # fmt: skip
    assert samples[1]["reward"] == ""


def test_parquet_of_several_runs_adds_up(bench: Bench):
    assert bench("a", "b", "a", "--format", "parquet").exit_code == 0
    assert bench.api.asked == ["samples of a", "samples of b"]
    for table, rows in (("steps", 2), ("evaluations", 1), ("events", 1), ("samples", 8)):
        both = pyarrow.concat_tables([pyarrow.parquet.read_table(bench.path(f"{run}/{table}.parquet")) for run in "ab"])
        assert both.column("run_id").to_pylist() == ["a"] * rows + ["b"] * rows
    steps = pyarrow.parquet.read_table(bench.path("a/steps.parquet"))
    assert steps.column("at").to_pylist() == [1_763_843_000.123, 1_763_843_001.5]
    assert steps.column("reward_mean").to_pylist() == [0.25, 1 / 3]
    assert steps.column("entropy_nats/lag/2-3").to_pylist() == [None, 1.5]
    assert steps.column("version").type == steps.column("lag_2_tokens").type == pyarrow.int64()
    assert steps.column("loss").type == pyarrow.float64(), "though it was never finite"
    samples = pyarrow.parquet.read_table(bench.path("b/samples.parquet"))
    first = samples.to_pylist()[0]
    assert (first["text"], first["tokens"], first["lags"], first["reward"], first["parts"]) == (HOSTILE, [7, 3], [1, 0], 1.0, "[]")
    assert (first["entropies"], first["log_ratios"]) == ([0.5, 0.25], None)
    assert samples.column("reward").to_pylist() == [1.0, None] * 4


def test_long_completions_are_not_all_in_memory_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export_files, "TOKENS", 6)  # three completions
    assert bench("a", "--format", "parquet").exit_code == 0
    file = pyarrow.parquet.ParquetFile(bench.path("a/samples.parquet"))
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [3, 3, 2]
    assert file.read().column("index").to_pylist() == [3, 3, 2, 2, 1, 1, 0, 0]


def test_tables_of_a_run_without_records_fit_those_of_others(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    assert bench("a", "--format", "parquet").exit_code == 0
    for name in ("events", "each_sample"):
        monkeypatch.setattr(FakeApi, name, lambda self, run_id: iter(()))
    monkeypatch.setattr(FakeApi, "steps", lambda self, run_id: StepsView(run_id=run_id, steps=[], recorded=0))
    monkeypatch.setattr(FakeApi, "evaluations", lambda self, run_id: EvaluationsView(run_id=run_id, evaluations=[]))
    assert bench("b", "--format", "parquet", "--format", "csv", "--format", "tensorboard").exit_code == 0
    for table in ("steps", "evaluations", "events", "samples"):
        whole, empty = (pyarrow.parquet.read_table(bench.path(f"{run}/{table}.parquet")) for run in "ab")
        assert empty.num_rows == 0
        assert set(empty.schema) <= set(whole.schema), "columns and their types"
        assert bench.path(f"b/{table}.csv").read_text().splitlines() == [",".join(empty.column_names)]
    samples = pyarrow.parquet.read_schema(bench.path("b/samples.parquet"))
    assert samples.field("tokens").type == pyarrow.list_(pyarrow.int32())


def test_tensorboard_reads_what_was_measured(bench: Bench):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    assert bench("a", "--format", "tensorboard").exit_code == 0
    assert bench.api.asked == [], "samples are not asked for in vain"
    assert len(list(bench.path("a").glob("events.out.tfevents.*"))) == 1
    read = EventAccumulator(str(bench.path("a")), {"scalars": 0, "histograms": 0, "tensors": 0})
    read.Reload()
    assert set(read.Tags()["scalars"]) == {"reward_mean", "entropy_nats/lag/2-3", "evaluation/held-out/pass@1"}
    assert [(one.step, one.wall_time, one.value) for one in read.Scalars("reward_mean")] == [
        (0, 1_763_843_000.123, 0.25), (1, 1_763_843_001.5, pytest.approx(1 / 3)),
    ]  # fmt: skip
    assert [(one.step, one.value) for one in read.Scalars("evaluation/held-out/pass@1")] == [(2, 0.5)]
    lags = read.Histograms("lag_versions")[1].histogram_value
    assert (lags.num, lags.sum, lags.bucket_limit, lags.bucket) == (30, 40, [0.5, 1.5, 2.5], [10, 0, 20])
    texts = {tag: [make_ndarray(one.tensor_proto).item().decode() for one in read.Tensors(tag)] for tag in read.Tags()["tensors"]}
    assert texts["events"] == ["knobs_changed: clip.high is 0.28"]
    assert 'name = "mine"' in texts["spec"][0]


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of an offline file: LevelDB's log format, in blocks of 32 KiB after seven bytes of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def test_weights_and_biases_gets_each_version_offline(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    assert bench("a", "--format", "wandb", "--offline", "--wandb-project", "mine").exit_code == 0, bench.err
    assert os.environ["WANDB_ERROR_REPORTING"] == "false", "offline it sends nothing at all"
    (path,) = bench.path("a").glob("wandb/offline-run-*/run-a.wandb")
    records = list(wandb_records(path))
    (run,) = [record.run for record in records if record.HasField("run")][:1]
    assert (run.run_id, run.display_name, run.project) == ("a", "mine", "mine")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["staleness"]["max_lag"] == SPEC.staleness.max_lag
    rows = [
        {("/".join(item.nested_key) or item.key): json.loads(item.value_json) for item in record.history.item}
        for record in records if record.HasField("history")
    ]  # fmt: skip
    assert [row["_step"] for row in rows] == [0, 1, 2]
    assert [row.get("reward_mean") for row in rows] == [0.25, 1 / 3, None]
    assert rows[1]["entropy_nats/lag/2-3"] == 1.5
    assert rows[2]["evaluation/held-out/pass@1"] == 0.5
    assert "loss" not in rows[0]


@pytest.mark.parametrize(("kind", "library"), [("wandb", "wandb"), ("tensorboard", "tensorboard"), ("parquet", "pyarrow"), ("report", "matplotlib")])
def test_a_missing_library_is_told_with_the_command_that_installs_it(bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: str, library: str):
    known = metadata.version

    def version(name: str) -> str:
        if name == library:
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    assert bench("a", "--format", kind).exit_code == Code.FAILED
    assert f"--format {kind} needs {library}, which is not installed" in bench.err
    assert f"-m pip install {library}" in bench.err
    assert not bench.path("").exists()


def test_all_runs_of_a_study_that_were_made_are_exported(bench: Bench):
    assert bench("--study", "s", "--format", "tensorboard", "--json").exit_code == 0
    assert {Path(path).parent.name for path in json.loads(bench.out)["files"]} == {"a", "b"}


def test_one_unknown_run_of_several_is_told_before_anything_is_written(bench: Bench):
    assert bench("a", "nobody").exit_code == Code.NOT_FOUND
    assert "run 'nobody' is not known" in bench.err
    assert not bench.path("").exists()
    assert bench().exit_code == Code.USAGE
    assert "which run?" in bench.err


def test_an_export_is_replaced_as_a_whole_and_only_when_the_new_one_is_complete(bench: Bench):
    bench("a", "--format", "csv", "--format", "jsonl")
    bench.api.breaks_at = "a"
    assert bench("a", "--format", "parquet").exit_code == Code.NO_STACK
    files = {f"a/{table}.{kind}" for table in ("steps", "evaluations", "events", "samples") for kind in ("csv", "jsonl")}
    assert bench.there() == {"a", "a/spec.toml", "a/export.json", *files}
    assert len(rows_of(bench.path("a/samples.csv"))) == 8
    bench.api.breaks_at = ""
    assert bench("a", "--format", "tensorboard").exit_code == 0
    assert len(bench.there()) == 4, "nothing of the older export stays beside the new one"


def test_what_is_no_export_is_never_replaced(bench: Bench):
    checkpoint = bench.path("a/checkpoints/v3")
    checkpoint.mkdir(parents=True)
    assert bench("b", "a").exit_code == Code.USAGE
    assert "is there and is no export" in bench.err
    assert bench.there() == {"a", "a/checkpoints", "a/checkpoints/v3"}


def test_progress_is_shown_on_a_terminal_only(bench: Bench):
    bench("a", "b", "--format", "jsonl", terminal=True)
    assert "a: groups" in bench.err
    assert "4/4" in bench.err
    bench("a", "b", "--format", "jsonl")
    assert bench.err == ""


def test_all_samples_are_asked_for_page_by_page_and_each_is_given_once(monkeypatch: pytest.MonkeyPatch):
    """A group may be recorded on two pages, when it was trained on again after a restart."""
    pages = {None: ([5, 4], "c1"), "c1": ([4, 3], "c2"), "c2": ([2], None)}
    asked = []

    def ask(self: Client, view: Any, method: str, path: str, *, params: dict[str, Any]) -> SamplesView:
        asked.append((path, params["limit"]))
        indices, after = pages[params.get("cursor")]
        return SamplesView(run_id="a", samples=[sample("a", index) for index in indices], next=after)

    monkeypatch.setattr(Client, "_ask", ask)
    with Client("http://127.0.0.1:1", "token") as client:
        assert [one.index for one in client.each_sample("a")] == [5, 4, 3, 2]
        assert asked == [("runs/a/samples", 200)] * 3
        assert [one.index for one in client.samples("a", limit=3).samples] == [5, 4, 3]
        assert asked[3:] == [("runs/a/samples", 3), ("runs/a/samples", 1)]
