"""Secrets left out of what is logged: those that this process knows, and what looks like one."""

from __future__ import annotations

import json
import re
from urllib.parse import quote, unquote

STARS = "***"
LEAST = 8
"""Characters of a secret that is looked for: a shorter one would be found in other words. In an address it is left out all the same."""
_hidden: tuple[str, ...] = ()
_SHAPES = (
    (re.compile(r"(?<=://)([^\s/?#@:'\"]*):[^\s/'\"]+@"), rf"\1:{STARS}@"),  # user and password of an address; a password may hold @ ? #
    (re.compile(r"(?i)\b(bearer|basic)(\s+)[\w.~+/=-]{16,}"), rf"\1\2{STARS}"),
    (re.compile(r"\b(hf_|sk-|ghp_|github_pat_)[\w-]{16,}"), rf"\1{STARS}"),
)


def hide(secret: str) -> None:
    """Leave `secret` out of everything that `redacted` sees from now on, also where it is written as part of an address or of JSON."""
    global _hidden
    plain = unquote(secret)
    forms = {secret, plain, quote(plain, safe=""), json.dumps(plain)[1:-1]}
    _hidden = tuple(sorted({*_hidden, *(form for form in forms if len(form) >= LEAST)}, key=len, reverse=True))


def redacted(text: str) -> str:
    """`text` with stars for secrets."""
    for secret in _hidden:
        text = text.replace(secret, STARS)
    for shape, stars in _SHAPES:
        text = shape.sub(stars, text)
    return text
