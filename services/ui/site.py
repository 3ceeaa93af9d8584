"""The page as routes of an application: its one document at `/`, its files below `/static`. It needs no token: all that it shows comes from `/v1`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from services.ui.headers import Guarded

STATIC = Path(str(files("services.ui") / "static"))
"""The package is installed as files: a wheel is unpacked, and an editable install is the checkout."""
FRESH = "no-cache"
"""Ask each time, and be told that nothing changed: after an update no browser mixes old files with new ones."""
WORTH_PACKING = 1_024
"""Bytes from which an answer is sent gzipped to those who take it. Streams of events never are."""
TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
"""Not left to the system's table: with `nosniff` a browser runs no script that comes as text/plain."""


class Assets(StaticFiles):
    """The files of the page."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = FRESH
        if media := TYPES.get(Path(path).suffix):
            response.headers["Content-Type"] = media
        return response


def add_page(app: FastAPI) -> None:
    """Serve the page from `app`, and guard and pack all of its answers."""
    app.add_middleware(Guarded)
    app.add_middleware(GZipMiddleware, minimum_size=WORTH_PACKING, compresslevel=5)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    def index() -> Response:
        return FileResponse(STATIC / "index.html", media_type="text/html; charset=utf-8", headers={"Cache-Control": FRESH})

    @app.api_route("/favicon.ico", methods=["GET", "HEAD"], include_in_schema=False)
    def icon() -> Response:
        return FileResponse(STATIC / "icon.svg", media_type=TYPES[".svg"], headers={"Cache-Control": FRESH})

    app.mount("/static", Assets(directory=STATIC), name="static")
