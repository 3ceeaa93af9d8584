"""The documents are in step with the code that they describe."""

import re
import runpy
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Any, cast, get_args

import pytest
from prometheus_client import CollectorRegistry

from services.contracts import algorithms
from services.contracts.algorithms import TAGS, Advantage, Anchor, EntropyControl, Loss, PositiveReweighting, StalenessTarget, Weighting
from services.contracts.spec import KNOBS, RunSpec
from services.control_plane.app import create_app
from services.runtime.metrics import ControlPlaneMetrics, ProcessMetrics, RewardMetrics, RolloutMetrics, TrainerMetrics
from services.runtime.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
ADRS = sorted((ROOT / "docs" / "adr").glob("*.md"))
OF_THE_COMMAND = {"OFFBEAT_URL", "OFFBEAT_HOME", "OFFBEAT_VENV"}
"""Variables that no process of the fleet reads."""
ALGORITHMS = (ROOT / "docs" / "algorithms.md").read_text()
QUICK_START = (ROOT / "docs" / "quick-start.md").read_text()
RECIPES = re.findall(r"^```toml\n(.*?)^```", ALGORITHMS + QUICK_START, flags=re.MULTILINE | re.DOTALL)
DEFAULTS = [recipe for recipe in RECIPES if recipe.startswith("# defaults\n")]
VARIANTS: dict[str, Any] = {"advantage": Advantage, "loss": Loss, "entropy": EntropyControl}
ROLES: list[type[ProcessMetrics]] = [RolloutMetrics, RewardMetrics, TrainerMetrics, ControlPlaneMetrics]


def without_code_blocks(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def metric_names() -> set[str]:
    """Of every role; a counter as it is scraped."""
    found = set()
    for role in ROLES:
        registry = CollectorRegistry()
        role(registry)
        found |= {f"{family.name}_total" if family.type == "counter" else family.name for family in registry.collect()}
    return found


def test_the_run_spec_is_as_generated() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "generate_run_spec.py"))
    assert (ROOT / "docs" / "run-spec.md").read_text() == script["render"](), "run `.venv/bin/python docs/generate_run_spec.py`"


def test_the_catalogue_of_metrics_is_as_generated() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "generate_metrics.py"))
    assert (ROOT / "docs" / "metrics.md").read_text() == script["render"](), "run `.venv/bin/python docs/generate_metrics.py`"


def test_the_verifiers_are_as_generated() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "generate_verifiers.py"))
    assert (ROOT / "docs" / "verifiers.md").read_text() == script["render"](), "run `.venv/bin/python docs/generate_verifiers.py`"


def test_every_route_is_documented_and_no_other() -> None:
    registry = CollectorRegistry()
    app = create_app(cast(Any, None), token="t" * 32, registry=registry, metrics=ControlPlaneMetrics(registry), ready=lambda: None)
    routes = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods if path.startswith("/v1/")}
    assert set(re.findall(r"^\| ([A-Z]+) \| `(/v1/[^`]*)` \|", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)) == routes


def test_every_environment_variable_is_documented_and_no_other() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    read = {f"OFFBEAT_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"^\| `(OFFBEAT_\w+)` \|", text, flags=re.MULTILINE)) == read
    assert set(re.findall(r"\bOFFBEAT_[A-Z_]+\b", text)) == read | OF_THE_COMMAND


def test_every_metric_is_documented_and_no_other() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert set(re.findall(r"^\| `(offbeat_\w+)` \|", text, flags=re.MULTILINE)) == metric_names()
    assert set(re.findall(r"\boffbeat_\w+\b", text)) <= metric_names()


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_every_recipe_is_a_run_spec(recipe: str) -> None:
    RunSpec.model_validate(tomllib.loads(recipe))


@pytest.mark.parametrize("shown", DEFAULTS, ids=range(len(DEFAULTS)))
def test_what_is_shown_as_defaults_is_that_and_whole(shown: str) -> None:
    for section, fields in tomllib.loads(shown).items():
        tag = TAGS.get(section)
        bare = RunSpec.model_validate({section: {tag: fields[tag]}} if tag else {})
        assert fields == getattr(bare, section).model_dump(mode="json", exclude_none=True)


def test_every_variant_of_the_algorithms_is_documented() -> None:
    """As it is written in a run file: `kind = "clip"`."""
    written = [
        f'{TAGS[section]} = "{variant.model_fields[TAGS[section]].default}"'
        for section, union in VARIANTS.items() for variant in get_args(get_args(union)[0])
    ]  # fmt: skip
    closed: dict[str, type[StrEnum]] = {"anchor": Anchor, "weight": Weighting}
    written += [f'{name} = "{one}"' for name, values in closed.items() for one in values]
    for name, owner in {"schedule": PositiveReweighting, "metric": StalenessTarget}.items():
        written += [f'{name} = "{one}"' for one in get_args(owner.model_fields[name].annotation)]
    assert len(written) > 40
    assert [one for one in written if one not in ALGORITHMS] == []


def test_every_control_method_is_shown_with_its_defaults() -> None:
    shown = {tomllib.loads(block).get("entropy", {}).get("method") for block in DEFAULTS}
    methods = {method.model_fields["method"].default for method in get_args(get_args(EntropyControl)[0])}
    assert methods - shown == {"none"}


def test_every_paper_and_knob_of_the_algorithms_is_documented() -> None:
    papers = set(re.findall(r"arXiv (\d{4}\.\d{5})", Path(algorithms.__file__).read_text()))
    assert len(papers) > 20
    assert [paper for paper in sorted(papers) if paper not in ALGORITHMS] == []
    knobs = [knob for knob in KNOBS if knob.split(".")[0] in {"advantage", "clip", "entropy", "staleness"} and "." in knob]
    assert [knob for knob in sorted(knobs) if knob not in ALGORITHMS] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_paths_lead_to_something(path: Path) -> None:
    text = without_code_blocks(path)
    links = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?://|#", target)}
    assert [target for target in sorted(links) if not (path.parent / target).exists()] == []
    named = re.findall(r"`((?:services|trainer|rollout_server|reward_server|deploy|docs|tests|benchmarks)/[\w./-]*)`", text)
    assert [target for target in sorted(set(named)) if not (ROOT / target).exists()] == []


def test_the_layout_names_what_is_there() -> None:
    layout = (ROOT / "ARCHITECTURE.md").read_text().split("## Layout")[1].split("```")[1]
    folder, missing = ROOT, []
    for line in layout.strip().splitlines():
        below = line
        if not line.startswith(" "):
            path, _, below = line.partition(" ")
            folder = ROOT / path
            missing += [] if folder.exists() else [path]
        missing += [name for name in re.findall(r"(?<![\w/])(\w+(?:\.py|/))", below) if not (folder / name).exists()]
    assert missing == []


@pytest.mark.parametrize("path", ADRS, ids=lambda path: path.name)
def test_a_decision_has_its_number_and_its_four_parts(path: Path) -> None:
    text = path.read_text()
    assert text.startswith(f"# {path.name[:4]}: ")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == ["Context", "Decision", "Rejected", "Consequences"]


def test_decisions_are_numbered_without_a_gap() -> None:
    assert [path.name[:4] for path in ADRS] == [f"{n:04d}" for n in range(1, len(ADRS) + 1)]
