"""Build a tokenizer from the files that published folders had before `tokenizer.json`.

    vocab.txt                  WordPiece: BERT, DistilBERT
    vocab.json + merges.txt    byte-level BPE: GPT-2, RoBERTa, Phi (CodeGen), Qwen2
    tokenizer.model            SentencePiece, BPE or Unigram: Llama, Mistral, T5
    spiece.model, spm.model, sentencepiece.bpe.model       the same: ALBERT, DeBERTa v2 and v3, XLM-RoBERTa

The family (its special tokens, its way of cutting a text) is what tokenizer_config.json's `tokenizer_class` says, else
config.json's `model_type`, else what the files show.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmworks.base.errors import FormatError
from lmworks.base.files import read_json, read_own
from lmworks.base.optional import require
from lmworks.tokens.pieces import make_sentencepiece

END = "<|endoftext|>"
BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
ROBERTA = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
ALBERT = {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "<unk>", "sep_token": "[SEP]", "pad_token": "<pad>",
          "cls_token": "[CLS]", "mask_token": "[MASK]"}  # fmt: skip
DEBERTA = {**BERT, "bos_token": "[CLS]", "eos_token": "[SEP]"}
GPT2 = {"bos_token": END, "eos_token": END, "unk_token": END}
QWEN2 = {"eos_token": END, "pad_token": END}
PIECES: dict[str, str] = {}  # a SentencePiece model names its own special tokens
FAMILIES = {  # family, model_type without its dashes: its file, its usual special tokens, its class in transformers
    "bert": ("vocab.txt", BERT, "BertTokenizer"),
    "distilbert": ("vocab.txt", BERT, "DistilBertTokenizer"),
    "gpt2": ("vocab.json", GPT2, "GPT2Tokenizer"),
    "codegen": ("vocab.json", GPT2, "CodeGenTokenizer"),
    "phi": ("vocab.json", GPT2, "CodeGenTokenizer"),
    "roberta": ("vocab.json", ROBERTA, "RobertaTokenizer"),
    "qwen2": ("vocab.json", QWEN2, "Qwen2Tokenizer"),
    "llama": ("tokenizer.model", PIECES, None),  # (a class would cut texts by its own rules, not the file's)
    "mistral": ("tokenizer.model", PIECES, None),
    "t5": ("tokenizer.model", PIECES, None),
    "albert": ("spiece.model", ALBERT, "AlbertTokenizer"),
    "debertav2": ("spm.model", DEBERTA, None),
    "xlmroberta": ("sentencepiece.bpe.model", ROBERTA, "XLMRobertaTokenizer"),
}
FILES = {  # the family where none is named (others publish such files, too: none), and what belongs beside it
    "vocab.txt": ("bert", ""), "vocab.json": ("gpt2", "merges.txt"), "tokenizer.model": ("llama", ""),
    "spiece.model": ("", ""), "spm.model": ("", ""), "sentencepiece.bpe.model": ("", ""),
}  # fmt: skip
QWEN2_WORDS = (  # GPT-4's rule with single digits, from the tokenizer.json that Qwen2 was published with
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_backend(folder: Path, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a `tokenizers.Tokenizer`, and the special tokens and the class as tokenizer_config.json would name them.

    `config` is what there is of that file. Raises FormatError where no set of files is complete, or one is damaged.
    """
    family = find_family(folder, config)
    file, usual, kind = FAMILIES[family]
    if file in ("vocab.txt", "vocab.json"):
        make = make_wordpiece if file == "vocab.txt" else make_byte_level
        backend, own = make(folder, config, family)
    else:
        backend, own = make_sentencepiece(folder / file, config, family)
    names: dict[str, Any] = usual | own | {key: config[key] for key in ROBERTA if key in config}
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    add_tokens(backend, folder, config, [*filter(None, names.values()), *(more if isinstance(more, list) else [])])
    backend.post_processor = make_post_processor(
        backend, config, family, {k: content(v) for k, v in names.items() if v}
    )
    return backend, names | ({"tokenizer_class": kind} if kind and not config.get("tokenizer_class") else {})


