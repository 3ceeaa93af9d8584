"""The dashboards are in step with the module that makes them and with the metrics that they show."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from services.contracts.measures import BINNED, EVALUATION_KEYS, STEP_KEYS
from tests.unit.metric_catalogue import DASHBOARDS, OF_THE_SCRAPE, ROOT, dashboard, panels, queries, recorded, rules, selectors, served, unknown

EVERY_QUERY = [pytest.param(expr, id=f"{path.stem}: {where}") for path in DASHBOARDS for where, expr in queries(path)]
NOT_SHOWN = {"offbeat_process_virtual_memory_bytes"}
"""Address space tells nothing; the library serves it with the memory that counts."""
each = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


def test_the_json_is_as_the_module_makes_it() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="deploy/install.sh dev")
    made = runpy.run_path(str(ROOT / "deploy/grafana/build_dashboards.py"))["render"]()
    assert {path.name for path in DASHBOARDS} == set(made)
    for path in DASHBOARDS:
        assert path.read_text() == made[path.name], "run `.venv/bin/python deploy/grafana/build_dashboards.py`"


def test_there_are_the_five() -> None:
    assert {dashboard(path)["uid"] for path in DASHBOARDS} == {f"offbeat-{name}" for name in ("entropy", "staleness", "reward", "fleet", "study")}


@pytest.mark.parametrize("expr", EVERY_QUERY)
def test_every_metric_of_a_query_is_there_with_the_labels_that_it_is_asked_for(expr: str) -> None:
    assert unknown(expr) == set()
    for one in selectors(expr):
        if one.metric in served():
            assert {label for label, _, _ in one.matchers} <= served()[one.metric] | OF_THE_SCRAPE


@pytest.mark.parametrize("expr", EVERY_QUERY)
def test_every_measurement_of_a_query_is_in_the_catalogue(expr: str) -> None:
    for one in selectors(expr):
        if one.metric == "offbeat_trainer_step":
            assert one.values("name")
            for name in one.values("name"):
                assert name in STEP_KEYS
                assert [by for by in one.values("by") if by] in [[], *([by] for by in BINNED.get(name, ()))]
        if one.metric == "offbeat_evaluation":
            for name in one.values("name"):
                assert [key for key in EVALUATION_KEYS if re.fullmatch(name, key)]


@pytest.mark.parametrize("expr", EVERY_QUERY)
def test_what_knows_its_run_is_filtered_by_it(expr: str) -> None:
    if expr.startswith("label_values"):
        return
    for one in selectors(expr):
        if "run" in served().get(one.metric, ()) or "by (run" in recorded().get(one.metric, ""):
            assert ("run", "=~", "$run") in one.matchers, one.text


def test_a_renamed_metric_and_a_renamed_label_are_found() -> None:
    assert unknown('sum(rate(offbeat_trainer_tokens_total[5m])) / offbeat_trainer_tokens{run="a"} + vllm:no_such') == {
        "offbeat_trainer_tokens", "vllm:no_such",
    }  # fmt: skip
    assert unknown("offbeat:entropy_left:ratios") == {"offbeat:entropy_left:ratios"}
    assert served()["offbeat_queue_groups"] == {"run", "place"}
    assert served()["offbeat_trainer_lag_versions_bucket"] == {"run", "le"}
    assert served()["offbeat_evaluation"] == {"run", "set", "domain", "name"}


def test_every_metric_is_read_by_a_panel_or_a_rule() -> None:
    asked = [expr for path in DASHBOARDS for _, expr in queries(path)] + [rule["expr"] for rule in rules()]
    read = {one.metric for expr in asked for one in selectors(expr)}
    unread = {name for name in served() if name not in read and not re.search(r"_(bucket|sum|count)$", name)}
    histograms = {name.removesuffix("_bucket") for name in served() if name.endswith("_bucket")}
    unread |= {name for name in histograms if not read & {f"{name}_bucket", f"{name}_sum", f"{name}_count"}}
    assert unread == NOT_SHOWN
    assert set(recorded()) <= read, "what is recorded is read"


@each
def test_every_panel_says_what_it_shows_and_in_which_unit(path: Path) -> None:
    assert len(panels(path)) >= 10
    for panel in panels(path):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert len(panel["description"]) > 20, panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    titles = [panel["title"] for panel in panels(path)]
    assert len(set(titles)) == len(titles)


@each
def test_no_panel_lies_on_another(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard(path)["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


@each
def test_every_dashboard_has_the_variables_and_the_marks(path: Path) -> None:
    whole = dashboard(path)
    assert [variable["name"] for variable in whole["templating"]["list"]] == ["datasource", "study", "run"]
    assert {mark["name"] for mark in whole["annotations"]["list"]} == {"Alerts", "Knobs", "Restarts"}
    sources = re.findall(r'"uid": "([^"]*)"', path.read_text())
    assert set(sources) == {"${datasource}", whole["uid"]}, "it can be imported anywhere"
