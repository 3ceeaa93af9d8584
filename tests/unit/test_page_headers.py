"""The page's files as they are served: what each answer tells the browser, and that all of it comes from here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from services.ui.headers import HEADERS, POLICY
from services.ui.site import STATIC, TYPES, add_page

OWN = [path for path in STATIC.rglob("*") if path.is_file() and "vendor" not in path.parts]
SCRIPTS = [path for path in OWN if path.suffix == ".js"]


def served() -> TestClient:
    app = FastAPI()

    @app.get("/v1/broken")
    def broken() -> None:
        raise RuntimeError("broken")

    @app.get("/v1/stream")
    def stream() -> StreamingResponse:
        return StreamingResponse(iter([b"data: 1\n\n"]), media_type="text/event-stream")

    add_page(app)
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize("path", ["/", "/static/js/main.js", "/static/nothing.js", "/v1/stream", "/v1/nothing", "/favicon.ico"])
def test_every_answer_has_the_headers(path: str) -> None:
    answer = served().get(path)
    assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS


def test_the_policy_lets_in_nothing_but_our_own_files() -> None:
    directives = dict(part.split(" ", 1) for part in POLICY.split("; "))
    assert directives["default-src"] == "'self'"
    assert {directives[name] for name in ("frame-ancestors", "object-src", "base-uri", "form-action")} == {"'none'"}
    assert not re.search(r"unsafe|data:|blob:|https?:|\*", POLICY)
    assert not {"script-src", "style-src", "connect-src"} & directives.keys(), "each would replace default-src"


def test_the_document_and_its_files_are_asked_for_each_time_and_come_as_what_they_are() -> None:
    client = served()
    index = client.get("/")
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    assert index.headers["cache-control"] == "no-cache"
    for path in OWN:
        if path.suffix in TYPES:
            answer = client.get(f"/static/{path.relative_to(STATIC).as_posix()}")
            assert (answer.status_code, answer.headers["content-type"], answer.headers["cache-control"]) == (200, TYPES[path.suffix], "no-cache")
            again = client.get(answer.request.url.path, headers={"If-None-Match": answer.headers["etag"]})
            assert again.status_code == 304


def test_what_is_long_is_packed_for_those_who_take_it_and_known_again_and_a_stream_is_not() -> None:
    client = served()
    path = "/static/vendor/uplot/uPlot.esm.js"
    packed, plain = (client.get(path, headers={"Accept-Encoding": encoding}) for encoding in ("gzip", "identity"))
    assert (packed.headers.get("content-encoding"), plain.headers.get("content-encoding")) == ("gzip", None)
    assert packed.text == plain.text
    assert "accept-encoding" in packed.headers["vary"].lower()
    assert client.get(path, headers={"Accept-Encoding": "gzip", "If-None-Match": packed.headers["etag"]}).status_code == 304
    assert client.get("/v1/stream", headers={"Accept-Encoding": "gzip"}).headers.get("content-encoding") is None


@pytest.mark.parametrize("path", ["/static/../site.py", "/static/%2e%2e/site.py", "/static/..%2fsite.py", "/static/js/"])
def test_nothing_else_is_served(path: str) -> None:
    assert served().get(path).status_code == 404


def test_the_document_has_no_script_or_style_inside() -> None:
    text = (STATIC / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)", text) == []
    assert re.findall(r"<style|\bstyle=|\bon\w+=", text) == []
    for link in re.findall(r'(?:src|href)="(/[^"]*)"', text):
        assert (STATIC / link.removeprefix("/static/")).is_file(), link


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(STATIC).as_posix())
def test_no_script_makes_html_or_code_of_a_text(path: Path) -> None:
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|\beval\(|new Function|setHTML|srcdoc"
    assert re.findall(ways, path.read_text()) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(STATIC).as_posix())
def test_every_import_leads_to_a_file_of_the_page(path: Path) -> None:
    for target in re.findall(r"""from ["']([^"']+)["']""", path.read_text()):
        assert target.startswith("."), target
        assert (path.parent / target).resolve().is_file(), target
        assert (path.parent / target).resolve().is_relative_to(STATIC)


def test_every_vendored_library_has_its_licence_and_its_version() -> None:
    said = (STATIC / "vendor" / "README.md").read_text()
    for folder in (STATIC / "vendor").iterdir():
        if folder.is_dir():
            assert "Permission is hereby granted" in (folder / "LICENSE").read_text()
            assert re.search(rf"`{folder.name}` \| .* \| \d+\.\d+\.\d+ \| MIT", said)
