"""ARPA files against a reader of our own on dictionaries and, where LMWORKS_KENLM names its programs, KenLM itself."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lmworks.base.errors import FormatError
from lmworks.models.ngram import NgramModel
from lmworks.models.ngram_arpa import read_arpa, write_arpa
from lmworks.models.ngram_prune import prune

NAMES = ["</s>", "<unk>", *(f"w{i}" for i in range(2, 40))]
SMOOTHINGS = ["mle", "laplace", "good-turing", "kneser-ney", "modified-kneser-ney"]


def make_stream(seed: int, documents: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tokens = [0]
    for _ in range(documents):
        tokens += [*(2 + rng.zipf(1.5, rng.integers(0, 9)).clip(max=36)).tolist(), 0]
    return np.array(tokens)


def look_up(text: str, words: list[str]) -> float:
    """Return log10 p of a sentence, word for word as the format is defined."""
    rows = {}
    for line in text.splitlines():
        parts = re.split(r"\t", line)
        if len(parts) > 1:
            rows[tuple(parts[1].split(" "))] = (float(parts[0]), float(parts[2]) if len(parts) > 2 else 0.0)
    order = max(len(key) for key in rows)

    def p(context: tuple[str, ...], word: str) -> float:
        if (*context, word) in rows:
            return rows[*context, word][0]
        return rows.get(context, (0, 0.0))[1] + p(context[1:], word)

    total, history = 0.0, ("<s>",)
    for word in [*words, "</s>"]:
        word = word if (word,) in rows else "<unk>"
        total += p(history[-(order - 1) :] if order > 1 else (), word)
        history = (*history, word)
    return total


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_a_file_gives_the_models_probabilities(smoothing: str, order: int, tmp_path: Path) -> None:
    model = NgramModel.train(make_stream(0, 300), order=order, vocab_size=40, eos_id=0, smoothing=smoothing)  # type: ignore[arg-type]
    file = io.StringIO()
    write_arpa(model, NAMES, file)
    (tmp_path / "m.arpa").write_text(file.getvalue())
    again, names = read_arpa(tmp_path / "m.arpa")
    assert names == NAMES
    assert file.getvalue().startswith(f"\\data\\\nngram 1={41}\n")
    held_out = make_stream(1, 40)
    assert again.logprobs(held_out) == pytest.approx(
        np.maximum(model.logprobs(held_out), -99 * math.log(10)), rel=1e-6, abs=1e-6
    )
    ends = np.flatnonzero(held_out == 0)
    for a, b in pairwise(ends[:13].tolist()):
        words = [NAMES[i] for i in held_out[a + 1 : b]]
        mine = np.maximum(model.logprobs(held_out[a : b + 1]), -99 * math.log(10)).sum() / math.log(10)
        assert look_up(file.getvalue(), words) == pytest.approx(mine, rel=1e-6)


def test_what_is_no_arpa_file_is_refused(tmp_path: Path) -> None:
    file = io.StringIO()
    write_arpa(NgramModel.train(make_stream(0, 50), order=2, vocab_size=40, eos_id=0), NAMES, file)
    good = file.getvalue()
    bad = {
        "no \\\\data": "hello\n",
        "ends before|in the": good[: len(good) // 2],
        "instead of": good.replace("\\2-grams:", "\\3-grams:"),
        "in the 2-grams": good.replace("\\2-grams:\n", "\\2-grams:\nx y z\n"),
        "'' in the 1-grams": good.replace(good.split("\\1-grams:\n")[1].splitlines()[1] + "\n", ""),  # one line is gone
        "is no 1-gram": good.replace("<s> w3\n", "<s> nobody\n"),
        "1-gram stands there twice": "\\data\\\nngram 1=3\n\n\\1-grams:\n-1\t</s>\n-1\ta\n-2\ta\n\n\\end\\\n",
        "or weight": re.sub(r"\tw3\t\S+", "\tw3\tnan", good, count=1),
        "in the 2-grams$": good.replace("<s> w3\n", "<s> w3\t-0.5\n"),
        "no counts": good.replace("ngram 1", "grams 1"),
    }
    for message, text in bad.items():
        path = tmp_path / "bad.arpa"
        path.write_text(text)
        with pytest.raises(FormatError, match="no whole ARPA file") as caught:
            read_arpa(path)
        assert re.search(message, caught.value.found), (message, caught.value.found)


def test_the_longest_ngrams_may_have_a_weight_of_nothing(tmp_path: Path) -> None:
    file = io.StringIO()
    write_arpa(NgramModel.train(make_stream(0, 50), order=2, vocab_size=40, eos_id=0), NAMES, file)
    (tmp_path / "plain.arpa").write_text(file.getvalue())
    (tmp_path / "zeros.arpa").write_text(re.sub(r"( w\d+)\n", r"\1\t0\n", file.getvalue()))
    plain, zeros = (read_arpa(tmp_path / f"{name}.arpa")[0] for name in ("plain", "zeros"))
    np.testing.assert_array_equal(plain.levels[0].logprobs, zeros.levels[0].logprobs)


def test_blanks_inside_a_token_are_spelled_out() -> None:
    file = io.StringIO()
    write_arpa(NgramModel.train(np.array([0, 2, 3, 0]), order=2, vocab_size=4, eos_id=0), ["", "u", " ", "a\tb"], file)
    assert "<0x20> a<0x09>b\n" in file.getvalue()


@pytest.mark.live  # LMWORKS_KENLM names the folder of lmplz and query
@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_kenlm_reads_ours_and_we_read_kenlms(order: int, tmp_path: Path, data_folder: Path) -> None:
    from lmworks.verbs import ngrams

    programs, wikitext = Path(os.environ["LMWORKS_KENLM"]), data_folder / "wikitext-2"
    options = f"-o {order} --skip_symbols --discount_fallback -S 200M -T {tmp_path}".split()
    command = [programs / "lmplz", *options]
    with (wikitext / "valid.txt").open() as source, (tmp_path / "theirs.arpa").open("w") as out:
        subprocess.run(command, stdin=source, stdout=out, stderr=subprocess.DEVNULL, check=True)
    ngrams.train(wikitext / "valid.txt", tmp_path / "ours", order=order)
    small = prune(ngrams.load(tmp_path / "ours").model, 1e-7)
    with (tmp_path / "pruned.arpa").open("w", encoding="utf-8") as file:
        write_arpa(small, ngrams.load(tmp_path / "ours").names, file)
    for path in (tmp_path / "theirs.arpa", tmp_path / "ours" / "model.arpa", tmp_path / "pruned.arpa"):
        with (wikitext / "test.txt").open() as source:
            done = subprocess.run(
                [programs / "query", "-v", "summary", path], stdin=source, capture_output=True, text=True
            )
        theirs = float(re.search(r"including OOVs:\s+([\d.]+)", done.stdout)[1])  # type: ignore[index]
        mine = ngrams.evaluate(path, wikitext / "test.txt").values["perplexity_with_blank_lines"]
        assert mine == pytest.approx(theirs, rel=1e-5)
