"""Build a tokenizer from the files that published folders had before `tokenizer.json`.

    vocab.txt                  WordPiece: BERT, DistilBERT
    vocab.json + merges.txt    byte-level BPE: GPT-2, RoBERTa, Phi (CodeGen), Qwen2
    tokenizer.model            SentencePiece, BPE or Unigram: Llama, Mistral, T5

The family (its special tokens, its way of cutting a text) is what tokenizer_config.json's `tokenizer_class` says, else
config.json's `model_type`, else what the files show.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmworks.base.errors import FormatError
from lmworks.base.files import read_json
from lmworks.base.optional import require

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
GPT2 = {"bos_token": END, "eos_token": END, "unk_token": END}
QWEN2 = {"eos_token": END, "pad_token": END}
PIECES: dict[str, str] = {}  # a SentencePiece model names its own special tokens
FAMILIES = {  # family, in small letters as in model_type: its file, its usual special tokens, its class in transformers
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
}
FILES = {"vocab.txt": ("bert", ""), "vocab.json": ("gpt2", "merges.txt"), "tokenizer.model": ("llama", "")}
QWEN2_WORDS = (  # GPT-4's rule with single digits, from the tokenizer.json that Qwen2 was published with
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UNIGRAM, BPE = 1, 2  # sentencepiece_model.proto: TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # SentencePiece.Type
SPACE = "▁"  # SentencePiece's visible space


def make_backend(folder: Path, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a `tokenizers.Tokenizer`, and the special tokens and the class as tokenizer_config.json would name them.

    `config` is what there is of that file. Raises FormatError where no set of files is complete, or one is damaged.
    """
    family = find_family(folder, config)
    file, usual, kind = FAMILIES[family]
    make = {"vocab.txt": make_wordpiece, "vocab.json": make_byte_level, "tokenizer.model": make_sentencepiece}[file]
    backend, own = make(folder, config, family)
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
            expected="tokenizer.json, or vocab.txt, or vocab.json and merges.txt, or tokenizer.model",
            fix="check that the folder is complete",
        )
    model = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    named = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer").lower()
    for family in (named, model.get("model_type")):
        if family in FAMILIES and FAMILIES[family][0] in present:
            return str(family)
    family = FILES[present[0]][0]
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


def make_sentencepiece(folder: Path, config: dict[str, Any], family: str) -> tuple[Any, dict[str, str]]:
    """Byte-pair encoding or a unigram model over whole texts with visible spaces (Kudo and Richardson 2018)."""
    library = require("tokenizers", extra="text")
    proto = read_proto(folder / "tokenizer.model")
    trained, pieces, bytes_too = proto.trainer_spec, proto.pieces, proto.trainer_spec.byte_fallback
    if trained.model_type == BPE:
        vocabulary = {piece.piece: i for i, piece in enumerate(pieces)}
        model = library.models.BPE(
            vocabulary,
            make_merges(vocabulary, [piece.piece for piece in pieces if piece.type in (NORMAL, USER_DEFINED, UNUSED)]),
            unk_token=pieces[trained.unk_id].piece,
            fuse_unk=True,
            byte_fallback=bytes_too,
        )
    elif trained.model_type == UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in pieces]
        model = library.models.Unigram(scores, unk_id=trained.unk_id, byte_fallback=bytes_too)
    else:
        raise FormatError("tokenizer.model holds neither a BPE nor a Unigram model", where=str(folder))
    backend = library.Tokenizer(model)
    added = [piece for piece in pieces if piece.type in (CONTROL, USER_DEFINED)]
    backend.add_tokens([library.AddedToken(p.piece, special=p.type == CONTROL, normalized=False) for p in added])
    cut_pieces(backend, proto, config)
    ids = {"unk_token": trained.unk_id, "bos_token": trained.bos_id, "eos_token": trained.eos_id}
    ids["pad_token"] = trained.pad_id
    return backend, {key: pieces[id].piece for key, id in ids.items() if 0 <= id < len(pieces)}


def read_proto(path: Path) -> Any:
    """Return a SentencePiece model as its library lays it out; Llama 3 published another format under this name."""
    require("google.protobuf", extra="sentencepiece")
    proto = require("sentencepiece.sentencepiece_model_pb2", extra="sentencepiece").ModelProto()
    found = ""
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's own, whose name depends on how it was built
        found = str(error)[:200]
    if found or not proto.pieces:
        raise FormatError(
            f"{path.name} is not a SentencePiece model",
            where=str(path.parent),
            found=found or "no pieces",
            fix="use a copy of the model that has a tokenizer.json",
        )
    return proto


def make_merges(vocabulary: dict[str, int], pieces: list[str]) -> list[tuple[str, str]]:
    """Return the pairs that make each piece, best piece first: SentencePiece stores the pieces in that order only."""
    pairs = ((piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece)))
    return [(a, b) for a, b in pairs if a in vocabulary and b in vocabulary]


def cut_pieces(backend: Any, proto: Any, config: dict[str, Any]) -> None:
    """Set how SentencePiece rewrites a text before it looks for pieces, and how pieces become text again.

    A text begins with one space more than it has. transformers 4 (`legacy`) put it before every part between special
    tokens, as SentencePiece itself does; since then it stands at the very beginning only, and not before a space.
    """
    library = require("tokenizers", extra="text")
    change, rules, trained = library.normalizers, proto.normalizer_spec, proto.trainer_spec
    asked = config.get("add_prefix_space")
    prefix = rules.add_dummy_prefix if asked is None else bool(asked)
    steps = [change.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [change.Replace(library.Regex("^ +| +$"), ""), change.Replace(library.Regex(" {2,}"), " ")]
    words = trained.model_type == UNIGRAM and trained.split_by_whitespace and rules.remove_extra_whitespaces
    if words or (trained.model_type == BPE and not config.get("legacy")):
        scheme = "never" if not prefix else "always" if words else "first"
        backend.pre_tokenizer = library.pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=words)
    else:
        steps += [*([change.Prepend(SPACE)] if prefix else []), change.Replace(" ", SPACE)]
    if steps:
        backend.normalizer = change.Sequence(steps)
    back = library.decoders
    undo = [back.Replace(SPACE, " "), back.ByteFallback(), back.Fuse()]
    backend.decoder = back.Sequence([*undo, back.Strip(" ", 1, 0)] if prefix else undo)


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
        if token == ROBERTA["mask_token"]:
            kept = {"lstrip": True}  # RoBERTa's mask stands for a word with the space before it
        if content(token) not in placed:
            backend.add_tokens([library.AddedToken(content(token), special=True, **kept)])


def make_post_processor(backend: Any, config: dict[str, Any], family: str, names: dict[str, str]) -> Any:
    """Return what puts the special tokens around a text, or a pair of texts."""
    process = require("tokenizers", extra="text").processors
    ids = {key: (name, backend.token_to_id(name)) for key, name in names.items()}
    if family == "roberta":
        trim, prefix = config.get("trim_offsets", True), bool(config.get("add_prefix_space"))
        return process.RobertaProcessing(ids["sep_token"], ids["cls_token"], trim, prefix)
    if FAMILIES[family][0] == "vocab.txt":
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
        raise FormatError("a special token is neither a text nor an object with a content", found=repr(token)[:200])
    return found


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file, cut at line feeds only: a vocabulary may hold every other separator."""
    try:
        return [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8").split("\n")]
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
