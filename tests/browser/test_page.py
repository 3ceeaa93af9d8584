"""What one does with the page, in a real browser, over runs that were recorded: look, turn dials, submit, compare."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.contracts.messages import DeadLetter, PromptGroup, Role, pack_ints
from services.contracts.spec import RunSpec
from services.contracts.states import RunState
from services.contracts.topics import Log
from services.runtime.bus import Bus
from services.runtime.codec import encode
from services.runtime.ledger import Ledger
from services.runtime.tokenizer import PromptTokenizer
from tests.browser.conftest import Tab
from tests.browser.recorded import commit, play, recorded_run, sample
from tests.integration.conftest import TOKEN, Api, Stubs, serve_api


@pytest.fixture
def long_spec(spec: RunSpec) -> RunSpec:
    return spec.model_copy(update={"versions": 60})


# -- login ------------------------------------------------------------------------------------------------------------------------------


def test_a_wrong_token_is_refused_and_the_right_one_lets_in_for_this_tab(api: Api, tab_at: Callable[..., Tab]) -> None:
    tab = tab_at(api.url, token=None)
    page = tab.open("runs")
    page.get_by_label("Token").fill("not-the-token")
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("alert").wait_for()
    assert "Wrong token" in page.get_by_role("alert").inner_text()
    tab.complaints.clear()  # the browser's own line on the 401
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("heading", name="Runs").wait_for()
    assert TOKEN not in page.url
    assert page.evaluate("Object.values(localStorage).join() + document.cookie").find(TOKEN) == -1
    page.get_by_role("button", name="Log out").click()
    page.get_by_role("heading", name="Log in").wait_for()
    assert page.evaluate("sessionStorage.length") == 0


# -- a run that goes on -----------------------------------------------------------------------------------------------------------------


def test_a_run_moves_while_one_looks(tab: Tab, bus: Bus, long_spec: RunSpec, pictures: Path) -> None:
    run_id = recorded_run(bus, long_spec, steps=30, sets=["held-out"])
    page = tab.open("runs")
    page.get_by_role("link", name=run_id).click()
    page.locator("#stats").get_by_text("30 of 60").wait_for()
    entropy = page.get_by_role("img", name=re.compile("^Policy entropy"))
    before = entropy.get_attribute("aria-label")
    commit(bus, run_id, long_spec, 30)
    page.locator("#stats").get_by_text("31 of 60").wait_for()
    page.wait_for_function("([node, was]) => node.getAttribute('aria-label') !== was", arg=[entropy.element_handle(), before])
    assert page.locator(".chart canvas").count() >= 6
    tab.picture(pictures, "run")


def test_every_chart_that_is_asked_for_is_drawn(tab: Tab, bus: Bus, long_spec: RunSpec) -> None:
    run_id = recorded_run(bus, long_spec, steps=30, sets=["held-out"])
    page = tab.open(f"runs/{run_id}")
    titles = [
        "Policy entropy", "Reward", "Lags requested and achieved", "Lag of trained tokens", "KL of sampler to policy by lag",
        "Effective sample size by lag", "Clipped tokens", "Idle time",
    ]  # fmt: skip
    page.get_by_text("held out: held-out").wait_for()
    for title in titles:
        card = page.get_by_role("region", name=title, exact=True)
        card.scroll_into_view_if_needed()
        card.locator("canvas").wait_for()
        drawn = "canvas => new Set(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data).size > 8"
        assert page.wait_for_function(drawn, arg=card.locator("canvas").element_handle())
    assert "advantage above 0" in page.get_by_role("region", name="Policy entropy").inner_text()
    assert "held out: held-out" in page.get_by_role("region", name="Reward").inner_text()


def test_a_dial_says_what_it_does_and_from_which_version_it_holds(tab: Tab, bus: Bus, api: Api, long_spec: RunSpec, pictures: Path) -> None:
    run_id = recorded_run(bus, long_spec, steps=30)
    page = tab.open(f"runs/{run_id}")
    dial = page.locator("[data-knob='staleness.max_lag']")
    dial.get_by_label("staleness.max_lag", exact=True).fill("4")
    plan = page.locator("#knob-plan")
    assert "From version 31 on, at the earliest" in plan.inner_text()
    assert "Up to 20 groups may be outstanding instead of 8" in plan.inner_text()
    page.get_by_role("button", name="Turn").click()
    answer = page.locator("#knob-answer")
    answer.get_by_text("In force from version 31").wait_for()
    tab.picture(pictures, "dial")
    assert api.client.knobs(run_id).changes[-1].values == {"staleness.max_lag": 4}
    commit(bus, run_id, long_spec, 30)
    answer.get_by_text("In force since version 31").wait_for()
    page.get_by_text("A knob was turned here").wait_for()
    assert dial.get_by_label("staleness.max_lag", exact=True).input_value() == "4"


def test_a_dial_that_cannot_be_turned_so_says_why_at_its_field(tab: Tab, bus: Bus, long_spec: RunSpec) -> None:
    run_id = recorded_run(bus, long_spec, steps=3)
    page = tab.open(f"runs/{run_id}")
    page.locator("[data-knob='staleness.min_lag']").get_by_label("staleness.min_lag", exact=True).fill("7")
    page.get_by_role("button", name="Turn").click()
    page.get_by_role("alert").get_by_text("staleness.min_lag (7) is above staleness.max_lag (1)").wait_for()
    tab.complaints.clear()  # the browser's own line on the 422


def test_a_run_is_paused_resumed_and_cancelled_after_a_question(tab: Tab, bus: Bus, api: Api, long_spec: RunSpec) -> None:
    run_id = recorded_run(bus, long_spec, steps=3)
    page = tab.open(f"runs/{run_id}")
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Resume").click()
    page.locator("#state").get_by_text("queued").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_role("button", name="Back").click()
    assert api.client.run(run_id).state is RunState.QUEUED
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel the run").click()
    page.locator("#state").get_by_text("cancelled").wait_for()
    assert api.client.run(run_id).state is RunState.CANCELLED
    names = [event.event for event in api.client.events(run_id)]
    page.get_by_role("link", name="Events").click()
    page.locator("#events li").first.wait_for()
    assert page.locator("#events li").count() == len(names)


def test_samples_are_coloured_by_entropy_lag_or_ratio(tab: Tab, bus: Bus, long_spec: RunSpec, tokenizer: PromptTokenizer, pictures: Path) -> None:
    run_id = recorded_run(bus, long_spec, steps=3, samples=[sample("r", tokenizer, ["8+9", "9+7+1"], index=i) for i in range(3)])
    page = tab.open(f"runs/{run_id}/samples")
    tokens = page.locator(".tokens .token")
    tokens.first.wait_for()
    assert page.locator(".tokens").first.inner_text() == "8+9"
    tokens.first.hover()
    said = page.locator(".said").first.inner_text()
    assert said.startswith("token 0, id ")
    assert "lag 2" in said
    classes = {}
    for colouring in ("entropy", "lag", "ratio", "none"):
        page.get_by_label("Colour tokens by").select_option(colouring)
        classes[colouring] = [token.get_attribute("class") for token in tokens.all()[:8]]
    assert len({tuple(found) for found in classes.values()}) == 4
    assert set(classes["none"]) == {"token heat-0"}
    page.get_by_label("Colour tokens by").select_option("entropy")
    tab.picture(pictures, "samples")


def test_a_dead_letter_is_looked_at_and_generated_again(tab: Tab, bus: Bus, api: Api, long_spec: RunSpec) -> None:
    run_id = recorded_run(bus, long_spec, steps=3)
    group = PromptGroup(
        run_id=run_id, index=7, prompt_id="p7", prompt="17=", prompt_tokens=pack_ints([1]), group_size=2, seed=1, temperature=1.0, top_p=1.0,
        max_tokens=4, max_lag=2, issued_version=0,
    )  # fmt: skip
    ledger = Ledger(bus, run_id)
    letters = [
        DeadLetter(run_id=run_id, stream="completions", reason="cannot be read", raw=b"\x00\x1bgarbage"),
        DeadLetter(run_id=run_id, stream="prompts", reason="tried 5 times", group=group),
    ]
    for n, letter in enumerate(letters):
        bus.redis.xadd(ledger.keys.stream(Log.DEAD), {"seq": n + 1, "data": encode(letter)})
    page = tab.open("dead-letters")
    page.get_by_text("tried 5 times").wait_for()
    assert page.get_by_text("cannot be replayed").count() == 1
    assert "␀␛garbage" in page.locator("main").inner_text()
    page.get_by_role("button", name="Replay").click()
    page.get_by_text("Group 7 will be generated again").wait_for()
    assert [letter.index for letter in api.client.dead_letters(run_id).letters] == [None]


# -- submitting -------------------------------------------------------------------------------------------------------------------------


def test_a_run_is_submitted_through_the_form(tab: Tab, api: Api, bus: Bus, model_folder: Path, pictures: Path) -> None:
    page = tab.open("submit")
    page.locator("[data-path='name']").fill("by-hand")
    page.locator("[data-path='versions']").fill("20")
    page.locator("[data-section='model'] summary").click()
    page.locator("[data-path='model.path']").fill(str(model_folder))
    page.locator("[data-section='entropy'] summary").click()
    page.locator("[data-path='entropy.method']").select_option("bonus") if page.locator("[data-path='entropy.method']").count() else None
    page.get_by_text("It would be accepted").wait_for()
    tab.picture(pictures, "submit")
    page.get_by_role("button", name="Submit", exact=True).click()
    page.locator("#state").wait_for()
    (run,) = api.client.runs().runs
    assert (run.name, run.spec.versions, run.spec.model.path) == ("by-hand", 20, str(model_folder))
    assert run.spec.entropy.method == "bonus"
    play(bus, run.run_id, run.spec, steps=2)
    page.locator("#stats").get_by_text("2 of 20").wait_for()


@pytest.mark.parametrize(
    ("path", "typed", "says"),
    [
        ("versions", "-5", "less than 1"),
        ("versions", "twelve", "is no whole number"),
        ("group_size", "2.5", "is no whole number"),
        ("name", "no spaces please", "characters that it may not have"),
        ("staleness.max_lag", "9999", "greater than 1024"),
    ],
)
def test_what_is_wrong_is_said_at_the_field_as_one_types(tab: Tab, path: str, typed: str, says: str) -> None:
    page = tab.open("submit")
    if "." in path:
        page.locator(f"[data-section='{path.partition('.')[0]}'] summary").click()
    field = page.locator(f"[data-path='{path}']")
    good = field.input_value()
    field.fill("")
    field.press_sequentially(typed)
    fault = page.locator(f".field:has([data-path='{path}']) .fault")
    fault.wait_for()
    assert says in fault.inner_text()
    assert field.get_attribute("aria-invalid") == "true"
    assert page.get_by_role("button", name="Submit", exact=True).is_disabled()
    field.fill(good)
    fault.wait_for(state="hidden")
    tab.complaints.clear()  # the browser's own line on the server's 422: the default model is not where the test runs


def test_what_only_the_server_knows_is_said_at_the_field_too(tab: Tab, model_folder: Path) -> None:
    page = tab.open("submit")
    page.locator("[data-section='model'] summary").click()
    page.locator("[data-path='model.path']").fill("/no/such/model")
    page.locator(".field:has([data-path='model.path']) .fault").wait_for()
    assert page.locator("[data-section='model']").get_attribute("data-faults") == "1"
    page.locator("[data-path='model.path']").fill(str(model_folder))
    page.locator("[data-path='updates_per_batch']").fill("3")
    page.locator(".field:has([data-path='updates_per_batch']) .fault").get_by_text("must divide batch_groups (16)").wait_for()
    tab.complaints.clear()  # the browser's own lines on 422


def test_a_spec_is_pasted_and_comes_back_as_it_was(tab: Tab, spec_tree: dict[str, Any], api: Api) -> None:
    given = spec_tree | {
        "entropy": {"method": "positive_reweighting", "target": 0.4},
        "staleness": {"min_lag": 1, "max_lag": 3, "target": {"value": 0.02, "least": 1}},
        "rewards": [{"name": "sum_to_target", "weight": 2.0}, {"name": "format", "options": {"pattern": "x"}}], "labels": {"who": "me"},
        "evaluation": {"sets": [{"name": "held-out", "prompts": 4}]},
    }  # fmt: skip
    page = tab.open("submit")
    page.get_by_text("As JSON").click()
    page.get_by_label("Spec").fill(json.dumps(given))
    page.get_by_role("button", name="Fill the form with this").click()
    page.get_by_text("It would be accepted").wait_for()
    page.get_by_role("button", name="Submit", exact=True).click()
    page.locator("#state").wait_for()
    (run,) = api.client.runs().runs
    assert run.spec == RunSpec.model_validate(given)


# -- several runs -----------------------------------------------------------------------------------------------------------------------


def test_runs_are_compared_over_one_another(tab: Tab, bus: Bus, long_spec: RunSpec, pictures: Path) -> None:
    first = recorded_run(bus, long_spec, steps=40)
    second = recorded_run(bus, long_spec.model_copy(update={"learning_rate": 1e-4}), steps=20, seed=3)
    page = tab.open("runs")
    for run_id in (first, second):
        page.get_by_label(f"Compare {run_id}").check()
    page.get_by_role("button", name="Compare (2)").click()
    page.get_by_role("heading", name="Compare runs").wait_for()
    legend = page.get_by_role("region", name="Policy entropy").locator(".legend")
    legend.get_by_text(first).wait_for()
    assert second in legend.inner_text()
    assert "learning_rate = 0.0003" in page.locator("table").inner_text() or "learning_rate = 0.0001" in page.locator("table").inner_text()
    tab.picture(pictures, "compare")


def test_a_study_shows_its_arms_side_by_side_and_its_verdicts(tab: Tab, bus: Bus, api: Api, spec_tree: dict[str, Any], pictures: Path) -> None:
    base = {name: value for name, value in spec_tree.items() if name not in ("name", "seed", "versions")}
    arms = [{"name": "plain"}, {"name": "wide", "set": {"clip.high": 0.4}}]
    claim = {"id": "C1", "text": "Wide keeps entropy", "metric": "steps.entropy_nats.end", "arms": ["wide", "plain"], "direction": "greater"}
    study = api.client.submit_study(
        {"name": "two-arms", "base": base, "budget": {"updates": 12}, "seeds": [0, 1, 2], "arms": arms, "claims": [claim]}
    )
    for run in study.runs:
        assert run.run_id is not None
        play(bus, run.run_id, api.client.run(run.run_id).spec, steps=run.versions, seed=run.seed + (50 if run.arm == "wide" else 0), complete=True)
    page = tab.open("studies")
    page.get_by_role("link", name=study.study_id).click()
    verdicts = page.get_by_role("region", name="Verdicts")
    verdicts.wait_for()
    row = verdicts.locator("tbody tr").first.inner_text()
    assert "Wide keeps entropy" in row
    expected = api.http.get(f"/v1/studies/{study.study_id}/verdicts", timeout=60).json()["verdicts"][0]
    assert expected["seeds"] == 3
    assert expected["reads"] in row
    legend = page.locator(".legend")
    legend.get_by_text("wide").wait_for()
    assert page.get_by_role("region", name="Arms").locator("a").count() == 6
    tab.picture(pictures, "study")


def test_the_fleet_is_shown_as_it_is(tab: Tab, stubs: Stubs, pictures: Path) -> None:
    stubs.beat("rollout-0", Role.ROLLOUT, version=7, detail="generates <b>3</b>")
    stubs.beat("trainer-0", Role.TRAINER, ready=False)
    page = tab.open("fleet")
    page.get_by_text("rollout-0").wait_for()
    assert "generates <b>3</b>" in page.locator("table").inner_text()
    assert "1 rollout server" in page.locator("#fleet-sums").inner_text()
    tab.picture(pictures, "fleet")
    stubs.beat("rollout-1", Role.ROLLOUT)
    page.get_by_text("rollout-1").wait_for()


# -- without a mouse --------------------------------------------------------------------------------------------------------------------


def test_the_keyboard_leads_everywhere(tab: Tab) -> None:
    page = tab.open("runs")
    page.keyboard.press("?")
    page.get_by_role("dialog").get_by_text("Submit a run").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    for keys, heading in (("gs", "Studies"), ("gf", "Fleet"), ("gd", "Dead letters"), ("n", "Submit a run"), ("gr", "Runs")):
        page.locator("main").focus()
        for key in keys:
            page.keyboard.press(key)
        page.get_by_role("heading", name=heading, exact=True, level=1).wait_for()
    page.reload()
    page.get_by_role("heading", name="Runs", exact=True).wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_colours_follow_the_system_until_one_chooses(tab_at: Callable[..., Tab], api: Api) -> None:
    tab = tab_at(api.url, scheme="dark")
    page = tab.open("runs")
    back = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(back)
    page.get_by_role("button", name="Colours: system").click()
    light = page.evaluate(back)
    assert light != dark
    page.reload()
    page.get_by_role("button", name="Colours: light").wait_for()
    assert page.evaluate(back) == light


def test_a_restart_of_the_control_plane_is_gone_through(
    tab_at: Callable[..., Tab], bus: Bus, long_spec: RunSpec, redis_url: str, tmp_path: Path
) -> None:
    run_id = recorded_run(bus, long_spec, steps=5)
    with serve_api(redis_url, tmp_path) as first:
        port = int(first.url.rpartition(":")[2])
        tab = tab_at(first.url)
        page = tab.open(f"runs/{run_id}")
        page.locator("#stats").get_by_text("5 of 60").wait_for()
        page.get_by_text("achieved; the window requested is shaded").wait_for()  # the whole page is there: what it asks for at its start is answered
        page.get_by_role("slider").or_(page.get_by_role("spinbutton")).first.wait_for()
    page.locator("#connection").get_by_text("trying again").wait_for()
    commit(bus, run_id, long_spec, 5)
    with serve_api(redis_url, tmp_path, port=port):
        page.locator("#stats").get_by_text("6 of 60").wait_for()
        page.locator("#connection").get_by_text("live").wait_for()
        page.goto("about:blank")
    tab.complaints.clear()  # the browser's own lines on what it could not load


def test_runs_that_are_unknown_say_so(tab: Tab) -> None:
    page = tab.open("runs/nothing-of-that-name")
    assert "Unknown run" in page.get_by_role("alert").inner_text()
    tab.complaints.clear()  # the browser's own line on the 404
