"""Write a checkpoint afresh, in today's Hugging Face layout: one safetensors file, today's names, both configs.

Whatever `load_model` reads goes in: old names of norms, shards, files with and without prefixes, the config of
transformers 4. What comes out was read again and compared before it took its place.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lmworks import __version__
from lmworks.base.errors import CheckFailed, InputError, did_you_mean
from lmworks.base.files import check_output, new_folder, sha256
from lmworks.base.report import Report, Table
from lmworks.compress.lowrank import multiply_out
from lmworks.export.parity import answer, differ, hash_weights
from lmworks.export.probe import TEXTS, make_probes
from lmworks.export.receipt import RECEIPT, write_receipt
from lmworks.models.checkpoint import load_model, modernize, strip
from lmworks.models.compact import is_compact
from lmworks.models.families import unsayable
from lmworks.models.folder import has_tokenizer, write_folder
from lmworks.models.heads import Model
from lmworks.models.weights import WEIGHTS, read_tensors
from lmworks.tokens.tokenizer import Tokenizer

FORMATS = ("hf",)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export(
    folder: str | Path, out: str | Path, *, to: str = "hf", dtype: str | None = None, overwrite: bool = False
) -> Report:
    """Write the checkpoint in `folder` to the new folder `out`, which is whole or absent.

    `dtype` is "fp32", "fp16", "bf16", or None for the file's own. `values["bit_equal"]` says that every weight and
    every answer is what it was; `max_abs_diff` how far the answers moved with another dtype. Raises InputError for an
    output that cannot be written, a format or dtype that does not exist, and weights that do not fit the dtype.
    """
    folder, out = Path(folder), Path(out)
    check_choice(to, FORMATS, "format")
    if dtype is not None:
        check_choice(dtype, DTYPES, "dtype")
    source = published(load_model(folder, dtype=None), folder)
    check_output(out, overwrite=overwrite, need_bytes=sum(p.nbytes for p in source.parameters()) * 11 // 10)
    if out.resolve() == folder.resolve() or out.resolve() in folder.resolve().parents:
        raise InputError("the output would replace the checkpoint itself", where=str(out), fix="choose another -o")
    model = source if dtype is None else published(load_model(folder, dtype=DTYPES[dtype]), folder)
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise InputError("some weights are not finite", where=str(folder), found=f"in {dtype or 'the file'}",
                         fix='choose --dtype bf16' if dtype == "fp16" else "use another checkpoint")  # fmt: skip
    with new_folder(out) as staged:
        write_folder(model, folder, staged)
        values = check_written(source, model, folder, staged)
        values |= {"left_out": list_left_out(model, folder, staged), "source_sha": hash_weights(folder)}
        facts = {
            "made_by": f"lmworks {__version__}",
            "source": folder.resolve().name,
            "source_sha": values["source_sha"],
        }
        receipt = write_receipt(staged, {**facts, "export": {"to": to, **values}})
    values = {"out": str(out), "to": to, **values, "files": sorted([*receipt["files"], RECEIPT])}
    rows = tuple((name.replace("_", " "), values[name]) for name in ("head", "dtype", "tensors", "bytes", "sha256"))
    left = "left out (other heads, copies, constants): " + ", ".join(values["left_out"])
    verdict = "the same to the bit" if values["bit_equal"] else f"answers moved by {values['max_abs_diff']:.1e}"
    return Report(
        f"{out}: {verdict}", values, tables=(Table("Written", ("what", "value"), rows),),
        notes=(left,) if values["left_out"] else (),
    )  # fmt: skip


def published(model: Model, folder: Path) -> Model:
    """Return a model that the published layout can say, factors multiplied out; raise InputError for another."""
    multiply_out(model)
    if is_compact(model) or unsayable(model.config, model.kind):
        raise InputError(
            "no published layout says what this model is: it is lmworks' own", where=str(folder),
            found="whole numbers" if is_compact(model) else "fewer heads than the family's config has a word for",
            fix="use the folder as it is, or export the model that it was made of",
        )  # fmt: skip
    return model


def check_choice(name: str, choices: Collection[str], what: str) -> None:
    """Raise InputError for a name that is not among the choices."""
    if name not in choices:
        fix = did_you_mean(name, choices).strip()
        raise InputError(f"lmworks export has no {what} {name!r}", expected=", ".join(choices), fix=fix)


def check_written(source: Model, model: Model, folder: Path, staged: Path) -> dict[str, Any]:
    """Read what was written and compare it with what was asked for. Raises CheckFailed."""
    again = load_model(staged, dtype=None)
    wanted, found, before = model.state_dict(), again.state_dict(), source.state_dict()
    wrong = [name for name in wanted if name not in found or not torch.equal(wanted[name], found[name])]
    if again.kind != model.kind or wrong or wanted.keys() != found.keys():
        raise CheckFailed("what was written is not what was read", where=str(staged), found=", ".join(wrong)[:300])
    if has_tokenizer(folder):
        first, second = (
            [(e.ids, e.type_ids) for e in Tokenizer.from_pretrained(place).encode_inputs(TEXTS)]
            for place in (folder, staged)
        )
        if first != second:
            raise CheckFailed("the tokenizer that was written gives other tokens", where=str(staged))
    one, two = source.float(), again.float()
    rows = [row for group in make_probes(folder, one.config).values() for row in group]
    answers = [next(answer(network, [row], left=False))["numbers"] for row in rows for network in (one, two)]
    differences = [differ(a, b) for a, b in zip(answers[::2], answers[1::2], strict=True)]
    if None in differences:
        raise CheckFailed("the answers of what was written are not finite", where=str(staged))
    kept = {name: before[name].dtype for name in before} == {name: found[name].dtype for name in found}
    worst = max(difference for difference in differences if difference is not None)
    if kept and worst:
        raise CheckFailed("what was written gives other answers", where=str(staged), found=f"up to {worst:.2e}")
    with safe_open(staged / WEIGHTS, framework="pt") as file:
        tensors = len(list(file.keys()))
    same = all(torch.equal(before[name].double(), found[name].double()) for name in before)
    return {
        "head": model.kind, "dtype": str(next(iter(found.values())).dtype).removeprefix("torch."), "tensors": tensors,
        "bytes": (staged / WEIGHTS).stat().st_size, "sha256": sha256(staged / WEIGHTS),
        "bit_equal": same and not worst, "max_abs_diff": worst,
    }  # fmt: skip


def list_left_out(model: Model, folder: Path, staged: Path) -> list[str]:
    """Return the tensors that were read and not written: other heads, copies of tied matrices, constants."""
    written = {strip(name, model) for name in read_tensors(staged)}
    names = [name for name in read_tensors(folder) if not name.startswith("lmworks.")]  # of factors
    return sorted(name for name in names if modernize(strip(name, model)) not in written)
