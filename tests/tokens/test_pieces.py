"""SentencePiece files of ALBERT, DeBERTa and XLM-RoBERTa: the pieces of sentencepiece, the ids of transformers."""

from __future__ import annotations

import io
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tests.tokens.real_texts import real_texts
from transformers import AutoTokenizer

from lmworks.base.errors import FormatError
from lmworks.export.hf import export
from lmworks.tokens.tokenizer import Tokenizer

FILES = {"albert": "spiece.model", "deberta-v2": "spm.model", "xlm-roberta": "sentencepiece.bpe.model"}
CLASSES = {"albert": "AlbertTokenizer", "deberta-v2": "DebertaV2Tokenizer", "xlm-roberta": "XLMRobertaTokenizer"}
MASK = {"albert": "[MASK]", "deberta-v2": "[MASK]", "xlm-roberta": "<mask>"}
SIZE = 900
TRAINED: dict[str, dict[str, Any]] = {  # as the published models were
    "albert": {
        "pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "control_symbols": ["[CLS]", "[SEP]", "[MASK]"],
        "split_by_unicode_script": False, "split_by_number": False,
        "normalization_rule_name": "nmt_nfkc",
    },
    "deberta-v2": {
        "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]", "bos_piece": "[CLS]",
        "eos_piece": "[SEP]", "unk_piece": "[UNK]", "normalization_rule_name": "nmt_nfkc",
    },
    "xlm-roberta": {"normalization_rule_name": "nmt_nfkc"},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small Unigram model of Botchan for each family."""
    lines = (data_folder / "books" / "botchan.txt").read_text("utf-8").splitlines()
    numbers = [f"{i}, {7 * i}, {13 * i % 1000}," for i in range(600)]
    place, found = tmp_path_factory.mktemp("pieces"), {}
    for family, settings in TRAINED.items():
        out = io.BytesIO()
        text = [line.lower() for line in lines] if family == "albert" else lines
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*text[:2500], *numbers]), model_writer=out, vocab_size=SIZE,
            model_type="unigram", minloglevel=2, **settings,
        )  # fmt: skip
        found[family] = place / FILES[family]
        found[family].write_bytes(out.getvalue())
    return found


@pytest.fixture(scope="module")
def texts(data_folder: Path) -> list[str]:
    more = ["  two spaces  first", "one last ", "a\tb\nc", "Ｆｕｌｌ　ｗｉｄｔｈ ½", "no.9, no.12, 1867,"]
    return [text.replace("\x00", "") for text in [*real_texts(data_folder), *more]]


Make = Callable[..., Path]


@pytest.fixture
def make(models: dict[str, Path], tmp_path: Path) -> Make:
    """Return what writes a folder as it was published: the model's file, config.json, and perhaps a few settings."""

    def write(family: str, **config: Any) -> Path:
        folder = tmp_path / family
        folder.mkdir(exist_ok=True)
        shutil.copyfile(models[family], folder / FILES[family])
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return write


def prepared(family: str, text: str) -> str:
    """Return what the slow tokenizers of transformers 4 handed to sentencepiece."""
    if family != "albert":
        return text
    text = " ".join(text.strip().split()).replace("``", '"').replace("''", '"')
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).lower()


@pytest.mark.parametrize("family", ["deberta-v2", "xlm-roberta"])
def test_pieces_are_those_of_sentencepiece(family: str, make: Make, models: dict[str, Path], texts: list[str]) -> None:
    """The library that the models were trained with is the truth; XLM-RoBERTa numbers its pieces one further."""
    ours = Tokenizer.from_pretrained(make(family))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(models[family]))
    for text in texts:
        ids = theirs.encode(text)
        expected = [id + 1 if id else 3 for id in ids] if family == "xlm-roberta" else ids
        assert ours.encode(text) == expected, text


