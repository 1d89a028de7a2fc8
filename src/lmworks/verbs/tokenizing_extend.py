"""`lmworks tokenizer extend`: more tokens for a model, with a proof that nothing else changed.

The proof, on built-in texts and on those that are given: a text without a new token keeps its ids; every other text
still comes back from its tokens, of which it has no more than before; a new token is one token; and the model's
numbers for texts that keep their ids are the same, up to the order in which a wider product adds (SAME).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmworks import __version__
from lmworks.base.errors import InputError
from lmworks.base.files import check_output, new_folder, write_json, write_text
from lmworks.base.hub import find_folder
from lmworks.base.optional import require
from lmworks.base.report import Cell, Report, Table
from lmworks.export.probe import TEXTS
from lmworks.export.receipt import write_receipt
from lmworks.tokens import extend as tokens
from lmworks.tokens.batch import pad
from lmworks.tokens.look import PROBES
from lmworks.tokens.stream import Texts
from lmworks.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lmworks.models.heads import Model

LINES, RUN, LENGTH = 5000, 8, 64  # lines of the proof, texts that the model runs, tokens of each
SHOWN = 12
SAME = 1e-6  # of the largest number


@dataclass(frozen=True)
class Proof:
    """What was looked at, and what went wrong: each list of failures is empty where the proof holds."""

    texts: int
    same_ids: int  # texts without a new token: all keep their ids
    shorter: int  # texts with one
    tokens_before: int
    tokens_after: int
    changed_ids: list[str]  # texts without a new token whose ids changed
    lost: list[str]  # texts that came back before and do not now
    longer: list[str]  # texts that take more tokens
    cut: list[str]  # asked-for tokens that are not one token
    largest_difference: float | None = None  # of the model's numbers, over the largest; None for a tokenizer alone

    @property
    def holds(self) -> bool:
        """Say whether nothing went wrong."""
        wrong = self.changed_ids or self.lost or self.longer or self.cut
        return not wrong and (self.largest_difference or 0.0) <= SAME


def extend(
    model: str | Path,
    texts: str,
    out: str | Path,
    *,
    count: int | None = None,
    column: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Write a model, or a tokenizer alone, with more tokens to the new folder `out`.

    `texts` are tokens with commas or a file with one a line; with `count` a file or folder of text, of which those
    words become tokens that save the most (`lmworks.tokens.extend`). New rows are the mean of the tokens that the word
    was cut into. `values["proved"]` says whether the proof holds. Raises InputError for tokens that cannot be added.
    """
    check_output(out, overwrite=overwrite)
    folder = find_folder(str(model), revision=revision)
    if Path(out).resolve() == folder.resolve():
        raise InputError("the output would replace the model itself", where=str(out), fix="choose another -o")
    old = Tokenizer.from_pretrained(folder)
    corpus = [] if count is None else list(Texts([texts], column=column))
    if count is None:
        names = tokens.named_tokens(texts)
        found, pieces = tokens.add_words(old, names)
    else:
        names = []
        result = tokens.extend(old, f"{tokens.AUTO}:{count}", corpus)
        found, pieces = result.tokenizer, result.pieces
    lines = [*TEXTS, *PROBES.values(), *(f"{name} {name}." for name in names)]
    lines += [line for text in corpus for line in text.split("\n") if line.strip()][:LINES]
    proof = prove(old, found, lines, names)
    with new_folder(out) as staged:
        rows: dict[str, Any] = {}
        if (folder / "config.json").is_file():
            proof, rows = resize(folder, staged, old, found, pieces, lines, proof)
        found.save(staged)
        values: dict[str, Any] = {
            "out": str(out), "base": str(model), "vocab_size_before": old.vocab_size, "vocab_size": found.vocab_size,
            "tokens_added": [found.decode([id], skip_special_tokens=False) for id in sorted(pieces)], **rows,
            "proved": proof.holds, "proof": asdict(proof),
        }  # fmt: skip
        report = describe(values, proof, old, found, pieces)
        write_json(staged / "report.json", report.to_dict())
        write_text(staged / "report.html", report.to_html())
        facts = {key: value for key, value in values.items() if key != "out"}
        write_receipt(staged, {"lmworks": __version__, "base": str(model), "extended": facts})
    return report


def prove(old: Tokenizer, new: Tokenizer, lines: Sequence[str], names: Sequence[str]) -> Proof:
    """Compare two tokenizers on lines of text, and see that every name is one token of the new one."""
    same = more = before = after = 0
    changed: list[str] = []
    lost: list[str] = []
    longer: list[str] = []
    for line, a, b in zip(lines, old.encode_batch(lines), new.encode_batch(lines), strict=True):
        before, after = before + len(a), after + len(b)
        if max(b, default=-1) < old.vocab_size:
            same += 1
            changed += [line] if a != b else []
        else:
            more += 1
            longer += [line] if len(b) > len(a) else []
        if old.decode(a, skip_special_tokens=False) == line != new.decode(b, skip_special_tokens=False):
            lost.append(line)
    cut = [name for name, ids in zip(names, new.encode_batch(list(names)), strict=True) if len(ids) != 1]
    return Proof(len(lines), same, more, before, after, changed, lost, longer, cut)


