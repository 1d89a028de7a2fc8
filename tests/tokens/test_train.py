"""Trained tokenizers: ids as the definitions say and as every library reads them, the same file for the same texts."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from itertools import groupby, pairwise
from math import inf
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers
from transformers import AutoTokenizer

import lmworks
from lmworks.base.errors import InputError
from lmworks.export.verify_js import find_modules, find_node
from lmworks.tokens import train as module
from lmworks.tokens.batch import is_cut_at_lines, make_stream
from lmworks.tokens.by_hand import PRINTABLE, cut
from lmworks.tokens.patterns import PIECES, WORDS
from lmworks.tokens.tokenizer import Tokenizer, repair
from lmworks.tokens.train import train_tokenizer

RECIPES: dict[str, dict[str, Any]] = {
    "word": {"kind": "word"},
    "char": {"kind": "char"},
    "bpe": {"kind": "bpe"},
    "bpe of characters": {"kind": "bpe", "level": "char"},
    "wordpiece": {"kind": "wordpiece", "lowercase": True},
    "unigram": {"kind": "unigram"},
}
STRINGS = 5000
NODE_SCRIPT = """
import { createRequire } from "node:module";
import { join } from "node:path";
import { text } from "node:stream/consumers";
const { modules, web, folders, texts } = JSON.parse(await text(process.stdin));
const library = createRequire(join(modules, "lmworks.js"))("@huggingface/transformers");
Object.assign(library.env, { allowRemoteModels: false, allowLocalModels: true });
const { Encoder } = await import(new URL("encoding.js", web));
const found = [];
for (const folder of folders) {
  const tokenizer = await library.AutoTokenizer.from_pretrained(folder);
  const encoder = new Encoder(tokenizer);
  const ids = texts.map((one) => tokenizer.encode(one, { add_special_tokens: false }));
  const back = ids.map((row) => (row.length ? tokenizer.decode(row, { skip_special_tokens: false }) : ""));
  found.push({ ids, back, page: texts.map((one) => encoder.ids(one)) });
}
const segmenter = new Intl.Segmenter("en", { granularity: "grapheme" });
const graphemes = texts.map((one) => Array.from(segmenter.segment(one), (part) => part.segment));
process.stdout.write(JSON.stringify({ found, graphemes }));
"""


@pytest.fixture(scope="module")
def languages(data_folder: Path) -> list[str]:
    texts = [path.read_text("utf-8") for path in sorted((data_folder / "udhr").glob("*.txt"))]
    assert len(texts) == 46
    return texts


@pytest.fixture(scope="module")
def strings(languages: list[str]) -> list[str]:
    """Random Unicode: letters of the languages, any assigned character, blanks and marks, half pairs of surrogates."""
    rng, known = random.Random(0), "".join(languages)
    assigned = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Co")]
    odd = " \n\t\r\0'abcéß0١.,<|😀ไหม\u200d\u3000\x1c\xa0\ufeff\u180e\u2028ΣςİǅÅक्ष🏽🇵🇱\ud800\udc00"
    pools: list[Callable[[], str]] = [lambda: rng.choice(known), lambda: rng.choice(assigned), lambda: rng.choice(odd)]
    return ["".join(rng.choices(pools, (6, 1, 2))[0]() for _ in range(rng.randint(0, 30))) for _ in range(STRINGS)]


@pytest.fixture(scope="module")
def trained(languages: list[str]) -> dict[str, Tokenizer]:
    """Trained on some of the languages only, so that all but bytes meet what they do not know."""
    return {name: train_tokenizer(languages[::6], vocab_size=2000, **recipe) for name, recipe in RECIPES.items()}


def greedy(word: str, vocabulary: dict[str, int], unknown: int) -> list[int]:
    """WordPiece: the longest known piece, again and again; one unknown token for a word that cannot be made up."""
    ids, start = [], 0
    while start < len(word):
        ends = range(len(word), start, -1)
        known = (("##" if start else "") + word[start:end] for end in ends)
        found = next(
            ((end, vocabulary[piece]) for end, piece in zip(ends, known, strict=True) if piece in vocabulary), None
        )
        if found is None:
            return [unknown]
        start = found[0]
        ids.append(found[1])
    return ids


def likeliest(word: str, scores: dict[str, tuple[int, float]], unknown: int) -> list[int]:
    """Unigram: the cut with the highest sum of scores; neighbouring unknown characters are one token."""
    worst = min(score for _, score in scores.values()) - 10
    best: list[tuple[float, int, int]] = [(0.0, 0, -1)] + [(-inf, 0, -1)] * len(word)
    for end in range(1, len(word) + 1):
        for start in range(max(0, end - 16), end):
            id, score = scores.get(word[start:end], (unknown, worst if end - start == 1 else -inf))
            if best[start][0] + score > best[end][0]:
                best[end] = (best[start][0] + score, start, id)
    ids, end = [], len(word)
    while end:
        ids.append(best[end][2])
        end = best[end][1]
    return [id for id, group in groupby(reversed(ids)) for _ in ([0] if id == unknown else group)]


def spelled() -> dict[bytes, str]:
    """GPT-2's letters for the bytes."""
    rest = [byte for byte in range(256) if byte not in PRINTABLE]
    letters = {bytes([b]): chr(b) for b in PRINTABLE} | {bytes([b]): chr(256 + i) for i, b in enumerate(rest)}
    return letters


