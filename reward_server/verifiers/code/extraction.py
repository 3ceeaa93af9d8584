"""Finding the solution in a completion, in time linear in its length."""

from __future__ import annotations

FENCE = "```"


def last_block(text: str, tags: frozenset[str]) -> str | None:
    """Content of the last closed fence whose language is one of `tags`, else of the last that names no language; None when there is neither."""
    found: dict[bool, str] = {}
    opened: str | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        bare = line.strip()
        if opened is None:
            if bare.startswith(FENCE):
                opened, lines = "".join(bare[len(FENCE) :].lower().split(maxsplit=1)[:1]), []  # the first word is the language
        elif bare == FENCE:
            if opened in tags or not opened:
                found[bool(opened)] = "\n".join(lines)
            opened = None
        else:
            lines.append(line)
    return found.get(True, found.get(False))
