"""Tokens in JavaScript: the ids, places, words and windows that Python's tokenizers give, and the text back again."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import sentencepiece
import tokenizers
from js_engine import ODD, ask, byte_level, questions, sentences, tweets, wordpiece
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lmworks.tokens import legacy
from lmworks.tokens.tokenizer import Tokenizer

pytestmark = pytest.mark.node


def qwen(data: Path) -> tokenizers.Tokenizer:
    backend = byte_level(data, nfc=True)
    words = pre_tokenizers.Split(tokenizers.Regex(legacy.QWEN2_WORDS), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def pieces(data: Path, *, prepend: bool) -> tokenizers.Tokenizer:
    """SentencePiece's kind of BPE, with bytes for what it lacks: Llama's older and newer forms."""
    names = ("eng", "deu", "ell_monotonic")
    lines = [line for name in names for line in (data / f"udhr/{name}.txt").read_text("utf-8").splitlines()]
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, limit_alphabet=100, show_progress=False
    )
    backend.train_from_iterator(lines, trainer)
    backend = tokenizers.Tokenizer(backend.model)
    backend.add_special_tokens(["<unk>", "<s>"])
    if prepend:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0", pair="<s>:0 $A:0 <s>:1 $B:1", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def unigram(data: Path) -> tokenizers.Tokenizer:
    """SentencePiece's Unigram with its table of rewritings, as XLM-RoBERTa has it."""
    lines = (data / "udhr/eng.txt").read_text("utf-8").splitlines()
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *KANA]), model_writer=out, vocab_size=600, minloglevel=2,
        normalization_rule_name="nmt_nfkc",
    )  # fmt: skip
    with TemporaryDirectory() as place:
        (Path(place) / "sentencepiece.bpe.model").write_bytes(out.getvalue())
        return legacy.make_backend(Path(place), {"tokenizer_class": "XLMRobertaTokenizer"})[0]


def compatible(data: Path) -> tokenizers.Tokenizer:
    backend = byte_level(data, nfc=True)
    backend.normalizer = normalizers.NFKC()
    return backend


TOKENIZERS: dict[str, Callable[[Path], tokenizers.Tokenizer]] = {
    "uncased": lambda _: wordpiece(),
    "cased": lambda _: wordpiece(lowercase=False),
    "roberta": byte_level,
    "roberta, space first": lambda data: byte_level(data, prefix=True),
    "roberta, untrimmed": lambda data: byte_level(data, prefix=True, trim=False),
    "modernbert": lambda data: byte_level(data, nfc=True),
    "qwen2": qwen,
    "llama": lambda data: pieces(data, prepend=False),
    "llama, legacy": lambda data: pieces(data, prepend=True),
    "nfkc": compatible,
    "xlm-roberta": unigram,
}
KANA = [  # what half-width kana, Korean letters and joined characters become is more than each alone becomes
    "ｶﾞｷﾞ ﾊﾟｿｺﾝ", "ﾞｶ ガ", "ㅎㅏㄴ ㅋㅋㅋ", "가\u11a8나\u11ab", "👨\u200d👩\u200d👧 🏳️\u200d🌈",
    "a\xadb\u034fc\u061cd x\u200d\u200cy", "a\u0300\u0301\u0323b", "\u200b\u200c ﬁne ½ ㌔ ﷺ", "１２３４　５６ ～",
]  # fmt: skip


def show(encoding: Any) -> list[list[Any]]:
    """Return the rows of an Encoding; words are counted from the first, whatever their numbers."""
    rows = zip(
        encoding.ids, encoding.tokens, encoding.offsets, encoding.word_ids, encoding.type_ids, encoding.sequence_ids,
        encoding.special_tokens_mask, strict=True,
    )  # fmt: skip
    return count_words([[id, token, *place, w, t, s, bool(m)] for id, token, place, w, t, s, m in rows])


def count_words(rows: list[list[Any]]) -> list[list[Any]]:
    seen: dict[Any, int] = {}
    return [
        [*row[:4], None if row[4] is None else seen.setdefault((row[6], row[4]), len(seen)), *row[5:]] for row in rows
    ]


@pytest.fixture(scope="module")
def encoded(data_folder, tmp_path_factory) -> dict[str, tuple[Tokenizer, dict[str, Any], dict[str, Any]]]:
    """Each tokenizer, what it was asked, and what JavaScript said."""
    draw = random.Random(0)
    texts = [*ODD, *KANA, *sentences(data_folder), *tweets(data_folder)]
    for language in ("en", "zh", "ru", "tr"):
        texts += [text for pair in questions(data_folder, language, count=2) for text in pair]
    texts += ["".join(draw.choice(ODD + KANA)[:9] + draw.choice(["", " ", "  "]) for _ in range(6)) for _ in range(60)]
    pairs = [(draw.choice(texts), draw.choice(texts)) for _ in range(20)]
    long = [draw.choice(texts) for _ in range(20)]
    windows = [[draw.choice([None, "Où est-il ?"]), text, 40, draw.choice([0, 8])] for text in long]
    jobs = []
    for make in TOKENIZERS.values():
        folder = tmp_path_factory.mktemp("tokenizer")
        Tokenizer(make(data_folder), config={"tokenizer_class": "PreTrainedTokenizerFast"}).save(folder)
        jobs.append({"folder": str(folder), "texts": texts, "pairs": pairs, "windows": windows})
    found = ask({"folders": jobs})
    opened = [Tokenizer.from_pretrained(job["folder"]) for job in jobs]
    return dict(zip(TOKENIZERS, zip(opened, jobs, found, strict=True), strict=True))


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_tokens_know_where_they_are(encoded, name):
    """Ids, spellings, characters, words, texts of a pair, segments; alone, in pairs, in windows; and back again."""
    tokenizer, asked, found = encoded[name]
    for text, rows, written in zip(asked["texts"], found["texts"], found["decoded"], strict=True):
        encoding = tokenizer.encode_inputs([text])[0]
        assert count_words(rows) == show(encoding), text
        assert written == tokenizer.decode(encoding.ids, skip_special_tokens=False), text
    for pair, rows in zip(asked["pairs"], found["pairs"], strict=True):
        assert count_words(rows) == show(tokenizer.encode_inputs([tuple(pair)])[0]), pair
    for (before, text, length, overlap), windows in zip(asked["windows"], found["windows"], strict=True):
        known = tokenizer.encode_windows(text, before=before, length=length, overlap=overlap)
        if (
            tokenizer.backend.post_processor.__class__.__name__ == "ByteLevel"
        ):  # segments of windows: no model reads them
            windows = [[[*row[:5], 0, *row[6:]] for row in rows] for rows in windows]
            assert [[[*r[:5], 0, *r[6:]] for r in show(e)] for e in known] == list(map(count_words, windows)), text
        else:
            assert list(map(count_words, windows)) == list(map(show, known)), text
