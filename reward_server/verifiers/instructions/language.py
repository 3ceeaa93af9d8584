"""Which language a text is in. py3langid is deterministic and small; langdetect, which IFEval takes, draws at random."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

LANGUAGES = (
    "af", "ar", "bg", "bn", "ca", "cs", "cy", "da", "de", "el", "en", "es", "et", "fa", "fi", "fr", "gu", "he", "hi", "hr",
    "hu", "id", "it", "ja", "kn", "ko", "lt", "lv", "mk", "ml", "mr", "ne", "nl", "no", "pa", "pl", "pt", "ro", "ru", "sk",
    "sl", "so", "sq", "sv", "sw", "ta", "te", "th", "tl", "tr", "uk", "ur", "vi", "zh",
)  # fmt: skip
"""Those that langdetect tells apart, among them all that IFEval asks for."""
LONGEST = 16_384
"""Characters that are looked at: a longer text is seen in as many pieces as make up that, spread over it."""
PIECES = 16
NOTHING = "zxx"
"""py3langid's code for what is no language: numbers, code, punctuation."""
UNIFORM = 1.001 / (len(LANGUAGES) + 1)
"""Probability of each language, all but rounding, when the text has no feature of any."""


def language_of(text: str) -> str | None:
    """Code of the likeliest language; None where nothing in the text speaks for any. Of a few words it is often wrong, as every such guess is."""
    if len(text) > LONGEST:
        width = LONGEST // PIECES
        text = "\n".join(text[start : start + width] for start in range(0, len(text) - width + 1, (len(text) - width) // (PIECES - 1)))
    code, confidence = _identifier().classify(text.lower())
    return str(code) if code != NOTHING and confidence > UNIFORM else None


@lru_cache(1)
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # with numpy, which the processes of other judges have no room for

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages((*LANGUAGES, NOTHING))
    return identifier
