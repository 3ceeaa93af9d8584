"""The report of one run: a single HTML file that needs no network, with its plots inside and as PNG files beside it.

Texts of models are data: they are made harmless, escaped by the template engine, and the page's own policy forbids scripts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import tomli_w

from services.contracts.messages import Severity
from services.contracts.spec import RunSpec
from services.contracts.views import ConservationView, EvaluationView, EventView, RunView, SampleView, StepView
from services.studies.display import duration, harmless, number, one_line
from services.studies.page import clock, inlined, template
from services.studies.plots import column, marks_of
from services.studies.run_panels import RunCurves
from services.studies.run_plots import draw_run
from services.studies.run_tables import ENDS, evaluation_measurements, outcomes, step_measurements

SHOWN_GROUPS = 8
SHOWN_COMPLETIONS = 4
SHOWN_EVENTS = 200


@dataclass(frozen=True)
class Summary:
    """What a run came to. Rewards and entropies are means over the first and last ten versions; None is what was not measured."""

    steps: int
    groups: int
    tokens: int
    seconds: float | None
    tokens_per_second: float | None
    reward_first: float | None
    reward_last: float | None
    entropy_first: float | None
    entropy_last: float | None
    mismatch: float | None
    """Mean |difference| of trainer and sampler log-probabilities at lag 0, nats."""
    requested: tuple[int, int] | None
    """Least and greatest lag ever requested."""
    achieved: tuple[int, int] | None
    """Least and greatest lag of a trained token."""
    lag_mean: float | None
    above: int
    """Trained tokens with more lag than the window in force at their step."""
    below: int
    """Trained tokens with less; those of the first versions included, when that lag did not exist yet."""
    idle_trainer: float | None
    """Share of the time in which the trainer waited."""
    idle_rollout: float | None


def summarise(steps: Sequence[StepView]) -> Summary:
    """The summary of a run's steps, which are in order of version."""
    lags = [(lag, count, step.window) for step in steps for lag, count in step.lags.items()]
    counted = sum(count for _, count, _ in lags)
    tokens = round(_total(steps, "tokens") or counted)
    seconds = _total(steps, "seconds") or (steps[-1].at - steps[0].at if len(steps) > 1 else None)
    reward, entropy = column(steps, "reward_mean").tolist(), column(steps, "entropy_nats").tolist()
    idle = {name: _total(steps, f"idle_{name}_seconds") for name in ("trainer", "rollout")}
    return Summary(
        steps=len(steps),
        groups=sum(len(step.groups) for step in steps),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else None,
        reward_first=_mean(reward[:ENDS]),
        reward_last=_mean(reward[-ENDS:]),
        entropy_first=_mean(entropy[:ENDS]),
        entropy_last=_mean(entropy[-ENDS:]),
        mismatch=_mean(column(steps, "mismatch_lag0_nats").tolist()),
        requested=(min(s.window[0] for s in steps), max(s.window[1] for s in steps)) if steps else None,
        achieved=(min(lag for lag, _, _ in lags), max(lag for lag, _, _ in lags)) if lags else None,
        lag_mean=sum(lag * count for lag, count, _ in lags) / counted if counted else None,
        above=sum(count for lag, count, window in lags if lag > window[1]),
        below=sum(count for lag, count, window in lags if lag < window[0]),
        idle_trainer=_share(idle["trainer"], seconds),
        idle_rollout=_share(idle["rollout"], seconds),
    )


def summary_rows(run: RunView, summary: Summary, conservation: ConservationView | None) -> list[tuple[str, str]]:
    """The summary as lines of label and value, the same in the terminal and in the page."""
    s = summary
    rows = [
        ("state", f"{run.state}{': ' + one_line(run.reason) if run.reason else ''}"),
        ("versions", f"{run.version or 0} of {run.versions}"),
        ("reward", _change(s.reward_first, s.reward_last, f"mean of the first and the last {ENDS} versions")),
        ("exact entropy", _change(s.entropy_first, s.entropy_last, "nats per token, same means")),
        ("lag requested", _span(s.requested)),
        ("lag achieved", f"{_span(s.achieved)}, mean {number(s.lag_mean, 2)}{_outside(s)}"),
        ("disagreement at lag 0", number(s.mismatch, 6, "nats, mean |difference| of the log-probabilities of trainer and sampler")),
        ("groups, tokens trained on", f"{s.groups:,} and {s.tokens:,}"),
        ("time", f"{duration(s.seconds)}, {number(s.tokens_per_second, 0)} trained tokens per second"),
        ("waiting", f"trainer {_percent(s.idle_trainer)}, rollout servers {_percent(s.idle_rollout)} of the time"),
    ]
    return rows + ([("groups accounted for", accounted(conservation))] if conservation is not None else [])


