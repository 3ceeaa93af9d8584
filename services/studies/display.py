"""Text of models, users and other processes, made harmless to show in a terminal or a page."""

from __future__ import annotations

import re
import unicodedata

REPLACEMENT = "\ufffd"
_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor moves, erasing
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|\x9c|$)"  # OSC, DCS and their like, up to their terminator: titles, links, clipboard
    r"|\x9b[0-?]*[ -/]*[@-~]"  # CSI as one C1 character
    r"|\x1b[ -/]*[0-~]",  # the two-character ones
    re.DOTALL,
)
_JOINERS = frozenset("\u200c\u200d")
"""Format characters that many scripts and emoji need, and that move nothing."""


def harmless(text: str) -> str:
    """`text` without terminal escapes; other control characters, marks of direction and lone surrogates become U+FFFD; line ends and tabs stay."""
    plain = _ESCAPES.sub("", text).replace("\r\n", "\n")
    return "".join(c if c in "\n\t" or c in _JOINERS or unicodedata.category(c) not in _UNSAFE else REPLACEMENT for c in plain)


_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def one_line(text: str, width: int | None = None) -> str:
    """`harmless` text on one line, line ends shown as a sign; cut to `width` characters."""
    line = harmless(text).replace("\n", "⏎").replace("\t", " ")
    return line if width is None or len(line) <= width else line[: max(0, width - 1)] + "…"


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """A measured value for people; what is missing or not a number shows as "-"."""
    if value is None or value != value:
        return "-"
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "-∞"
    shown = f"{value:,.{digits}f}" if value == 0 or 10**-digits <= abs(value) < 1e7 else f"{value:.{digits}g}"
    return f"{shown} {unit}".rstrip()


def duration(seconds: float | None) -> str:
    """Seconds for people: "42 s", "3 min 05 s", "2 h 10 min"."""
    if seconds is None or seconds != seconds or seconds < 0:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
