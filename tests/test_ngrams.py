"""`lmworks ngram` from end to end: files, figures that KenLM gave, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lmworks.base.errors import FormatError, InputError
from lmworks.cli import main
from lmworks.verbs import ngrams

FOX = "the quick brown fox jumps over the lazy dog\nthe dog sleeps\na fox jumps\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of three sentences, one a smoothing."""
    place = tmp_path_factory.mktemp("ngrams")
    (place / "fox.txt").write_text(FOX)
    for smoothing in ("mle", "laplace", "kneser-ney"):
        ngrams.train(place / "fox.txt", place / smoothing, order=2, smoothing=smoothing)
    return place


def test_the_table_of_the_book(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ngram", "table", str(folder / "mle"), "fox"]) == 0
    assert "P(jumps | fox)" in (shown := capsys.readouterr().out)
    assert "1.0000" in shown
    after = ngrams.table(folder / "mle", "the").values["probabilities"]
    assert after == pytest.approx({"quick": 1 / 3, "lazy": 1 / 3, "dog": 1 / 3})
    assert ngrams.table(folder / "mle", "<s>").values["probabilities"] == pytest.approx({"the": 2 / 3, "a": 1 / 3})
    assert ngrams.table(folder / "laplace", "fox").values["probabilities"]["jumps"] == pytest.approx(3 / 14)


def test_the_chain_rule(folder: Path) -> None:
    found = ngrams.score(folder / "mle", "the fox jumps").values
    assert found["logprob"] is None  # "the fox" was never seen
    found = ngrams.score(folder / "mle", "a fox jumps").values
    assert found["logprob"] == pytest.approx(math.log(1 / 3 * 1 * 1 * 1 / 2))
    assert [row["token"] for row in found["tokens"]] == ["a", "fox", "jumps", "</s>"]
    texts = ngrams.sample(folder / "mle", count=8).values["texts"]
    assert texts == ngrams.sample(folder / "mle", count=8).values["texts"]
    assert all(text.startswith(("the ", "a ")) for text in texts)
    assert all(t.startswith("lazy dog") for t in ngrams.sample(folder / "mle", prompt="lazy", count=4).values["texts"])


def test_eval_counts_what_it_says(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("the dog  jumps\n\n  \nthe fox\n")
    assert main(["ngram", "eval", str(folder / "laplace"), str(tmp_path / "t.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    p = [3 / 15, 2 / 15, 1 / 14, 2 / 14, 3 / 15, 1 / 15, 1 / 14]  # V = 12: ten words, <unk>, </s>
    assert found["perplexity"] == pytest.approx(math.exp(-sum(map(math.log, p)) / 7))
    assert found["bits_per_byte"] == pytest.approx(-sum(map(math.log2, p)) / len("the dog jumps\nthe fox\n"))
    assert (found["oov_rate"], found["tokens"], found["lines"], found["blank_lines"]) == (0, 7, 2, 2)
    (tmp_path / "u.txt").write_text("the unicorn\n<unk> fox\n")
    found = ngrams.evaluate(folder / "laplace", tmp_path / "u.txt").values
    assert (found["oov"], found["oov_rate"], found["bits_per_byte"]) == (2, 0.5, None)
    found = ngrams.evaluate(folder / "mle", tmp_path / "u.txt").values
    assert found["perplexity"] is None
    assert found["impossible_tokens"] == 5


@pytest.mark.parametrize(("order", "including", "excluding"), [(2, 687.1123, 337.4638), (3, 654.9973, 320.1231)])
def test_kenlms_figures(order: int, including: float, excluding: float, data_folder: Path, tmp_path: Path) -> None:
    ngrams.train(data_folder / "wikitext-2" / "valid.txt", tmp_path / "m", order=order)
    found = ngrams.evaluate(tmp_path / "m", data_folder / "wikitext-2" / "test.txt").values
    assert found["perplexity_with_blank_lines"] == pytest.approx(including, rel=1e-6)
    assert (found["oov"], found["tokens_with_blank_lines"]) == (27_114, 245_569)
    (tmp_path / "m" / "model.safetensors").unlink()  # the ARPA file alone
    again = ngrams.evaluate(tmp_path / "m", data_folder / "wikitext-2" / "test.txt").values
    assert again["perplexity"] == pytest.approx(found["perplexity"], rel=1e-6)
    assert again["perplexity_excluding_oov"] == pytest.approx(found["perplexity_excluding_oov"], rel=1e-6)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_tokens_of_a_tokenizer(kind: str, data_folder: Path, tmp_path: Path) -> None:
    text = (data_folder / "books" / "botchan.txt").read_text(encoding="utf-8-sig").splitlines()
    (tmp_path / "train.txt").write_text("\n".join(text[:1500]) + "\n")
    (tmp_path / "test.txt").write_text("\n".join(text[1500:1700]) + "\n")
    ngrams.train(tmp_path / "train.txt", tmp_path / "m", order=4, kind=kind, vocab_size=400)
    found = ngrams.evaluate(tmp_path / "m", tmp_path / "test.txt").values
    assert 1.5 < found["bits_per_byte"] < 3.5
    assert found["bytes"] == len(("\n".join(text[1500:1700]) + "\n").encode()) - found["blank_lines"]
    assert (tmp_path / "m" / "tokenizer.json").is_file()
    assert ngrams.sample(tmp_path / "m", prompt="He", count=1).values["texts"][0].startswith("He")
    assert ngrams.table(tmp_path / "m", "th").values["probabilities"]


def test_a_small_vocabulary_learns_the_unknown_word(folder: Path, tmp_path: Path) -> None:
    found = ngrams.train(folder / "fox.txt", tmp_path / "m", order=2, vocab_size=5).values
    assert found["vocab_size"] == 5
    assert ngrams.load(tmp_path / "m").names == ["</s>", "<unk>", "the", "fox", "jumps"]  # ties: the first one
    assert ngrams.table(tmp_path / "m", "the").values["probabilities"]["<unk>"] > 0.2


def test_bad_input_says_what_to_do(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (("--order", "30"), "--order is out of range"),
        (("--order", "12"), "no line is long enough for --order 12"),
        (("--smoothing", "good-turing"), "too little text for Good-Turing"),
        (("--smoothing", "knesser-ney"), 'did you mean "kneser-ney"'),
        (("--kind", "words"), "there is no kind 'words'"),
        (("--prune", "2"), "--prune is out of range"),
        (("--min-count", "0"), "--min-count is out of range"),
        (("--smoothing", "laplace", "--prune", "1e-6"), "cannot be pruned"),
        (("--smoothing", "mle", "--discount", "0.2"), "is for kneser-ney"),
    ):
        assert main(["ngram", "train", str(folder / "fox.txt"), "-o", str(tmp_path / "x"), *words]) == 2
        assert said.lower() in capsys.readouterr().err.lower(), words
        assert not (tmp_path / "x").exists()
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(InputError, match="no text"):
        ngrams.train(tmp_path / "blank.txt", tmp_path / "x")
    with pytest.raises(InputError, match="does not know this context") as caught:
        ngrams.table(folder / "mle", "the unicorn")
    assert caught.value.found == "unicorn"
    with pytest.raises(InputError, match="no n-gram model here"):
        ngrams.evaluate(tmp_path, folder / "fox.txt")
    broken = tmp_path / "broken"
    ngrams.train(folder / "fox.txt", broken)
    (broken / "model.safetensors").write_bytes(b"no")
    with pytest.raises(FormatError, match=r"model\.safetensors cannot be used"):
        ngrams.load(broken)


def test_bits_per_byte_are_none_where_a_tokenizer_loses_blanks(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(FOX * 40)
    (tmp_path / "same").write_text("the  dog   sleeps\n")
    for kind, lossy in (("wordpiece", True), ("bpe", False)):
        ngrams.train(tmp_path / "text", tmp_path / kind, order=2, kind=kind, vocab_size=300 - 200 * lossy)
        found = ngrams.evaluate(tmp_path / kind, tmp_path / "same")
        assert (found.values["bits_per_byte"] is None) == lossy and bool(found.notes) == lossy


def test_an_end_token_that_is_spelled_out_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(FOX * 40)
    ngrams.train(tmp_path / "text", tmp_path / "bpe", order=2, kind="bpe", vocab_size=300)
    (tmp_path / "odd").write_text("the fox<|endoftext|> jumps\n\nthe dog\n")
    found = ngrams.evaluate(tmp_path / "bpe", tmp_path / "odd").values
    assert (found["lines"], found["blank_lines"]) == (2, 1) and found["tokens"] == found["tokens_with_blank_lines"] - 1


def test_samples_of_mle_stop_where_nothing_is_known(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing follows this prompt"):
        ngrams.sample(folder / "mle", prompt="zebras unheard")
    for bad in ({"seed": -1}, {"count": 0}, {"max_tokens": -2}):
        with pytest.raises(InputError, match="out of range"):
            ngrams.sample(folder / "mle", **bad)
    with pytest.raises(InputError, match="--top is out of range"):
        ngrams.table(folder / "mle", "fox", top=0)


def test_good_turing_on_a_word_says_so_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("word\n")
    with pytest.raises(InputError, match="too little text for Good-Turing"):
        ngrams.train(tmp_path / "text", tmp_path / "out", order=2, smoothing="good-turing")


def test_the_capital_unk_of_other_writers(tmp_path: Path) -> None:
    body = "\\data\\\nngram 1=4\n\n\\1-grams:\n-0.5\t<UNK>\n-99\t<s>\n-0.4\t</s>\n-0.6\ta\n\n\\end\\\n"
    (tmp_path / "m.arpa").write_text(body)
    (tmp_path / "text").write_text("a zebra\n")
    found = ngrams.evaluate(tmp_path / "m.arpa", tmp_path / "text").values
    assert found["logprob10"] == pytest.approx(-1.5) and found["oov"] == 1


def test_a_capital_unk_in_a_text_is_the_unknown_word(tmp_path: Path) -> None:
    """A reader of ARPA files takes <UNK> for <unk>, so that as a word of its own it would overwrite that."""
    (tmp_path / "text").write_text("a <UNK> b\na b <UNK>\nb a\n")
    ngrams.train(tmp_path / "text", tmp_path / "m", order=2)
    folder, file = (
        ngrams.evaluate(path, tmp_path / "text").values for path in (tmp_path / "m", tmp_path / "m" / "model.arpa")
    )
    assert folder["oov"] == file["oov"] == 2
    assert folder["logprob10"] == pytest.approx(file["logprob10"], rel=1e-6)
