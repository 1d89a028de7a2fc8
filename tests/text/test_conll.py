"""CoNLL's word a line with a first line that names the columns, beside tables that hold a sentence a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmworks.text.labelled import read_labelled

WORDS, TAGS = [("Anna", "lives"), ("in", "Bern")], [("B-PER", "O"), ("O", "B-LOC")]


@pytest.mark.parametrize("name", ["a.tsv", "a.conll"])
@pytest.mark.parametrize("head", ["tokens\ttags\n", "word\tner_tags\n", "words\tTag\n\n", ""])
def test_a_header_is_no_word(name: str, head: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(head + "Anna\tB-PER\nlives\tO\n\nin\tO\nBern\tB-LOC\n")
    data = read_labelled(tmp_path / name, "token-classification")
    assert (data.examples, data.references) == (WORDS, TAGS)


def test_a_tag_that_comes_again_is_a_tag_and_a_table_of_sentences_stays_one(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("the\tlabel\nold\tO\n\nlast\tlabel\n")
    data = read_labelled(tmp_path / "a.conll", "token-classification")
    assert data.examples == [("the", "old"), ("last",)]
    (tmp_path / "a.tsv").write_text("tokens\ttags\nAnna lives\tB-PER O\n\nin Bern\tO B-LOC\n")
    data = read_labelled(tmp_path / "a.tsv", "token-classification")
    assert (data.examples, data.references) == (WORDS, TAGS)
