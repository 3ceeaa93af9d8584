"""What goes wrong around a page that is open for long: sessions end, servers restart, tabs are hidden, addresses are cut, specs are misspelt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.contracts.messages import DeadLetter
from services.contracts.spec import RunSpec
from services.contracts.topics import Log
from services.runtime.bus import Bus
from services.runtime.codec import encode
from services.runtime.ledger import Ledger
from services.runtime.tokenizer import PromptTokenizer
from tests.browser.conftest import Tab
from tests.browser.recorded import commit, recorded_run, sample
from tests.integration.conftest import TOKEN, Api, serve_api

FOCUSED = "document.activeElement.textContent"
HIDE = """hidden => {
  Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


@pytest.fixture
def long_spec(spec: RunSpec) -> RunSpec:
    return spec.model_copy(update={"versions": 60})


def test_a_session_that_ends_asks_for_the_token_and_leaves_what_is_typed_there_alone(tab: Tab, bus: Bus, long_spec: RunSpec) -> None:
    recorded_run(bus, long_spec, steps=3)
    page = tab.open("runs")
    page.locator("table").wait_for()
    page.evaluate("sessionStorage.setItem('offbeat.token', 'no longer valid')")
    page.get_by_role("heading", name="Log in").wait_for()  # the list looks again by itself
    page.get_by_label("Token").fill(TOKEN)
    page.wait_for_timeout(3_500)  # longer than the list waited between two looks
    assert page.get_by_label("Token").input_value() == TOKEN
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("heading", name="Runs").wait_for()
    tab.complaints.clear()  # the browser's own line on the 401


def test_a_token_that_is_refused_at_once_leads_to_the_login(tab_at: Callable[..., Tab], api: Api) -> None:
    tab = tab_at(api.url, token="of-yesterday")
    page = tab.open("runs/some-run")
    page.get_by_role("heading", name="Log in").wait_for()
    page.wait_for_timeout(300)
    page.get_by_label("Token").fill("tökén")
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("alert").get_by_text("characters that no token has").wait_for()
    tab.complaints.clear()  # the browser's own line on the 401


def test_addresses_that_lead_nowhere_say_so_and_lead_on(tab: Tab, bus: Bus, long_spec: RunSpec) -> None:
    run_id = recorded_run(bus, long_spec, steps=2)
    for place in ("x/y/z", "runs/%E0%A4%A", "runs/<script>alert(1)</script>", f"runs/{run_id}/constructor", f"runs/{run_id}/__proto__"):
        page = tab.open(place)
        page.get_by_role("alert").wait_for()
        page.get_by_role("button", name="Try again").wait_for()
        page.get_by_role("link", name="All runs").click()
        page.locator("table").wait_for()
    tab.complaints.clear()  # the browser's own lines on 404


def test_a_list_that_is_looked_at_again_keeps_the_focus_and_its_place(tab_at: Callable[..., Tab], api: Api, bus: Bus, long_spec: RunSpec) -> None:
    run_id = recorded_run(bus, long_spec, steps=3)
    tab = tab_at(api.url, width=400)
    page = tab.open("runs")
    page.get_by_role("link", name=run_id).focus()
    page.locator(".table").evaluate("node => { node.scrollLeft = 60; }")
    commit(bus, run_id, long_spec, 3)
    page.get_by_text("4 of 60").wait_for()
    assert page.evaluate(FOCUSED) == run_id
    assert page.locator(".table").evaluate("node => node.scrollLeft") == 60
    page.get_by_label("Name").fill("nothing")
    page.get_by_text("No run fits").wait_for()
    assert page.url.endswith("#/runs?name=nothing")
    page.get_by_label("Name").fill(run_id[1:4].upper())
    page.get_by_role("link", name=run_id).wait_for()
    page.get_by_label("Name").fill("nothing")
    page.get_by_text("No run fits").wait_for()
    page.get_by_role("button", name="Show all").click()
    page.get_by_role("link", name=run_id).wait_for()
    page.get_by_role("button", name="Colours").focus()
    page.keyboard.press("Enter")
    assert page.evaluate(FOCUSED) == "Colours: light"


def test_a_list_says_that_it_is_old_while_the_control_plane_is_away(
    tab_at: Callable[..., Tab], bus: Bus, long_spec: RunSpec, redis_url: str, tmp_path: Path
) -> None:
    recorded_run(bus, long_spec, steps=5)
    with serve_api(redis_url, tmp_path) as first:
        port = int(first.url.rpartition(":")[2])
        tab = tab_at(first.url)
        page = tab.open("runs")
        page.locator("table").wait_for()
    page.locator("#notice").get_by_text("What is shown is of").wait_for()
    with serve_api(redis_url, tmp_path, port=port):
        page.locator("#notice").wait_for(state="hidden")
        page.goto("about:blank")
    tab.complaints.clear()  # the browser's own lines on what it could not load


def test_a_tab_that_nobody_sees_gives_its_stream_back_and_catches_up(tab: Tab, bus: Bus, long_spec: RunSpec) -> None:
    run_id = recorded_run(bus, long_spec, steps=5)
    page = tab.open(f"runs/{run_id}/events")
    page.locator("#stats").get_by_text("5 of 60").wait_for()
    page.evaluate(HIDE, True)
    page.locator("#connection").get_by_text("trying again").wait_for()
    commit(bus, run_id, long_spec, 5)
    page.evaluate(HIDE, False)
    page.locator("#stats").get_by_text("6 of 60").wait_for()
    page.locator("#connection").get_by_text("live").wait_for()


def test_who_looks_closer_at_a_chart_stays_there_while_the_run_goes_on(tab: Tab, bus: Bus, long_spec: RunSpec) -> None:
    run_id = recorded_run(bus, long_spec, steps=40)
    page = tab.open(f"runs/{run_id}")
    card = page.get_by_role("region", name="Policy entropy")
    plot = card.locator(".u-over")
    plot.wait_for()
    box = plot.bounding_box()
    y = box["y"] + box["height"] / 2

    def at_the_left() -> str:
        page.mouse.move(box["x"] + 2, y)
        return card.locator(".now").inner_text()

    assert at_the_left() == "version 0"
    page.mouse.move(box["x"] + box["width"] * 0.5, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, y, steps=4)
    page.mouse.up()
    closer = at_the_left()
    assert 18 <= int(closer.split()[1]) <= 22
    commit(bus, run_id, long_spec, 40)
    page.locator("#stats").get_by_text("41 of 60").wait_for()
    page.wait_for_timeout(500)  # until it is drawn again
    assert at_the_left() == closer
    plot.dblclick()
    assert at_the_left() == "version 0"


def test_a_dial_knows_what_no_value_is_and_keeps_the_focus_when_it_is_turned(tab: Tab, bus: Bus, long_spec: RunSpec) -> None:
    run_id = recorded_run(bus, long_spec, steps=3)
    page = tab.open(f"runs/{run_id}")
    dial = page.get_by_label("staleness.max_lag", exact=True)
    fault = page.locator("[data-knob='staleness.max_lag'] .fault")
    for typed, says in (("many", "no whole number"), ("", "no whole number"), ("-1", "less than 0")):
        dial.fill(typed)
        assert says in fault.inner_text()
        assert page.get_by_role("button", name="Turn").is_disabled()
        assert page.locator("#knob-plan").inner_text() == ""
    dial.fill("3")
    assert fault.inner_text() == ""
    dial.press("Enter")
    page.locator("#knob-answer").get_by_text("In force").wait_for()
    assert page.evaluate("document.activeElement.closest('[data-knob]').dataset.knob") == "staleness.max_lag"


def test_the_form_works_without_https_says_what_it_cannot_hold_and_lets_go_of_what_is_removed(tab: Tab, spec_tree: dict[str, Any]) -> None:
    tab.page.add_init_script("delete Crypto.prototype.randomUUID")  # as in a page that comes over plain HTTP from another machine
    page = tab.open("submit")
    given = spec_tree | {"lerning_rate": 1, "clip": {"hgih": 0.3}, "rewards": [{"name": "sum_to_target"}, {"name": "format"}]}
    page.get_by_text("As JSON").click()
    page.get_by_label("Spec").fill(json.dumps(given))
    page.get_by_role("button", name="Fill the form with this").click()
    page.locator("#unread").get_by_text("lerning_rate, clip.hgih").wait_for()
    page.locator("[data-section='rewards'] summary").click()
    page.locator("[data-section='rewards'] fieldset").first.get_by_role("button", name="Remove").click()
    assert page.locator("[data-path='rewards.0.name']").input_value() == "format"
    assert page.locator("[data-path='rewards.1.name']").count() == 0
    page.get_by_label("Spec").fill("[1]")
    page.get_by_role("button", name="Fill the form with this").click()
    page.locator("#unread").get_by_text("an object with fields").wait_for()
    tab.complaints.clear()  # 422 of the form: a verifier lacks its options


def test_a_form_that_was_begun_is_there_again_until_it_is_submitted_or_started_over(tab: Tab, api: Api, spec_tree: dict[str, Any]) -> None:
    page = tab.open("submit")
    name, over, begun = page.locator("[data-path='name']"), page.get_by_role("button", name="Start over"), page.get_by_text("is here again")
    assert over.count() == 0, "there is nothing to drop"
    page.get_by_text("As JSON").click()
    page.get_by_label("Spec").fill(json.dumps(spec_tree | {"labels": {"who": "me"}, "staleness": {"min_lag": 1, "max_lag": 4}}))
    page.get_by_role("button", name="Fill the form with this").click()
    name.fill("half-done")
    page.locator("[data-path='versions']").fill("many")
    places = page.get_by_role("navigation", name="Places")
    places.get_by_role("link", name="Fleet").click()
    page.get_by_role("heading", name="Fleet").wait_for()
    page.go_back()
    begun.wait_for()
    assert name.input_value() == "half-done"
    assert page.locator("[data-path='versions']").input_value() == "many"
    page.locator(".field:has([data-path='versions']) .fault").get_by_text("is no whole number").wait_for()

    page.reload()
    begun.wait_for()
    page.locator("[data-path='versions']").fill("20")
    page.get_by_text("It would be accepted").wait_for()
    page.get_by_role("button", name="Submit", exact=True).click()
    page.locator("#state").wait_for()
    (run,) = api.client.runs().runs
    assert (run.name, run.versions, run.spec.labels, run.spec.staleness.max_lag) == ("half-done", 20, {"who": "me"}, 4)

    page.get_by_role("link", name="Submit another like it").click()
    page.get_by_text("As half-done").wait_for()
    assert begun.count() == 0
    name.fill("another")
    page.locator("[data-path='labels']").fill('{"who": ')
    places.get_by_role("link", name="Submit").click()
    page.get_by_text("Begun and not submitted").wait_for()
    assert name.input_value() == "run"
    page.get_by_role("link", name=f"as {run.run_id}").click()
    begun.wait_for()
    assert name.input_value() == "another"
    assert page.locator("[data-path='labels']").input_value() == "{}", "what is no JSON is left out"
    over.click()
    assert page.locator("[data-path='labels']").input_value() == '{"who":"me"}'
    assert name.input_value() == "half-done"
    assert over.count() == 0
    places.get_by_role("link", name="Submit").click()
    page.locator("[data-path='name'][aria-invalid]").wait_for()
    assert page.get_by_text("Begun and not submitted").count() == begun.count() == 0

    name.fill("of-somebody-who-leaves")
    page.get_by_role("button", name="Log out").click()
    page.get_by_role("heading", name="Log in").wait_for()
    assert page.evaluate("sessionStorage.length") == 0
    tab.complaints.clear()  # 422 of the form: the default model is not where the test runs


def test_dead_letters_come_by_themselves_and_leave_what_one_reads_alone(tab: Tab, bus: Bus, long_spec: RunSpec) -> None:
    run_id = recorded_run(bus, long_spec, steps=3)
    page = tab.open("dead-letters")
    page.get_by_text("None: everything was processed").wait_for()
    for reason in ("first", "second", "third"):
        given_up(bus, run_id, reason, raw=b"x" * 5_000)
    page.get_by_text("third").wait_for()
    row = page.get_by_role("row").filter(has_text="second")
    row.get_by_role("button", name="Show more").click()
    row.locator(".text").evaluate("node => { node.scrollTop = 40; getSelection().selectAllChildren(node); }")
    given_up(bus, run_id, "fourth", raw=b"y")
    page.get_by_text("fourth").wait_for()
    assert [page.get_by_role("row").nth(i).locator("td").nth(3).inner_text() for i in range(1, 5)] == ["fourth", "third", "second", "first"]
    assert len(row.locator(".text").inner_text()) == 5_000, "what was unfolded stays so"
    assert page.evaluate("getSelection().toString().length") == 5_000
    bus.redis.delete(Ledger(bus, run_id).keys.stream(Log.DEAD))
    page.get_by_text("None: everything was processed").wait_for()


def test_who_goes_back_is_where_one_was(tab_at: Callable[..., Tab], api: Api, bus: Bus, long_spec: RunSpec) -> None:
    run_id = recorded_run(bus, long_spec, steps=3)
    for n in range(40):
        given_up(bus, run_id, f"letter {n}", raw=b"x")
    tab = tab_at(api.url, height=400)
    page = tab.open("dead-letters")
    page.get_by_text("letter 20").scroll_into_view_if_needed()
    page.wait_for_function("() => scrollY > 200")
    place = page.evaluate("scrollY")
    page.get_by_role("row").filter(has_text="letter 20").get_by_role("link").click()
    page.get_by_role("heading", name="Where the groups are").wait_for()
    assert page.evaluate("scrollY") == 0
    page.go_back()
    page.get_by_text("letter 20").wait_for()
    page.wait_for_function("place => scrollY === place", arg=place)
    page.go_forward()
    page.get_by_role("heading", name="Where the groups are").wait_for()
    page.wait_for_function("() => scrollY === 0")
    page.get_by_role("navigation", name="Places").get_by_role("link", name="Dead letters").click()
    page.get_by_text("letter 20").wait_for()
    assert page.evaluate("scrollY") == 0, "a page that one goes to begins at its top"


def given_up(bus: Bus, run_id: str, reason: str, *, raw: bytes) -> None:
    """An entry that nobody could read, in the dead letters."""
    letter = DeadLetter(run_id=run_id, stream="s", reason=reason, raw=raw)
    bus.redis.xadd(Ledger(bus, run_id).keys.stream(Log.DEAD), {"seq": 1, "data": encode(letter)})


def test_of_a_wide_study_one_chooses_the_arms_that_are_drawn(tab: Tab, api: Api, spec_tree: dict[str, Any]) -> None:
    base = {name: value for name, value in spec_tree.items() if name not in ("name", "seed", "versions")}
    names = ["constructor", "toString", *(f"arm-{i}" for i in range(8))]
    arms = [{"name": name, "set": {"clip.high": 0.1 * (i + 1)}} for i, name in enumerate(names)]
    study = api.client.submit_study({"name": "wide", "base": base, "budget": {"updates": 12}, "seeds": [0], "arms": arms})
    page = tab.open(f"studies/{study.study_id}")
    page.get_by_text("8 of 10 arms drawn").wait_for()
    page.get_by_label("Draw arm-7").check()
    page.get_by_text("9 of 10 arms drawn").wait_for()
    page.get_by_label("Draw constructor").uncheck()
    page.get_by_text("8 of 10 arms drawn").wait_for()


def test_tokens_are_made_as_they_come_into_view_and_tell_their_measures_to_the_keyboard(
    tab: Tab, bus: Bus, long_spec: RunSpec, tokenizer: PromptTokenizer
) -> None:
    texts = ["a" * 1_000] * 6
    run_id = recorded_run(bus, long_spec, steps=3, samples=[sample("r", tokenizer, texts, index=i) for i in range(3)])
    page = tab.open(f"runs/{run_id}/samples")
    boxes = page.locator(".tokens")
    boxes.first.locator(".token").first.wait_for()
    page.wait_for_timeout(200)
    assert boxes.last.locator(".token").count() == 0
    boxes.last.scroll_into_view_if_needed()
    boxes.last.locator(".token").first.wait_for()
    boxes.first.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.locator(".said").first.inner_text().startswith("token 1, id ")


def test_the_keys_are_switched_off_by_who_needs_it(tab: Tab) -> None:
    page = tab.open("runs")
    for listens in (False, True):
        page.get_by_role("button", name="Keys").click()
        page.get_by_label("The page listens to these keys").set_checked(listens)
        page.get_by_role("button", name="Close").click()
        page.locator("main").focus()
        page.keyboard.press("n")
        page.wait_for_timeout(200)
        assert page.url.endswith("#/submit") is listens
    tab.complaints.clear()  # 422 of the form: the default model is not where the test runs


def test_marks_of_an_axis_are_told_apart(tab: Tab) -> None:
    page = tab.open("runs")
    marks = "async ([values, increment, shares]) => (await import('/static/js/format.js')).ticks(values, increment, { shares })"
    assert page.evaluate(marks, [[0, 0.0025, 0.005, 0.0075], 0.0025, False]) == ["0", "0.0025", "0.005", "0.0075"]
    assert page.evaluate(marks, [[0.9, 0.9025], 0.0025, True]) == ["90 %", "90.25 %"]
    assert page.evaluate(marks, [[2e-7, 2.2e-7], 2e-8, False]) == ["2e-7", "2.2e-7"]
    assert page.evaluate(marks, [[0, 50, 1000], 50, False]) == ["0", "50", "1,000"]
