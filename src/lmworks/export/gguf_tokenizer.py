"""A tokenizer.json as llama.cpp reads vocabularies: byte-level BPE with a named cut into words, or SentencePiece's BPE.

    gpt2    tokens as tokenizer.json spells them, merges in order, and the name of the pattern that cuts words
    llama   pieces with visible spaces; of two neighbours those are joined whose piece has the highest score

llama.cpp knows patterns by name only: another pattern, or another kind of tokenizer, is refused rather than guessed.
What it joins by score is tried here, by its rule, on every piece of the vocabulary and on real texts.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lmworks.base.errors import InputError
from lmworks.export.probe import TEXTS
from lmworks.tokens.legacy import QWEN2_WORDS
from lmworks.tokens.pieces import SPACE
from lmworks.tokens.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
WORDS = {  # how a text is cut, and whether whole words come before merges -> llama.cpp's name of it
    (("gpt-2",), False): "gpt-2",
    (("digits", "gpt-2"), False): "smollm",
    ((LLAMA3_WORDS,), True): "llama-bpe",
    ((LLAMA3_WORDS,), False): "dbrx",
    ((QWEN2_WORDS,), False): "qwen2",
}
SUPPORTED = "byte-level BPE cut as GPT-2, SmolLM, Llama 3 or Qwen2 cut it, or Llama 2's BPE with a token for each byte"
HARD = (
    *TEXTS,
    "a  b   c\t\td\n\n\ne",
    "x=1234567890; y=3.14e-10",
    "🇵🇱👩‍👩‍👧 ﷽ ½ ²³",
    "don't CAN'T",
    "\u200b\u00a0end ",
)
LOWEST = -1e9  # the score of a piece that nothing is joined to


def describe_tokenizer(
    tokenizer: Tokenizer, rows: int, ends: Sequence[int], *, where: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the file's keys for a tokenizer of a model with `rows` embeddings, and what llama.cpp does otherwise.

    `ends`: the tokens that end a text. Raises InputError for a tokenizer that llama.cpp does not have.
    """
    tokenizer.check_fits(rows, where=where)
    said = json.loads(tokenizer.backend.to_str())
    model, notes = said["model"], list[str]()
    if model.get("type") != "BPE" or model.get("dropout") or any(model.get(key) for key in AFFIXES):
        raise refuse(where, f"a {model.get('type')} model" if model.get("type") != "BPE" else "BPE with affixes")
    keys = (describe_pieces if model.get("byte_fallback") else describe_bytes)(tokenizer, said, rows, where, notes)
    if len(set(keys["tokens"])) != rows:
        raise refuse(where, "two tokens that are spelled alike")
    odd = [t.content for t in tokenizer.backend.get_added_tokens_decoder().values() if t.lstrip or t.rstrip]
    if odd:
        notes.append(f"llama.cpp keeps the spaces beside {', '.join(sorted(odd)[:5])}, which this tokenizer takes in.")
    keys |= special_ids(tokenizer, ends, where)
    template = tokenizer.chat_template
    found = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return found | ({"tokenizer.chat_template": template} if template else {}), notes


def describe_bytes(
    tokenizer: Tokenizer, said: Mapping[str, Any], rows: int, where: str, notes: list[str]
) -> dict[str, Any]:
    """Return tokens, types and merges of byte-level BPE, and the name of how words are cut."""
    cut, model = read_cut(said.get("pre_tokenizer")), said["model"]
    name = WORDS.get((cut, bool(model.get("ignore_merges")))) if cut else None
    if name is None:
        raise refuse(where, f"a cut into words by {json.dumps(said.get('pre_tokenizer'))[:200]}")
    normalizer = said.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise refuse(where, f"a normalizer {normalizer.get('type')}")
    if normalizer is not None:
        notes.append("llama.cpp takes a text as it is; this tokenizer first puts it into Unicode's form NFC.")
    missing = [byte for byte in alphabet() if byte not in model["vocab"]]
    if missing:
        raise refuse(where, f"no token for {len(missing)} of the 256 bytes")
    tokens, types = list_tokens(tokenizer, rows, {})
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": name, "tokens": tokens, "token_type": types, "merges": merges}


