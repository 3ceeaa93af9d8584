import csv
import html.parser
import math
import re
import tomllib
from pathlib import Path

import pyarrow.parquet
import pytest

from services.contracts.states import RunState
from services.contracts.study import StudySpec
from services.studies.correlations import correlations_with_entropy
from services.studies.curve_plots import arm_groups, curves
from services.studies.drawing import Drawing
from services.studies.factors import arm_settings, factor_lines, lag_and_clip
from services.studies.study_data import total
from services.studies.study_plots import drawings, scaled
from services.studies.study_report import chance_text, meaning, study_toml, write_study_report
from services.studies.verdicts import Decision, verdicts_of
from tests.unit.synthetic_study import a_claim, a_run, a_study, a_view, level, runs_at

PNG = b"\x89PNG\r\n\x1a\n"
WITH_UNIT = re.compile(r".+\s\(.+\)$", re.DOTALL)
EXACT = {"staleness.min_lag": 4, "staleness.max_lag": 4}
GRID = (
    {"name": "base"}, {"name": "n4", "set": {"updates_per_batch": 4}}, {"name": "lag", "set": EXACT}, {"name": "free", "set": {"clip.off": True}},
    {"name": "lag-free", "like": "lag", "set": {"clip.off": True}}, {"name": "few", "set": {"data.size": 4}, "factors": {"prompts": 4}},
    {"name": "some", "set": {"data.size": 12}, "factors": {"prompts": 12}},
)  # fmt: skip


@pytest.fixture
def unrendered(monkeypatch):
    """Figures are made and not rendered, which is what takes time."""

    def save(drawing: Drawing, folder: Path) -> Path:
        (folder / f"{drawing.name}.png").write_bytes(PNG)
        return folder / f"{drawing.name}.png"

    monkeypatch.setattr(Drawing, "save", save)


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; every tag must be closed in its order."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def a_grid(seeds: int = 5, **fields) -> StudySpec:
    claims = (
        a_claim(id="F1", arms=["base", "n4"]), a_claim(id="F2.lag", arms=["lag", "base"], direction="two-sided"),
        a_claim(id="F2.clip", arms=["free", "base"], direction="less"),
        a_claim(id="F3", statistic="level", arms=["base"], direction="within", low=0.5, high=1.5),
        a_claim(id="F4", statistic="spearman", arms=[], against="evaluation.held.distinct_3.end", threshold=0.8),
        a_claim(id="F5", statistic="monotone", arms=["few", "some", "base"], metric="run.entropy_auc"),
    )  # fmt: skip
    return a_study(*claims, arms=GRID, seeds=seeds, **fields)


def grid_runs(study: StudySpec):
    levels = {"base": 1.0, "n4": 0.5, "lag": 1.2, "free": 0.7, "lag-free": 0.6, "few": 0.1, "some": 0.3}
    return runs_at(study, {arm: [value + 0.02 * math.sin(7 * seed + value) for seed in range(len(study.seeds))] for arm, value in levels.items()})


def all_drawings(study, runs):
    return drawings(study, runs, verdicts_of(study, runs), correlations_with_entropy(runs))


def test_report_has_verdicts_arms_figures_and_spec(tmp_path: Path):
    study = a_grid()
    path, verdicts = write_study_report(tmp_path / "study-1", a_view(study, runs := grid_runs(study)), runs)
    assert path == tmp_path / "study-1/report.html"
    assert {v.claim.id: v.decision for v in verdicts} == {
        "F1": Decision.HOLDS, "F2.lag": Decision.HOLDS, "F2.clip": Decision.HOLDS, "F3": Decision.HOLDS, "F4": Decision.HOLDS, "F5": Decision.HOLDS
    }  # fmt: skip
    table = (tmp_path / "study-1/verdicts.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {v.claim.id}" for v in verdicts]
    text = path.read_text()
    page = Page(text)
    words = " ".join(page.words)
    assert (
        words.index("Verdicts")
        < words.index("What was run")
        < words.index("What was excluded")
        < words.index("Claims in detail")
        < words.index("Figures")
    )
    assert "differs" in words
    assert "nothing: the base run" in words
    assert "clip.off = True" in words
    assert "Nothing: all runs are completed." in words
    assert "7 arms x 5 seeds: 35 completed" in words
    assert text.count('src="data:image/png;base64,') == len(list(path.parent.glob("*.png"))) >= 8
    assert all(file.read_bytes().startswith(PNG) and file.stat().st_size > 5_000 for file in path.parent.glob("*.png"))
    assert "p = 0.031" in words


