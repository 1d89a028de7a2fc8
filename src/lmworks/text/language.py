"""Which language a text is in: py3langid's model (138 languages, Naive Bayes over n-grams of bytes), without a network.

Measured on the Universal Declaration of Human Rights in 46 languages: see docs/text.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from lmworks.base.errors import InputError
from lmworks.base.optional import require

LOOKED_AT = 600  # characters of a text that tell
UNSURE = 0.2  # confidence below which a text is in no language that the model knows


@lru_cache(maxsize=2)
def load(among: tuple[str, ...] = ()) -> Any:
    """Return the model, held to some languages (ISO 639-1 codes where there are, else 639-3), or to none."""
    library = require("py3langid.langid", extra="data")
    model = library.LanguageIdentifier.from_model_file(library.MODEL_FILE, norm_probs=True)
    unknown = sorted(set(among) - set(model.labels))
    if unknown:
        raise InputError(
            f'the language model does not know "{unknown[0]}"',
            expected=" ".join(sorted(set(model.labels) - {"zxx"})),
            fix="name languages by their ISO 639 codes: en, eo, zh …",
        )
    if among:
        model.set_languages(sorted(set(among)))
    return model


def check_languages(codes: Sequence[str]) -> None:
    """Raise InputError for a code that the model does not know."""
    load(tuple(codes))


def identify(text: str, among: tuple[str, ...] = ()) -> str:
    """Return the code of the text's language, or "und" for too little text or an unsure answer."""
    look = text[: 2 * LOOKED_AT].strip()[:LOOKED_AT]
    if not any(c.isalpha() for c in look):
        return "und"
    code, confidence = load(among).classify(look)
    return "und" if confidence < UNSURE or code == "zxx" else str(code)
