"""The figures of a run's report, by what is drawn in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from services.contracts.measures import BINNED, BINS, EVALUATION_KEYS, STEP_KEYS
from services.contracts.spec import RunSpec
from services.contracts.views import EvaluationView, StepView
from services.studies import control_plots, entropy_plots, evaluation_plots, off_policy_plots
from services.studies.drawing import Drawing
from services.studies.plots import Mark
from services.studies.run_panels import RunCurves
from services.studies.run_plots import STEPS, Section, draw_run

Whole = tuple[Path, list[Section], list[str]]
"""Where a run's figures were drawn, under which headings, and what was left out."""
ALL = [f"{key}/{by}/{name}" for key, ways in BINNED.items() for by in ways for name in BINS[by]]
"""Every bin of every key."""
TARGET = {"staleness": {"max_lag": 4, "target": {"metric": "kl", "value": 0.02}}}


def a_step(version: int, values: dict[str, float | None], *, lags: dict[int, int] | None = None, window: tuple[int, int] = (0, 4)) -> StepView:
    return StepView(version=version, count=1, at=float(version), values=values, lags=lags or {}, window=window, groups=[version])


def an_evaluation(version: int, values: dict[str, float | None], *, name: str = "held", domain: str = "in") -> EvaluationView:
    return EvaluationView(
        name=name, domain=domain, version=version, at=0.0, prompts=2, samples=2, temperature=1.0, top_p=1.0, max_tokens=8, values=values
    )


def a_run(*steps: dict[str, float | None], evaluations: tuple[EvaluationView, ...] = (), **spec: object) -> RunCurves:
    """A run whose versions measured these values."""
    return RunCurves(RunSpec.model_validate(spec), [a_step(version, values) for version, values in enumerate(steps)], evaluations)


def a_whole_run() -> RunCurves:
    """Everything in the catalogue, each value another one; with knobs that were changed at version 2."""
    values = {key: 0.01 * (1 + at) for at, key in enumerate([*STEP_KEYS, *ALL])}
    steps = [a_step(version, {key: value * (1 + version) for key, value in values.items()}, lags={0: 3, 2: 1}) for version in range(4)]
    measured = {key: 0.01 * at for at, key in enumerate(EVALUATION_KEYS)}
    sets = (("held", "in"), ("other", "out"))
    evaluations = [an_evaluation(version, measured, name=name, domain=domain) for version in (0, 4) for name, domain in sets]
    return RunCurves(RunSpec.model_validate(TARGET), steps, evaluations, [Mark(2, "knobs")])


def figure_axes(drawn: Drawing | str) -> list[Axes]:
    assert isinstance(drawn, Drawing), drawn
    return drawn.figure.axes


