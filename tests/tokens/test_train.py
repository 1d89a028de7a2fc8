"""Trained tokenizers: nothing lost on 46 languages, the same ids in Python, transformers and JavaScript."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import lmworks
from lmworks.base.errors import InputError
from lmworks.tokens import train as module
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.tokens.train import train_tokenizer

NODE_LIBRARY = Path(lmworks.__file__).parent / "export/web/node_modules/@huggingface/tokenizers/dist/tokenizers.mjs"
NODE_SCRIPT = """
import { Tokenizer } from %s;
import { readFileSync } from "node:fs";
const read = (name) => JSON.parse(readFileSync(name, "utf8"));
const folder = process.argv[2];
const tokenizer = new Tokenizer(read(folder + "/tokenizer.json"), read(folder + "/tokenizer_config.json"));
const texts = read(folder + "/texts.json");
const ids = texts.map((text) => Array.from(tokenizer.encode(text, { add_special_tokens: false }).ids));
const back = ids.map((row) => tokenizer.decode(row, { skip_special_tokens: false }));
process.stdout.write(JSON.stringify({ ids, back }));
"""


@pytest.fixture(scope="module")
def languages(data_folder: Path) -> list[str]:
    texts = [path.read_text("utf-8") for path in sorted((data_folder / "udhr").glob("*.txt"))]
    assert len(texts) == 46
    return texts


@pytest.fixture(scope="module", params=["bpe", "char"])
def tokenizer(request: pytest.FixtureRequest, languages: list[str]) -> Tokenizer:
    """Trained on every second language only, so that char meets what it does not know."""
    return train_tokenizer(languages[::2], kind=request.param, vocab_size=1500)


def test_round_trip_on_every_language(languages: list[str]) -> None:
    """C6: added tokens lose spaces."""
    bpe = train_tokenizer(languages[:4], vocab_size=600)
    assert [bpe.decode(ids) for ids in bpe.encode_batch(languages)] == languages
    assert bpe.vocab_size == 600
    char = train_tokenizer(languages, kind="char", vocab_size=10**6)
    assert char.vocab_size == 3 + len(set("".join(languages)))  # smaller than asked for, never padded
    assert [char.decode(ids) for ids in char.encode_batch(languages)] == languages


def test_transformers_gives_the_same_ids(tokenizer: Tokenizer, languages: list[str], tmp_path: Path) -> None:
    tokenizer.save(tmp_path, max_length=10**6)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text, ids in zip(languages, tokenizer.encode_batch(languages), strict=True):
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.node
def test_javascript_gives_the_same_ids(tokenizer: Tokenizer, languages: list[str], tmp_path: Path) -> None:
    """C11: JS tokens differ from Python."""
    assert NODE_LIBRARY.exists(), "run: python -m lmworks.export.vendor"
    rng = random.Random(0)
    letters = " \n\t'abcéß0١.,<|😀ไหม\u200d\u3000\x1c\x85\xa0\ufeff\u180e\u2028"
    noise = ["".join(rng.choice(letters) for _ in range(40)) for _ in range(200)]
    texts = [*languages, *noise, "a<|endoftext|>b", "it's we'LL", " ", "\r\n"]
    tokenizer.save(tmp_path)
    (tmp_path / "texts.json").write_text(json.dumps(texts), "utf-8")
    (tmp_path / "run.mjs").write_text(NODE_SCRIPT % json.dumps(NODE_LIBRARY.as_uri()), "utf-8")
    done = subprocess.run(
        ["node", str(tmp_path / "run.mjs"), str(tmp_path)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    ids = tokenizer.encode_batch(texts)
    assert result["ids"] == ids
    assert result["back"] == [tokenizer.decode(row, skip_special_tokens=False) for row in ids]


def test_the_same_text_gives_the_same_file_in_a_new_process(languages: list[str], tmp_path: Path) -> None:
    text = languages[0]
    (tmp_path / "text.txt").write_text(text, "utf-8")
    code = (
        "import sys, pathlib; from lmworks.tokens.train import train_tokenizer as t;"
        "folder = pathlib.Path(sys.argv[1]);"
        "t([(folder / 'text.txt').read_text('utf-8')], vocab_size=700).save(folder)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    train_tokenizer([text], vocab_size=700).save(tmp_path / "here")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_small_data_gives_a_small_vocabulary() -> None:
    assert train_tokenizer(["abab abab"], vocab_size=5000).vocab_size == 258 + 2  # ab, abab
    assert train_tokenizer([""], vocab_size=5000).vocab_size == 258
    assert train_tokenizer(["aab"], kind="char").vocab_size == 5
    assert train_tokenizer(["aab"], kind="char", vocab_size=4).encode("ab") == [3, 2]  # the frequent one stays


@pytest.mark.parametrize(("kind", "size"), [("bpe", 257), ("char", 3), ("words", 100)])
def test_what_cannot_work_is_refused(kind: str, size: int) -> None:
    with pytest.raises(InputError):
        train_tokenizer(["text"], kind=kind, vocab_size=size)  # type: ignore[arg-type]


def test_training_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """C7: BPE training runs out of RAM. Past a limit the corpus is sampled evenly."""
    monkeypatch.setattr(module, "ENOUGH", 1000)
    monkeypatch.setattr(module, "PIECE", 10)
    text = "".join(f"{i:010d}" for i in range(1000))
    pieces = list(module.sample([text, "\ud800"]))
    assert pieces[:100] == [f"{i:010d}" for i in range(100)]
    assert pieces[100:103] == [f"{i:010d}" for i in (100, 102, 104)]
    assert sum(map(len, pieces)) < 4000
    assert pieces[-1] == "\ufffd" or int(pieces[-1]) > 950  # the end of the corpus is seen too
