"""Tiny bodies of transformers with a WordPiece vocabulary of real words, saved as published folders."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyzäöüß0123456789.,'!?-:;()&\"@#/_%=*+$[]<>|~^`{}"
POSITIONS = 160


def write_vocabulary(folder: Path, texts: Iterable[str], *, words: int = 700) -> int:
    """Write vocab.txt with the commonest words of these texts and every letter; return its size."""
    counts = Counter(word for text in texts for word in text.lower().split() if word.isalpha())
    pieces = [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokens = list(dict.fromkeys([*SPECIAL, *pieces, *(word for word, _ in counts.most_common(words))]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": POSITIONS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(tokens)


def make_body(folder: Path, texts: Iterable[str], *, seed: int = 0) -> Path:
    """Save a BERT without a head, of two layers and 32 numbers wide; return its folder."""
    size = write_vocabulary(folder, texts)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def two_languages(data_folder: Path, *, skip: int, count: int) -> list[tuple[str, str]]:
    """Return English and German sentences with their language: real and easy to tell apart."""
    rows = []
    for language in ("en", "de"):
        with gzip.open(data_folder / f"multi30k/train.{language}.gz", "rt", encoding="utf-8") as file:
            lines = [file.readline().strip() for _ in range(skip + count)][skip:]
        rows += [(line, language) for line in lines]
    return rows


def make_languages(root: Path, data_folder: Path, count: int) -> None:
    """Leave in `root` a body without a head, and English and German sentences: `count` of each, and 40 others."""
    train = two_languages(data_folder, skip=0, count=count)
    make_body(root / "body", (text for text, _ in train))
    write_rows(root / "train.jsonl", train)
    write_rows(root / "validation.jsonl", two_languages(data_folder, skip=500, count=40))


def write_rows(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    """Write texts and labels as jsonl."""
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path
