"""Augmented texts: what changes, what stays, and that a seed says which."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from lmworks.base.errors import InputError
from lmworks.text.augment import augment
from lmworks.verbs.cleaning_augment import augment_corpus

TEXT = "The  quick brown fox\njumps over the lazy dog, and everybody laughs about it."


def test_each_way_changes_what_it_says() -> None:
    for seed in map(str, range(30)):
        swapped = augment(TEXT, "swap", share=0.1, seed=seed)
        assert Counter(swapped.split()) == Counter(TEXT.split())
        assert sum(a != b for a, b in zip(swapped.split(), TEXT.split(), strict=True)) == 2
        dropped = augment(TEXT, "drop", share=0.2, seed=seed)
        assert len(dropped.split()) == 14 - 3 and set(dropped.split()) <= set(TEXT.split())
        mistyped = augment(TEXT, "typo", share=0.1, seed=seed)
        pairs = [(a, b) for a, b in zip(mistyped.split(), TEXT.split(), strict=True) if a != b]
        assert all(Counter(a) == Counter(b) and (a[0], a[-1]) == (b[0], b[-1]) for a, b in pairs) and len(pairs) <= 1
        assert len(mistyped) == len(TEXT)
    assert len({augment(TEXT, "drop", share=0.2, seed=str(i)) for i in range(30)}) > 20
    assert augment("one", "drop", share=1, seed="0") == augment("one", "swap", share=1, seed="0") == "one"
    assert augment(" \n", "typo", share=1, seed="0") == " \n"


def test_rows_keep_their_columns(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(f'label,text\ngood,"{TEXT}"\nbad,no\n')
    values = augment_corpus([tmp_path / "in.csv"], tmp_path / "a.jsonl", copies=3, seed=1).values
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(row["label"], row["augmented"]) for row in rows] == [
        ("good", None), ("good", "swap"), ("good", "drop"), ("good", "typo"), ("bad", None)
    ]  # fmt: skip
    assert rows[0]["text"] == TEXT and len({row["text"] for row in rows}) == 5
    assert values["documents"] == {"as it was": 2, "swap": 1, "drop": 1, "typo": 1}
    augment_corpus([tmp_path / "in.csv"], tmp_path / "b.jsonl", copies=3, seed=1)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    augment_corpus([tmp_path / "in.csv"], tmp_path / "b.jsonl.zst", copies=3, seed=1)
    with zstandard.open(tmp_path / "b.jsonl.zst", "rb") as packed:
        assert packed.read() == (tmp_path / "a.jsonl").read_bytes()
    for options, message in (({"ways": "swop"}, 'did you mean "swap"'), ({"share": 0.0}, "nothing would change")):
        with pytest.raises(InputError, match=message):
            augment_corpus([tmp_path / "in.csv"], tmp_path / "c.jsonl", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "c.jsonl").exists()