def read_cut(step: Any) -> tuple[str, ...] | None:
    """Return how a pre-tokenizer cuts words: names and patterns; None for one that is not byte-level or does more."""
    steps = step.get("pretokenizers", []) if step and step.get("type") == "Sequence" else [step] if step else []
    cut: list[str] = []
    for part in steps:
        if part["type"] == "Digits" and part.get("individual_digits"):
            cut.append("digits")
        elif part["type"] == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            cut.append(str(part["pattern"].get("Regex")))
        elif part["type"] != "ByteLevel" or part.get("add_prefix_space"):
            return None
        elif part.get("use_regex", True):
            cut.append("gpt-2")
    return tuple(cut) if steps and steps[-1]["type"] == "ByteLevel" else None


def alphabet() -> list[str]:
    """Return the 256 letters in which byte-level tokens are spelled."""
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())


def describe_pieces(
    tokenizer: Tokenizer, said: Mapping[str, Any], rows: int, where: str, notes: list[str]
) -> dict[str, Any]:
    """Return tokens, types and scores of SentencePiece's BPE, after trying that llama.cpp's rule gives our tokens."""
    vocabulary = said["model"]["vocab"]
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if any(name not in vocabulary for name in names):
        raise refuse(where, "no token for some of the 256 bytes")
    prefix, only_first = read_spaces(said, where)
    if only_first:
        notes.append(
            "llama.cpp puts a space before every part of a text that follows a special token, and before a text that "
            "begins with one; this tokenizer does so at the very beginning only, and before no space."
        )
    types = dict.fromkeys((vocabulary[name] for name in names), BYTE)
    unknown = tokenizer.unk_id
    tokens, kinds = list_tokens(tokenizer, rows, types | ({} if unknown is None else {unknown: UNKNOWN}), spaces=True)
    best: dict[str, float] = {}
    for rank, merge in enumerate(said["model"]["merges"]):
        best.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), -1.0 - rank)
    scores = [best.get(token, LOWEST if len(token) > 1 else 0.0) for token in tokens]
    try_pieces(tokenizer, dict(zip(tokens, scores, strict=True)), prefix, where, notes)
    return {
        "model": "llama", "pre": "default", "tokens": tokens, "token_type": kinds, "scores": scores,
        "add_space_prefix": prefix,
    }  # fmt: skip


def read_spaces(said: Mapping[str, Any], where: str) -> tuple[bool, bool]:
    """Return whether a text begins with one more space, and whether only its very beginning does."""
    steps = said.get("normalizer") or {"normalizers": []}
    steps = steps.get("normalizers", [steps])
    kinds = [step["type"] for step in steps]
    cut = said.get("pre_tokenizer")
    visible = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if cut is None and kinds in (["Prepend", "Replace"], ["Replace"]) and steps[-1] == visible:
        return kinds[0] == "Prepend", False
    if not kinds and cut and cut.get("type") == "Metaspace" and cut.get("replacement") == SPACE:
        return cut.get("prepend_scheme") != "never", cut.get("prepend_scheme") != "never"
    raise refuse(where, f"the normalizer {kinds} before the pre-tokenizer {cut and cut.get('type')}")


