"""The page is quick: the first paint, and thousands of steps. Tasks are measured in time of the processor: on a machine that is shared, how long one
waits for it says nothing of the page. Of the first paint, which can only be measured by the clock, the best of a few tries counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from services.contracts.spec import RunSpec
from services.runtime.bus import Bus
from tests.browser.conftest import Tab
from tests.browser.recorded import commit, recorded_run
from tests.integration.conftest import Api

FIRST_PAINT_MS = 1_000
LONGEST_TASK_MS = 200
STEPS = 5_000
TRIES = 4
TRACED = ["toplevel", "devtools.timeline", "disabled-by-default-devtools.timeline"]
MAIN = "CrRendererMain"
"""Chromium's name for the thread that runs scripts and answers clicks."""


def tasks_ms(trace: bytes) -> list[float]:
    """Milliseconds of processor time of each task of pages' main threads."""
    events: list[dict[str, Any]] = json.loads(trace)["traceEvents"]
    threads = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name" and event["args"]["name"] == MAIN}
    return [e["tdur"] / 1_000 for e in events if e["name"].endswith("RunTask") and (e["pid"], e["tid"]) in threads and "tdur" in e]


def test_the_first_paint_is_there_within_a_second(tab_at: Callable[..., Tab], api: Api, bus: Bus, spec: RunSpec) -> None:
    recorded_run(bus, spec, steps=3)
    found = []
    for _ in range(TRIES):
        page = tab_at(api.url).open("runs")
        page.locator("table").wait_for()
        found.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        if found[-1] < FIRST_PAINT_MS:
            break
    assert min(found) < FIRST_PAINT_MS


def test_five_thousand_steps_are_drawn_without_a_stall(chromium: Any, tab: Tab, bus: Bus, spec: RunSpec) -> None:
    spec = spec.model_copy(update={"versions": STEPS + 10})
    run_id = recorded_run(bus, spec, steps=STEPS, sets=["held-out"])
    chromium.start_tracing(page=tab.page, categories=TRACED)
    page = tab.open(f"runs/{run_id}")
    page.locator("#stats").get_by_text(f"{STEPS:,} of").wait_for()
    page.wait_for_function("() => document.querySelectorAll('.chart canvas').length > 3")
    page.mouse.move(400, 500)
    page.mouse.wheel(0, 1_500)
    page.wait_for_timeout(500)
    page.mouse.move(420, 400)
    commit(bus, run_id, spec, STEPS)
    page.locator("#stats").get_by_text(f"{STEPS + 1:,} of").wait_for()
    page.wait_for_timeout(500)
    found = tasks_ms(chromium.stop_tracing())
    assert len(found) > 100
    assert max(found) < LONGEST_TASK_MS, sorted(found, reverse=True)[:5]
