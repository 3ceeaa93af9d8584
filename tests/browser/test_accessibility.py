"""Every page by axe's rules, in light and in dark, and from a phone's width to a wall's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.contracts.messages import DeadLetter, LogLevel, Role
from services.contracts.spec import RunSpec
from services.contracts.topics import Log
from services.runtime.bus import Bus
from services.runtime.codec import encode
from services.runtime.ledger import Ledger
from services.runtime.tokenizer import PromptTokenizer
from tests.browser.conftest import Tab
from tests.browser.recorded import log_row, recorded_run, sample
from tests.integration.conftest import TOKEN, Api, Stubs

AXE = (Path(__file__).parent / "assets" / "axe.min.js").read_text()
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
WAIT = {
    "runs": "table",
    "studies": "table",
    "dead-letters": "table",
    "fleet": "table",
    "logs": "#logs li",
    "run-logs": "#logs li",
    "submit": "[data-path=name]",
}


@pytest.fixture
def places(bus: Bus, spec: RunSpec, spec_tree: dict[str, Any], api: Api, tokenizer: PromptTokenizer) -> dict[str, str]:
    """Every page with something on it: name -> place."""
    spec = spec.model_copy(update={"versions": 60})
    samples = [sample("r", tokenizer, ["8+9", "<b>9+7\x1b+1</b>"], index=i) for i in range(2)]
    run_id = recorded_run(bus, spec, steps=30, sets=["held-out"], samples=samples)
    other = recorded_run(bus, spec, steps=60, seed=1, complete=True)
    letter = DeadLetter(run_id=run_id, stream="prompts", reason="tried 5 times", raw=b"\x00x" * 90)
    bus.redis.xadd(Ledger(bus, run_id).keys.stream(Log.DEAD), {"seq": 1, "data": encode(letter)})
    fault = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\nValueError: boom'
    lines = [log_row(f"a line of level {level}", level=level, run_id=run_id, data={"index": 7}, traceback=fault) for level in LogLevel]
    bus.append_logs([*lines, log_row("x" * 3_000, member="m" * 90, run_id=run_id, data={"y" * 120: "z" * 500})])
    base = {name: value for name, value in spec_tree.items() if name not in ("name", "seed", "versions")}
    claim = {"id": "C1", "text": "Wide keeps entropy", "metric": "steps.entropy_nats.end", "arms": ["wide", "plain"], "direction": "greater"}
    arms = [{"name": "plain"}, {"name": "wide", "set": {"clip.high": 0.4}}]
    study = api.client.submit_study({"name": "two", "base": base, "budget": {"updates": 12}, "seeds": [0, 1], "arms": arms, "claims": [claim]})
    return {
        "login": "runs", "runs": "runs", "run": f"runs/{run_id}", "samples": f"runs/{run_id}/samples", "events": f"runs/{run_id}/events",
        "groups": f"runs/{run_id}/groups", "spec": f"runs/{run_id}/spec", "compare": f"compare?runs={run_id},{other}", "submit": "submit",
        "studies": "studies", "study": f"studies/{study.study_id}", "dead-letters": "dead-letters", "fleet": "fleet", "logs": "logs",
        "run-logs": f"runs/{run_id}/logs",
    }  # fmt: skip


def settled(page: Any, name: str) -> None:
    page.locator(WAIT.get(name, "main h1")).first.wait_for()
    page.wait_for_timeout(400)  # what comes after the heading


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.timeout(900)
def test_axe_finds_nothing_serious(tab_at: Callable[..., Tab], api: Api, places: dict[str, str], stubs: Stubs, scheme: str, pictures: Path) -> None:
    found = {}
    logged_out, tab_in = (tab_at(api.url, scheme=scheme, bypass_csp=True, token=token) for token in (None, TOKEN))  # axe is a script of the test's
    for name, place in places.items():
        tab = logged_out if name == "login" else tab_in
        stubs.beat("rollout-0", Role.ROLLOUT, version=7)  # it lives for six seconds
        page = tab.open(place)
        settled(page, name)
        if name == "submit":
            for section in ("staleness", "entropy", "rewards", "evaluation"):
                page.locator(f"[data-section='{section}'] summary").click()
        for summary in page.locator("#logs summary").all():
            summary.click()
        page.evaluate(AXE)
        answer = page.evaluate("rules => axe.run(document, {runOnly: rules})", RULES)
        found |= {
            f"{name}: {one['id']}": [node["target"][0] + ": " + node.get("failureSummary", "")[:300] for node in one["nodes"][:3]]
            for one in answer["violations"]
        }  # fmt: skip
        assert len(answer["passes"]) > 10
        tab.picture(pictures, f"{name}-{scheme}")
        tab.complaints.clear()  # 422 of the form: the default model is not where the test runs
    assert found == {}


@pytest.mark.parametrize(("width", "height"), [(400, 800), (3840, 2160)])
@pytest.mark.timeout(900)
def test_every_page_fits_from_a_phone_to_a_wall(
    tab_at: Callable[..., Tab], api: Api, places: dict[str, str], stubs: Stubs, width: int, height: int, pictures: Path
) -> None:
    logged_out, tab_in = (tab_at(api.url, width=width, height=height, token=token) for token in (None, TOKEN))
    for name, place in places.items():
        tab = logged_out if name == "login" else tab_in
        stubs.beat("rollout-0", Role.ROLLOUT, version=7)  # it lives for six seconds
        page = tab.open(place)
        settled(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} scrolls sideways at {width}"
        size = page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)")
        assert size >= (15 if width < 1000 else 22)
        beyond = page.evaluate(
            "width => [...document.querySelectorAll('main *')].filter(n => !n.closest('.table, .tokens') && n.getClientRects().length"
            " && n.getBoundingClientRect().right > width + 1).map(n => n.outerHTML.slice(0, 120))",
            width,
        )
        assert beyond == [], name
        tab.picture(pictures, f"{name}-{width}")
        tab.complaints.clear()  # 422 of the form
