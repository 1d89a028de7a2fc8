"""Work an adapter into its base model, and prove that nothing moved: a folder that needs neither peft nor the base.

The products are added in float32. What was written is read again and asked the same as the model with its adapter; the
largest difference of a logit is reported, and one above the limit is a failure that leaves nothing behind.
"""

from __future__ import annotations

from pathlib import Path

from lmworks import __version__
from lmworks.base.errors import CheckFailed, InputError
from lmworks.base.files import check_output, new_folder
from lmworks.base.report import Report, Table
from lmworks.export.parity import answer, differ
from lmworks.export.probe import make_probes
from lmworks.export.receipt import write_receipt
from lmworks.models.checkpoint import load_model
from lmworks.models.folder import write_folder
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.adapter_files import open_adapter
from lmworks.training.lora import merge_lora
from lmworks.training.peft_format import read_settings

UNMERGED = {"adapter": "bottlenecks, which are not linear", "prefix": "a prefix, which is read beside the text"}
LIMIT = 1e-3  # of a logit; float32 leaves about 1e-5 in a model of six layers


def merge(
    folder: str | Path, out: str | Path, *, base: str | Path | None = None, limit: float = LIMIT,
    overwrite: bool = False,
) -> Report:  # fmt: skip
    """Merge the adapter in `folder` into its base and write the new folder `out`, which is whole or absent.

    `base` replaces the name in the adapter's config. Raises InputError for an adapter that no weights can hold,
    CheckFailed where a logit moves by more than `limit`.
    """
    folder, out = Path(folder), Path(out)
    if not limit > 0:
        raise InputError("this is not a limit", found=str(limit), expected="a number above 0, such as 1e-3")
    check_linear(folder, read_settings(folder).method)
    opened = open_adapter(folder, base=base)
    model, holder = opened.model.eval(), opened.tokenizer
    if any(out.resolve() in (place.resolve(), *place.resolve().parents) for place in (folder, opened.base)):
        raise InputError("the output would replace what is merged", where=str(out), fix="choose another -o")
    check_output(out, overwrite=overwrite, need_bytes=sum(p.numel() for p in model.parameters()) * 4)
    if holder is not None and not model.config.vision:
        Tokenizer.from_pretrained(holder).check_fits(model.config.vocab_size, where=str(holder))
    probes = make_probes(holder or opened.base, model.config)
    rows = [row for group in probes.values() for row in group]
    before = [next(answer(model, [row], left=False))["numbers"] for row in rows]
    facts = merge_lora(model)
    with new_folder(out) as staged:
        write_folder(model, opened.base, staged)
        if holder is not None and holder != opened.base:
            Tokenizer.from_pretrained(holder).save(staged)
        again = load_model(staged)
        after = [next(answer(again, [row], left=False))["numbers"] for row in rows]
        differences = [differ(a, b) for a, b in zip(before, after, strict=True)]
        numbers = [difference for difference in differences if difference is not None]
        worst = max(numbers) if len(numbers) == len(differences) else None
        if worst is None or worst > limit:
            found = "numbers that are not finite" if worst is None else f"a logit that moved by {worst:.2e}"
            raise CheckFailed("the merged model is not the model with its adapter", where=str(folder), found=found,
                              expected=f"at most {limit:g}")  # fmt: skip
        values = {
            "out": str(out), "base": opened.facts["base"], "layers": facts["merged"], "untied": facts["untied"],
            "max_abs_diff": worst, "limit": limit, "compared": len(rows), "notes": opened.facts["notes"],
        }  # fmt: skip
        write_receipt(staged, {"made_by": f"lmworks {__version__}", "merge": values})
    notes = [f"{note[:1].upper()}{note[1:]}." for note in opened.facts["notes"]]
    if facts["untied"]:
        notes.append("The embedding and the projection are two matrices now: only one of them was adapted.")
    table = (
        ("base", values["base"]), ("adapted layers", facts["merged"]), ("texts compared", len(rows)),
        ("largest difference of a logit", worst), ("limit", limit),
    )  # fmt: skip
    title = f"{out}: merged, logits moved by at most {worst:.1e}"
    return Report(title, values, tables=(Table("Merged", ("what", "value"), table),), notes=tuple(notes))


def check_linear(folder: Path, method: str) -> None:
    """Raise InputError for an adapter that is no change of matrices; it names what works instead."""
    if method in UNMERGED:
        raise InputError(
            "this adapter cannot be merged: no weights of the base would do the same", where=str(folder),
            found=UNMERGED[method], expected="a LoRA adapter",
            fix="use the folder as it is, which opens its base by itself (lmworks evaluate, classify …), or train with "
            "--method lora",
        )  # fmt: skip
