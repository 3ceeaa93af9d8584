"""A real browser before a real control plane over a real store. Chromium is the system's, or the one that deploy/install.sh put beside Python;
without it, or without playwright, the tests are skipped.

What the tests see is kept as pictures in the folder that OFFBEAT_TEST_PICTURES names, or in pytest's own.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from services.runtime.tokenizer import PromptTokenizer
from tests.integration.conftest import (  # noqa: F401 - fixtures
    TOKEN,
    Api,
    api,
    bus,
    model_folder,
    redis_url,
    serve_api,
    shared_redis,
    spec,
    spec_tree,
    stubs,
)

ROOT = Path(__file__).parents[2]
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip
PROGRAMS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
PLACES = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
PATIENCE_MS = 60_000
LOADS = 5


def playwright_error() -> type[Exception]:
    from playwright.sync_api import Error

    return Error


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    playwright_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright: deploy/install.sh dev")
    program = next((found for name in PROGRAMS if (found := shutil.which(name, path=PLACES))), None)
    if program is None:
        pytest.skip("the browser tests need Chromium: apt-get install chromium")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_LIBRARY_PATH", f"{sys.prefix}/lib", prepend=os.pathsep)  # where deploy/install.sh puts libatomic for playwright's Node
        playwright = playwright_api.sync_playwright().start()
    try:
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        yield browser
        browser.close()
    finally:
        playwright.stop()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("OFFBEAT_TEST_PICTURES") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass
class Tab:
    """A page of the site in a browser, and what it complained of."""

    page: Any
    url: str
    complaints: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    loads: int = 0

    def open(self, place: str) -> Any:
        """The page at `#/place`, loaded afresh, once its heading is there."""
        for _ in range(LOADS):
            self.loads += 1
            dropped = len(self.dropped)
            self.page.goto(f"{self.url}/?{self.loads}#/{place}")
            try:
                self.page.locator("main h1").wait_for()
                return self.page
            except playwright_error():
                if len(self.dropped) == dropped:
                    raise
        raise AssertionError("networks of this machine come and go too often to load a page")

    def complained(self, text: str) -> None:
        """Chromium drops what it loads whenever a network interface comes or goes, as those of containers do."""
        (self.dropped if "ERR_NETWORK_CHANGED" in text else self.complaints).append(text)

    def picture(self, folder: Path, name: str) -> None:
        self.page.screenshot(path=folder / f"{name}.png")


@pytest.fixture
def tab_at(chromium: Any) -> Iterator[Callable[..., Tab]]:
    """Opens tabs, each with a fresh profile. `token` logs it in. A test fails when a tab complained of anything."""
    contexts, tabs = [], []

    def opened(url: str, *, token: str | None = TOKEN, width: int = 1280, height: int = 900, scheme: str = "light", bypass_csp: bool = False) -> Tab:
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=bypass_csp)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        if token is not None:
            context.add_init_script(f"if (location.protocol === 'http:') sessionStorage.setItem('offbeat.token', '{token}')")
        tab = Tab(context.new_page(), url)
        tabs.append(tab)
        tab.page.on("console", lambda message: tab.complained(message.text) if message.type in ("error", "warning") else None)
        tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.page.on("dialog", lambda dialog: tab.complaints.append(f"a dialog: {dialog.message}"))
        return tab

    yield opened
    complaints = [complaint for tab in tabs for complaint in tab.complaints]
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def tab(tab_at: Callable[..., Tab], api: Api) -> Tab:  # noqa: F811
    return tab_at(api.url)


@pytest.fixture
def tokenizer(model_folder: Path) -> PromptTokenizer:  # noqa: F811
    """One token a byte."""
    return PromptTokenizer(model_folder)
