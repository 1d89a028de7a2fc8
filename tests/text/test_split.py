"""The split: by document, seeded, without leaks."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from lmworks.base.errors import InputError
from lmworks.text.read import Document
from lmworks.text.split import split_documents


def make(count: int, *, seed: int = 0) -> list[Document]:
    rng = random.Random(seed)
    return [Document(f"{i}", f"{i} " + "word " * rng.randint(5, 50)) for i in range(count)]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_many_documents(share: float) -> None:
    documents = make(500)
    train, held_out = split_documents(documents, validation=share, seed=3)
    assert sorted(train + held_out, key=lambda d: int(d.name)) == documents
    assert train == [d for d in documents if d in train]  # the order stays
    size = sum(len(d.text) for d in held_out) / sum(len(d.text) for d in documents)
    assert abs(size - share) < 0.005
    assert split_documents(documents, validation=share, seed=3) == (train, held_out)
    assert split_documents(documents, validation=share, seed=4)[1] != held_out


def test_the_order_of_the_files_does_not_matter() -> None:
    documents = make(100)
    shuffled = random.Random(1).sample(documents, 100)
    assert {d.name for d in split_documents(documents)[1]} == {d.name for d in split_documents(shuffled)[1]}


def test_another_process_splits_alike() -> None:
    code = (
        "from lmworks.text.split import split_documents as s; from lmworks.text.read import Document as D;"
        "print([d.name for d in s([D(str(i), f'text {i}') for i in range(50)])[1]])"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True).stdout
        for hash_seed in ("1", "2")
    }
    (output,) = outputs
    assert eval(output) == [d.name for d in split_documents([Document(str(i), f"text {i}") for i in range(50)])[1]]


def test_duplicates_stay_together() -> None:
    documents = make(60) * 3
    train, held_out = split_documents(documents)
    assert not {d.text for d in train} & {d.text for d in held_out}
    assert len(train) + len(held_out) == 180


def test_a_single_text_is_cut_at_exactly_nine_tenths(data_folder: Path) -> None:
    text = (data_folder / "tinyshakespeare" / "input.txt").read_text("utf-8")
    (train,), (held_out,) = split_documents([Document("x", text)])
    assert (train.text, held_out.text) == (text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :])  # nanoGPT's


def test_few_texts_give_their_last_lines() -> None:
    documents = [Document(f"{i}", "".join(f"{i} line {j}\n" for j in range(100))) for i in range(3)]
    train, held_out = split_documents(documents)
    for whole, a, b in zip(documents, train, held_out, strict=True):
        assert a.text + b.text == whole.text
        assert a.text.endswith("\n")
        assert 9 <= b.text.count("\n") <= 12
    words = [Document("a", "one two three four five six seven eight nine ten"), Document("b", "x" * 30)]
    assert [d.text for d in split_documents(words)[1]] == ["nine ten", "xxx"]


def test_large_documents_do_not_spoil_the_share() -> None:
    sizes = [9_000] * 6 + [50] * 1000
    documents = [Document(f"{i}", f"{i} ".ljust(size, "x")) for i, size in enumerate(sizes)]
    for seed in range(8):
        held_out = split_documents(documents, seed=seed)[1]
        assert abs(sum(len(d.text) for d in held_out) / sum(sizes) - 0.1) < 0.002


def test_one_giant_among_many_is_cut_too() -> None:
    documents = [*make(30), Document("giant", "line of text\n" * 5000)]
    _, held_out = split_documents(documents)
    size = sum(len(d.text) for d in held_out) / sum(len(d.text) for d in documents)
    assert 0.09 < size < 0.13


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="out of range"):
        split_documents(make(30), validation=share)


def test_too_little_to_split_is_refused() -> None:
    with pytest.raises(InputError, match="too little text"):
        split_documents([Document("x", "a")])
    with pytest.raises(InputError, match="too little text"):
        split_documents([])