def merged(word: list[str], ranks: dict[tuple[str, str], int], ids: dict[str, int], unknown: int) -> list[int]:
    """BPE: the pair of the lowest rank, wherever it stands, again and again."""
    while known := [pair for pair in pairwise(word) if pair in ranks]:
        pair, joined, i = min(known, key=ranks.__getitem__), list[str](), 0
        while i < len(word):
            both = tuple(word[i : i + 2]) == pair
            joined.append("".join(pair) if both else word[i])
            i += 1 + both
        word = joined
    return [ids.get(piece, unknown) for piece in word]


@pytest.mark.parametrize("name", RECIPES)
def test_ids_are_those_of_the_definition_and_of_the_library(
    name: str, trained: dict[str, Tokenizer], languages: list[str], strings: list[str], tmp_path: Path
) -> None:
    """Against a plain implementation of each kind, and `tokenizers` and transformers reading the saved file."""
    ours = trained[name]
    ours.save(tmp_path)
    texts = [repair(text) for text in strings]
    found = ours.encode_batch(strings)
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert found == [e.ids for e in raw.encode_batch(texts, add_special_tokens=False)]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    whole = ours.encode_batch(languages)
    assert whole == theirs(languages, add_special_tokens=False)["input_ids"]
    assert found[::5] == theirs(texts[::5], add_special_tokens=False)["input_ids"]
    assert [theirs.decode(row) for row in whole] == [ours.decode(row, skip_special_tokens=False) for row in whole]
    state = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]
    unknown = ours.unk_id or 0
    ranks = {tuple(pair): rank for rank, pair in enumerate(state.get("merges", []))}
    if name == "bpe":
        letters = spelled()
        by_hand = [
            [id for word in cut(text) for id in merged([letters[b] for b in word], ranks, state["vocab"], 0)]
            for text in texts
        ]
    elif name == "bpe of characters":
        by_hand = [
            [id for word in regex.findall(PIECES, text) for id in merged(list(word), ranks, state["vocab"], unknown)]
            for text in texts
        ]
    elif name == "wordpiece":
        low = ["".join(c.lower() for c in text).replace("ς", "σ") for text in texts]
        by_hand = [
            [id for w in regex.findall(WORDS, text) for id in greedy(w, state["vocab"], unknown)] for text in low
        ]
    elif name == "unigram":
        scores = {token: (id, score) for id, (token, score) in enumerate(state["vocab"]) if id > unknown}
        by_hand = [[id for w in regex.findall(PIECES, text) for id in likeliest(w, scores, unknown)] for text in texts]
    else:
        pattern = WORDS if name == "word" else r"\X"
        by_hand = [[state["vocab"].get(w, unknown) for w in regex.findall(pattern, text)] for text in texts]
    differ = [text for text, a, b in zip(texts, found, by_hand, strict=True) if a != b]
    assert len(differ) <= 0.02 * STRINGS  # where versions of Unicode differ on a letter's kind
    assert all(any(is_unsettled(letter, text) for letter in text) for text in differ), differ[:3]


def is_unsettled(letter: str, text: str) -> bool:
    """Say whether engines may see a character differently: beyond the common planes, or what tells graphemes apart."""
    return ord(letter) > 0xFFFF or unicodedata.category(letter) in (
        "Mc",
        "Mn",
        "Me",
        "Cf",
        "No",
        "Nl",
        "Lm",
        "Sk",
        "Lo",
    )


