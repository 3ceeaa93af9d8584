import math
import re
from pathlib import Path

import numpy as np
import pytest

from services.contracts.messages import FinishReason, Severity
from services.contracts.spec import RunSpec
from services.contracts.states import RunState
from services.contracts.views import CompletionView, ConservationView, EvaluationView, EventView, RunView, SampleView, StepView
from services.studies.display import duration, harmless, number, one_line
from services.studies.plots import lag_shares, marks_of, trailing_mean
from services.studies.run_report import accounted, spec_toml, spread, summarise, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def a_run(**changes: object) -> RunView:
    fields = {
        "run_id": "demo-1", "name": "demo", "state": RunState.COMPLETED, "reason": "", "created_at": 0.0, "started_at": 1.0, "ended_at": 50.0,
        "version": 20, "versions": 20, "trainer": "trainer-0", "spec": RunSpec(name="demo", versions=20),
    }  # fmt: skip
    return RunView(**(fields | changes))


def a_step(version: int, *, lags: dict[int, int] | None = None, **values: float | None) -> StepView:
    measured = {"reward_mean": 0.1 + 0.01 * version, "entropy_nats": 1.0 - 0.02 * version, "seconds": 2.0, "tokens": 100.0} | values
    return StepView(version=version, count=1, at=2.0 * version, values=measured, lags=lags or {0: 60, 1: 40}, window=(0, 1), groups=[version])


def an_event(event: str, text: str, version: int | None = None, severity: Severity = Severity.INFO) -> EventView:
    return EventView(id="1-0", run_id="demo-1", event=event, text=text, severity=severity, version=version, at=10.0, data={})


def a_sample(index: int, version: int, *texts: str, prompt: str = "17=") -> SampleView:
    completions = [
        CompletionView(
            text=t, tokens=[1, 2], versions=[version, version], lags=[0, 0], finish=FinishReason.STOP, reward=float(i), parts=[], advantage=0.5
        )
        for i, t in enumerate(texts)
    ]
    return SampleView(
        run_id="demo-1", index=index, prompt_id="p", prompt=prompt, answer=17, trained_version=version, issued_version=version, max_lag=1,
        server="rollout-0", attempt=1, completions=completions,
    )  # fmt: skip


def a_count(**changes: int | bool) -> ConservationView:
    fields = dict.fromkeys(("queued", "running", "generated", "scored", "taken", "replaying", "dead", "cancelled", "superseded", "unreadable"), 0)
    return ConservationView(**({"run_id": "demo-1", "issued": 20, "consumed": 18, "outstanding": 2, "holds": True} | fields | changes))


def test_summary_takes_means_over_the_first_and_the_last_ten_versions():
    summary = summarise([a_step(v) for v in range(20)])
    assert summary.reward_first == pytest.approx(0.1 + 0.01 * 4.5)
    assert summary.reward_last == pytest.approx(0.1 + 0.01 * 14.5)
    assert summary.entropy_last == pytest.approx(1.0 - 0.02 * 14.5)
    assert (summary.tokens, summary.seconds, summary.tokens_per_second) == (2000, 40.0, 50.0)


def test_summary_counts_tokens_outside_the_window_on_either_side():
    steps = [a_step(0, lags={0: 5}), a_step(1, lags={0: 3, 1: 7, 3: 2})]
    steps[1] = steps[1].model_copy(update={"window": (1, 2)})
    summary = summarise(steps)
    assert (summary.above, summary.below) == (2, 3)
    assert summary.achieved == (0, 3)
    assert summary.requested == (0, 2)
    assert summary.lag_mean == pytest.approx((7 + 6) / 17)


def test_summary_of_missing_and_not_finite_measurements_is_none():
    summary = summarise(
        [StepView(version=0, count=1, at=1.0, values={"reward_mean": None, "entropy_nats": math.inf}, lags={}, window=(0, 0), groups=[])]
    )
    assert (summary.reward_first, summary.entropy_first, summary.achieved, summary.seconds, summary.tokens_per_second) == (None,) * 5


