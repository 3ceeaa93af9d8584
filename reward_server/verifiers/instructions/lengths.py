"""`length_constraints:*`: words, sentences and paragraphs."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, model_validator

from reward_server.verifiers.instructions.constraint import Constraint, Count, Phrase, Relation, compare

WORD = re.compile(r"\w+")
NUMBERING = re.compile(r"^[ \t]*\d{1,3}[.)]", re.MULTILINE)
SENTENCE_END = re.compile(
    r"(?<!\b[A-Z])(?<!\b(?:Mr|Dr|Ms|St|vs))(?<!\b(?:Mrs|Inc|Ltd|etc))(?<!\bProf)(?<!\b(?:e\.g|i\.e|a\.m|p\.m))"  # initials and abbreviations
    r"(?<![.!?])[.!?]++[\"'\u201d\u2019)\]*_]*+(?=\s+[^a-z\s])"
    r"|[\u3002\uff01\uff1f\u0964]+"  # of Chinese, Japanese and Hindi, which no space follows
)
"""A full stop, question or exclamation mark, with what closes after it, before white space and anything but a small letter. The lookbehind for
the marks themselves keeps a row of a million of them linear."""


class NumberOfWords(Constraint):
    num_words: Count
    relation: Relation

    def followed_by(self, text: str) -> bool:
        return compare(len(WORD.findall(text)), self.relation, self.num_words)


class NumberOfSentences(Constraint):
    num_sentences: Count
    relation: Relation

    def followed_by(self, text: str) -> bool:
        return compare(sentences(text), self.relation, self.num_sentences)


class NumberOfParagraphs(Constraint):
    """Exactly so many, divided by `***`; none in between may be empty."""

    num_paragraphs: Count

    def followed_by(self, text: str) -> bool:
        first, *inner = text.split("***")
        last = [inner.pop()] if inner else []
        return all(part.strip() for part in inner) and sum(bool(part.strip()) for part in (first, *inner, *last)) == self.num_paragraphs


class NthParagraphFirstWord(Constraint):
    """Exactly so many paragraphs, divided by an empty line, of which the n-th, from 1, begins with this word in any case."""

    num_paragraphs: Annotated[int, Field(ge=1, le=10**6)]
    nth_paragraph: Annotated[int, Field(ge=1, le=10**6)]
    first_word: Phrase

    @model_validator(mode="after")
    def _within(self) -> NthParagraphFirstWord:
        if self.nth_paragraph > self.num_paragraphs:
            raise ValueError(f"nth_paragraph ({self.nth_paragraph}) is above num_paragraphs ({self.num_paragraphs})")
        return self

    def followed_by(self, text: str) -> bool:
        paragraphs = [part.strip() for part in text.split("\n\n")]
        if sum(map(bool, paragraphs)) != self.num_paragraphs or not paragraphs[self.nth_paragraph - 1]:
            return False
        word = paragraphs[self.nth_paragraph - 1].split(maxsplit=1)[0].lstrip("'").lstrip('"')
        return re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower() == self.first_word.lower()


def sentences(text: str) -> int:
    """Pieces between ends of sentences that have a letter or a digit in them; numbering at the beginning of a line does not end one."""
    return sum(WORD.search(piece) is not None for piece in SENTENCE_END.split(NUMBERING.sub("", text)))
