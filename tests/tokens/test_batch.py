"""Padded batches and the stream of a corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers

from lmworks.base.errors import InputError
from lmworks.tokens import batch as module
from lmworks.tokens.batch import make_stream, pad
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.tokens.train import train_tokenizer


def test_pad_on_both_sides() -> None:
    rows = [[5, 6, 7], [8], []]
    right = pad(rows, pad_id=1)
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1], [1, 1, 1]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    left = pad(rows, pad_id=1, side="left", max_length=2)
    assert left["input_ids"].tolist() == [[5, 6], [1, 8], [1, 1]]
    assert left["attention_mask"].tolist() == [[1, 1], [0, 1], [0, 0]]
    assert left["input_ids"].dtype == left["attention_mask"].dtype == np.int64
    assert pad([], pad_id=1)["input_ids"].shape == (0, 0)


def test_every_document_ends_once() -> None:
    """C25: the end of a text must be in the training data, or a model never stops."""
    tokenizer = train_tokenizer(["ab", "c"], kind="char")
    a, b, c = (tokenizer.encode(x)[0] for x in "abc")
    stream = make_stream(tokenizer, ["ab", "", "c"])
    assert stream.tolist() == [0, a, b, 0, 0, c, 0]
    assert stream.dtype == np.uint16
    assert make_stream(tokenizer, []).tolist() == [0]


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_long_documents_are_encoded_in_pieces_without_a_trace(
    kind: str, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C7, C27: memory stays flat on one huge file, and the ids are those of the whole text."""
    texts = [path.read_text("utf-8") for path in sorted((data_folder / "udhr").glob("*.txt"))[::5]]
    texts.append("a\n\n\nb \n \n c\n\n  d\x1c\n\x85\n e" * 40)
    texts.append("no line end at all " * 50)
    tokenizer = train_tokenizer(texts, kind=kind, vocab_size=900)  # type: ignore[arg-type]
    whole = [0]
    for text in texts:
        whole += [*tokenizer.encode(text), 0]
    monkeypatch.setattr(module, "PIECE", 7)
    monkeypatch.setattr(module, "GROUP", 300)
    sizes = []
    encode = tokenizer.encode_batch

    def watched(group: list[str]) -> list[list[int]]:
        sizes.append(sum(map(len, group)))
        return encode(group)

    monkeypatch.setattr(tokenizer, "encode_batch", watched)
    assert make_stream(tokenizer, texts).tolist() == whole
    assert len(sizes) > 50
    assert sorted(sizes)[len(sizes) // 2] < 500


def test_a_tokenizer_with_other_rules_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.train_from_iterator(
        ["a b\nc d"], tokenizers.trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False)
    )
    monkeypatch.setattr(module, "PIECE", 1)
    text = "a b\nc\nd" * 5
    tokenizer = Tokenizer(backend, config={"eos_token": "</s>"})
    assert make_stream(tokenizer, [text]).tolist() == [0, *tokenizer.encode(text), 0]


def test_a_large_vocabulary_takes_four_bytes() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w1"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    stream = make_stream(Tokenizer(backend, config={"eos_token": "w0"}), ["w69999"])
    assert stream.dtype == np.uint32
    assert stream.tolist() == [0, 69999, 0]


def test_no_end_token_is_an_error() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))
    with pytest.raises(InputError, match="ends a document"):
        make_stream(tokenizer, ["a"])
