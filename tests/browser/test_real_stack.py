"""The page over the whole local stack: a run is submitted through the form, moves, and a dial that is turned takes effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.client import Client
from services.local.stack import StackSettings, down, up
from tests.browser.conftest import ROOT, Tab

pytestmark = pytest.mark.vllm

SLOW_MS = 240_000
"""Models are loaded, and versions trained, on a machine that others use too."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("stack") / "home"
    try:
        up(home, StackSettings(data=home / "runs"), timeout_s=400)
        yield home
    finally:
        down(home)


@pytest.mark.timeout(900)
def test_submit_watch_turn_a_dial_and_see_it_take_effect(home: Path, tab_at: Callable[..., Tab], pictures: Path) -> None:
    with Client.local(home) as client:
        tab = tab_at(client.url, token=(home / "token").read_text().strip(), width=1500, height=1000)
        page = tab.open("submit")
        for path, value in {"name": "from-the-page", "versions": "80", "batch_groups": "8", "group_size": "4"}.items():
            page.locator(f"[data-path='{path}']").fill(value)
        page.locator("[data-section='model'] summary").click()
        page.locator("[data-path='model.path']").fill(str(ROOT / "deploy/models/tiny"))
        page.locator("[data-path='model.max_model_len']").fill("64")
        page.get_by_text("It would be accepted").wait_for(timeout=SLOW_MS)
        page.get_by_role("button", name="Submit", exact=True).click()

        page.locator("#state").get_by_text("running").wait_for(timeout=SLOW_MS)
        (run,) = client.runs().runs
        page.wait_for_function("() => parseInt(document.querySelector('#stats b').textContent) >= 5", timeout=SLOW_MS)
        assert page.locator(".chart canvas").count() > 2

        page.locator("[data-knob='staleness.max_lag']").get_by_label("staleness.max_lag", exact=True).fill("5")
        page.locator("[data-knob='learning_rate']").get_by_label("learning_rate", exact=True).fill("1e-5")
        page.get_by_role("button", name="Turn").click()
        answer = page.locator("#knob-answer")
        answer.get_by_text("In force").wait_for()
        answer.get_by_text("In force since version").wait_for(timeout=SLOW_MS)
        page.get_by_text("A knob was turned here").wait_for()
        (change,) = client.knobs(run.run_id).changes
        page.wait_for_function(f"() => parseInt(document.querySelector('#stats b').textContent) >= {change.version + 4}", timeout=SLOW_MS)
        steps = {step.version: step for step in client.steps(run.run_id).steps}
        assert [steps[change.version + by].window[1] for by in (-1, 0)] == [2, 5]
        assert [steps[change.version + by].values["learning_rate"] for by in (-1, 0)] == pytest.approx([3e-4, 1e-5])
        tab.picture(pictures, "real-run")

        page.get_by_role("link", name="Samples").click()
        page.locator(".tokens .token").first.wait_for(timeout=SLOW_MS)
        assert page.get_by_text("entropy").count() > 1
        (sample,) = client.samples(run.run_id, limit=1).samples
        one = sample.completions[0]
        assert one.entropies is not None
        assert one.log_ratios is not None
        assert len(one.entropies) == len(one.log_ratios) == len(one.tokens)
        assert 0 <= min(one.entropies) <= max(one.entropies) < 10
        tab.picture(pictures, "real-samples")

        page.get_by_role("navigation", name="Parts of the run").get_by_role("link", name="Logs").click()
        page.locator("#logs").get_by_text("trains the run").wait_for()
        page.locator("#logs").get_by_text("serves the run").wait_for()
        page.get_by_role("navigation", name="Places").get_by_role("link", name="Logs").click()
        for name in ("control-plane", "rollout-0", "reward-0", "trainer-0"):
            page.locator("#logs").get_by_text(name, exact=True).first.wait_for()
        tab.picture(pictures, "real-logs")

        page.goto(f"{client.url}/#/runs/{run.run_id}")
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel the run").click()
        page.locator("#state").get_by_text("cancelled").wait_for()
        page.goto("about:blank")
        tab.complaints.clear()  # 422 of the form until the model's folder was typed
