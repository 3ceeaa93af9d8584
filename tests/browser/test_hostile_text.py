"""Texts of models are data: whatever they hold, they are shown, move nothing, run nothing, and do not stall the page."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from services.contracts.messages import RunEvent
from services.contracts.spec import RunSpec
from services.contracts.topics import Log
from services.runtime.bus import Bus
from services.runtime.codec import encode
from services.runtime.ledger import Ledger
from services.runtime.tokenizer import PromptTokenizer
from tests.browser.conftest import Tab
from tests.browser.recorded import recorded_run, sample

SCRIPT = (
    "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'><svg onload='window.hit = 3'><iframe src='javascript:parent.hit=4'></iframe>"
)
ANSI = "\x1b[31mred\x1b[2J\x1b]0;title\x07\x1b]8;;http://evil.example\x1b\\link\x9b31m"
TURNED = "user\u202etxt.exe\u202c \u2066isolated\u2069 \u200bzero \ufeffwidth \u061c"
BROKEN = "\x00\x07\x7f\r\n\u2028next\u2029"
MEGABYTE = "abcdefg " * 131_072
HOSTILE = [SCRIPT, ANSI, TURNED, BROKEN]


@pytest.fixture
def hostile_run(bus: Bus, spec: RunSpec, tokenizer: PromptTokenizer) -> str:
    shown = [sample("r", tokenizer, HOSTILE, index=0, prompt=SCRIPT + TURNED)]
    return recorded_run(bus, spec, steps=2, samples=shown)


def harmless(tab: Tab) -> None:
    page = tab.page
    assert page.evaluate("window.hit") is None
    assert page.locator("main script, main img, main svg, main iframe, main a[href*=evil]").count() == 0


@pytest.mark.parametrize("colouring", ["entropy", "none"])
def test_a_hostile_completion_is_shown_as_the_text_that_it_is(tab: Tab, hostile_run: str, colouring: str, pictures: Path) -> None:
    page = tab.open(f"runs/{hostile_run}/samples?colour={colouring}")
    page.locator(".tokens").first.wait_for()
    texts = [node.inner_text() for node in page.locator(".tokens > .text").all()]
    assert texts[0] == SCRIPT
    assert texts[1] == "␛[31mred␛[2J␛]0;title␇␛]8;;http://evil.example␛\\link⟨U+009B⟩31m"
    assert texts[2] == "user⟨U+202E⟩txt.exe⟨U+202C⟩ ⟨U+2066⟩isolated⟨U+2069⟩ ⟨U+200B⟩zero ⟨U+FEFF⟩width ⟨U+061C⟩"
    assert texts[3].replace("\n", "") == "␀␇␡␍⟨U+2028⟩next⟨U+2029⟩"
    raw = page.locator("main").inner_text()
    assert not set(raw) & set("\x1b\x9b\x00\x07\u202e\u2066\u200b\ufeff")
    titles = "".join(node.get_attribute("title") or "" for node in page.locator("main [title]").all()[:50])
    assert "\u202e" not in titles
    harmless(tab)
    tab.picture(pictures, f"hostile-{colouring}")


def test_a_megabyte_is_cut_and_more_is_shown_when_asked_for(tab: Tab, bus: Bus, spec: RunSpec, tokenizer: PromptTokenizer) -> None:
    long = sample("r", tokenizer, ["12+5", "x"], index=0)
    texts = [MEGABYTE, "\u202e" * 500_000]
    completions = [
        done.model_copy(update={"text": text}) for done, text in zip(long.scored.completed.completions, texts, strict=True)
    ]  # fmt: skip
    # As many tokens as are taken to pieces: the text is shown whole, and the model's folder is not needed.
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"path": "/no/such/model"})})
    scored = long.scored.model_copy(update={"completed": long.scored.completed.model_copy(update={"completions": tuple(completions)})})
    run_id = recorded_run(bus, spec, steps=2, samples=[long.model_copy(update={"scored": scored})])
    began = time.monotonic()
    page = tab.open(f"runs/{run_id}/samples")
    more = page.get_by_role("button", name="Show more")
    more.first.wait_for()
    assert time.monotonic() - began < 15
    assert "1,044,576 characters are not shown" in more.first.inner_text()
    box = page.get_by_role("group", name="Text of completion 1").locator(".text")
    assert box.evaluate("node => node.textContent") == MEGABYTE[:4_000]
    more.first.click()
    assert box.evaluate("node => node.textContent") == MEGABYTE[:20_000]
    turned = page.get_by_role("group", name="Text of completion 2").locator(".text")
    assert turned.evaluate("node => node.textContent") == "⟨U+202E⟩" * 4_000
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    harmless(tab)


def test_many_tokens_are_cut_too(tab: Tab, bus: Bus, spec: RunSpec, tokenizer: PromptTokenizer) -> None:
    run_id = recorded_run(bus, spec, steps=2, samples=[sample("r", tokenizer, ["a" * 16_000, "b"], index=0)])
    page = tab.open(f"runs/{run_id}/samples")
    first = page.locator(".tokens").first
    first.locator(".token").first.wait_for()
    assert first.locator(".token").count() == 1_500
    first.get_by_role("button", name="Show more (14,500 tokens are not shown)").click()
    assert first.locator(".token").count() == 4_500


def test_events_reasons_and_names_are_harmless_too(tab: Tab, bus: Bus, spec: RunSpec) -> None:
    run_id = recorded_run(bus, spec, steps=2)
    keys = Ledger(bus, run_id).keys
    event = RunEvent(run_id=run_id, event="trainer_failed", text=SCRIPT + ANSI + TURNED + BROKEN)
    bus.redis.xadd(keys.stream(Log.EVENTS), {"seq": 99, "data": encode(event)})
    bus.redis.hset(keys.info, mapping={"reason": SCRIPT + TURNED + BROKEN})
    page = tab.open(f"runs/{run_id}/events")
    page.get_by_text("window.hit = 1").first.wait_for()
    assert "user⟨U+202E⟩txt.exe" in page.locator("#events").inner_text()
    assert "⟨U+2028⟩next⟨U+2029⟩" in page.locator("#events").inner_text()
    harmless(tab)
    page = tab.open("runs")
    page.get_by_text("window.hit = 1").wait_for()
    harmless(tab)


def test_the_policy_of_the_page_stops_what_a_script_would_try(tab: Tab) -> None:
    """Should a text become HTML in spite of all: the browser refuses it."""
    page = tab.open("runs")
    tried = """text => { try { document.body.insertAdjacentHTML("beforeend", text); return "done"; } catch (error) { return error.name; } }"""
    assert page.evaluate(tried, SCRIPT) == "TypeError"
    page.evaluate("() => { const script = document.createElement('script'); script.append('window.hit = 5'); document.body.append(script); }")
    away = """() => fetch("http://127.0.0.1:9/").then(() => "sent", error => error.name)"""
    assert page.evaluate(away) == "TypeError"
    assert page.evaluate("window.hit") is None
    assert any("connect-src" in line or "default-src" in line for line in tab.complaints)
    tab.complaints.clear()  # that the browser refused is what was asked for
