"""Prove that a checkpoint gives the same numbers here as in transformers, or as in a fixture that was made with it.

    {max_abs_diff, passed, tolerance, cells: {head: {way: largest difference}}, greedy: {equal, checked},
     round_trip: {passed, missing, unexpected …}, reference: {name, version, torch, attention},
     source_sha, compared, notes}

Every head that config.json states and the bare body are compared, in float32 on both sides. The reference runs each row
alone; ours must say the same alone, in a batch padded on the right, and in one padded on the left.

Shapes: B batch, T tokens, O outputs of the head, D hidden_size, G tokens of greedy search, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256 as new_hash
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from lmworks import __version__
from lmworks.base.errors import FormatError, InputError, LmworksError
from lmworks.base.files import sha256
from lmworks.base.report import Report, Table
from lmworks.export.fixture import Record, check_free, read_fixture, write_fixture
from lmworks.export.probe import make_probes
from lmworks.export.reference import NAME, Arrays, Reference, versions
from lmworks.models.checkpoint import load_model, read_config, save_model
from lmworks.models.config import Config
from lmworks.models.families import TASKS, architecture, find_head, read_kind
from lmworks.models.heads import Model
from lmworks.models.weights import find_files
from lmworks.runtime.torch_runtime import TorchRuntime

TOKENS, PROMPT = 32, 16  # of greedy search
BATCHED = ("texts", "pairs")  # groups that are compared padded on either side as well
BATCH = 8
DOUBLE = {"BertForPreTraining": ("MaskedLM", "NextSentencePrediction")}  # published classes with two heads


@dataclass
class Found:
    """What the comparison found so far."""

    cells: dict[str, dict[str, float | None]] = field(default_factory=dict)  # None: not finite, or another shape
    greedy: dict[str, int] = field(default_factory=dict)
    largest: float = 0.0  # of the reference's own numbers
    round_trip: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def add(self, head: str, way: str, difference: float | None) -> None:
        """Keep the largest difference of a cell; what cannot be compared stays."""
        row = self.cells.setdefault(head, {})
        before = row.get(way, 0.0)
        row[way] = None if before is None or difference is None else max(before, difference)

    @property
    def worst(self) -> float | None:
        """The largest difference of all; None where one is not a number."""
        numbers = [value for row in self.cells.values() for value in row.values()]
        return None if not numbers or None in numbers else max(value for value in numbers if value is not None)


def verify_against(
    folder: str | Path,
    reference: str | Path = NAME,
    *,
    head: str | None = None,
    texts: Sequence[str] | None = None,
    save_fixture: str | Path | None = None,
    tolerance: float = 1e-5,
) -> Report:
    """Compare a checkpoint's numbers with "transformers", or with a fixture file that was made with it elsewhere.

    `head` (a published head or a pipeline's name) replaces the heads that config.json states; `texts` are read beside
    the built-in ones; `save_fixture` keeps inputs and answers. `values["passed"]`: every difference is at most
    `tolerance`, every greedy token is the reference's, and what is saved from here loads there to the bit. Raises
    InputError, FormatError, and MissingExtra where transformers is wanted but not installed.
    """
    folder = Path(folder)
    if not (isinstance(tolerance, int | float) and math.isfinite(tolerance) and tolerance > 0):
        raise InputError("this is not a tolerance", found=str(tolerance), expected="a number above 0, such as 1e-5")
    c, sha = read_config(folder), hash_weights(folder)
    found = Found()
    if str(reference) == NAME:
        facts = versions()
        heads = choose_heads(c, head, found)
        path = None if save_fixture is None else Path(save_fixture)
        if path is not None:
            check_free(path)
        record = compare_live(folder, c, heads, texts or (), found, keep=path is not None)
        if path is not None:
            write_fixture(path, record, {
                "source": folder.resolve().name, "source_sha": sha, "transformers_version": facts["version"],
                "torch_version": facts["torch"], "attention": facts["attention"],
            })  # fmt: skip
    else:
        if texts or save_fixture:
            raise InputError("a fixture brings texts of its own", fix=f"compare with {NAME}, or leave out the texts")
        facts = compare_stored(folder, c, Path(reference), sha, head, found)
    return make_report(folder, c, found, facts, sha, float(tolerance))


def choose_heads(c: Config, head: str | None, found: Found) -> list[str]:
    """Return the heads to compare, the bare body last; note what the checkpoint holds beyond them."""
    if head is not None:
        head = TASKS.get(head, head)
        alone = find_head(c, head).prefix is not None  # as below
        return [head] if alone else list(dict.fromkeys((head, "Model")))
    named = str((c.source.get("architectures") or [""])[0])
    kinds = DOUBLE.get(named, (read_kind(c),))
    if named and named not in DOUBLE and named != architecture(c.model_type, kinds[0]):
        found.notes.append(f"{named} is read in part: {', '.join(kinds)} was compared, its other heads were not")
    if find_head(c, kinds[0]).prefix is not None:  # neither library reads the bare body from such a file
        found.notes.append(f"the body was compared through {kinds[0]} alone, beside which it has names of its own")
        return list(kinds)
    return list(dict.fromkeys((*kinds, "Model")))


def compare_live(
    folder: Path, c: Config, heads: Sequence[str], texts: Sequence[str], found: Found, *, keep: bool
) -> Record:
    """Ask the reference and compare head by head; return its answers if they are to be kept."""
    probes, record = make_probes(folder, c, texts), {}
    for place, head in enumerate(heads):
        model, theirs = load_model(folder, head), Reference(folder, c, head)
        groups = {name: [{**row, **theirs.answer(row)} for row in rows] for name, rows in probes.items()}
        if head == "CausalLM":
            prompt = probes["texts"][0]["input_ids"][:PROMPT]
            count = min(TOKENS, c.max_tokens - len(prompt))
            if count > 0:
                groups["greedy"] = [{"input_ids": prompt, **theirs.greedy(prompt, count)}]
        compare(model, groups, found)
        if place == 0:
            found.round_trip = round_trip(folder, c, theirs, [rows[0] for rows in probes.values()])
        if keep:
            record[head] = groups
    return record


def compare_stored(folder: Path, c: Config, path: Path, sha: str, head: str | None, found: Found) -> dict[str, str]:
    """Compare with a fixture's answers; return what made them."""
    if not path.is_file():
        raise InputError(
            "there is nothing to compare with here", where=str(path), expected=f'"{NAME}", or the file of a fixture'
        )
    record, facts = read_fixture(path)
    if facts["source_sha"] != sha:
        raise InputError(
            f"this fixture was made with other weights ({facts['source']})", where=str(path),
            found=f"sha256 {facts['source_sha']}", expected=f"sha256 {sha}, the weights of {folder}",
            fix=f"make a new one: lmworks verify MODEL --against {NAME} --save-fixture FILE",
        )  # fmt: skip
    wanted = list(record) if head is None else [TASKS.get(head, head)]
    if not set(wanted) <= set(record):
        raise InputError(f"the fixture holds no answers of {wanted[0]}", where=str(path), expected=", ".join(record))
    for name in wanted:
        try:
            compare(load_model(folder, name), record[name], found)
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
            raise FormatError("the fixture's rows do not fit the model", where=str(path), found=str(error)) from None
    found.notes.append("the round trip through transformers was not checked: a fixture cannot prove it")
    return {
        "name": NAME, "version": facts["transformers_version"], "torch": facts["torch_version"],
        "attention": facts["attention"], "fixture": path.name,
    }  # fmt: skip


def compare(model: Model, groups: dict[str, list[Arrays]], found: Found) -> None:
    """Run our model on every row of a head and keep the differences."""
    for group, rows in groups.items():
        if group == "greedy":
            compare_greedy(model, rows, found)
            continue
        ways = {"alone": [[row] for row in rows]}
        if group in BATCHED:
            batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
            ways |= {"right": batches, "left": batches}
        for way, batches in ways.items():
            for batch in batches:
                for row, ours in zip(batch, answer(model, batch, left=way == "left"), strict=True):
                    kept = ours["numbers"][row["kept"]] if "kept" in row else ours["numbers"]
                    found.add(model.kind, f"{group} {way}", differ(kept, row["numbers"]))
                    found.largest = max(found.largest, float(np.abs(row["numbers"]).max(initial=0.0)))
                    if "pooled" in row and "pooled" in ours:
                        found.add(model.kind, f"{group} {way}, pooled", differ(ours["pooled"], row["pooled"]))


@torch.inference_mode()
def answer(model: Model, batch: Sequence[Arrays], *, left: bool) -> Iterator[Arrays]:
    """Run rows as one padded batch; yield for each numbers, (T, O) of its own tokens or (O,), and pooled (D,)."""
    if "pixel_values" in batch[0]:
        lengths, inputs = None, torch.from_numpy(np.stack([row["pixel_values"] for row in batch]))  # (B, C, H, W)
        mask, types = None, None
    else:
        lengths = [len(row["input_ids"]) for row in batch]
        T, c = max(lengths), model.config
        inputs = torch.full((len(batch), T), c.pad_token_id or 0)
        mask = torch.zeros(len(batch), T, dtype=torch.long)
        types = torch.zeros_like(mask) if "token_type_ids" in batch[0] else None
        places = [slice(T - n, T) if left else slice(0, n) for n in lengths]
        for i, (row, place) in enumerate(zip(batch, places, strict=True)):
            inputs[i, place], mask[i, place] = torch.from_numpy(row["input_ids"]), 1
            if types is not None:
                types[i, place] = torch.from_numpy(row["token_type_ids"])
        mask = None if mask.all() else mask  # whole rows take the way without a mask
    numbers = model(inputs, mask, token_type_ids=types)  # (B, T, O) or (B, O)
    pooled = model.head(numbers, mask) if model.kind == "Model" and model.head.dense is not None else None  # (B, D)
    for i in range(len(batch)):
        own = numbers[i, places[i]] if lengths is not None and numbers.ndim == 3 else numbers[i]
        yield {"numbers": own.numpy()} | ({} if pooled is None else {"pooled": pooled[i].numpy()})


def compare_greedy(model: Model, rows: Sequence[Arrays], found: Found) -> None:
    """Give our cache the reference's tokens one by one: each step must want the same token, with the same logits."""
    runtime = TorchRuntime(model)
    for row in rows:
        steps = [runtime.prefill([0], [row["input_ids"].tolist()])]
        steps += [runtime.step([0], [token]) for token in row["tokens"][:-1].tolist()]
        ours = np.concatenate(steps)  # (G, V)
        found.add(model.kind, "greedy, cached", differ(ours, row["numbers"]))
        equal = int((ours.argmax(-1) == row["tokens"]).sum())
        before = found.greedy or {"equal": 0, "checked": 0}
        found.greedy = {"equal": before["equal"] + equal, "checked": before["checked"] + len(ours)}


def differ(a: Any, b: Any) -> float | None:
    """Return the largest difference; None for other shapes, or numbers that are not finite."""
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    return float(np.abs(a - b).max(initial=0.0))


def round_trip(folder: Path, c: Config, first: Reference, rows: Sequence[Arrays]) -> dict[str, Any]:
    """Load here, save, load there: no key may be missing or left over, no bit of the weights or the answers differ."""
    with TemporaryDirectory() as place:
        try:
            save_model(load_model(folder, first.head, dtype=None), place)
            again = Reference(Path(place), c, first.head)
        except LmworksError as error:
            return {"passed": False, "problem": str(error)}
        before, after = first.model.state_dict(), again.model.state_dict()
        changed = [key for key in before.keys() | after.keys() if key not in first.missing and not (
            key in before and key in after and torch.equal(before[key], after[key]))]  # fmt: skip
        answers = [(first.answer(row)["numbers"], again.answer(row)["numbers"]) for row in rows]
    result = {
        "missing": sorted(again.missing - first.missing),  # what the checkpoint itself lacks is drawn there
        "unexpected": sorted(again.unexpected),
        "changed": sorted(changed),
        "forward_equal": all(np.array_equal(a, b) for a, b in answers),
    }
    passed = result["forward_equal"] and not (result["missing"] or result["unexpected"] or changed)
    return {"passed": bool(passed), **result}


def hash_weights(folder: Path) -> str:
    """Return the SHA-256 of the weight file; of shards that of the lines "sha256  name"."""
    names = find_files(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FormatError("weight files are missing", where=str(folder), found=", ".join(missing))
    if len(names) == 1:
        return sha256(folder / names[0])
    return new_hash("".join(f"{sha256(folder / name)}  {name}\n" for name in names).encode()).hexdigest()


def make_report(folder: Path, c: Config, found: Found, facts: dict[str, str], sha: str, tolerance: float) -> Report:
    """Say what was found, for programs and for people."""
    trip, greedy, worst = found.round_trip, found.greedy, found.worst
    problems = [] if worst is None or worst <= tolerance else [f"the largest difference is {worst:.2e}"]
    unit = found.largest * float(np.finfo(np.float32).eps)
    if worst is not None and tolerance < worst <= 16 * unit:
        found.notes.append(
            f"the largest number compared is {found.largest:.3g}, where neighbours in float32 are {unit:.1e} apart: "
            "the difference may be rounding, which --tolerance can allow for"
        )
    if worst is None:
        problems.append("some numbers are not finite, or have another shape")
    if greedy and greedy["equal"] < greedy["checked"]:
        problems.append(f"greedy search agrees on {greedy['equal']} of {greedy['checked']} tokens")
    if trip is not None and not trip["passed"]:
        problems.append("what lmworks saves is not what was there")
    values = {
        "max_abs_diff": worst, "passed": not problems, "tolerance": tolerance, "model": str(folder),
        "compared": list(found.cells), "cells": found.cells, **({"greedy": greedy} if greedy else {}),
        **({} if trip is None else {"round_trip": trip}), "reference": facts, "lmworks": __version__,
        "largest_number": found.largest if math.isfinite(found.largest) else None,
        "stored_dtype": c.source.get("dtype") or c.source.get("torch_dtype"), "computed_dtype": "float32",
        "source_sha": sha, "problems": problems, "notes": found.notes,
    }  # fmt: skip
    rows = tuple((head, way, value) for head, row in found.cells.items() for way, value in row.items())
    title = f"{folder} against {facts['name']} {facts['version']}: {'FAILED' if problems else 'the same numbers'}"
    table = Table(f"Largest difference (at most {tolerance:g} passes)", ("head", "inputs", "difference"), rows)
    return Report(title, values, tables=(table,), notes=(*problems, *found.notes))
