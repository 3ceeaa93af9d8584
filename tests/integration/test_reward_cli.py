"""`offbeat reward` with a real reward server."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console
from typer.testing import CliRunner, Result

from reward_server.app import MAX_BODY, create_app
from reward_server.judges.pool import JudgePools
from reward_server.scoring import Scoring
from reward_server.scoring_threads import ScoringThreads
from reward_server.verifiers.verdict import Tools
from services.cli import json_lines
from services.cli.__main__ import app
from services.cli.session import Code, Parts
from services.runtime.metrics import RewardMetrics
from services.runtime.process import serving
from tests.integration.conftest import CLUSTER_TOKEN, free_port

Offbeat = Callable[..., Result]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    pools, threads, registry, port = JudgePools(), ScoringThreads(4, most_waiting=64), CollectorRegistry(), free_port()
    scoring = Scoring(Tools(ask=pools.ask), threads, RewardMetrics(registry))
    with serving(create_app(scoring=scoring, cluster_token=CLUSTER_TOKEN, registry=registry, ready=lambda: None), host="127.0.0.1", port=port):
        yield f"http://127.0.0.1:{port}"
    threads.close()
    pools.close()


@pytest.fixture
def offbeat(server: str, tmp_path: Path) -> Offbeat:
    """Runs `offbeat reward ARGUMENTS` with that server."""
    token = tmp_path / "cluster-token"
    token.write_text(CLUSTER_TOKEN)

    def run(command: str, *arguments: object) -> Result:
        out, err = (Console(file=io.StringIO(), width=400, highlight=False) for _ in range(2))
        named = ["--server", server, "--cluster-token-file", token]
        result = CliRunner().invoke(app, ["reward", command, *map(str, [*arguments, *named])], obj=Parts(out=out, err=err))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        result.said, result.warned = out.file.getvalue(), err.file.getvalue()  # type: ignore[attr-defined]
        return result

    return run


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- score ----------------------------------------------------------------------------------------------------------------------------


def test_every_line_gets_its_result_and_bad_ones_are_told_by_number(offbeat: Offbeat, tmp_path: Path) -> None:
    file = write(
        tmp_path / "in.jsonl",
        {"completion": r"\boxed{1/2}", "answer": "0.5", "id": 7},
        {"completion": r"\boxed{3}", "answer": "0.5"},
        "not json",
        "",
        {"answer": "0.5"},
        {"completion": r"\boxed{1}", "answer": None},
        {"completion": 5, "answer": "0.5"},
        {"completion": "9" * MAX_BODY, "answer": "1"},
        {"completion": r"\boxed{1+x}", "answer": "x+1"},
    )
    result = offbeat("score", file, "--verifier", "math", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == Code.FAILED
    found = {one["line"]: one for one in results(tmp_path / "out.jsonl")}
    assert list(found) == [1, 2, 3, 5, 6, 7, 8, 9]
    assert {line: one["score"].get("reward") for line, one in found.items() if "score" in one} == {1: 1.0, 2: 0.0, 6: None, 9: 1.0}
    assert (found[1]["score"]["outcome"], found[6]["score"]["outcome"]) == ("ok", "unverifiable")
    for line, said in ((3, "not JSON"), (5, "no field 'completion'"), (6, "unverifiable"), (7, "completion: "), (8, "at most")):
        assert any(f"line {line}: " in text and said in text for text in result.warned.splitlines())
    assert "3 scored, mean reward 0.6667" in result.said


def test_a_rubric_comes_from_a_file_too_and_numbers_for_programs(offbeat: Offbeat, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", *[{"completion": rf"\boxed{{{n % 2}}}", "answer": "1"} for n in range(150)])
    rubric = tmp_path / "rewards.toml"
    rubric.write_text('[[rewards]]\nname = "math"\nweight = 2.0\n[[rewards]]\nname = "format"\noptions = { boxed = true }\n')
    result = offbeat("score", file, "--rewards", rubric, "--json")
    assert result.exit_code == 0
    told = json.loads(result.said)
    assert (told["outcomes"], told["scored"], told["reward_mean"], told["unscored"]) == ({"ok": 150}, 150, 2.0, [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either --rewards FILE or --verifier NAME"),
        (["--verifier", "maths"], "did you mean 'math'?"),
        (["--verifier", "math", "--option", "extract=middle"], "extract"),
        (["--verifier", "math", "--resume"], "name it with --out"),
    ],
)
def test_what_is_wrong_with_the_command_is_said_before_anything_is_judged(offbeat: Offbeat, tmp_path: Path, arguments: list[str], said: str) -> None:
    file = write(tmp_path / "in.jsonl", {"completion": "1", "answer": "1"})
    result = offbeat("score", file, *arguments)
    assert (result.exit_code, said in result.warned) == (Code.USAGE, True), result.warned


def test_results_that_are_there_are_lost_to_no_mistake(offbeat: Offbeat, tmp_path: Path) -> None:
    file, out = write(tmp_path / "in.jsonl", {"completion": r"\boxed{1}", "answer": "1"}), write(tmp_path / "out.jsonl", {"line": 1})
    told = [
        (["--verifier", "maths", "--force"], out, "did you mean 'math'?"),
        (["--verifier", "math"], out, "--force writes over it"),
        (["--verifier", "math", "--force"], file, "what is to be judged"),
        (["--verifier", "math", "--force"], tmp_path / "nowhere" / "out.jsonl", "its folder is not there"),
        (["--verifier", "math", "--force"], tmp_path, "it is a folder"),
    ]
    for arguments, target, said in told:
        result = offbeat("score", file, *arguments, "--out", target)
        assert (result.exit_code, said in result.warned) == (Code.USAGE, True), result.warned
    missing = offbeat("score", tmp_path / "nothing.jsonl", "--verifier", "math", "--out", out, "--force")
    assert (missing.exit_code, "cannot read" in missing.warned) == (Code.USAGE, True)
    assert (results(out), len(results(file))) == ([{"line": 1}], 1)
    assert offbeat("score", file, "--verifier", "math", "--out", out, "--force").exit_code == 0
    assert [one["score"]["reward"] for one in results(out)] == [1.0]


def test_an_interrupted_file_is_gone_on_with(offbeat: Offbeat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle leaves whole results; the rest is added later, none twice."""
    monkeypatch.setattr(json_lines, "ITEMS", 2)
    bombs = {"completion": r"\boxed{9^{9^{9^{9}}}}", "answer": "7"}
    lines = [{"completion": rf"\boxed{{{n}}}", "answer": "1"} for n in range(20)]
    file, out = write(tmp_path / "in.jsonl", *lines[:10], *[bombs] * 40, *lines[10:]), tmp_path / "out.jsonl"

    def interrupt() -> None:
        while not (out.exists() and len(out.read_text().splitlines()) >= 4):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    first = offbeat("score", file, "--verifier", "math", "--out", out)
    assert first.exit_code == Code.INTERRUPTED
    assert "--resume goes on with it" in first.warned
    before = results(out)
    assert [one["line"] for one in before] == list(range(1, len(before) + 1))
    assert 4 <= len(before) < 60
    assert offbeat("score", file, "--verifier", "math", "--out", out).exit_code == Code.USAGE, "what is there is not written over"
    write(file, *lines)
    whole = out.read_text().splitlines(keepends=True)[:4]
    out.write_text("".join(whole) + '{"line": 5, "sco')  # as a crash may leave it
    second = offbeat("score", file, "--verifier", "math", "--out", out, "--resume")
    assert second.exit_code == 0
    assert [one["line"] for one in results(out)] == list(range(1, 21))
    assert "4 lines were there already" in second.said