def find_family(folder: Path, config: dict[str, Any]) -> str:
    """Return the family that the folder names, unless its files are not there; then the one they show."""
    present = [name for name, (_, other) in FILES.items() if (folder / name).is_file() and (folder / other).exists()]
    if not present:
        raise FormatError(
            "tokenizer.json is missing, and so are the older files it could be made from",
            where=str(folder),
            expected="tokenizer.json, or vocab.txt, or vocab.json and merges.txt, or tokenizer.model, or the file of "
            "another SentencePiece model",
            fix="check that the folder is complete",
        )
    model = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    named = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer").lower()
    for family in (named, str(model.get("model_type")).replace("-", "")):
        if family in FAMILIES and FAMILIES[family][0] in present:
            return family
    family = next((FILES[name][0] for name in present if FILES[name][0]), "")
    if not family:
        raise FormatError(
            "nothing says which family this SentencePiece model belongs to", where=str(folder), found=present[0],
            expected="a model_type in config.json: albert, deberta-v2 or xlm-roberta",
        )  # fmt: skip
    if family == "gpt2" and {"<s>", "</s>", "<mask>"} <= read_json(folder / "vocab.json").keys():
        family = "roberta"
    return family


def make_wordpiece(folder: Path, config: dict[str, Any], family: str) -> tuple[Any, dict[str, str]]:
    """Greedy longest match within words, continued with `##` (Schuster and Nakajima 2012; Devlin et al. 2018)."""
    library = require("tokenizers", extra="text")
    lines = read_lines(folder / "vocab.txt")
    vocabulary = {line: i for i, line in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    unknown = content(config.get("unk_token") or BERT["unk_token"])
    backend = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token=unknown))
    backend.normalizer = library.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    backend.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    backend.decoder = library.decoders.WordPiece(prefix="##")
    return backend, {}


def make_byte_level(folder: Path, config: dict[str, Any], family: str) -> tuple[Any, dict[str, str]]:
    """Byte-pair encoding over bytes spelled as letters (Radford et al. 2019)."""
    library = require("tokenizers", extra="text")
    merges = []
    for number, line in enumerate(read_lines(folder / "merges.txt"), 1):
        if line.strip() and not line.startswith("#version"):
            pair = tuple(line.split(" "))
            if len(pair) != 2:
                raise FormatError("merges.txt: a line does not hold a pair", where=f"line {number}", found=line[:80])
            merges.append(pair)
    backend = library.Tokenizer(library.models.BPE(read_json(folder / "vocab.json"), merges, fuse_unk=False))
    cut, prefix = library.pre_tokenizers, bool(config.get("add_prefix_space"))
    backend.pre_tokenizer = cut.ByteLevel(add_prefix_space=prefix)
    if family == "qwen2":
        backend.normalizer = library.normalizers.NFC()
        words = cut.Split(library.Regex(QWEN2_WORDS), behavior="isolated", invert=False)
        backend.pre_tokenizer = cut.Sequence([words, cut.ByteLevel(add_prefix_space=prefix, use_regex=False)])
    backend.decoder = library.decoders.ByteLevel()
    return backend, {}


def add_tokens(backend: Any, folder: Path, config: dict[str, Any], special: list[Any]) -> None:
    """Add the tokens that came after the vocabulary, at their ids, and mark the special ones."""
    library = require("tokenizers", extra="text")
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    marked = {content(token) for token in special}
    places: dict[int, Any] = {}
    if isinstance(config.get("added_tokens_decoder"), dict):
        places = {int(id): token for id, token in config["added_tokens_decoder"].items()}
    elif (folder / "added_tokens.json").is_file():
        older = read_json(folder / "added_tokens.json")
        places = {int(id): {"content": name, "normalized": name not in marked} for name, id in older.items()}
    for id, token in sorted(places.items()):
        kept = {key: bool(token[key]) for key in flags if key in token} if isinstance(token, dict) else {}
        kept["special"] = kept.get("special", False) or content(token) in marked
        backend.add_tokens([library.AddedToken(content(token), **kept)])
        if (found := backend.token_to_id(content(token))) != id:
            raise FormatError(
                f"the added token {content(token)!r} cannot have the id that the files give it",
                where=str(folder),
                found=str(found),
                expected=str(id),
            )
    placed = {content(token) for token in places.values()}
    for token in special:
        kept = {key: bool(token[key]) for key in flags[:4] if key in token} if isinstance(token, dict) else {}
        if token == ROBERTA["mask_token"] or (token == ALBERT["mask_token"] and (folder / "spiece.model").is_file()):
            kept = {"lstrip": True}  # the mask stands for a word with the space before it
        if content(token) not in placed:
            backend.add_tokens([library.AddedToken(content(token), special=True, **kept)])