def test_trailing_mean_leaves_gaps_out():
    means = trailing_mean(np.array([1.0, np.nan, 3.0, 5.0]), width=2)
    assert means.tolist() == [1.0, 1.0, 3.0, 4.0]
    assert np.isnan(trailing_mean(np.array([np.nan]))).all()


def test_lag_shares_fill_the_gap_between_lags():
    lags, shares = lag_shares([a_step(0, lags={0: 1, 2: 3}), a_step(1, lags={2: 4})])
    assert lags == [0, 1, 2]
    assert shares.tolist() == [[0.25, 0.0], [0.0, 0.0], [0.75, 1.0]]


def test_marks_tell_knobs_returns_and_trouble_apart():
    told = [
        ("server_admitted", 0),
        ("run_started", 0),
        ("knobs_changed", 3),
        ("knobs_steered", 4),
        ("server_fenced", 5),
        ("run_resumed", 5),
        ("server_admitted", 6),
    ]
    marks = marks_of([an_event(name, "", version) for name, version in told])
    assert [(mark.version, mark.kind) for mark in marks] == [(3, "knobs"), (5, "back"), (5, "trouble"), (6, "back")]


def test_report_shows_the_figures_and_writes_a_plot_for_each(tmp_path: Path):
    steps = [a_step(v, kl_behaviour_k3_nats=0.01, clip_up_share=0.1, idle_trainer_seconds=0.5) for v in range(20)]
    events = [an_event("knobs_changed", "staleness.max_lag is 4 now", 7)]
    path = write_report(tmp_path / "demo-1", a_run(), steps, events, [a_sample(3, 2, "8+9")], conservation=a_count())
    page = path.read_text()
    assert path == tmp_path / "demo-1/report.html"
    assert "0.145 → 0.245 (+0.100;" in page
    assert "18 consumed + 2 outstanding" in page
    assert "every token inside the window" in page
    assert "trainer 25 %" in page
    assert "staleness.max_lag is 4 now" in page
    names = ["reward", "entropy", "lag", "kl", "clip", "idle"]
    assert sorted(p.stem for p in path.parent.glob("*.png")) == sorted(names)
    for name in names:
        assert (path.parent / f"{name}.png").read_bytes().startswith(PNG)
        assert (path.parent / f"{name}.png").stat().st_size > 5_000
    assert page.count('src="data:image/png;base64,') == len(names)
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page


def test_report_before_the_first_version_says_so(tmp_path: Path):
    page = write_report(tmp_path, a_run(version=None, state=RunState.STARTING), [], [], []).read_text()
    assert "nothing to plot" in page
    assert "0 of 20" in page
    assert list(tmp_path.glob("*.png")) == []


def test_report_survives_steps_without_any_measurement(tmp_path: Path):
    bare = StepView(version=4, count=1, at=1.0, values={}, lags={}, window=(2, 2), groups=[])
    page = write_report(tmp_path, a_run(), [bare], [], []).read_text()
    assert "KL divergence: not measured." in page
    assert list(tmp_path.glob("*.png")) == []


def test_report_groups_its_plots_and_tells_what_is_left_out(tmp_path: Path):
    page = write_report(tmp_path, a_run(), [a_step(v) for v in range(3)], [], []).read_text()
    headings = re.findall(r'<h3 id="(.*)">(.*)</h3>', page)
    assert headings == [("plots-1", "Reward"), ("plots-2", "Entropy"), ("plots-3", "Off-policyness"), ("plots-4", "Time")]
    assert all(f'<a href="#{place}">{heading}</a>' in page for place, heading in headings)
    assert "<li>Evaluations: the run has no evaluation yet, or no sets.</li>" in page