def test_alberts_pieces_but_for_numbers_before_commas(make: Make, models: dict[str, Path], texts: list[str]) -> None:
    """A comma after a digit is a piece of its own, which sentencepiece does not know."""
    ours = Tokenizer.from_pretrained(make("albert"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(models["albert"]))
    assert any(theirs.id_to_piece(id)[-2:] in {"9,", "2,", "7,", "3,"} for id in range(SIZE))  # or nothing is proven
    compared = 0
    for text in texts:
        found = [ours.token(id) for id in ours.encode(text)]
        assert not any(piece[-1:] == "," and piece[-2:-1].isdigit() for piece in found)
        pieces = theirs.encode(prepared("albert", text), out_type=str)
        if not any(c.isdigit() for c in text):
            known = [piece if theirs.piece_to_id(piece) != 1 else "<unk>" for piece in pieces]
            assert found == known, text
            compared += 1
    assert compared > len(texts) / 3 and "".join(ours.token(id) for id in ours.encode("9, 12,")) == "▁9,▁12,"


@pytest.mark.parametrize("family", FILES)
def test_ids_are_those_of_transformers(family: str, make: Make, texts: list[str]) -> None:
    """Alone, in pairs and with special tokens; where transformers 5 cuts a text as sentencepiece does.

    Its class for DeBERTa leaves out the model's own rules for characters, and reads tabs otherwise.
    """
    folder = make(family, tokenizer_class=CLASSES[family])
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    plain = [text for text in texts if text.isascii() and text == " ".join(text.split()) and text]
    assert len(plain) > 10
    first, last = (ours.token(id) for id in (ours.cls_id, ours.sep_id))
    lines = [*plain, f"Paris is the {MASK[family]}, {first}yes{last}"]
    for a, b in zip(lines, [*lines[1:], lines[0]], strict=True):
        one, two = ours.encode_inputs([a, (a, b)])
        if family == "albert" and any(c.isdigit() for c in a + b):
            continue  # that class forgot about numbers before commas
        if MASK[family] not in a + b:
            assert one.ids == theirs(a)["input_ids"], a
            assert two.ids == theirs(a, b)["input_ids"]
            if "token_type_ids" in theirs.model_input_names:
                assert two.type_ids == theirs(a, b)["token_type_ids"]
    for name in ("bos", "eos", "pad", "unk", "cls", "sep", "mask"):
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_token_id"), name
    assert ours.vocab_size == len(theirs)
    ids = ours.encode(f"Paris is the {MASK[family]}.")
    assert ours.mask_id in ids and (family == "deberta-v2" or ours.token(ids[ids.index(ours.mask_id) - 1]) != "▁")


@pytest.mark.parametrize("family", FILES)
def test_what_was_built_is_saved(family: str, make: Make, texts: list[str], tmp_path: Path) -> None:
    """tokenizer.json says the same to us and to transformers, and can be read without sentencepiece."""
    ours = Tokenizer.from_pretrained(make(family))
    ours.save(tmp_path / "saved")
    again, theirs = Tokenizer.from_pretrained(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.encode_batch(texts) == ours.encode_batch(texts)
    assert [theirs(text)["input_ids"] for text in texts] == [e.ids for e in ours.encode_inputs(texts)]
    known = [text for text in texts if text.isascii() and text == " ".join(text.split())]
    for text in known:
        ids = ours.encode(text)
        if ours.unk_id not in ids:
            assert ours.decode(ids) == (text.lower() if family == "albert" else text)


def test_settings_of_the_families(make: Make) -> None:
    cased = Tokenizer.from_pretrained(make("albert", do_lower_case=False, keep_accents=True))
    usual = Tokenizer.from_pretrained(make("albert"))
    assert usual.encode("THE THE") == usual.encode("the the") and cased.encode("THE") != cased.encode("the")
    lower = Tokenizer.from_pretrained(make("deberta-v2", do_lower_case=True))
    assert lower.encode("THE") == lower.encode("the")
    parted = Tokenizer.from_pretrained(make("deberta-v2", split_by_punct=True))
    assert [parted.token(id) for id in parted.encode("the.")][-1] in ("▁.", ".")
    added = make("deberta-v2", tokenizer_class="DebertaV2Tokenizer")
    (added / "added_tokens.json").write_text(json.dumps({"[MASK]": SIZE}))  # as v3 is published
    assert Tokenizer.from_pretrained(added).mask_id == SIZE


def test_a_family_must_be_named(make: Make) -> None:
    """T5 and XLNet publish a spiece.model as well, which they read otherwise."""
    folder = make("albert")
    (folder / "config.json").write_text('{"model_type": "xlnet"}')
    with pytest.raises(FormatError, match=r"which family(.|\n)*spiece\.model(.|\n)*xlm-roberta"):
        Tokenizer.from_pretrained(folder)


def test_a_published_folder_becomes_todays(make: Make, tmp_path: Path) -> None:
    """`lmworks export --to hf` writes tokenizer.json beside the weights."""
    import transformers

    folder = make("xlm-roberta", tokenizer_class="XLMRobertaTokenizer")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.XLMRobertaConfig(vocab_size=SIZE + 2, max_position_embeddings=514, type_vocab_size=1, **sizes)
    transformers.XLMRobertaModel(config).save_pretrained(folder)
    assert export(folder, tmp_path / "out").values["bit_equal"]
    assert (tmp_path / "out/tokenizer.json").is_file() and (tmp_path / "out/sentencepiece.bpe.model").is_file()
    text = "She said: nothing."
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == (
        Tokenizer.from_pretrained(folder).encode_inputs([text])[0].ids
    )
