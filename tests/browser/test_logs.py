"""The log of the fleet in a real browser: as it comes, filtered, folded, bounded, and as harmless as any other text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from services.contracts.messages import LogLevel, Role
from services.contracts.spec import RunSpec
from services.runtime.bus import Bus
from tests.browser.conftest import Tab
from tests.browser.recorded import log_row, recorded_run
from tests.browser.test_hostile_text import ANSI, BROKEN, SCRIPT, TURNED, harmless
from tests.integration.conftest import Api, Stubs

LINES = "#logs li"
TRACEBACK = 'Traceback (most recent call last):\n  File "train.py", line 7, in step\nValueError: boom'


def shows(tab: Tab, *texts: str) -> None:
    """Wait until these lines and no others are shown."""
    tab.page.wait_for_function(
        "texts => JSON.stringify([...document.querySelectorAll('#logs li .said > .text:first-of-type')].map(n => n.textContent)) === texts",
        arg=json.dumps(list(texts), separators=(",", ":"), ensure_ascii=False),
    )


def test_lines_come_as_they_are_logged_and_one_follows_them(tab: Tab, bus: Bus, pictures: Path) -> None:
    bus.append_logs([log_row(f"line {i}") for i in range(80)])
    page = tab.open("runs")
    page.keyboard.press("g")
    page.keyboard.press("l")
    page.get_by_role("heading", name="Logs").wait_for()
    page.get_by_text("line 79", exact=True).wait_for()
    assert page.locator(LINES).count() == 80
    at_end = "() => { const box = document.getElementById('logs'); return box.scrollHeight - box.scrollTop - box.clientHeight < 5 }"
    page.wait_for_function(at_end)
    bus.append_logs([log_row("the newest", level=LogLevel.WARNING)])
    page.get_by_text("the newest").wait_for()
    page.wait_for_function(at_end)

    page.locator("#logs").focus()
    page.keyboard.press("Home")
    page.wait_for_function("() => !document.getElementById('log-follow').checked && document.getElementById('logs').scrollTop === 0")
    bus.append_logs([log_row("not followed")])
    page.get_by_text("not followed").wait_for(state="attached")
    page.get_by_text("82 lines").wait_for()
    assert page.evaluate("document.getElementById('logs').scrollTop") < 200
    page.get_by_label("Follow").check()
    page.wait_for_function(at_end)
    tab.picture(pictures, "logs")


def test_the_filters_are_the_server_s_and_stay_in_the_address(tab: Tab, bus: Bus) -> None:
    bus.append_logs(
        [
            log_row("one", level=LogLevel.DEBUG),
            log_row("two", level=LogLevel.WARNING, role="reward", member="r-0"),
            log_row("three", level=LogLevel.ERROR, data={"reason": "a Needle"}),
            log_row("four", level=LogLevel.CRITICAL, role="rollout", member="v-0"),
        ]
    )
    page = tab.open("logs")
    shows(tab, "one", "two", "three", "four")
    page.get_by_label("Show").select_option("warnings and above")
    shows(tab, "two", "three", "four")
    page.get_by_label("of", exact=True).select_option("reward servers")
    shows(tab, "two")
    page.get_by_label("of", exact=True).select_option("every kind")
    page.get_by_label("Process").select_option("v-0")
    shows(tab, "four")
    page.get_by_label("Process").select_option("every one")
    page.get_by_label("Text").fill("needle")
    shows(tab, "three")
    bus.append_logs([log_row("passed over"), log_row("five: needle", level=LogLevel.ERROR)])
    shows(tab, "three", "five: needle")
    assert page.url.endswith("#/logs?level=warning&text=needle")
    page.reload()
    shows(tab, "three", "five: needle")
    assert page.get_by_label("Show").input_value() == "warning"
    page.get_by_label("Text").fill("no such")
    page.get_by_text("No line that fits was logged").wait_for()


def test_a_traceback_is_folded_until_one_asks(tab: Tab, bus: Bus) -> None:
    bus.append_logs([log_row("a step failed", level=LogLevel.ERROR, traceback=TRACEBACK)])
    page = tab.open("logs")
    page.get_by_text("ValueError: boom").wait_for()
    assert page.get_by_text("train.py").count() == 0
    page.locator("#logs summary").focus()
    page.keyboard.press("Enter")
    page.get_by_role("group", name="Traceback").get_by_text("train.py").wait_for()
    assert page.get_by_role("group", name="Traceback").locator(".text").evaluate("node => node.textContent") == TRACEBACK


def test_no_more_than_the_newest_thousand_lines_are_in_the_page(tab: Tab, bus: Bus) -> None:
    bus.append_logs([log_row(f"line {i}") for i in range(1_500)])
    page = tab.open("logs")
    page.get_by_text("the newest 1,000 lines").wait_for()
    page.get_by_text("line 1499", exact=True).wait_for()
    for start in range(1_500, 3_000, 500):
        bus.append_logs([log_row(f"line {i}") for i in range(start, start + 500)])
    page.get_by_text("line 2999", exact=True).wait_for()
    assert page.locator(LINES).count() == 1_000
    assert page.locator(LINES).first.locator(".text").inner_text() == "line 2000"


def test_a_run_shows_its_own_lines(tab: Tab, bus: Bus, spec: RunSpec) -> None:
    run_id = recorded_run(bus, spec, steps=2)
    bus.append_logs([log_row("of the run", run_id=run_id), log_row("of its evaluation", run_id=f"{run_id}~held-out"), log_row("of none")])
    page = tab.open("logs")
    shows(tab, "of the run", "of its evaluation", "of none")
    assert [link.get_attribute("href") for link in page.locator(f"{LINES} a").all()] == [f"#/runs/{run_id}"] * 2
    page = tab.open(f"runs/{run_id}")
    page.get_by_role("navigation", name="Parts of the run").get_by_role("link", name="Logs").click()
    shows(tab, "of the run", "of its evaluation")
    page.get_by_label("Show").select_option("errors")
    page.get_by_text("No line that fits was logged").wait_for()
    assert page.url.endswith(f"#/runs/{run_id}/logs?level=error")


def test_a_process_of_the_fleet_leads_to_its_log(tab: Tab, bus: Bus, stubs: Stubs) -> None:
    bus.append_logs([log_row("mine", member="gone-7"), log_row("another's")])
    tab.open("logs?member=gone-7")
    shows(tab, "mine")
    stubs.beat("rollout-0", Role.ROLLOUT)
    page = tab.open("fleet")
    assert page.get_by_role("link", name="rollout-0").get_attribute("href") == "#/logs?member=rollout-0"


def test_a_log_that_cannot_be_read_says_why(tab: Tab, bus: Bus) -> None:
    page = tab.open(f"logs?text={'x' * 201}")
    page.get_by_role("alert").wait_for()
    assert "at most 200 characters" in page.get_by_role("alert").inner_text()
    tab.complaints.clear()  # the browser's own line on the 422


def test_a_hostile_line_is_shown_as_the_text_that_it_is(tab: Tab, bus: Bus, pictures: Path) -> None:
    hostile = SCRIPT + ANSI + TURNED + BROKEN
    bus.append_logs(
        [
            log_row(
                hostile, level=LogLevel.ERROR, logger=hostile, role=hostile, member=hostile, host=hostile, run_id=SCRIPT + TURNED,
                traceback=f"{hostile}\n{hostile}", data={hostile: hostile},
            ),
            log_row("after it"),
        ]
    )  # fmt: skip
    page = tab.open("logs")
    page.get_by_text("after it").wait_for()
    page.locator("#logs summary").click()
    page.get_by_role("group", name="Traceback").wait_for()
    shown = page.locator(f"{LINES} .said > .text").first.inner_text()
    assert SCRIPT in shown
    assert "␛[31mred␛[2J␛]0;title␇" in shown
    assert "user⟨U+202E⟩txt.exe⟨U+202C⟩" in shown
    raw = page.locator("main").inner_text() + "".join(page.locator("main option").all_inner_texts())
    raw += "".join(node.get_attribute("title") or "" for node in page.locator("main [title]").all())
    assert not set(raw) & set("\x1b\x9b\x00\x07\u202e\u2066\u200b\ufeff")
    assert page.locator(f"{LINES} a").get_attribute("href").startswith("#/runs/%3Cscript%3E")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    harmless(tab)
    tab.picture(pictures, "hostile-log")


def test_lines_are_read_on_a_phone(tab_at: Callable[..., Tab], api: Api, bus: Bus, pictures: Path) -> None:
    bus.append_logs([log_row("a line that is long enough to need more than one row on a phone", run_id="r" * 60, data={"index": 3})])
    tab = tab_at(api.url, width=400, height=800)
    page = tab.open("logs")
    page.locator(LINES).first.wait_for()
    box = page.locator(f"{LINES} .said").first.bounding_box()
    assert box["width"] > 300
    tab.picture(pictures, "logs-phone")
