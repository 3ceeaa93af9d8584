"""What the reports' pages have in common: one HTML file each, which opens without a network and runs nothing."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


def template(name: str) -> Template:
    """A page's template. All that is put into it is escaped; a name that is not given is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def inlined(picture: Path) -> str:
    """A picture's bytes in base64, for a data URI."""
    return base64.b64encode(picture.read_bytes()).decode()


def clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
