"""What is held out: a share of every label, copies on one side, and a word on what the split cannot give."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lmworks.base.errors import InputError
from lmworks.text.labelled import Labelled
from lmworks.training.data import draw
from lmworks.verbs.finetune_data import HELD_STREAM, hold_out, read_data

COLUMNS = {"text_column": None, "label_column": None, "header": True}
CLASSES = "text-classification"


def labelled(references: list[str], texts: list[str] | None = None) -> Labelled:
    texts = texts or [f"text {i}" for i in range(len(references))]
    return Labelled(CLASSES, texts, references, tuple(dict.fromkeys(references)), "here")


@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_is_held_out_of_classes_too_small_for_one_each(seed: int) -> None:
    """60 classes of 4: 24 examples of 24 classes; beside a large class the small ones get their share."""
    train, held = hold_out(labelled([f"c{i // 4}" for i in range(240)]), seed)
    assert len(held) == len(set(held.references)) == 24 and len(set(train.references)) == 60
    assert held.notes == ("36 of 60 labels have no held-out example: too few rows.",)
    train, held = hold_out(labelled(["big"] * 50 + [f"c{i // 5}" for i in range(50)]), seed)
    counts = Counter(held.references)
    assert len(held) == 10 and counts["big"] == 5 and len(counts) == 6
    train, held = hold_out(labelled(["big"] * 10 + [f"c{i}" for i in range(90)]), seed)  # a last row stays
    assert set(held.references) == {"big"} and len(held) == 5 and len(set(train.references)) == 91
    train, held = hold_out(labelled(["a", "b", "c"]), seed)
    assert (len(train), len(held)) == (2, 1)
    with pytest.raises(InputError, match="cannot be trained on and held out"):
        hold_out(labelled(["a"]), seed)


def test_large_classes_without_copies_are_split_by_the_draw_alone() -> None:
    """Of every class the tenth with the lowest numbers: runs of the past keep their rows."""
    references = np.random.default_rng(0).choice(["a", "b", "c"], 200, p=[0.7, 0.2, 0.1]).tolist()
    numbers = draw(5, 0, 200, stream=HELD_STREAM)
    places: list[int] = []
    for name in "abc":
        own = sorted((i for i in range(200) if references[i] == name), key=lambda i: numbers[i])
        places += own[: round(0.1 * len(own))]
    train, held = hold_out(labelled(references), 5)
    assert held.examples == [f"text {i}" for i in sorted(places)] and len(train) + len(held) == 200
    assert held.notes == ()


@pytest.mark.parametrize("seed", range(3))
def test_copies_stay_on_one_side(seed: int) -> None:
    """10 texts 8 times each; a text with two labels goes with all its rows, and never takes a label's last."""
    texts = [f"text {i % 10}" for i in range(80)]
    train, held = hold_out(labelled(["pos" if i % 2 else "neg" for i in range(80)], texts), seed)
    assert not set(train.examples) & set(held.examples) and Counter(held.references) == {"pos": 8, "neg": 8}
    texts = [*(f"text {i}" for i in range(40)), "text 0"]
    train, held = hold_out(labelled(["a"] * 40 + ["b"], texts), seed)
    assert not set(train.examples) & set(held.examples) and set(train.references) == {"a", "b"}
    words = [("a", "b"), ("c", "d"), ("a", "b"), ("c", "d")]
    tags = Labelled("token-classification", words, [("O", "O")] * 4, ("O",), "here")
    train, held = hold_out(tags, seed)
    assert len(train) == len(held) == 2 and not set(train.examples) & set(held.examples)


def test_copies_across_given_files_are_counted(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"text {i}", "label": "ab"[i % 2]}) for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:6]))
    (tmp_path / "validation.jsonl").write_text("\n".join(rows[3:]))
    for file, says in (("train.jsonl", ("6 of 6",)), ("validation.jsonl", ("3 of 5",))):
        _, held = read_data(tmp_path / "train.jsonl", tmp_path / file, CLASSES, None, 0, COLUMNS)
        assert held.notes == tuple(f"{one} validation examples are also in the training data." for one in says)


def test_few_whole_numbers_with_a_point_are_said_to_be_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"text {i},{i % 2}.0\n" for i in range(20)))
    (tmp_path / "b.csv").write_text("text,label\n" + "".join(f"text {i},{i % 2}.5\n" for i in range(20)))
    train, _ = read_data(tmp_path / "a.csv", None, CLASSES, None, 0, COLUMNS)
    assert len(train.notes) == 1 and "2 whole numbers" in train.notes[0] and "numbers" in train.notes[0]
    assert read_data(tmp_path / "b.csv", None, CLASSES, None, 0, COLUMNS)[0].notes == ()