def test_report_tells_what_the_run_came_to_and_all_that_was_measured(tmp_path: Path):
    steps = [a_step(v, **{"entropy_nats": 1.0 if v < 12 else 0.3, "entropy_nats/lag/2-3": 0.5 + v}) for v in range(30)]
    page = write_report(tmp_path, a_run(), steps, [], []).read_text()
    assert '<th scope="row">entropy_half_life</th><td>version 12</td>' in page
    assert "<td>not defined: fewer than 3 versions measured both changes, or they do not differ</td>" in page
    assert '<th scope="row">entropy_nats/lag/2-3</th><td>5.0000</td><td>25.0000</td><td>0.5000</td><td>29.5000</td>' in page


def test_report_shows_evaluations_by_set(tmp_path: Path):
    def evaluation(version: int, value: float) -> EvaluationView:
        return EvaluationView(
            name="held", domain="in", version=version, at=0.0, prompts=2, samples=2, temperature=1.0, top_p=1.0, max_tokens=8,
            values={"pass_at_1": value, "distinct_3": 0.5, "consistency_ece": None},
        )  # fmt: skip

    page = write_report(tmp_path, a_run(), [a_step(0)], [], [], evaluations=[evaluation(20, 0.75), evaluation(0, 0.25)]).read_text()
    assert {path.stem for path in tmp_path.glob("*.png")} >= {"pass", "diversity"}
    assert "Of the evaluations on held, 2" in page
    assert '<th scope="row">pass_at_1</th><td>0.2500</td><td>0.7500</td>' in page
    assert "Calibration: not measured." in page


def test_report_never_renders_what_a_model_wrote(tmp_path: Path):
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b]0;owned\x07\x1b[2J\u202egnp\x00{{ 7*7 }}"
    events = [an_event("run_failed", f"<b>{hostile}</b>", 1, Severity.ERROR)]
    run = a_run(name="x<script>", spec=RunSpec(name="x"), reason=hostile, state=RunState.FAILED)
    page = write_report(tmp_path, run, [a_step(0)], events, [a_sample(0, 0, hostile, prompt=hostile)]).read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{ 7*7 }}" in page
    for character in "\x1b\x07\x00\u202e":
        assert character not in page
    assert "owned" not in page


def test_accounting_that_does_not_add_up_is_loud(tmp_path: Path):
    broken = a_count(issued=21, holds=False, dead=1)
    assert accounted(broken).startswith("NOT ALL: 21 issued")
    assert "1 in the dead letters" in accounted(broken)
    assert 'class="alarm"' in write_report(tmp_path, a_run(), [], [], [], conservation=broken).read_text()


def test_samples_are_spread_from_the_oldest_to_the_newest():
    samples = [a_sample(i, i, "x") for i in reversed(range(100))]
    assert [s.index for s in spread(samples, 4)] == [0, 33, 66, 99]
    assert [s.index for s in spread(samples[:2], 4)] == [98, 99]


def test_spec_in_the_report_can_be_submitted_again():
    import tomllib

    spec = RunSpec(name="again", versions=7)
    assert RunSpec.model_validate(tomllib.loads(spec_toml(spec))) == spec


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("a\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\b", "alinkb"),
        ("\x9b2Jx", "x"),
        ("abc\u202edef", "abc\ufffddef"),
        ("a\x08b\rc", "a\ufffdb\ufffdc"),
        ("tab\tline\nend", "tab\tline\nend"),
        ("\ud800", "\ufffd"),
        ("שלום 👩\u200d🔬", "שלום 👩\u200d🔬"),
    ],
)
def test_harmless_text_keeps_words_and_nothing_that_acts(text: str, plain: str):
    assert harmless(text) == plain


def test_numbers_and_times_for_people():
    assert [number(v) for v in (None, math.nan, 0.0, 1234.5, 0.00001, math.inf)] == ["-", "-", "0.000", "1,234.500", "1e-05", "∞"]
    assert [duration(s) for s in (None, 0.25, 42, 185, 7800)] == ["-", "0.2 s", "42 s", "3 min 05 s", "2 h 10 min"]
    assert one_line("a\nb" + "c" * 10, 6) == "a⏎bcc…"
