"""What lies in the repository: nothing of the machine that it was written on, and every file that is data loads as what it is."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.contracts.spec import RunSpec

ROOT = Path(__file__).resolve().parents[2]
RUN_FILES = sorted((ROOT / "deploy" / "runs").glob("**/*.toml"))
PLACES_IN_IMAGES = {"/", "/app", "/opt", "/src", "/srv", "/tmp", "/usr", "/usr/src", "/var"}
"""Parents of a checkout that files of docker/ and the charts may name for reasons of their own."""


def text_files() -> Iterator[tuple[str, str]]:
    """(path, text) of every file that is, or is about to be, in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            yield name, content.decode()


def test_no_file_names_a_folder_of_the_machine_it_was_written_on() -> None:
    home = re.compile(r"/(?:home|Users)/[a-z][\w.-]*/|/r[o]ot/\.?\w")
    checkout = re.compile(rf"(?<![\w.~-]){re.escape(str(ROOT.parent))}/")
    found = []
    for name, text in text_files():
        if not name.startswith("docker/"):  # images have homes of their own
            found += [f"{name}: {match[0]}" for match in home.finditer(text)]
        if str(ROOT.parent) not in PLACES_IN_IMAGES:
            found += [f"{name}: {match[0]}" for match in checkout.finditer(text)]
    assert found == []


def test_no_file_names_a_package_registry_or_a_host_of_a_private_network() -> None:
    pattern = re.compile(
        r"(?i)python[h]osted[.]|py[p]i[.]org|[n]pmjs[.]|(?:extra-)?index-url\s*=|--(?:extra-)?index-url|find-links"
        r"|https?://[\w.-]+[.](?:internal|corp|lan|intra)\b"
    )
    own = Path(__file__).relative_to(ROOT).as_posix()
    found = [f"{name}: {match[0]}" for name, text in text_files() if name != own for match in pattern.finditer(text)]
    assert found == []


def test_secrets_are_in_no_file() -> None:
    pattern = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bhf_[A-Za-z0-9]{30,}|\bghp_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b")
    assert [name for name, text in text_files() if pattern.search(text)] == []


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_run_file_is_a_valid_spec(path: Path) -> None:
    RunSpec.model_validate(tomllib.loads(path.read_text()))


def test_the_demo_has_its_run_file_and_its_model() -> None:
    spec = RunSpec.model_validate(tomllib.loads((ROOT / "deploy" / "runs" / "demo.toml").read_text()))
    assert (ROOT / spec.model.path / "model.safetensors").is_file()


def test_make_has_the_targets_that_are_documented_and_no_more() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z][\w-]*):(?!=)", text, flags=re.MULTILINE)
    assert sorted(targets) == ["bench", "check", "demo", "docs", "down", "help", "images", "test", "test-docker", "up"]
    assert sorted(re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)[1].split()) == sorted(targets)
