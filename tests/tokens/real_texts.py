"""Real texts in three scripts, and the shapes of text that break tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

ODD = [
    "",
    " ",
    "a  b   c",
    "naïve CAFÉ Ünïcode ÅNGSTRÖM",
    "tab\there\r\nand\n\nnew lines ",
    "\u200bzero\u200dwidth \ufeff and \x00 control \x07",
    "👩‍👩‍👧 😀 ｆｕｌｌ　ｗｉｄｔｈ ﬁ",
    "it's we'LL don't I'M 12345 3.14 $5,000.00!!!???",
    "e\u0301 decomposed, 東京都 한국어 ไทย नमस्ते",
    "def f(x):\n        return x  # eight spaces",
    "supercalifragilisticexpialidocious" * 4,
]


def real_texts(data: Path, *, count: int = 60) -> list[str]:
    """Return passages and questions of XQuAD in English, Chinese and Russian, tweets of WNUT-17, and ODD."""
    texts = []
    for language in ("en", "zh", "ru"):
        articles = json.loads((data / "xquad" / f"xquad.{language}.json").read_text("utf-8"))["data"]
        for article in articles[: count // 6]:
            for paragraph in article["paragraphs"][:2]:
                texts += [paragraph["context"], paragraph["qas"][0]["question"]]
    lines = (data / "wnut17" / "dev.conll").read_text("utf-8").split("\n\n")[:count]
    texts += [" ".join(row.split("\t")[0] for row in block.splitlines()) for block in lines]
    return [*texts, *ODD]