@pytest.mark.node
def test_javascript_gives_the_same_ids(
    trained: dict[str, Tokenizer], languages: list[str], strings: list[str], tmp_path: Path
) -> None:
    """C11. Of Unigram, transformers.js joins neighbouring unknown words into one token; the page's encoder does not."""
    texts = [
        *languages[::5],
        *(repair(text) for text in strings[:300]),
        "a<|endoftext|>b",
        "it's we'LL",
        "ΟΔΥΣΣΕΥΣ ΑΣ",
        "\r\n",
    ]
    for name, tokenizer in trained.items():
        tokenizer.save(tmp_path / name)
    (tmp_path / "run.mjs").write_text(NODE_SCRIPT, "utf-8")
    node = find_node()
    work = {
        "modules": str(find_modules(node)), "web": (Path(lmworks.__file__).parent / "export/web").as_uri() + "/",
        "folders": [str(tmp_path / name) for name in trained], "texts": texts,
    }  # fmt: skip
    done = subprocess.run(
        [str(node), str(tmp_path / "run.mjs")], input=json.dumps(work), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    for (name, tokenizer), given in zip(trained.items(), answers["found"], strict=True):
        ids = tokenizer.encode_batch(texts)
        assert given["page"] == ids, name
        if name == "unigram":
            runs = [
                [id for id, group in groupby(row) for _ in ([0] if id == tokenizer.unk_id else group)] for row in ids
            ]
            assert given["ids"] == runs != ids
            known = [i for i, row in enumerate(ids) if tokenizer.unk_id not in row]
        else:
            assert given["ids"] == ids, name
            known = list(range(len(texts)))
        assert [given["back"][i] for i in known] == [tokenizer.decode(ids[i], skip_special_tokens=False) for i in known]
    cuts = [[piece for piece, _ in trained["char"].backend.pre_tokenizer.pre_tokenize_str(text)] for text in texts]
    differ = [text for text, a, b in zip(texts, answers["graphemes"], cuts, strict=True) if a != b]
    assert not set(differ) & set(languages) and len(differ) <= 4, differ  # Intl.Segmenter is of a later Unicode


def test_graphemes_are_what_readers_call_characters(languages: list[str], trained: dict[str, Tokenizer]) -> None:
    """Row 26, against `regex`, whose \\X knows Unicode 17: all 46 languages, and the hard cases."""
    cut_graphemes = trained["char"].backend.pre_tokenizer.pre_tokenize_str
    hard = [
        "你好，世界!",
        "👩\u200d👩\u200d👧🏽🇵🇱🇩🇪",
        "e\u0301\r\n\n",
        "क्षत्रिय",
        "각\u1100\u1161\u11a8",
        "กำ ຳ",
        "\u0600١",
        "\u200ba",
    ]
    for text in [*languages, *hard]:
        assert [piece for piece, _ in cut_graphemes(text)] == regex.findall(r"\X", text)
    assert [piece for piece, _ in cut_graphemes(hard[0])] == ["你", "好", "，", "世", "界", "!"]


def test_round_trip_on_every_language(languages: list[str], trained: dict[str, Tokenizer]) -> None:
    """C6: added tokens lose spaces."""
    bpe = trained["bpe"]
    assert [bpe.decode(ids) for ids in bpe.encode_batch(languages)] == languages
    for name in ("char", "bpe of characters", "unigram"):
        assert all(trained[name].knows(text) for text in languages[::6]), name
        assert not trained[name].knows("🦙") and not trained[name].is_lossless
    clusters = {cluster for text in languages[::6] for cluster in regex.findall(r"\X", text)}
    char = train_tokenizer(languages[::6], kind="char", vocab_size=10**6)
    assert char.vocab_size == 3 + len(clusters)  # smaller than asked for, never padded


def test_long_texts_are_cut_where_nothing_joins(trained: dict[str, Tokenizer], languages: list[str]) -> None:
    """The stream for training is made of pieces; for our own kinds they give the ids of the whole text."""
    assert all(is_cut_at_lines(tokenizer) == (name != "wordpiece") for name, tokenizer in trained.items())
    text = "\n".join(languages[:3])
    for tokenizer in trained.values():
        assert make_stream(tokenizer, [text]).tolist() == [0, *tokenizer.encode(text), 0]


def test_the_same_text_gives_the_same_file_in_a_new_process(languages: list[str], tmp_path: Path) -> None:
    """The library's own trainer gives WordPiece other ids, and Unigram other scores, in every process."""
    (tmp_path / "text.txt").write_text(languages[11], "utf-8")
    code = (
        "import sys, json, pathlib; from lmworks.tokens.train import train_tokenizer as t;"
        "folder = pathlib.Path(sys.argv[1]); text = (folder / 'text.txt').read_text('utf-8');"
        "[t([text], vocab_size=400, **recipe).save(folder / name) for name, recipe in json.loads(sys.argv[2]).items()]"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), json.dumps(RECIPES)], check=True)
    for name, recipe in RECIPES.items():
        train_tokenizer([languages[11]], vocab_size=400, **recipe).save(tmp_path / "here")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "here" / file).read_bytes(), name


