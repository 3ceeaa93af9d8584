"""`detectable_content:*` and `detectable_format:*`: what can be seen of a text without reading it."""

from __future__ import annotations

import json
import re
from typing import Literal, NoReturn

from reward_server.verifiers.instructions.constraint import Constraint, Count, Phrase

HIGHLIGHT = re.compile(r"\*([^\n*]*)\*")
STRONG = re.compile(r"\*\*([^\n*]*)\*\*")
POSTSCRIPTS = {"P.S.": re.compile(r"p\.\s?s\."), "P.P.S": re.compile(r"p\.\s?p\.\s?s")}
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
FENCES = ("```json", "```Json", "```JSON", "```")


class NumberOfPlaceholders(Constraint):
    """At least so many, such as [address]."""

    num_placeholders: Count

    def followed_by(self, text: str) -> bool:
        return sum(map(_placeholders, text.split("\n"))) >= self.num_placeholders


class Postscript(Constraint):
    """The marker is there, in any case; P.S. and P.P.S with or without spaces in them."""

    postscript_marker: Phrase

    def followed_by(self, text: str) -> bool:
        pattern = POSTSCRIPTS.get(self.postscript_marker)
        return self.postscript_marker.lower() in text.lower() if pattern is None else pattern.search(text.lower()) is not None


class NumberOfBullets(Constraint):
    """Exactly so many lines that begin with `-`, or with one `*`."""

    num_bullets: Count

    def followed_by(self, text: str) -> bool:
        lines = (line.lstrip() for line in text.split("\n"))
        return sum(line.startswith("-") or (line.startswith("*") and line[1:2] not in ("", "*")) for line in lines) == self.num_bullets


class Title(Constraint):
    """A line has <<a title>> in it."""

    def followed_by(self, text: str) -> bool:
        return any(_title(line) for line in text.split("\n"))


class JsonFormat(Constraint):
    """All of it is JSON, in a fence of Markdown or not."""

    def followed_by(self, text: str) -> bool:
        text = text.strip()
        for fence in FENCES:
            text = text.removeprefix(fence)
        try:  # numbers are left as texts: Python refuses to read those of many digits
            json.loads(text.removesuffix("```").strip(), parse_int=str, parse_float=str, parse_constant=_no_json)
        except (ValueError, RecursionError):
            return False
        return True


class ConstrainedResponse(Constraint):
    """One of the three options of the paper is in it."""

    def followed_by(self, text: str) -> bool:
        return any(option in text for option in OPTIONS)


class NumberOfHighlights(Constraint):
    """At least so many, such as *this*; **this** counts as well."""

    num_highlights: Count

    def followed_by(self, text: str) -> bool:
        found = sum(bool(inner.strip()) for pattern in (HIGHLIGHT, STRONG) for inner in pattern.findall(text))
        return found >= self.num_highlights


class MultipleSections(Constraint):
    """At least so many that begin with the marker and a number, such as SECTION 2."""

    section_spliter: Phrase
    num_sections: Count

    def followed_by(self, text: str) -> bool:
        return len(re.findall(rf"{re.escape(self.section_spliter)}\s?\d", text)) >= self.num_sections


def _placeholders(line: str) -> int:
    count, end = 0, -1
    while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start)) >= 0:
        count += 1
    return count


def _title(line: str) -> bool:
    start, end = line.find("<<"), line.rfind(">>")
    return start >= 0 and start + 2 < end and bool(line[start:end].lstrip("<").rstrip(">").strip())


def _no_json(constant: Literal["NaN", "Infinity", "-Infinity"] | str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
