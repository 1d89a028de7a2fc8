"""Tokenizers from SentencePiece models: BPE or Unigram over texts with visible spaces (Kudo and Richardson 2018)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmworks.base.errors import FormatError
from lmworks.base.files import read_own
from lmworks.base.optional import require

UNIGRAM, BPE = 1, 2  # sentencepiece_model.proto: TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # SentencePiece.Type
SPACE = "▁"  # SentencePiece's visible space
XLM_ROBERTA = ("<s>", "<pad>", "</s>", "<unk>")  # fairseq's first tokens, in place of the model's own three
NAMED = ("albert", "debertav2", "xlmroberta")  # whose special tokens have names of the family's
UNLIKELY = 100.0  # what is taken off the score of ALBERT's pieces such as "9,", whose comma stands alone


def make_sentencepiece(path: Path, config: dict[str, Any], family: str) -> tuple[Any, dict[str, str]]:
    """Return a `tokenizers.Tokenizer` of a model's file, and the special tokens that the model names."""
    library = require("tokenizers", extra="text")
    proto = read_proto(path)
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
        scores, unknown = list_scores(proto, family)
        model = library.models.Unigram(scores, unk_id=unknown, byte_fallback=bytes_too)
    else:
        raise FormatError(f"{path.name} holds neither a BPE nor a Unigram model", where=str(path.parent))
    backend = library.Tokenizer(model)
    added = [piece for piece in pieces if piece.type in (CONTROL, USER_DEFINED)]
    backend.add_tokens([library.AddedToken(p.piece, special=p.type == CONTROL, normalized=False) for p in added])
    cut_pieces(backend, proto, config, family)
    ids = {"unk_token": trained.unk_id, "bos_token": trained.bos_id, "eos_token": trained.eos_id}
    ids["pad_token"] = trained.pad_id
    named = {} if family in NAMED else {key: pieces[id].piece for key, id in ids.items() if 0 <= id < len(pieces)}
    return backend, named


def list_scores(proto: Any, family: str) -> tuple[list[tuple[str, float]], int]:
    """Return the pieces of a Unigram model with their scores, as the family numbers them, and the unknown one's id."""
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    if family == "xlmroberta":
        return [*((name, 0.0) for name in XLM_ROBERTA), *scores[3:], ("<mask>", 0.0)], XLM_ROBERTA.index("<unk>")
    if family == "albert":
        scores = [(name, score - UNLIKELY * (name[-2:-1].isdigit() and name[-1] == ",")) for name, score in scores]
    return scores, proto.trainer_spec.unk_id


def change_text(config: dict[str, Any], family: str) -> list[Any]:
    """Return what a family does to a text before its SentencePiece model does."""
    change = require("tokenizers", extra="text").normalizers
    lower = [change.Lowercase()] if config.get("do_lower_case", family == "albert") else []
    if family == "albert":
        accents = [] if config.get("keep_accents") else [change.NFKD(), change.StripAccents()]
        return [change.Replace("``", '"'), change.Replace("''", '"'), *accents, *lower]
    return lower if family == "debertav2" else []


def read_proto(path: Path) -> Any:
    """Return a SentencePiece model as its library lays it out; Llama 3 published another format under this name."""
    require("google.protobuf", extra="sentencepiece")
    proto = require("sentencepiece.sentencepiece_model_pb2", extra="sentencepiece").ModelProto()
    found, data = "", read_own(path)
    try:
        proto.ParseFromString(data)
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


def cut_pieces(backend: Any, proto: Any, config: dict[str, Any], family: str) -> None:
    """Set how SentencePiece rewrites a text before it looks for pieces, and how pieces become text again.

    A text begins with one space more than it has. transformers 4 (`legacy`) put it before every part between special
    tokens, as SentencePiece itself does; since then it stands at the very beginning only, and not before a space.
    """
    library = require("tokenizers", extra="text")
    change, rules, trained = library.normalizers, proto.normalizer_spec, proto.trainer_spec
    asked = config.get("add_prefix_space")
    prefix = rules.add_dummy_prefix if asked is None else bool(asked)
    steps = change_text(config, family)
    steps += [change.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [change.Replace(library.Regex("^ +| +$"), ""), change.Replace(library.Regex(" {2,}"), " ")]
    words = trained.model_type == UNIGRAM and trained.split_by_whitespace and rules.remove_extra_whitespaces
    if words or (trained.model_type == BPE and not config.get("legacy")):
        scheme = "never" if not prefix else "always" if words else "first"
        backend.pre_tokenizer = library.pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=words)
        if family == "debertav2" and config.get("split_by_punct"):
            cut = library.pre_tokenizers
            backend.pre_tokenizer = cut.Sequence([cut.Punctuation(behavior="isolated"), backend.pre_tokenizer])
    else:
        steps += [*([change.Prepend(SPACE)] if prefix else []), change.Replace(" ", SPACE)]
    if steps:
        backend.normalizer = change.Sequence(steps)
    back = library.decoders
    undo = [back.Replace(SPACE, " "), back.ByteFallback(), back.Fuse()]
    backend.decoder = back.Sequence([*undo, back.Strip(" ", 1, 0)] if prefix else undo)
