r"""What `math` says where a verdict may surprise: each row is decided on purpose, shown in docs/verifiers.md, and tested with the real judge.

Rows marked as mistakes are math-verify's, kept because a rule of our own would cost more right answers than it would save: an answer is rarely
given in a wrong unit by one who has the right number. None of them lets an answer name several candidates and be right with one.
"""

from __future__ import annotations

from typing import NamedTuple


class Decision(NamedTuple):
    """A row: is the answer right for this gold one?"""

    topic: str
    gold: str
    answer: str
    right: bool
    why: str
    mistake: bool = False
    """A person would decide otherwise."""


DECISIONS: tuple[Decision, ...] = (
    Decision("units", "5", r"5\text{ cm}", True, "units are not read; the question fixes them"),
    Decision("units", r"5\text{ m}", r"5\text{ cm}", True, "units are not read", mistake=True),
    Decision("units", r"5\text{ m}", r"500\text{ cm}", False, "units are not converted", mistake=True),
    Decision("units", r"90^\circ", "90", True, "degrees are a unit"),
    Decision("units", r"\$5", "5", True, "currency is a unit"),
    Decision("percent", "10", r"10\%", True, "gold answers of questions about per cent come without the sign"),
    Decision("percent", "0.1", r"10\%", True, "10 % is 0.1"),
    Decision("percent", r"10\%", "10", True, "the sign may be left out"),
    Decision("percent", "50", "0.5", False, "without the sign a number is what it is"),
    Decision("chained equalities", "5", "x=5", True, "the right side counts"),
    Decision("chained equalities", "5", "x=2+3=5", True, "the last part counts"),
    Decision("chained equalities", "6", "x=5=6", True, "the last part counts, whether the chain holds or not", mistake=True),
    Decision("chained equalities", "5", "x=5=6", False, "the last part counts, so nothing is gained by a longer chain"),
    Decision("chained equalities", "x=5", "y=5", False, "another unknown is another answer"),
    Decision("repeating decimals", "1/3", r"0.\overline{3}", True, "read exactly"),
    Decision("repeating decimals", r"0.1\overline{6}", "1/6", True, "read exactly"),
    Decision("repeating decimals", "1", r"0.\overline{9}", True, "they are equal"),
    Decision("repeating decimals", "1/3", "0.333333", True, "equal when rounded to 6 places"),
    Decision("repeating decimals", "1/3", "0.33333", False, "5 places are too few"),
    Decision("repeating decimals", r"0.\overline{3}", "0.333", False, "3 places are too few"),
    Decision("scientific notation", "6.02e23", r"6.02 \times 10^{23}", True, "both are numbers, compared exactly"),
    Decision("scientific notation", "2000", r"2\cdot 10^3", True, "compared exactly"),
    Decision("scientific notation", "1.5e-3", "0.0015", True, "compared exactly"),
    Decision("scientific notation", "1e-7", "0", False, "small is not zero"),
    Decision("trailing dots", "7", "7.", True, "the full stop belongs to the sentence"),
    Decision("trailing dots", "7", "$7$.", True, "so do dollar signs"),
    Decision("trailing dots", "7", "7,", False, "a comma does not"),
    Decision("separators", "1,234", "1234", True, "commas between groups of three digits"),
    Decision("separators", "1.5", "1,5", False, "a comma is no decimal point"),
    Decision("separators", "1,000", "1.000", False, "a point does not group digits"),
    Decision("collections", r"\{1,2\}", "2,1", True, "a set has no order"),
    Decision("collections", "(1,2)", "(2,1)", False, "a pair has one"),
    Decision("collections", "(1,2)", r"\{1,2\}", True, "the braces are not told from parentheses", mistake=True),
    Decision("collections", "(1,2)", "x=1,y=2", True, "the values count"),
    Decision("collections", "[1,2]", "(1,2)", False, "an interval's ends count"),
    Decision("several answers", "6", "5,6", False, "naming more than one is wrong"),
    Decision("several answers", "6", r"5 \text{ or } 6", False, "naming more than one is wrong"),
    Decision("several answers", "6", r"5\pm 1", False, "naming more than one is wrong"),
    Decision("expressions", "x^2-1", "(x-1)(x+1)", True, "equal as expressions"),
    Decision("expressions", r"\sqrt{8}", r"2\sqrt{2}", True, "equal as numbers"),
    Decision("expressions", "1024", "2^{10}", True, "it need not be worked out"),
    Decision("expressions", r"\pi", "3.14159", False, "a rounded value of an exact answer is wrong"),
    Decision("expressions", "2x=4", "x=2", False, "equations are compared as they are, not by their solutions", mistake=True),
    Decision("mixed numbers", r"1\frac{1}{2}", r"\frac{3}{2}", True, "one and a half"),
    Decision("mixed numbers", "1 1/2", r"\frac{3}{2}", False, "without LaTeX it is not read as one and a half", mistake=True),
    Decision("words", "blue", "Blue", True, "letters are compared without regard to case"),
    Decision("words", "(A)", "A", True, "parentheses around a choice mean nothing"),
    Decision("words", "50", "fifty", False, "numbers in words are not read", mistake=True),
)
