"""The constraints by id: those of IFEval (arXiv 2311.07911, table 1)."""

from __future__ import annotations

import difflib

from reward_server.verifiers.instructions import formats, keywords, lengths, whole
from reward_server.verifiers.instructions.constraint import Constraint

CONSTRAINTS: dict[str, type[Constraint]] = {
    "keywords:existence": keywords.Existence,
    "keywords:frequency": keywords.Frequency,
    "keywords:forbidden_words": keywords.ForbiddenWords,
    "keywords:letter_frequency": keywords.LetterFrequency,
    "language:response_language": whole.ResponseLanguage,
    "length_constraints:number_words": lengths.NumberOfWords,
    "length_constraints:number_sentences": lengths.NumberOfSentences,
    "length_constraints:number_paragraphs": lengths.NumberOfParagraphs,
    "length_constraints:nth_paragraph_first_word": lengths.NthParagraphFirstWord,
    "detectable_content:number_placeholders": formats.NumberOfPlaceholders,
    "detectable_content:postscript": formats.Postscript,
    "detectable_format:number_bullet_lists": formats.NumberOfBullets,
    "detectable_format:constrained_response": formats.ConstrainedResponse,
    "detectable_format:number_highlighted_sections": formats.NumberOfHighlights,
    "detectable_format:multiple_sections": formats.MultipleSections,
    "detectable_format:json_format": formats.JsonFormat,
    "detectable_format:title": formats.Title,
    "combination:two_responses": whole.TwoResponses,
    "combination:repeat_prompt": whole.RepeatPrompt,
    "startend:end_checker": whole.EndChecker,
    "startend:quotation": whole.Quotation,
    "change_case:english_capital": whole.EnglishCapital,
    "change_case:english_lowercase": whole.EnglishLowercase,
    "change_case:capital_word_frequency": whole.CapitalWordFrequency,
    "punctuation:no_comma": whole.NoComma,
}


def named(name: str) -> type[Constraint]:
    """Raises ValueError with what there is."""
    if name not in CONSTRAINTS:
        near = difflib.get_close_matches(name, CONSTRAINTS, n=1)
        raise ValueError(
            f"there is no instruction {name[:80]!r}{f': did you mean {near[0]!r}?' if near else ''}. There are: {', '.join(CONSTRAINTS)}"
        )
    return CONSTRAINTS[name]