def accounted(conservation: ConservationView) -> str:
    """The law of conservation in a sentence, with its numbers."""
    c = conservation
    verdict = "all" if c.holds else "NOT ALL"
    dropped = "nothing dropped" if not c.dead else f"{c.dead} in the dead letters"
    skipped = f" + {c.skipped:,} skipped" if c.skipped else ""
    return (
        f"{verdict}: {c.issued:,} issued = {c.consumed:,} consumed{skipped} + {c.outstanding:,} outstanding + {c.replaying:,} to be replayed"
        f" + {c.dead:,} dead-lettered + {c.cancelled:,} cancelled; {dropped}"
    )


def write_report(
    folder: Path,
    run: RunView,
    steps: Sequence[StepView],
    events: Sequence[EventView],
    samples: Sequence[SampleView],
    *,
    evaluations: Sequence[EvaluationView] = (),
    conservation: ConservationView | None = None,
) -> Path:
    """Write report.html and the plots into `folder`; the path of the page. Works before the first step too."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = sorted({step.version: step for step in steps}.values(), key=lambda step: step.version)
    evaluations = sorted(evaluations, key=lambda one: one.version)
    drawn, left_out = draw_run(folder, RunCurves(run.spec, steps, evaluations, marks_of(events)))
    sections = [
        {
            "heading": section.heading,
            "plots": [
                {"title": one.title, "caption": one.caption, "name": path.name, "data": inlined(path)} for one, path in section.figures
            ],
        }
        for section in drawn
    ]  # fmt: skip
    page = template("run_report.html.j2").render(
        run=run,
        name=one_line(run.name),
        made=clock(datetime.now(UTC).timestamp()),
        rows=summary_rows(run, summarise(steps), conservation),
        holds=conservation is None or conservation.holds,
        sections=sections,
        left_out=left_out,
        outcomes=outcomes(steps),
        ends=ENDS,
        measurements=step_measurements(steps),
        evaluated=evaluation_measurements(evaluations),
        samples=[_sample_view(sample) for sample in spread(samples, SHOWN_GROUPS)],
        events=[_event_view(event) for event in events[-SHOWN_EVENTS:]],
        events_left_out=max(0, len(events) - SHOWN_EVENTS),
        spec=harmless(spec_toml(run.spec)),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def spec_toml(spec: RunSpec) -> str:
    """The spec as a file that `offbeat run submit` takes."""
    return tomli_w.dumps(spec.model_dump(mode="json", exclude_none=True))


def spread(samples: Sequence[SampleView], count: int) -> list[SampleView]:
    """`count` samples spread evenly from the oldest to the newest, both ends included."""
    ordered = sorted(samples, key=lambda sample: (sample.trained_version, sample.index))
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def _sample_view(sample: SampleView) -> dict[str, object]:
    best_first = sorted(sample.completions, key=lambda completion: -math.inf if completion.reward is None else completion.reward, reverse=True)
    return {
        "index": sample.index,
        "version": sample.trained_version,
        "prompt": harmless(sample.prompt),
        "answer": "" if sample.answer is None else one_line(str(sample.answer), 200),
        "left_out": max(0, len(best_first) - SHOWN_COMPLETIONS),
        "completions": [
            {
                "text": harmless(completion.text),
                "reward": number(completion.reward),
                "advantage": number(completion.advantage, 2),
                "lag": _span((min(completion.lags), max(completion.lags))) if completion.lags else "-",
                "finish": completion.finish.value,
            }
            for completion in best_first[:SHOWN_COMPLETIONS]
        ],
    }


def _event_view(event: EventView) -> dict[str, object]:
    return {
        "at": clock(event.at),
        "version": "-" if event.version is None else event.version,
        "event": one_line(event.event),
        "text": one_line(event.text),
        "trouble": event.severity is not Severity.INFO,
        "severity": event.severity.value,
    }


def _total(steps: Sequence[StepView], key: str) -> float | None:
    known = [value for value in column(steps, key).tolist() if math.isfinite(value)]
    return math.fsum(known) if known else None


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _span(window: tuple[int, int] | None) -> str:
    if window is None:
        return "-"
    return str(window[0]) if window[0] == window[1] else f"{window[0]} to {window[1]}"


def _change(first: float | None, last: float | None, unit: str) -> str:
    if first is None or last is None:
        return "-"
    return f"{number(first)} → {number(last)} ({last - first:+.3f}; {unit})"


def _outside(summary: Summary) -> str:
    parts = [f"{count:,} tokens {word} the window in force" for count, word in ((summary.above, "above"), (summary.below, "below")) if count]
    return f"; {' and '.join(parts)}" if parts else "; every token inside the window" if summary.achieved else ""
