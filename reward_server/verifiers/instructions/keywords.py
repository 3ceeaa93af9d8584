"""`keywords:*`: words and letters that are to be there, or not."""

from __future__ import annotations

from typing import Annotated

import regex
from pydantic import Field, StringConstraints

from reward_server.verifiers.instructions.constraint import Constraint, Count, Phrase, Relation, compare
from reward_server.verifiers.verdict import Unjudged
from services.contracts.messages import Outcome

SECONDS = 0.25
"""Time, as in `patterns`, of a search for whole words: the one search here whose time is the product of two lengths."""
Phrases = Annotated[tuple[Phrase, ...], Field(min_length=1, max_length=100)]


class Existence(Constraint):
    """All of them, in any case, also as parts of longer words."""

    keywords: Phrases

    def followed_by(self, text: str) -> bool:
        folded = text.casefold()
        return all(keyword.casefold() in folded for keyword in self.keywords)


class Frequency(Constraint):
    """So often, in any case, also as a part of longer words."""

    keyword: Phrase
    frequency: Count
    relation: Relation

    def followed_by(self, text: str) -> bool:
        return compare(text.casefold().count(self.keyword.casefold()), self.relation, self.frequency)


class ForbiddenWords(Constraint):
    """None of them as a whole word, in any case."""

    forbidden_words: Phrases

    def followed_by(self, text: str) -> bool:
        words = "|".join(regex.escape(word, literal_spaces=True) for word in self.forbidden_words)
        try:
            return regex.search(rf"\b(?:{words})\b", text, regex.IGNORECASE, timeout=SECONDS, concurrent=True) is None
        except TimeoutError as late:
            raise Unjudged(Outcome.TIMEOUT, f"the search for forbidden words took more than {SECONDS} s") from late


class LetterFrequency(Constraint):
    """A letter, or another character, so often, in any case."""

    letter: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1)]
    let_frequency: Count
    let_relation: Relation

    def followed_by(self, text: str) -> bool:
        return compare(text.lower().count(self.letter.lower()), self.let_relation, self.let_frequency)
