"""Finding the answer in a completion. Pure functions of text, linear in its length whatever the model wrote."""

from __future__ import annotations

import re
from collections import deque

TAIL = 8192
"""Characters at a completion's end in which the answer is looked for."""
LONGEST = 1024
"""Characters of the longest answer."""

BOX = "\\boxed"
EXPRESSION = re.compile(
    r"\$(?P<dollar>[^$]{1,1024})\$|\\\((?P<round>.{1,1024}?)\\\)|\\\[(?P<square>.{1,1024}?)\\\]"
    r"|(?P<number>-?(?:\\[dt]?frac\{-?\d{1,40}\}\{\d{1,40}\}|\d[\d,]{0,400}(?:\.\d{1,400})?(?:/\d{1,40})?%?))",
    re.DOTALL | re.ASCII,
)


def after_thinking(text: str, prompt: str = "") -> str:
    """The completion without its thinking part: nothing at all when thinking was begun (here, or at the prompt's end) and never ended."""
    before, tag, rest = text.rpartition("</think>")
    if tag:
        return "" if "<think>" in rest else rest
    return "" if "<think>" in rest or prompt.rstrip().endswith("<think>") else before + rest


def boxes(text: str) -> int:
    """How many boxes are begun."""
    return text.count(BOX)


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` in the text's tail; None when there is none, or it is empty, too long or cut off."""
    tail = text[-TAIL:]
    start = tail.rfind(BOX)
    if start < 0:
        return None
    rest = tail[start + len(BOX) :].lstrip()
    depth, at = 0, 0
    while at < min(len(rest), LONGEST + 2):
        if rest[at] == "\\":  # \{ and \} are characters of the answer
            at += 2
            continue
        depth += (rest[at] == "{") - (rest[at] == "}")
        if depth == 0:
            return rest[1:at].strip() or None
        at += 1
    return None


def last_expression(text: str) -> str | None:
    """The last number or formula between maths delimiters in the text's tail; None when there is none."""
    last = deque(EXPRESSION.finditer(text[-TAIL:]), maxlen=1)
    if not last:
        return None
    found = next(group for group in last[0].groups() if group is not None).strip().rstrip(",")
    return found or None


def last_tagged(text: str, tag: str) -> str | None:
    """What stands between the last `<tag>` and the `</tag>` after it, stripped; None when there is none."""
    start = text.rfind(f"<{tag}>")
    end = text.find(f"</{tag}>", start)
    return text[start + len(tag) + 2 : end].strip() if 0 <= start < end else None