def list_tokens(
    tokenizer: Tokenizer, rows: int, types: Mapping[int, int], *, spaces: bool = False
) -> tuple[list[str], list[int]]:
    """Return the spelling and the type of every id below `rows`; ids without a token become unused ones."""
    added = tokenizer.backend.get_added_tokens_decoder()
    named = {id: token for token, id in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    tokens, kinds = [], []
    for id in range(rows):
        if id in added and id not in types:
            own = added[id].content
            tokens.append(own.replace(SPACE, " ") if spaces and not added[id].special else own)
            kinds.append(CONTROL if added[id].special else USER_DEFINED)
        else:
            tokens.append(named.get(id, f"[PAD{id}]"))
            kinds.append(types.get(id, NORMAL) if id in named else UNUSED)
    return tokens, kinds


def try_pieces(tokenizer: Tokenizer, scores: Mapping[str, float], prefix: bool, where: str, notes: list[str]) -> None:
    """Raise InputError where joining by score does not give the tokenizer's own tokens of real texts."""
    added = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values()}
    words = [token.replace(SPACE, " ").strip() for token in scores if token not in added and token[:3] != "<0x"]
    texts = [*HARD, *(word for word in words if word)]
    wrong = [
        text
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True)
        if [tokenizer.token(id) for id in ids] != join_pieces(f"{' ' * prefix}{text}".replace(" ", SPACE), scores)
    ]
    if any(text in HARD for text in wrong):
        raise refuse(where, f"merges that no scores can say: {wrong[0]!r} becomes other tokens")
    if wrong:
        share = f"{len(wrong)} of {len(texts)}"
        notes.append(f"llama.cpp cuts {share} words of the vocabulary otherwise, such as {wrong[0]!r}.")


def join_pieces(text: str, scores: Mapping[str, float]) -> list[str]:
    """Join neighbours, the pair with the highest score first, the left one of equals; what remains becomes bytes."""
    pieces: list[str] = list(text)
    after, before = list(range(1, len(text) + 1)), list(range(-1, len(text) - 1))
    queue: list[tuple[float, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < len(pieces) and (joined := pieces[left] + pieces[right]) in scores:
            heapq.heappush(queue, (-scores[joined], left, joined))

    for i in range(len(text) - 1):
        offer(i, i + 1)
    while queue:
        _, left, joined = heapq.heappop(queue)
        right = after[left]
        if not pieces[left] or right >= len(pieces) or pieces[left] + pieces[right] != joined:
            continue
        pieces[left], pieces[right], after[left] = joined, "", after[right]
        if after[left] < len(pieces):
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    found: list[str] = []
    for piece in filter(None, pieces):
        found += [piece] if piece in scores else [f"<0x{byte:02X}>" for byte in piece.encode()]
    return found


def special_ids(tokenizer: Tokenizer, ends: Sequence[int], where: str) -> dict[str, Any]:
    """Return the special tokens, and which of them go around a prompt."""
    bare, whole = tokenizer.encode("a"), tokenizer.encode_prompt("a")
    place = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    first, last = whole[:place], whole[place + len(bare) :]
    ids: dict[str, Any] = {"add_bos_token": bool(first), "add_eos_token": bool(last)}
    ends = list(ends) or [id for id in (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) if id is not None][:1]
    if not ends:  # llama.cpp would take the token 11 or 2 for one
        raise InputError("no token ends a text, and llama.cpp needs one", where=where, fix="name an eos_token in "
                         "tokenizer_config.json")  # fmt: skip
    if len(first) > 1 or len(last) > 1 or (last and last[0] not in ends):
        raise refuse(where, f"{len(first)} tokens before a text and {len(last)} after it")
    bos = first[0] if first else tokenizer.bos_id
    end = last[0] if last else ends[0]
    others = [id for id in ends if id != end]
    named = {
        "bos_token_id": ends[0] if bos is None else bos, "eos_token_id": end,
        "eot_token_id": others[0] if others else None, "unknown_token_id": tokenizer.unk_id,
        "padding_token_id": tokenizer.pad_id,
    }  # fmt: skip
    return ids | {key: id for key, id in named.items() if id is not None}


def refuse(where: str, found: str) -> InputError:
    """Return the error for a tokenizer that llama.cpp does not have."""
    return InputError(
        "llama.cpp has no such tokenizer", where=where, found=found, expected=SUPPORTED, fix="export with --to onnx"
    )