def curves(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of each labelled line, without gaps."""
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    points = {str(line.get_label()): zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True) for line in lines}
    return {label: [(float(x), float(y)) for x, y in found if np.isfinite(y)] for label, found in points.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Of a run that measured everything."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *draw_run(folder, a_whole_run())


def drawings(whole: Whole) -> list[Drawing]:
    return [drawn for section in whole[1] for drawn, _ in section.figures]


# -- all of them ------------------------------------------------------------------------------------------------------------------------


def test_a_run_that_measured_everything_has_every_figure_under_its_heading(whole: Whole) -> None:
    folder, sections, left_out = whole
    assert left_out == []
    assert [section.heading for section in sections] == ["Reward", "Entropy", "Control", "Off-policyness", "Clipping", "Time", "Evaluations"]
    assert sum(len(figures) for figures in STEPS.values()) + 4 == sum(len(section.figures) for section in sections)
    paths = [path for section in sections for _, path in section.figures]
    assert sorted(paths) == sorted(folder.glob("*.png"))
    assert len(set(paths)) == len(paths)


def test_every_axis_has_its_unit_and_every_figure_its_words(whole: Whole) -> None:
    for drawn in drawings(whole):
        assert drawn.title
        assert drawn.caption.endswith(".")
        *rest, last = [axes for axes in drawn.figure.axes if axes.get_label() != "<colorbar>"]
        assert all("(" in axes.get_ylabel() for axes in drawn.figure.axes), drawn.name
        assert last.get_xlabel() == "policy version"
        assert all(axes.get_xlabel() or axes.get_shared_x_axes().joined(axes, last) for axes in rest)


def test_no_two_curves_of_an_axis_look_alike_to_those_who_see_no_colours(whole: Whole) -> None:
    for drawn in drawings(whole):
        for axes in drawn.figure.axes:
            lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
            looks = [(line.get_linestyle(), line.get_marker()) for line in lines]
            assert len(set(looks)) == len(looks), drawn.name


def test_what_was_not_measured_has_no_figure_and_says_so(tmp_path: Path) -> None:
    sections, left_out = draw_run(tmp_path, a_run({"reward_mean": 0.5}))
    assert [(section.heading, [drawn.name for drawn, _ in section.figures]) for section in sections] == [("Reward", ["reward"])]
    assert [path.name for path in tmp_path.glob("*.png")] == ["reward.png"]
    assert "Prompt entropy: not measured." in left_out
    assert "Staleness control: the run has no staleness.target." in left_out
    assert len(left_out) == sum(len(figures) for figures in STEPS.values())  # one for the evaluations, none for the reward


def test_before_the_first_step_there_is_nothing(tmp_path: Path) -> None:
    assert draw_run(tmp_path, a_run(evaluations=(an_evaluation(0, {"pass_at_1": 0.5}),))) == ([], [])


def test_what_happened_is_a_line_in_every_axes_of_versions(whole: Whole) -> None:
    for drawn in drawings(whole):
        for axes in drawn.figure.axes:
            if axes.get_label() != "<colorbar>":
                assert curves(axes)["knobs changed"] == [(2, 0), (2, 1)], drawn.name


# -- curves out of steps ----------------------------------------------------------------------------------------------------------------


def test_a_line_is_of_a_key_that_was_measured_at_all() -> None:
    run = a_run({"a": 1.0, "b": None}, {"b": float("nan")}, {"a": 3.0})
    (line,) = run.lines({"a": "the a", "b": "the b", "c": "the c"}, scale=100.0)
    assert (line.label, line.versions.tolist()) == ("the a", [0, 1, 2])
    assert line.values == pytest.approx([100, np.nan, 300], nan_ok=True)


def test_what_is_measured_every_few_versions_is_joined() -> None:
    run = a_run(*({"prompt_entropy_in_nats": 1.0 + v} if v % 20 == 0 else {} for v in range(41)))
    (axes,) = figure_axes(entropy_plots.prompt_entropy(run))
    (line,) = axes.get_lines()
    assert line.get_xydata().tolist() == [[0, 1], [20, 21], [40, 41]]
    assert line.get_markevery() == [0, 1, 2]


def test_a_mean_ends_ten_versions_after_what_it_is_of_and_begins_anew() -> None:
    late = {"entropy_nats/lag/4-7": 3.0}
    run = a_run(*({"entropy_nats/lag/0": 1.0} | (late if v in (2, 3) else {"entropy_nats/lag/4-7": 1.0} if v == 30 else {}) for v in range(32)))
    (axes,) = figure_axes(entropy_plots.entropy_by_lag(run))
    assert curves(axes)["lag 4-7"] == [*((v, 3) for v in range(2, 13)), (30, 1), (31, 1)]


def test_a_division_has_a_line_for_each_bin_that_was_measured() -> None:
    run = a_run({"entropy_nats/lag/0": 1.0}, {"entropy_nats/lag/0": 2.0, "entropy_nats/lag/32+": 3.0, "entropy_nats": 9.0})
    lines = run.divided("entropy_nats", "lag")
    assert [line.label for line in lines] == ["lag 0", "lag 32+"]
    assert [line.values for line in lines] == [pytest.approx([1, 2]), pytest.approx([np.nan, 3], nan_ok=True)]


# -- entropy ----------------------------------------------------------------------------------------------------------------------------


def test_entropy_has_its_parts_by_sign() -> None:
    run = a_run(*({"entropy_nats": 1.0 - v, "entropy_positive_nats": 2.0, "entropy_negative_nats": 3.0} for v in (0, 1)))
    (axes,) = figure_axes(entropy_plots.entropy(run))
    assert curves(axes) == {"exact": [(0, 1), (1, 0)], "exact, advantage > 0": [(0, 2), (1, 2)], "exact, advantage < 0": [(0, 3), (1, 3)]}


def test_entropy_by_lag_takes_several_lags() -> None:
    one = {"entropy_nats/lag/0": 1.0}
    assert entropy_plots.entropy_by_lag(a_run(one, one)) == "Entropy by lag: the trained tokens had one lag, or it was not measured."
    (axes,) = figure_axes(entropy_plots.entropy_by_lag(a_run(one, {"entropy_nats/lag/0": 2.0, "entropy_nats/lag/4-7": 4.0})))
    assert curves(axes) == {"lag 0": [(0, 1), (1, 1.5)], "lag 4-7": [(1, 4)]}, "means of the versions so far"


def test_entropy_by_place_is_a_map_with_gaps_where_nothing_was_measured() -> None:
    steps = [a_step(0, {f"entropy_nats/position/{d}": float(d) for d in range(10)}), a_step(2, {"entropy_nats/position/9": 5.0})]
    axes, _ = figure_axes(entropy_plots.entropy_by_position(RunCurves(RunSpec(), steps)))
    (mesh,) = axes.collections
    table = np.ma.filled(mesh.get_array(), np.nan)
    assert table.shape == (10, 3)
    assert table[:, 0].tolist() == list(range(10))
    assert np.isnan(table[:, 1]).all()
    assert table[9, 2] == 5.0


@pytest.mark.parametrize(
    ("positive", "negative", "spans"),
    [
        (-2.0, 1.0, [(-2, 0), (0, 1)]),
        (2.0, 1.0, [(0, 2), (2, 3)]),
        (-2.0, -1.0, [(-2, 0), (-3, -2)]),
    ],
)
def test_the_parts_of_the_budget_are_stacked_away_from_zero(positive: float, negative: float, spans: list[tuple[float, float]]) -> None:
    values: dict[str, float | None] = {
        "entropy_change_predicted_positive": positive, "entropy_change_predicted_negative": negative, "entropy_change_predicted": positive + negative
    }  # fmt: skip
    predicted, realised = figure_axes(entropy_plots.budget(a_run(values | {"entropy_change_realised": -0.5}, values)))
    extents = [area.get_paths()[0].get_extents() for area in predicted.collections]
    assert [(extent.y0, extent.y1) for extent in extents] == spans
    assert [area.get_label() for area in predicted.collections] == ["advantage > 0", "advantage < 0"]
    assert curves(predicted)["net"] == [(0, positive + negative), (1, positive + negative)]
    assert curves(realised) == {"realised": [(0, -0.5)]}


def test_a_budget_without_a_probe_has_no_axes_for_it() -> None:
    (axes,) = figure_axes(entropy_plots.budget(a_run({"entropy_change_predicted_positive": -1.0}, {"entropy_change_predicted_positive": -1.0})))
    assert axes.get_xlabel() == "policy version"
    assert entropy_plots.budget(a_run({"entropy_change_realised": 1.0})) == "Signed entropy budget: not measured."


# -- off-policyness ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "key", "scale"),
    [
        (off_policy_plots.off_policy_by_lag, "ess_share/lag/", 100),
        (off_policy_plots.off_policy_by_lag, "kl_behaviour_k3_nats/lag/", 1),
        (off_policy_plots.clip_by_lag, "clip_down_share/lag/", 100),
    ],
)
def test_measures_by_lag_are_drawn_where_there_are_several_lags(draw: Callable[[RunCurves], Drawing | str], key: str, scale: int) -> None:
    assert isinstance(draw(a_run({f"{key}0": 0.5})), str)
    (axes,) = figure_axes(draw(a_run({f"{key}0": 0.5, f"{key}1": 0.25})))
    assert curves(axes) == {"lag 0": [(0, 0.5 * scale)], "lag 1": [(0, 0.25 * scale)]}


def test_lags_are_shown_with_the_window_that_was_asked_for() -> None:
    steps = [a_step(0, {}, lags={0: 4}, window=(0, 1)), a_step(1, {}, lags={0: 1, 1: 3}, window=(1, 2))]
    axes, _ = figure_axes(off_policy_plots.lag(RunCurves(RunSpec(), steps)))
    assert curves(axes) == {"requested, greatest": [(0, 1.5), (1, 2.5)], "requested, least": [(0, -0.5), (1, 0.5)]}
    assert np.ma.filled(axes.collections[0].get_array(), 0.0).tolist() == [[1.0, 0.25], [0.0, 0.75]]


# -- control ----------------------------------------------------------------------------------------------------------------------------


def test_entropy_control_shows_what_there_is_of_it() -> None:
    assert control_plots.entropy_control(a_run({"entropy_nats": 1.0})) == "Entropy control: the run has no controller that acts between steps."
    measured, actuated = figure_axes(
        control_plots.entropy_control(a_run({"entropy_nats": 1.0, "control_target_nats": 0.8, "control_coefficient": 0.1}))
    )
    assert curves(measured) == {"measured": [(0, 1.0)], "target": [(0, 0.8)]}
    assert curves(actuated) == {"coefficient": [(0, 0.1)]}
    guarded = {"entropy_nats": 1.0, "control_weight": 0.2, "control_guard": 1.0}
    assert curves(figure_axes(control_plots.entropy_control(a_run(guarded)))[2]) == {"reward guard": [(0, 1.0)]}


@pytest.mark.parametrize(("metric", "key"), [("kl", "kl_behaviour_k3_nats"), ("ess", "ess_share")])
def test_staleness_control_shows_its_own_measure(metric: str, key: str) -> None:
    values = {"kl_behaviour_k3_nats": 0.01, "ess_share": 0.9, "staleness_target": 0.5, "staleness_wish_versions": 3.0, "lag_mean": 1.5}
    run = a_run(values, staleness={"max_lag": 4, "target": {"metric": metric, "value": 0.5}})
    held, lag = figure_axes(control_plots.staleness_control(run))
    assert curves(held) == {"measured": [(0, values[key])], "target": [(0, 0.5)]}
    assert curves(lag) == {"max_lag in force": [(0, 4)], "asked for": [(0, 3)], "mean lag of tokens": [(0, 1.5)]}


def test_the_slope_of_entropy_is_that_of_a_straight_line_over_twenty_versions() -> None:
    line = control_plots.entropy_slope(a_run(*({"entropy_nats": 2.0 - 0.01 * v} for v in range(22))))
    assert line.versions.tolist() == [19, 20, 21]
    assert line.values == pytest.approx([-0.01] * 3)
    assert len(control_plots.entropy_slope(a_run(*({"entropy_nats": 1.0} for _ in range(19)))).values) == 0
    rng = np.random.default_rng(0)
    noisy = rng.normal(size=20)
    line = control_plots.entropy_slope(a_run(*({"entropy_nats": float(h)} for h in noisy)))
    assert line.values == pytest.approx([np.polyfit(np.arange(20), noisy, 1)[0]])


# -- evaluations ------------------------------------------------------------------------------------------------------------------------


def test_each_set_has_its_panel_of_pass_at_k() -> None:
    found = (
        an_evaluation(0, {"pass_at_1": 0.25, "pass_at_16": 0.5}),
        an_evaluation(0, {"pass_at_1": 0.1}, name="other", domain="out"),
        an_evaluation(3, {"pass_at_1": 0.75, "pass_at_16": None}),
    )
    passes, *others = evaluation_plots.evaluation_figures(a_run({}, evaluations=found))
    held, other = figure_axes(passes)
    assert (held.get_title(loc="left"), other.get_title(loc="left")) == ("held (in of domain)", "other (out of domain)")
    assert curves(held) == {"pass@1": [(0, 0.25), (3, 0.75)], "pass@16": [(0, 0.5)]}
    assert curves(other) == {"pass@1": [(0, 0.1)]}
    assert held.get_ylim() == other.get_ylim()
    assert others == ["Diversity of answers: not measured.", "Calibration: not measured.", "Length of answers: not measured."]


def test_calibration_tells_the_two_confidences_apart() -> None:
    values: dict[str, float | None] = {"consistency_ece": 0.1, "consistency_gap": -0.2, "likelihood_ece": 0.3}
    _, _, drawn, _ = evaluation_plots.evaluation_figures(a_run({}, evaluations=(an_evaluation(0, values),)))
    consistency, likelihood = figure_axes(drawn)
    assert curves(consistency) == {"ECE": [(0, 0.1)], "over-confidence gap": [(0, -0.2)]}
    assert curves(likelihood) == {"ECE": [(0, 0.3)]}
    assert (consistency.get_ylabel(), likelihood.get_ylabel()) == ("self-consistency (of 1)", "likelihood (of 1)")


def test_lengths_of_all_sets_are_in_one_figure() -> None:
    found = tuple(an_evaluation(0, {"length_mean": 5.0 + at}, name=name) for at, name in enumerate("ab"))
    (axes,) = figure_axes(evaluation_plots.lengths(a_run({}, evaluations=found)))
    assert curves(axes) == {"a (in of domain)": [(0, 5.0)], "b (in of domain)": [(0, 6.0)]}


def test_many_sets_have_several_figures_of_a_kind() -> None:
    found = tuple(an_evaluation(0, {"pass_at_1": 0.5}, name=name) for name in "abcd")
    drawn = [one for one in evaluation_plots.evaluation_figures(a_run({}, evaluations=found)) if isinstance(one, Drawing)]
    assert [(one.name, len(one.figure.axes)) for one in drawn] == [("pass", 3), ("pass-2", 1)]