def test_small_data_gives_a_small_vocabulary() -> None:
    assert train_tokenizer(["abab abab"], vocab_size=5000).vocab_size == 258 + 2  # ab, abab
    assert train_tokenizer([""], vocab_size=5000).vocab_size == 258
    assert train_tokenizer(["aab"], kind="char").vocab_size == 5
    assert train_tokenizer(["aab"], kind="char", vocab_size=4).encode("ab") == [3, 2]  # the frequent one stays
    assert train_tokenizer(["a b, a"], kind="word").encode("a b") == [3, 2]  # what stands once is unknown
    assert train_tokenizer(["a b, a"], kind="word", min_frequency=1).vocab_size == 6


def test_special_tokens_have_their_places(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(
        ["some text " * 9], kind="wordpiece", special="[CLS],[SEP],[MASK],<note>", vocab_size=60
    )
    names = ["<|endoftext|>", "<|pad|>", "<|unk|>", "[CLS]", "[SEP]", "[MASK]", "<note>"]
    assert [tokenizer.token(id) for id in range(7)] == names
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.eos_id) == (3, 4, 5, 0)
    text = tokenizer.encode("some text")
    assert tokenizer.encode_inputs([("some", "text")])[0].ids == [3, text[0], 4, text[1], 4]
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("some", "text")["input_ids"] == [3, text[0], 4, text[1], 4]
    assert theirs.mask_token == "[MASK]" and "<note>" in theirs.all_special_tokens


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_special_tokens_that_a_text_spells_out_teach_nothing(recipe: dict[str, Any]) -> None:
    recipe = {**recipe, "special": "<|endoftext|>.", "vocab_size": 270, "min_frequency": None}
    text = "a tale. another tale"
    expected = train_tokenizer([f"{text}\n", f"\n{text}"] * 5, **recipe)
    found = train_tokenizer(
        [f"{text}\n<|endoftext|>\n{text}", "<|pad|><|endoftext|>.<|unk|>"[: 22 + 7 * (expected.unk_id == 2)]] * 5,
        **recipe,
    )
    assert found.backend.get_vocab() == expected.backend.get_vocab()
    assert sorted(found.backend.get_vocab().values()) == list(range(found.vocab_size))
    assert found.eos_id == 0


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"kind": "bpe", "vocab_size": 257}, "too small"),
        ({"kind": "char", "vocab_size": 3}, "too small"),
        ({"kind": "wordpiece", "vocab_size": 6}, "too small"),
        ({"kind": "unigram", "vocab_size": 4}, "too small"),
        ({"kind": "words"}, "unknown tokenizer kind"),
        ({"kind": "char", "level": "byte!"}, "unknown tokenizer level"),
        ({"kind": "char", "level": "char"}, "for bpe"),
        ({"kind": "unigram", "min_frequency": 2}, "no frequency"),
        ({"special": "[CLS],[CLS]"}, "special token"),
        ({"special": "a,\ud800"}, "special token"),
        ({"size": 5}, "has no size"),
    ],
)
def test_what_cannot_work_is_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_tokenizer(["text and more text"], **recipe)


def test_training_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """C7: BPE training runs out of RAM. Past a limit the corpus is sampled evenly."""
    monkeypatch.setattr(module, "ENOUGH", 1000)
    monkeypatch.setattr(module, "PIECE", 10)
    monkeypatch.setattr(module, "LONGEST", 10)
    text = "".join(f"{i:010d}" for i in range(1000))
    pieces = list(module.sample(module.Recipe(), [text, "\ud800"]))
    assert pieces[:100] == [f"{i:010d}" for i in range(100)]
    assert pieces[100:103] == [f"{i:010d}" for i in (100, 102, 104)]
    assert sum(map(len, pieces)) < 4000
    assert pieces[-1] == "\ufffd" or int(pieces[-1]) > 950  # the end of the corpus is seen too