@pytest.mark.usefixtures("unrendered")
def test_page_opens_offline_and_runs_nothing(tmp_path: Path):
    study = a_grid(seeds=3)
    page = Page(write_study_report(tmp_path, a_view(study, runs := grid_runs(study)), runs)[0].read_text())
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    assert all(value.startswith(("data:image/png;base64,", "#")) for _, name, value in page.attributes if name in ("src", "href"))
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes
    assert not re.search(r"(?:https?:)?//[a-z]", " ".join(f"{name}={value[:40]}" for _, name, value in page.attributes))
    assert "url(" not in " ".join(page.words)


def test_hostile_texts_are_shown_and_do_nothing(tmp_path: Path):
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b]0;owned\x07\u202e$\\frac{$ {{ 7*7 }}"
    arms = [
        {"name": name, "set": {"updates_per_batch": 2**at}, "factors": {"../../etc/x$": at % 2, hostile: hostile + str(at // 2)}}
        for at, name in enumerate(("n1", "n2", "n4", "n8"))
    ]
    study = a_study(a_claim(text=hostile), arms=arms, seeds=3, text=hostile)
    runs = runs_at(study, {"n1": [1.0, 1.1], "n4": [0.5, 0.6, 0.5], "n2": [0.7], "n8": [0.4]})
    runs.append(a_run(study, "n1", 2, level(1.0), state=RunState.FAILED, reason=hostile))
    text = write_study_report(tmp_path / "in", a_view(study, runs, warnings=[hostile]), runs)[0].read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert ("img", "src", "x") not in page.attributes
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "{{ 7*7 }}" in text
    assert not [character for character in "\x1b\x07\u202e" if character in text]
    assert [file for file in tmp_path.rglob("*") if file.is_file() and file.parent != tmp_path / "in"] == []
    assert list((tmp_path / "in").glob("factor-.._.._etc_x_.png"))


@pytest.mark.usefixtures("unrendered")
def test_what_failed_is_shown_and_named_in_the_claims(tmp_path: Path):
    study = a_grid()
    runs = [run for run in grid_runs(study) if (run.arm, run.seed) not in {("n4", 0), ("n4", 1), ("lag", 2)}]
    runs.append(a_run(study, "n4", 0, level(0.5), state=RunState.FAILED, reason="CUDA out of memory", versions=3))
    runs.append(a_run(study, "n4", 1, level(0.5), state=RunState.CANCELLED))
    path, verdicts = write_study_report(tmp_path, a_view(study, runs), runs)
    words = " ".join(Page(path.read_text()).words)
    assert "CUDA out of memory" in words
    assert "missing: not made yet" in words
    assert "seed 0: n4 failed (CUDA out of memory)" in words
    assert "32 completed, 1 failed, 1 missing" in words
    assert (verdicts[0].n, verdicts[0].decision) == (3, Decision.HOLDS)
    assert "with 3 seeds p cannot be below 0.125" in words


def test_report_of_runs_that_go_on_or_are_not_there_yet(tmp_path: Path):
    study = a_grid(seeds=1)
    path, verdicts = write_study_report(tmp_path / "none", a_view(study, warnings=["one seed: no interval"]), [])
    words = " ".join(Page(path.read_text()).words)
    assert {verdict.decision for verdict in verdicts} == {Decision.NO_DATA}
    assert "Warning: one seed: no interval" in words
    assert "There is nothing to plot yet." in words
    going = [
        a_run(study, "base", 0, level(1.0), state=RunState.RUNNING, versions=2),
        a_run(study, "n4", 0, level(None), state=RunState.RUNNING, versions=1), a_run(study, "lag", 0, level(1.0), state=RunState.QUEUED, versions=0),
    ]  # fmt: skip
    path, verdicts = write_study_report(tmp_path / "going", a_view(study, going), going)
    assert {verdict.decision for verdict in verdicts} == {Decision.NO_DATA}
    assert [file.name for file in path.parent.glob("*.png")] == ["curves-all.png"]
    assert "seed 0: base is running; n4 is running" in " ".join(Page(path.read_text()).words)


def test_every_axis_of_every_figure_has_its_unit():
    study = a_grid()
    made, left_out = all_drawings(study, grid_runs(study))
    assert left_out == []
    names = {drawing.name for drawing in made}
    assert {"claims", "curves-all", "factor-prompts", "factor-data.size", "factor-updates_per_batch", "lag-clip", "budget", "correlations"} <= names
    for drawing in made:
        assert drawing.figure.axes
        for axes in drawing.figure.axes:
            labels = [axes.get_xlabel(), axes.get_ylabel()]
            colour_bar = axes.get_label() == "<colorbar>"
            assert all(WITH_UNIT.match(label) for label in labels if label or not colour_bar), (drawing.name, labels)
            assert any(labels)


def test_curves_are_told_by_more_than_colour():
    study = a_grid()
    curves = next(drawing for drawing in all_drawings(study, grid_runs(study))[0] if drawing.name == "curves-all")
    for axes in curves.figure.axes:
        styles = [(line.get_linestyle(), line.get_marker()) for line in axes.get_lines()]
        assert len(styles) == len(set(styles)) == 7


def test_curves_show_the_mean_of_the_seeds_at_what_they_spent():
    study = a_study(seeds=2)
    runs = runs_at(study, {"n1": [1.0, 2.0], "n4": [0.5, 0.5]})
    curves = next(drawing for drawing in all_drawings(study, runs)[0] if drawing.name == "curves-all")
    rollouts, updates, kl = (axes.get_lines() for axes in curves.figure.axes[:3])
    assert rollouts[0].get_ydata().tolist() == [1.5] * 20
    assert (rollouts[0].get_xdata()[-1], updates[0].get_xdata()[-1], updates[1].get_xdata()[-1]) == (2560.0, 20.0, 80.0)
    assert kl[0].get_xdata()[-1] == pytest.approx(0.2)
    band = curves.figure.axes[0].collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (1.0, 2.0)


def test_runs_that_failed_are_in_no_figure():
    study = a_study(seeds=2)
    runs = [
        *runs_at(study, {"n1": [1.0]}),
        a_run(study, "n1", 1, level(5.0), state=RunState.FAILED),
        a_run(study, "n4", 0, level(5.0), state=RunState.CANCELLED),
    ]
    curves = next(drawing for drawing in all_drawings(study, runs)[0] if drawing.name == "curves-all")
    assert [line.get_ydata().tolist() for line in curves.figure.axes[0].get_lines()] == [[1.0] * 20]


def test_budget_is_summed_over_the_run_with_its_signs():
    study = a_study(seeds=1)
    drawing = next(d for d in all_drawings(study, runs_at(study, {"n1": [1.0], "n4": [0.5]}))[0] if d.name == "budget")
    widths = {round(bar.get_width(), 9) for bar in drawing.figure.axes[0].patches}
    assert widths == {-4.0, 2.0, -2.0, 1.0}  # 20 versions of -0.2 H and +0.1 H
    assert {round(bar.get_width(), 9) for bar in drawing.figure.axes[1].patches} == {-1.8, -0.9}


def test_budget_stacks_parts_of_one_sign():
    study = a_study(arms=({"name": "n1"},), seeds=1)
    (run,) = runs_at(study, {"n1": [1.0]})
    for step in run.steps:
        step.values["entropy_change_predicted_negative"] = -0.3
    drawing = next(d for d in all_drawings(study, [run])[0] if d.name == "budget")
    spans = [(round(bar.get_x(), 9), round(bar.get_width(), 9)) for bar in drawing.figure.axes[0].patches]
    assert spans == [(0.0, -4.0), (-4.0, -6.0)]


def test_a_sum_over_the_run_counts_versions_without_a_probe_as_the_others():
    (run,) = runs_at(a_study(arms=({"name": "n1"},), seeds=1), {"n1": [1.0]})
    for step in run.steps:
        step.values["entropy_change_realised"] = float(step.version) if step.version % 4 == 0 else None
    assert total(run, "entropy_change_realised") == pytest.approx(8.0 * 20)  # mean of 0, 4, 8, 12, 16
    assert total(run, "loss") is None


def test_arms_of_different_length_are_not_alike_and_no_arm_hides_another():
    arms = [
        {"name": name, "set": {"updates_per_batch": many}, "factors": {"N": many}} for name, many in (("one", 1), ("two", 2), ("clipped", 2))
    ] + [{"name": "long", "like": "one", "budget": {"rollouts": 5120}, "factors": {"N": 1}}]  # fmt: skip
    arms[2]["set"] = {"updates_per_batch": 2, "clip": {"high": 0.4}}
    study = a_study(arms=arms, seeds=1)
    assert [line.arms for line in factor_lines(study)["N"]] == [((1.0, "one"), (2.0, "clipped"), (2.0, "two"))]
    runs = runs_at(study, {"one": [1.0], "two": [0.5], "clipped": [0.7], "long": [0.1]})
    drawing = next(d for d in all_drawings(study, runs)[0] if d.name == "factor-N")
    assert drawing.figure.axes[0].get_lines()[0].get_ydata().tolist() == pytest.approx([1.0, 0.6])


def test_a_factor_joins_arms_that_are_alike_in_all_else():
    lines = factor_lines(a_grid())
    assert [line.arms for line in lines["updates_per_batch"]] == [((1.0, "base"), (4.0, "n4"))]
    assert {line.arms for line in lines["staleness.lag"]} == {((0.0, "base"), (4.0, "lag")), ((0.0, "free"), (4.0, "lag-free"))}
    assert [line.arms for line in lines["prompts"]] == [((4.0, "few"), (12.0, "some"))]
    assert "clip.off" not in lines


def test_lines_of_a_factor_are_named_by_their_arms():
    study = a_grid()
    made = {drawing.name: drawing.figure for drawing in all_drawings(study, grid_runs(study))[0]}
    assert {text.get_text() for text in made["factor-staleness.lag"].legends[0].get_texts()} == {"base, lag", "free, lag-free"}
    assert made["factor-updates_per_batch"].legends == []


def test_budgets_of_arms_are_a_factor():
    study = a_study(arms=({"name": "short"}, {"name": "long", "budget": {"rollouts": 5120}}))
    assert arm_settings(study) == {"short": {"versions": 20}, "long": {"versions": 40}}
    assert factor_lines(study)["versions"][0].arms == ((20.0, "short"), (40.0, "long"))


def test_lag_and_clip_span_a_grid_or_are_left_out():
    cells = lag_and_clip(a_grid())
    assert cells == {("0", "0.2/0.2"): ["base"], ("4", "0.2/0.2"): ["lag"], ("0", "off"): ["free"], ("4", "off"): ["lag-free"]}
    study = a_study(seeds=1)
    assert any("do not span" in sentence for sentence in all_drawings(study, runs_at(study, {"n1": [1.0], "n4": [0.5]}))[1])
    many = [{"name": f"n4-{at}", "set": {"updates_per_batch": 4, "clip": {"high": 0.2 + at / 10}}} for at in range(6)]
    assert lag_and_clip(a_study(arms=[*GRID, *many])) == cells, "six clips at one lag are no grid"


def test_many_arms_are_drawn_by_claim_number():
    arms = [{"name": f"a{at}", "set": {"clip.high": 0.2 + 0.01 * at}} for at in range(12)]
    claims = [a_claim(id="F1", arms=["a1", "a0"]), a_claim(id="F2.x", arms=["a1", "a2"]), a_claim(id="F2.y", arms=["a0", "a3"])]
    groups = arm_groups(a_study(*claims, arms=arms))
    assert groups == [("F2", ["a0", "a1", "a2", "a3"]), ("rest", [f"a{at}" for at in range(4, 12)])]


def test_arms_of_no_claim_are_drawn_by_task():
    arms = [{"name": f"a{at}", "set": {"clip.high": 0.2 + 0.01 * at, "data.source": "addition" if at % 2 else "sum_to_target"}} for at in range(12)]
    groups = arm_groups(a_study(a_claim(id="F1", arms=["a1", "a0"]), arms=arms))
    assert groups == [
        ("F1", ["a0", "a1"]), ("rest-addition", [f"a{at}" for at in range(3, 12, 2)]), ("rest-sum_to_target", [f"a{at}" for at in range(2, 12, 2)])
    ]  # fmt: skip
    study = a_study(arms=({"name": "n1"},), seeds=1)
    drawn = [curves(name, ["n1"], runs_at(study, {"n1": [1.0]})) for name in ("all", "F1", "rest", "rest-addition")]
    assert [one.title.removeprefix("Entropy and reward") for one in drawn] == ["", ", arms of F1", ", other arms", ", other arms addition"]


def test_forest_is_scaled_to_the_furthest_end_and_positive_as_claimed():
    study = a_grid()
    by_id = {verdict.claim.id: verdict for verdict in verdicts_of(study, grid_runs(study))}
    effect, low, high = scaled(by_id["F2.clip"])  # claimed less, and it is
    assert 0 < high < effect < low == 1.0
    assert scaled(by_id["F3"])[0] > 0
    assert scaled(verdicts_of(study, [])[0]) == (0.0, 0.0, 0.0)


def test_correlations_are_over_all_runs_of_each_set():
    study = a_grid()
    found = {(one.key, one.name): one for one in correlations_with_entropy(grid_runs(study))}
    assert found["distinct_3", "held"].rho == 1.0
    assert found["correct_mean", "other"].rho == -1.0
    assert found["distinct_3", "held"].runs == 35
    assert set(found) == {(key, name) for key in ("correct_mean", "distinct_3") for name in ("held", "other")}


def test_correlations_have_one_row_for_accuracy_and_none_for_the_entropy_itself():
    study = a_grid()
    runs = grid_runs(study)
    for run in runs:
        for one in run.evaluations:
            right = one.values["correct_mean"]
            entropy = run.steps[-1].values["entropy_nats"] ** 2 + (0.3 if one.name == "other" else 0.0)
            one.values |= {"pass_at_1": right, "reward_mean": right, "entropy_estimate_nats": entropy}
    found = {(one.key, one.name) for one in correlations_with_entropy(runs)}
    assert found == {(key, name) for key in ("correct_mean", "distinct_3") for name in ("held", "other")} | {("entropy_estimate_nats", "other")}


def test_factor_plots_show_the_entropy_of_the_final_policy():
    study = a_study(seeds=1)
    runs = runs_at(study, {"n1": [1.0], "n4": [0.5]})
    for run, entropy in zip(runs, (0.8, 0.3), strict=True):
        for one in run.evaluations:
            one.values["entropy_estimate_nats"] = entropy
    drawing = next(d for d in all_drawings(study, runs)[0] if d.name == "factor-updates_per_batch")
    assert drawing.figure.axes[0].get_lines()[0].get_ydata().tolist() == [0.8, 0.3]
    assert "fresh samples" in drawing.caption


def test_correlations_do_not_pool_tasks():
    other = {"updates_per_batch": 4, "evaluation.sets": [{"name": "held", "data": {"source": "addition"}}]}
    study = a_study(arms=({"name": "n1"}, {"name": "n4", "set": other}))
    runs = runs_at(study, {"n1": [1.0, 1.1, 1.2], "n4": [0.1, 0.2, 0.3]})
    for run in runs:  # within each task entropy and diversity go against each other, the levels of the tasks go together
        for one in run.evaluations:
            one.values["distinct_3"] = (10.0 if run.arm == "n1" else 0.0) - run.steps[-1].values["entropy_nats"]
    found = {one.name: one.rho for one in correlations_with_entropy(runs) if one.key == "distinct_3"}
    assert {name: found[name] for name in ("held (addition)", "held (sum_to_target)")} == {"held (addition)": -1.0, "held (sum_to_target)": -1.0}
    assert "held" not in found


@pytest.mark.usefixtures("unrendered")
def test_tables_hold_a_row_a_run_and_a_row_a_version(tmp_path: Path):
    study = a_grid(seeds=2)
    runs = grid_runs(study)
    runs[0] = a_run(study, "base", 0, level(0.9), state=RunState.FAILED, reason="=1+1", versions=3)
    write_study_report(tmp_path, a_view(study, runs), runs)
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    assert (rows[0]["arm"], rows[0]["state"], rows[0]["trained"], rows[0]["reason"]) == ("base", "failed", "3", "'=1+1")
    assert float(rows[0]["steps.entropy_nats.end"]) == 0.9
    assert {row["set.data.size"] for row in rows if row["arm"] == "few"} == {"4"}
    assert {row["factor.prompts"] for row in rows} == {"", "4", "12"}
    table = pyarrow.parquet.read_table(tmp_path / "runs.parquet").to_pylist()
    assert table[0]["steps.entropy_nats.end"] == 0.9
    assert table[0]["reason"] == "=1+1"
    assert table[0]["factor.prompts"] is None
    steps = pyarrow.parquet.read_table(tmp_path / "steps.parquet")
    assert steps.num_rows == 3 + 13 * 20
    assert steps.column("spent.rollouts").to_pylist()[:3] == [128.0, 256.0, 384.0]
    with (tmp_path / "steps.csv").open() as file:
        assert sum(1 for _ in csv.DictReader(file)) == steps.num_rows


def test_spec_in_the_report_can_be_run_again():
    study = a_grid(base={"evaluation": {"sets": [{"name": "held"}]}, "staleness": {"max_lag": 0, "target": None}}, claims=[])
    again = StudySpec.model_validate(tomllib.loads(study_toml(study)))
    assert again.arms == study.arms
    assert [again.run(arm.name, 3) for arm in again.arms] == [study.run(arm.name, 3) for arm in study.arms]


def test_chance_is_counted_over_the_one_sided_claims():
    assert "4 one-sided claims, with 5 seeds about 0.1 of them" in chance_text(a_grid())
    assert "with 3 seeds about 0.5 of them" in chance_text(a_grid(seeds=3))
    assert chance_text(a_grid(seeds=2)) == ""


def test_metrics_are_told_in_words():
    assert meaning("steps.entropy_nats/lag/2-3.end").endswith("(of lag/2-3); mean over the last five versions (evaluations: the last)")
    assert meaning("evaluation.held.distinct_3.at_kl_50m").endswith("on held; value where the summed KL reaches 50 thousandths of a nat")
    assert meaning("run.entropy_floor").startswith("Least mean entropy")