# -- check ----------------------------------------------------------------------------------------------------------------------------


def test_a_gold_answer_that_its_verifier_refuses_is_told_with_its_line(offbeat: Offbeat, tmp_path: Path) -> None:
    data = write(
        tmp_path / "train.jsonl",
        {"question": "1+1?", "gold": "2"},
        {"question": "?", "gold": r"\sqrt{2"},
        "{",
        {"question": "?", "gold": r"\frac{\sqrt{2}}{2}"},
        {"question": "?"},
    )
    result = offbeat("check", "--data", data, "--verifier", "math", "--prompt-field", "question", "--answer-field", "gold")
    assert result.exit_code == Code.FAILED
    refused = [line.partition(":")[0] for line in result.warned.splitlines() if "refuses" in line]
    assert refused == ["line 2", "line 3", "line 5"]
    assert "scored 0.0" in result.warned


def test_the_data_of_a_run_and_of_its_evaluation_sets_are_checked(offbeat: Offbeat, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", *[{"prompt": f"{n}?", "answer": n} for n in range(5)])
    held = write(tmp_path / "held.jsonl", {"prompt": "?", "answer": "1/3"}, {"prompt": "?", "answer": r"\sqrt{2"})
    spec = tmp_path / "run.toml"
    spec.write_text(
        f'[data]\nsource = "jsonl"\npath = "{train}"\n[[rewards]]\nname = "math"\n'
        f'[[evaluation.sets]]\nname = "held"\ndata = {{ source = "jsonl", path = "{held}" }}\n'
    )
    result = offbeat("check", spec, "--json")
    assert result.exit_code == Code.FAILED
    told = {one["data"]: one for one in json.loads(result.said)}
    assert (told["training"]["accepted"], told["training"]["refused"]) == (5, [])
    assert (told["held"]["accepted"], [one["where"] for one in told["held"]["refused"]]) == (1, ["held.jsonl:2"])


def test_bounds_and_weights_of_a_rubric_are_no_verdict_on_its_gold_answers(offbeat: Offbeat, tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", {"prompt": "?", "answer": "2"}, {"prompt": "?", "answer": r"\sqrt{2"})
    rubric = tmp_path / "rewards.toml"
    rubric.write_text('[[rewards]]\nname = "math"\nweight = 0.5\nleast = -1.0\nmost = 0.5\ngate = 1.0\n')
    result = offbeat("check", "--data", data, "--rewards", rubric, "--json")
    (told,) = json.loads(result.said)
    assert (result.exit_code, told["accepted"], [one["line"] for one in told["refused"]]) == (Code.FAILED, 1, [2])


def test_gold_answers_that_make_no_sense_are_told_even_where_no_completion_can_be_made_of_any(offbeat: Offbeat, tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {
        "instructions": [
            {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
            {"instruction_id_list": ["no:such"], "kwargs": [{}]},
            None,
        ],
        "regex": ["a+", "(", 5],
        "code": [{"function": "f", "calls": [{"expected": 1}]}, "{'function': 1}", None],
        "math": ["7", ["7"], None],
    }
    for verifier, answers in rows.items():
        data = write(tmp_path / f"{verifier}.jsonl", *[{"prompt": "?", "answer": answer} for answer in answers])
        result = offbeat("check", "--data", data, "--verifier", verifier, "--json")
        (told,) = json.loads(result.said)
        assert result.exit_code == Code.FAILED
        assert [one["line"] for one in told["refused"]] == [2, 3]
        assert all("unverifiable" in one["why"] for one in told["refused"])
        assert (told["accepted"], told["unknown"]) == ((1, 0) if verifier == "math" else (0, 1))


def test_a_verifier_whose_gold_answers_cannot_be_checked_is_said_to_be_so(offbeat: Offbeat, tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", {"prompt": "?", "answer": "2"})
    result = offbeat("check", "--data", data, "--verifier", "remote", "--option", "url=http://127.0.0.1:1/")
    assert result.exit_code == 0
    assert "remote: its gold answers cannot be checked without asking others" in result.warned
