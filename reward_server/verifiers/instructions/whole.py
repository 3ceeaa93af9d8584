"""`combination:*`, `startend:*`, `change_case:*`, `punctuation:*` and `language:*`: how the whole text is to be."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator

from reward_server.verifiers.instructions.constraint import Constraint, Count, Phrase, Relation, compare
from reward_server.verifiers.instructions.language import LANGUAGES, language_of

TOKEN = re.compile(r"[^\W_]+(?:[-'\u2019][^\W_]+)*")
"""A word; one with hyphens is one."""


class TwoResponses(Constraint):
    """Two different ones, divided by `******`."""

    def followed_by(self, text: str) -> bool:
        parts = [part.strip() for part in text.split("******")]
        given = [part for part in parts if part]
        return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


class RepeatPrompt(Constraint):
    """The request comes first, word for word, in any case."""

    prompt_to_repeat: Annotated[str, Field(min_length=1, max_length=100_000)]

    def followed_by(self, text: str) -> bool:
        return text.strip().lower().startswith(self.prompt_to_repeat.strip().lower())


class EndChecker(Constraint):
    """The phrase is the end, in any case; quotation marks around the text do not count."""

    end_phrase: Phrase

    def followed_by(self, text: str) -> bool:
        return text.strip().strip('"').lower().endswith(self.end_phrase.lower())


class Quotation(Constraint):
    """All of it in double quotation marks."""

    def followed_by(self, text: str) -> bool:
        text = text.strip()
        return len(text) > 1 and text[0] == text[-1] == '"'


class EnglishCapital(Constraint):
    """English without small letters."""

    def followed_by(self, text: str) -> bool:
        return text.isupper() and language_of(text) == "en"


class EnglishLowercase(Constraint):
    """English without capital letters."""

    def followed_by(self, text: str) -> bool:
        return text.islower() and language_of(text) == "en"


class CapitalWordFrequency(Constraint):
    """So many words all in capital letters, those of one letter included."""

    capital_frequency: Count
    capital_relation: Relation

    def followed_by(self, text: str) -> bool:
        return compare(sum(map(str.isupper, TOKEN.findall(text))), self.capital_relation, self.capital_frequency)


class NoComma(Constraint):
    def followed_by(self, text: str) -> bool:
        return "," not in text


class ResponseLanguage(Constraint):
    """All of it in this language, by its code of ISO 639-1."""

    language: str

    @field_validator("language")
    @classmethod
    def _known(cls, language: str) -> str:
        code = language.lower().partition("-")[0]  # zh-cn
        if code not in LANGUAGES:
            raise ValueError(f"{language!r} is not known: use one of {', '.join(LANGUAGES)}")
        return code

    def followed_by(self, text: str) -> bool:
        return language_of(text) == self.language
