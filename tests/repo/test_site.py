"""The documents as a site: strict, with every page in its menu, and asking nothing of other hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("material", reason="deploy/install.sh dev")
ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md"))
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//[^"'>\s]*"""
    r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*\bhref=["']?(?:https?:)?//[^"'>\s]*"""
    r"""|(?:@import\s+|url\()\s*["']?(?:https?:)?//[^"')\s]*"""
)
"""What a browser fetches from another host by itself; a link that one may follow is not."""


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(site)],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT / "mkdocs.yml", folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_every_document_is_a_page(site: Path) -> None:
    assert len(PAGES) > 35
    assert [str(page) for page in PAGES if not (site / page.with_suffix(".html")).is_file()] == []
    menu = (site / "index.html").read_text()
    assert [str(page) for page in PAGES if f'href="{page.with_suffix(".html").as_posix()}"' not in menu] == []
    assert list(site.rglob("*.py")) == []


def test_a_page_fetches_nothing_from_other_hosts(site: Path) -> None:
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert [f"{path.relative_to(site)}: {found}" for path in files for found in FETCHED.findall(path.read_text())] == []
    assert FETCHED.search('<link rel="preconnect" href="https://fonts.example" crossorigin>')
    assert FETCHED.search("<script async src=//cdn.example/x.js></script>")


def test_a_link_that_leads_nowhere_breaks_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    links = ["nowhere.md", "#nowhere", "other.md#nowhere", "../README.md"]
    (tmp_path / "docs" / "index.md").write_text("# One\n\n" + "\n".join(f"[one]({link})" for link in links))
    (tmp_path / "docs" / "other.md").write_text("# Other\n")
    (tmp_path / "README.md").touch()
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: {tmp_path / 'docs'}\nplugins: []\nnav: [index.md, other.md]\n")
    result = build(config, tmp_path / "site")
    assert result.returncode == 1
    assert [link for link in links if not re.search(rf"WARNING .*'{re.escape(link)}'", result.stderr)] == []
    assert result.stderr.count("WARNING ") == len(links)
