"""MinHash against brute force: the same similarities, the same groups, however little is held at a time."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from lmworks.text import duplicates
from lmworks.text.duplicates import BINS, Fingerprints, choose_rows, key, sign


def windows(text: str) -> set[str]:
    plain = " ".join(text.lower().split()).ljust(8)
    return {plain[i : i + 8] for i in range(len(plain) - 7)}


def jaccard(a: str, b: str) -> float:
    return len(windows(a) & windows(b)) / len(windows(a) | windows(b))


def group(texts: list[str], folder: Path, threshold: float | None) -> tuple[list[int], int]:
    """Return the groups of texts, told in batches of 70."""
    with Fingerprints(folder, threshold=threshold) as prints:
        for start in range(0, len(texts), 70):
            batch = texts[start : start + 70]
            prints.add(np.array([key(t) for t in batch], np.uint64), sign(batch) if threshold else None)
        return prints.groups().tolist(), prints.exact


@pytest.mark.parametrize("length", [9, 60, 300, 3000])
def test_signatures_estimate_the_jaccard_similarity(length: int, data_folder: Path) -> None:
    """Without bias, and with the error of 120 independent draws: √(J (1 − J) / 120)."""
    text = (data_folder / "books" / "bronte.txt").read_text("utf-8")
    rng = random.Random(length)
    pairs = []
    for _ in range(400 if length < 1000 else 100):
        start, shift = rng.randrange(len(text) - 2 * length), rng.randrange(length // 2)
        pairs.append((text[start : start + length], text[start + shift : start + shift + length]))
    signatures = sign([one for pair in pairs for one in pair])
    found = (signatures[::2] == signatures[1::2]).mean(axis=1)
    true = np.array([jaccard(*pair) for pair in pairs])
    expected = np.sqrt((true * (1 - true) / BINS).mean())
    assert abs((found - true).mean()) < 4 * expected / len(pairs) ** 0.5 + 1e-9
    assert np.sqrt(((found - true) ** 2).mean()) < 1.25 * expected + 1e-9


def test_a_signature_depends_on_the_set_of_windows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        "",
        "a",
        "short",
        "The  same\ntext in\tother blanks ",
        "the same text in other blanks",
        "x" * 5000,
        "x" * 50,
    ]
    table = sign(texts)
    assert (table[3] == table[4]).all() and (table[5] == table[6]).all()
    assert not (table[1] == table[2]).all()
    assert (table == np.concatenate([sign([text]) for text in texts])).all()  # whatever stands beside it
    monkeypatch.setattr(duplicates, "BLOCK", 50)
    assert (sign(texts) == table).all()  # however it is cut


@pytest.mark.parametrize(("threshold", "rows"), [(0.5, 3), (0.7, 6), (0.8, 8), (0.9, 12), (1.0, 120), (0.05, 1)])
def test_bands_find_nine_in_ten(threshold: float, rows: int) -> None:
    assert choose_rows(threshold) == rows


def make_texts(data_folder: Path, count: int) -> list[str]:
    """Paragraphs, and copies of some that are equal or have a few letters changed."""
    rng = random.Random(1)
    text = (data_folder / "books" / "dubois.txt").read_text("utf-8")
    texts: list[str] = []
    while len(texts) < count:
        draw = rng.random()
        if draw < 0.15 and texts:
            texts.append(rng.choice(texts))
        elif draw < 0.4 and texts:
            letters = list(rng.choice(texts))
            for _ in range(rng.choice([1, 2, 8])):
                letters[rng.randrange(len(letters))] = "q"
            texts.append("".join(letters))
        else:
            start = rng.randrange(len(text) - 600)
            texts.append(text[start : start + rng.choice([100, 300, 600])])
    return texts


def components(texts: list[str], alike: float) -> list[int]:
    """Return the first text of each one's group of texts that are alike, by brute force."""
    sets = [windows(text) for text in texts]
    first = list(range(len(texts)))
    for j in range(len(texts)):
        for i in range(j):
            if first[i] != first[j] and len(sets[i] & sets[j]) >= alike * len(sets[i] | sets[j]):
                a, b = sorted((first[i], first[j]))
                first = [a if one == b else one for one in first]
    return first


def test_groups_against_brute_force(data_folder: Path, tmp_path: Path) -> None:
    texts = make_texts(data_folder, 160)
    found, exact = group(texts, tmp_path, 0.8)
    assert exact == len(texts) - len(set(texts))
    surely, maybe = components(texts, 0.9), components(texts, 0.7)
    pairs = [(i, j) for j in range(len(texts)) for i in range(j)]
    together = [surely[i] == surely[j] for i, j in pairs]
    assert sum(together) > 40
    missed = sum(one and found[i] != found[j] for one, (i, j) in zip(together, pairs, strict=True))
    assert missed <= 0.02 * sum(together)  # of pairs that are more alike than asked for
    assert not any(found[i] == found[j] and maybe[i] != maybe[j] for i, j in pairs)  # less alike than asked for
    assert all(one <= i and found[one] == one for i, one in enumerate(found))  # a group is named by its first


def test_exact_groups_are_those_of_equal_texts(data_folder: Path, tmp_path: Path) -> None:
    texts = make_texts(data_folder, 500)
    found, exact = group(texts, tmp_path, None)
    assert found == [texts.index(text) for text in texts]
    assert exact == len(texts) - len(set(texts))


def test_what_is_held_at_a_time_changes_nothing(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = make_texts(data_folder, 200)
    found = group(texts, tmp_path, 0.7)
    monkeypatch.setattr(duplicates, "SORTED", 60)
    monkeypatch.setattr(duplicates, "ROWS", 33)
    assert group(texts, tmp_path, 0.7) == found


def test_a_corpus_of_one_text_many_times(tmp_path: Path) -> None:
    found, exact = group(["the very same text"] * 3000 + ["another one altogether"], tmp_path, 0.8)
    assert set(found) == {0, 3000} and exact == 2999
    assert group([], tmp_path, 0.8) == ([], 0)
