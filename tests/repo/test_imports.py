"""Who may import what: the contracts of pyproject.toml, and what must load on a machine without PyTorch."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PLANES = ("services", "trainer", "rollout_server", "reward_server")


def modules_of(package: str) -> list[str]:
    """Dotted names of all modules below `package`."""
    folder = ROOT.joinpath(*package.split("."))
    names = (path.relative_to(ROOT).with_suffix("").parts for path in sorted(folder.rglob("*.py")))
    return [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names]


def test_import_contracts_are_kept() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " kept, 0 broken." in result.stdout


@pytest.mark.parametrize(
    "package", ["services.contracts", "services.runtime", "services.control_plane", "reward_server", "services.cli", "services.client"]
)
def test_package_loads_without_torch(package: str) -> None:
    modules = modules_of(package) if ROOT.joinpath(*package.split(".")).is_dir() else [package]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'vllm', 'transformers'} & sys.modules.keys()\n"
        "    if name.startswith('reward_server'):\n"
        "        heavy |= {'numpy'} & sys.modules.keys()  # its judges live under a limit of memory\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


HOLDS_ONLY = """
import importlib, importlib.metadata, re, sys
names, packages = sys.argv[1].split(), set(sys.argv[2].split())
owners = importlib.metadata.packages_distributions()

class Refuses:
    def find_spec(self, name, path, target=None):
        top = name.partition(".")[0]
        if top in owners and not packages & {re.sub("[-_.]+", "-", owner).lower() for owner in owners[top]}:
            raise ModuleNotFoundError(f"no package of the set has {name}", name=name)

sys.meta_path.insert(0, Refuses())
for name in names:
    importlib.import_module(name)
"""


@pytest.mark.parametrize(
    ("lock", "packages"),
    [
        ("control-plane", ["services.contracts", "services.runtime", "services.control_plane", "services.ui", "services.evaluation", "services.cli"]),
        ("reward-server", ["services.contracts", "services.runtime", "reward_server"]),
    ],
)
def test_an_image_s_set_holds_what_its_modules_import(lock: str, packages: list[str]) -> None:
    lines = [line for name in (lock, "reasoning-gym") for line in (ROOT / "deploy" / "locks" / f"{name}.txt").read_text().splitlines()]
    held = {canonicalize_name(Requirement(line).name) for line in lines if line and not line.startswith("#")} | {"offbeat"}
    modules = [name for package in packages for name in modules_of(package)]
    arguments = [sys.executable, "-c", HOLDS_ONLY, " ".join(modules), " ".join(held)]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


def test_contracts_need_the_standard_library_and_pydantic_only() -> None:
    allowed = sys.stdlib_module_names | {"pydantic"}
    for path in sorted((ROOT / "services" / "contracts").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name} has a relative import"
                names = [node.module or ""]
            for name in names:
                assert name.partition(".")[0] in allowed or name.startswith("services.contracts"), f"{path.name} imports {name}"


def test_no_other_distribution_owns_our_packages() -> None:
    """Two distributions with a folder of the same name overwrite each other file by file, without a word."""
    for package in PLANES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin == str(ROOT / package / "__init__.py")


@pytest.mark.parametrize("folder", ["docker", "deploy", "tests"])
def test_folder_is_no_package(folder: str) -> None:
    """docker/__init__.py would hide the Docker SDK; one under tests/trainer would make pytest import the tests as `trainer`."""
    assert list((ROOT / folder).rglob("__init__.py")) == []