def make_post_processor(backend: Any, config: dict[str, Any], family: str, names: dict[str, str]) -> Any:
    """Return what puts the special tokens around a text, or a pair of texts."""
    process = require("tokenizers", extra="text").processors
    ids = {key: (name, backend.token_to_id(name)) for key, name in names.items()}
    if family == "roberta":
        trim, prefix = config.get("trim_offsets", True), bool(config.get("add_prefix_space"))
        return process.RobertaProcessing(ids["sep_token"], ids["cls_token"], trim, prefix)
    if family == "xlmroberta":
        used = [ids["cls_token"], ids["sep_token"]]
        single = [used[0][0], "$A", used[1][0]]
        pair = [*single, used[1][0], "$B", used[1][0]]
    elif FAMILIES[family][0] == "vocab.txt" or family in {"albert", "debertav2"}:
        used = [ids["cls_token"], ids["sep_token"]]
        single = [f"{used[0][0]}:0", "$A:0", f"{used[1][0]}:0"]
        pair = [*single, "$B:1", f"{used[1][0]}:1"]
    else:
        begins = config.get("add_bos_token", FAMILIES[family][0] == "tokenizer.model" and family != "t5")
        first = [ids["bos_token"]] if begins and "bos_token" in ids else []
        last = [ids["eos_token"]] if config.get("add_eos_token", family == "t5") and "eos_token" in ids else []
        used = [*first, *last]
        pair = [f"{name}:{i}" for i, part in enumerate(("$A", "$B")) for name, _ in (*first, (part, 0), *last)]
        single = pair[: len(pair) // 2]
    return process.TemplateProcessing(single=single, pair=pair, special_tokens=used)


def content(token: Any) -> str:
    """Return the text of a special token, which may be a plain string or an object with flags."""
    found = token.get("content") if isinstance(token, dict) else token
    if not isinstance(found, str) or not found:
        where = "tokenizer_config.json, special_tokens_map.json"
        what = "a special token is neither a text nor an object with a content"
        raise FormatError(what, where=where, found=repr(token)[:200])
    return found


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file, cut at line feeds only: a vocabulary may hold every other separator."""
    try:
        return [line.removesuffix("\r") for line in read_own(path).decode("utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise FormatError(f"{path.name} is not UTF-8", where=str(path.parent), found=str(error)) from None


def agree(backend: Any, config: Mapping[str, Any]) -> None:
    """Let what tokenizer_config.json says win over tokenizer.json, where the tokenizer's class does so in transformers.

    BERT's classes know `do_lower_case`, `strip_accents` and `tokenize_chinese_chars`; GPT-2's and RoBERTa's know
    `add_prefix_space`.
    """
    name = str(config.get("tokenizer_class", ""))
    library = require("tokenizers", extra="text")
    if "Bert" in name and isinstance(backend.normalizer, library.normalizers.BertNormalizer):
        stated = {
            "lowercase": config.get("do_lower_case"),
            "strip_accents": config.get("strip_accents"),
            "handle_chinese_chars": config.get("tokenize_chinese_chars"),
        }
        for setting, value in stated.items():
            if isinstance(value, bool) and getattr(backend.normalizer, setting) != value:
                setattr(backend.normalizer, setting, value)
    prefix = config.get("add_prefix_space")
    byte_level = isinstance(backend.pre_tokenizer, library.pre_tokenizers.ByteLevel)
    if name.startswith(("GPT2", "Roberta")) and byte_level and isinstance(prefix, bool):
        backend.pre_tokenizer.add_prefix_space = prefix