def resize(
    folder: Path, staged: Path, old: Tokenizer, new: Tokenizer, pieces: dict[int, list[int]], lines: Sequence[str],
    proof: Proof,
) -> tuple[Proof, dict[str, Any]]:  # fmt: skip
    """Write the model with rows for the new tokens; return the proof with its numbers, and its sizes."""
    require("torch", extra="torch")
    from dataclasses import replace

    from lmworks.models.checkpoint import load_model
    from lmworks.models.folder import write_folder
    from lmworks.models.resize import add_rows

    network = load_model(folder)
    rows = network.config.vocab_size
    old.check_fits(rows, where=str(folder))
    kept = [ids for line in lines if (ids := old.encode(line)) and ids == new.encode(line)][:RUN]
    batch = [ids[: min(LENGTH, network.config.max_tokens)] for ids in kept]
    before = run(network, batch, old)
    add_rows(network, new.vocab_size, pieces)
    after = run(network, batch, old)
    width = old.vocab_size if before.shape[-1] == rows else after.shape[-1]  # rows to spare may be new tokens' now
    before, after = before[..., :width], after[..., :width]
    difference = float(np.abs(before - after).max() / max(1.0, np.abs(before).max())) if before.size else 0.0
    write_folder(network, folder, staged)
    found = {
        "rows_before": rows,
        "rows": network.config.vocab_size,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    return replace(proof, largest_difference=difference), found


def run(network: Model, batch: Sequence[Sequence[int]], tokenizer: Tokenizer) -> np.ndarray[Any, Any]:
    """Return what a model says of some texts, padded places left out."""
    from lmworks.runtime.torch_runtime import TorchRuntime

    rows = [
        next(iter(TorchRuntime(network).run(pad([ids], pad_id=tokenizer.pad_id or 0)).values()))[0] for ids in batch
    ]
    return np.concatenate([np.atleast_2d(row) for row in rows]) if rows else np.empty((0, 0))


def describe(
    values: dict[str, Any], proof: Proof, old: Tokenizer, new: Tokenizer, pieces: dict[int, list[int]]
) -> Report:
    """Return the report."""
    facts: list[tuple[Cell, ...]] = [
        ("tokens", values["vocab_size_before"], values["vocab_size"]),
        *([("rows of the embedding", values["rows_before"], values["rows"])] if "rows" in values else []),
        ("tokens of the texts looked at", proof.tokens_before, proof.tokens_after),
    ]
    checks: list[tuple[Cell, ...]] = [
        ("texts without a new token keep their ids", proof.same_ids, say(proof.changed_ids)),
        ("texts with one take no more tokens", proof.shorter, say(proof.longer)),
        ("texts come back from their tokens", proof.texts, say(proof.lost)),
        ("each token that was asked for is one token", len(values["tokens_added"]), say(proof.cut)),
    ]
    if proof.largest_difference is not None:
        found = "holds" if proof.largest_difference <= SAME else f"they differ by {proof.largest_difference:.1e}"
        checks.append(("the model's numbers are the same", RUN, found))
    shown = tuple(
        (id, new.decode([id], skip_special_tokens=False), name_pieces(old, pieces[id])) for id in sorted(pieces)[:SHOWN]
    )
    tables = (
        Table("Before and after", ("what", "before", "after"), tuple(facts)),
        Table("Proof", ("what", "looked at", "verdict"), tuple(checks)),
        Table("New tokens" + (" (the first ones)" if len(pieces) > SHOWN else ""),
              ("id", "token", "its row is the mean of"), shown),
    )  # fmt: skip
    notes = ["The new rows are a start: lmworks finetune teaches the model what they mean."] if "rows" in values else []
    if not proof.holds:
        notes.append("The proof does not hold: look at what failed before you use this folder.")
    return Report(
        f"{values['out']}: {values['base']} with {len(pieces):,} more tokens", values, tables, notes=tuple(notes)
    )


def name_pieces(old: Tokenizer, ids: Sequence[int]) -> str:
    """Return the tokens whose rows a new row is the mean of."""
    return " + ".join(repr(old.decode([i])) for i in ids) or "all tokens"


def say(failures: Sequence[str]) -> str:
    """Return the verdict of a check."""
    return "holds" if not failures else f"{len(failures)} fail: {failures[0][:40]!r}"
