"""What a language model gained and lost: perplexity and bits per byte on several texts, before and after.

A tokenizer with more tokens makes fewer, harder tokens of the same text, so perplexity per token cannot be compared
across it; bits per byte can. Every text is scored as `lmworks evaluate` does: each token once, with at least half of
the context before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError
from lmworks.base.files import read_json, write_json
from lmworks.base.report import Table
from lmworks.evaluation.perplexity import bits_per_byte, token_logprobs
from lmworks.models.checkpoint import load_model
from lmworks.models.heads import Model
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.text.clean import clean
from lmworks.text.read import read_documents
from lmworks.tokens.batch import make_stream
from lmworks.tokens.tokenizer import Tokenizer

HELD = "held-out examples"
LONGEST = 2**18  # characters of each text that are scored, from its beginning
FILE = "before.json"
Scores = dict[str, dict[str, float | None]]  # by text: perplexity, bits_per_byte, tokens, bytes


def read_texts(task: str, held_out: Sequence[Any], files: Sequence[str]) -> dict[str, list[str]]:
    """Return the texts to score by name, the held-out examples first; nothing without files.

    Raises InputError for another task than text-generation, and for files that cannot be read.
    """
    if not files:
        return {}
    if task != "text-generation":
        raise InputError("--also-evaluate measures how a model goes on with texts", found=f"--task {task}",
                         expected="text-generation", fix="leave it out")  # fmt: skip
    texts = {HELD: shorten([example for example in held_out if isinstance(example, str)])}
    for file in files:
        name = Path(file).name if Path(file).name not in texts else file
        texts[name] = shorten([clean(document.text) for document in read_documents(Path(file))])
    return {name: found for name, found in texts.items() if found}


def shorten(texts: Sequence[str]) -> list[str]:
    """Return the first texts, the last one cut, so that they have LONGEST characters in all."""
    left, kept = LONGEST, []
    for text in texts:
        if left > 0 and text:
            kept.append(text[:left])
            left -= len(text)
    return kept


def score_texts(model: Model, tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]]) -> Scores:
    """Score a model on each of the texts."""
    found: Scores = {}
    training = model.training
    runtime = TorchRuntime(model.eval())
    for name, parts in texts.items():
        stream = make_stream(tokenizer, parts)
        scores = token_logprobs(runtime, stream, context=runtime.max_length)
        size = sum(len(part.encode()) for part in parts)
        known = all(tokenizer.knows(part) for part in parts)
        found[name] = {
            "perplexity": scores.perplexity, "bits_per_byte": bits_per_byte(scores.logprobs, size if known else None),
            "tokens": float(len(stream) - 1), "bytes": float(size),
        }  # fmt: skip
    model.train(training)
    return found


def score_base(folder: Path, base: Path, texts: Mapping[str, Sequence[str]]) -> Scores:
    """Return the scores of the model as it was, with its own tokenizer; a resumed run reads them from its folder."""
    path = folder / FILE
    if texts and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, score_texts(load_model(base), Tokenizer.from_pretrained(base), texts))
    return {name: dict(scores) for name, scores in read_json(path).items()} if texts else {}


def forgetting_table(before: Scores, after: Scores) -> tuple[Table, ...]:
    """Return what was gained and lost on each text; nothing where none was scored."""
    if not after:
        return ()
    rows = []
    for name, now in after.items():
        was = before[name]
        bits = [scores["bits_per_byte"] for scores in (was, now)]
        change = None if bits[0] is None or bits[1] is None else bits[1] - bits[0]
        rows.append((name, was["perplexity"], now["perplexity"], *bits, change, int(now["bytes"] or 0)))
    head = ("text", "perplexity before", "after", "bits per byte before", "after", "change", "bytes")
    return (Table("Gained and forgotten", head, tuple(rows)),)
