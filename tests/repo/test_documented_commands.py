"""What the documents tell a reader to type is there: commands, options, targets of make, values of the chart, versions."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compose
import kubernetes_validate
import pytest
import typer
import yaml
from helm_python.chart import Chart

from services.cli.__main__ import app

ROOT = Path(__file__).resolve().parents[2]
DOCS = [*ROOT.glob("*.md"), *(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "adr"), ROOT / "docker" / "README.md"]
CHART = ROOT / "deploy" / "helm" / "offbeat"
DEPLOYMENT = (ROOT / "docs" / "deployment.md").read_text()
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
COMMAND: Any = typer.main.get_command(app)


def typed(text: str) -> Iterator[str]:
    """Lines of code blocks, those that end in a backslash joined with the next, and what stands between backticks."""
    blocks = re.findall(r"^```(?:\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for block in blocks:
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def words_after(program: str, line: str) -> list[str] | None:
    """Arguments of the program where a line calls it, at its start or in a container."""
    found = re.match(rf"(?:docker (?:compose exec|run) .*?(?<=[\s/]))?(?:\.venv/bin/)?{program} (.+)", line.split("  #")[0].strip())
    return shlex.split(re.split(r" (?:&&|\||<|>|;) ?", found[1])[0]) if found else None


def wrong(words: list[str]) -> str | None:
    """What of a call of `offbeat` is not there."""
    command, known = COMMAND, {name for option in COMMAND.params for name in option.opts}
    for word in words:
        if word.startswith("-"):
            if word.partition("=")[0] not in known | {"--help"}:
                return word
        elif hasattr(command, "commands"):
            if word not in command.commands:
                return word
            command = command.commands[word]
            known |= {name for option in command.params for name in [*option.opts, *option.secondary_opts]}
    return None


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_call_of_the_command_is_one_that_there_is(path: Path) -> None:
    calls = [(line, words) for line in typed(path.read_text()) if (words := words_after("offbeat", line))]
    assert [(line, missing) for line, words in calls if (missing := wrong(words))] == []


def test_a_call_that_there_is_not_is_found() -> None:
    assert wrong(["run", "submit", "deploy/runs/demo.toml", "--watch"]) is None
    assert wrong(["run", "submti", "x"]) == "submti"
    assert wrong(["init", "--gpu", "2"]) == "--gpu"
    assert words_after("offbeat", 'docker run --rm -v "$PWD:/work" offbeat/control-plane:0.1.0 offbeat init --gpus 2') == ["init", "--gpus", "2"]
    assert words_after("offbeat", "offbeat fleet   # who lives") == ["fleet"]
    assert len([line for path in DOCS for line in typed(path.read_text()) if words_after("offbeat", line)]) > 50


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_target_of_make_is_one_that_there_is(path: Path) -> None:
    targets = re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = [words[0] for line in typed(path.read_text()) if (words := words_after("make", line))]
    assert set(named) <= set(targets)


def test_every_call_of_compose_has_options_that_compose_knows() -> None:
    calls = [words for line in typed(DEPLOYMENT) if (words := words_after("docker compose", line))]
    assert {words[0] for words in calls} >= {"config", "up", "exec", "down", "ps", "logs"}
    program = str(Path(compose.__file__).parent / "docker-compose")
    for words in calls:
        asked = subprocess.run([program, words[0], "--help"], capture_output=True, text=True, timeout=60, check=True)
        own = words[1 : words.index("offbeat")] if "offbeat" in words else words[1 : words.index("grafana")] if "grafana" in words else words[1:]
        known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", asked.stdout))
        assert {word for word in own if word.startswith("-")} <= known, words


def test_what_is_named_of_the_chart_is_there() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    named = [name for name in re.findall(r"`([a-z]\w*(?:\.\w+)+)(?:: [^`]*)?`", DEPLOYMENT) if name.split(".")[0] in values]
    assert len(named) > 10
    for name in named:
        below = values
        for part in name.split("."):
            assert part in below, name
            below = below[part]
    files = re.findall(r"^\| `([\w-]+\.yaml)` \|", DEPLOYMENT, flags=re.MULTILINE)
    assert sorted(files) == sorted(path.name for path in (CHART / "values").glob("*.yaml"))


def test_the_pod_that_models_are_copied_with_is_one_and_the_claim_is_made_by_the_chart() -> None:
    (text,) = re.findall(r"<<'END'\n(.*?)^END$", DEPLOYMENT, flags=re.MULTILINE | re.DOTALL)
    pod = yaml.safe_load(text)
    kubernetes_validate.validate(pod, "1.29", strict=True)
    with Chart.load(CHART) as chart:
        rendered = chart.render({"existingSecret": "offbeat"}, name="offbeat", namespace="offbeat")
    made = [d["metadata"]["name"] for d in yaml.safe_load_all(rendered["offbeat/templates/storage.yaml"]) if d]
    assert [volume["persistentVolumeClaim"]["claimName"] for volume in pod["spec"]["volumes"]] == ["offbeat-models"]
    assert "offbeat-models" in made


def test_all_say_the_same_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert {chart["version"], chart["appVersion"]} == {VERSION}
    files = [*ROOT.glob("compose*.yaml"), ROOT / ".env.example", ROOT / "docs" / "deployment.md"]
    said = [
        said
        for path in files
        for said in re.findall(r"(?:OFFBEAT_TAG(?::-|=)|(?:control-plane|reward-server|server|trainer):)(\d[\d.]*\d)", path.read_text())
    ]
    assert len(said) > 8
    assert set(said) == {VERSION}


def test_make_help_says_what_each_target_does() -> None:
    told = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    targets = re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert [line.split()[0] for line in told.splitlines()] == targets
    assert all(len(line.split(maxsplit=1)[1]) >= 8 for line in told.splitlines())
