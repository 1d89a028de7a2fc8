r"""How our tokenizers cut texts: patterns that mean the same in Python's tokenizers (Oniguruma) and in JavaScript.

    WORDS       words and single other signs, blanks left out; each Chinese character is a word
    PIECES      words with the space before them, numbers, runs of signs, blanks: nothing is lost
    GRAPHEMES   what a reader calls a character (Unicode Standard Annex 29), "e\u0301" or a family of emoji among them

JavaScript has no \X, and Oniguruma's is older than Annex 29's rule for Indian conjuncts, so GRAPHEMES spells the rules
out. Left out: conjuncts of scripts that Unicode 16 and later added to that rule, and a vowel sign of Hangul after a
closed syllable. What a sign is (a mark, an emoji) is each engine's own Unicode version's word.
"""

from __future__ import annotations

import re
from typing import Any

WORDS = r"\p{Han}|(?:(?!\p{Han})[\p{L}\p{M}\p{N}\p{Pc}])+|[^\p{L}\p{M}\p{N}\p{Pc}\p{White_Space}]"
PIECES = (
    r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\p{L}\p{M}\p{N}\p{White_Space}]+"
    r"|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+"
)

SPACELESS = r"[\u102b\u102c\u1038\u1062-\u1064\u1067-\u106d\u1083\u1087-\u108c\u108f\u109a-\u109c\u1a61\u1a63\u1a64]"
TAIL = rf"(?:(?!{SPACELESS})[\p{{Grapheme_Extend}}\p{{Mc}}\u0e33\u0eb3\u200d🏻-🏿])*"  # marks that join what is before
JOINS = r"[\p{Grapheme_Extend}\u200d🏻-🏿]*"
CONTROL = r"[\p{Cc}\p{Zl}\p{Zp}\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff0-\ufffb]"
BEFORE = r"[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e]*"  # signs that join what follows
EMOJI = rf"\p{{Extended_Pictographic}}(?:{JOINS}(?<=\u200d)\p{{Extended_Pictographic}})*"
LEADING, VOWEL = r"[\u1100-\u115f\ua960-\ua97c]", r"[\u1160-\u11a7\ud7b0-\ud7c6]"
TRAILING = r"[\u11a8-\u11ff\ud7cb-\ud7fb]"
HANGUL = rf"{LEADING}*(?:[\uac00-\ud7a3]|{VOWEL}){VOWEL}*{TRAILING}*|{LEADING}+|{TRAILING}+"
CONSONANT = (
    r"[\u0915-\u0939\u0958-\u095f\u0978-\u097f\u0995-\u09b9\u09dc-\u09df\u09f0\u09f1\u0a95-\u0ab9\u0af9"
    r"\u0b15-\u0b39\u0b5c-\u0b5f\u0b71\u0c15-\u0c39\u0c58-\u0c5a\u0d15-\u0d3a]"
)
CONJUNCT = rf"{CONSONANT}(?:{JOINS}[\u094d\u09cd\u0acd\u0b4d\u0c4d\u0d4d]{JOINS}{CONSONANT})+"
CLUSTER = rf"\p{{RI}}\p{{RI}}|{EMOJI}|{HANGUL}|{CONJUNCT}|(?!{CONTROL})[\s\S]"
CODES = re.compile(r"\\u([0-9a-f]{4})")
GRAPHEMES = CODES.sub(  # Oniguruma reads no \u
    lambda code: chr(int(code[1], 16)), rf"\r\n|{CONTROL}|{BEFORE}(?:{CLUSTER}){TAIL}|[\s\S]"
)
OURS = (WORDS, PIECES, GRAPHEMES)  # each cuts between a character and a line end


def is_ours(rule: dict[str, Any]) -> bool:
    """Say whether a tokenizer.json's `pre_tokenizer` is one of these patterns."""
    pattern = rule.get("pattern", {})
    return rule.get("type") == "Split" and pattern.get("Regex") in OURS
