"""Export a checkpoint as a folder that runs without torch: graphs, config, tokenizer, and what they were held to.

Every graph answers real texts (or images) before the folder takes its place: in fp32 as torch does, in a lossy dtype
with numbers that are finite, whose distance and agreement are reported.

Shapes: T tokens, O outputs of the head, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lmworks import __version__
from lmworks.base.errors import CheckFailed, InputError
from lmworks.base.files import check_output, new_folder, read_json, write_json
from lmworks.base.report import Report, Table
from lmworks.base.types import Batch
from lmworks.evaluation.monitor import carry
from lmworks.export.calibration import find_precisions
from lmworks.export.emit_encoder import check_attends
from lmworks.export.merge import merge
from lmworks.export.onnx import check_dtypes, export_onnx
from lmworks.export.parity import answer, differ, hash_weights
from lmworks.export.probe import make_probes
from lmworks.export.receipt import RECEIPT, recall, write_receipt
from lmworks.export.reference import Arrays
from lmworks.export.selftest import FP32_CLOSE, FP32_MOST, FP32_PART
from lmworks.export.web_folder import add_page, check_page, find_task, record
from lmworks.models.checkpoint import load_model
from lmworks.models.families import publish
from lmworks.models.folder import has_tokenizer, write_folder
from lmworks.models.heads import Model
from lmworks.models.weights import WEIGHTS
from lmworks.runtime.onnx_runtime import FILES, OnnxRuntime
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.peft_format import CONFIG as ADAPTER_CONFIG

SELFTEST = "selftest.json"
LARGE = 64_000_000  # bytes of weights that lie beside their graph: 438 MB open in half the time, with 0.7 of the memory
PARTS = {"fp32": 1.1}  # of the weights' bytes that a graph takes at most; a smaller dtype about half


def export_graphs(
    folder: str | Path, out: str | Path, *, to: str = "onnx", dtypes: Sequence[str] = ("fp32", "int8"),
    external: bool | None = None, data: str | Path | None = None, single_file: bool = False,
    attentions: bool = False, batches: Sequence[Batch] = (), code: Sequence[Any] = (), overwrite: bool = False,
) -> Report:  # fmt: skip
    """Write the graphs of the checkpoint in `folder` to the new folder `out`, which is whole or absent.

    An adapter is merged into its base first. `to`: "onnx", or "web" with the page beside them. `external` puts weights
    beside the graphs; None: above 64 MB, which are then mapped and not read, and in a page above 2 GB. `data` is a file
    of real examples that torch answers for selftest.json, in place of the built-in ones; a head that no task has gets
    none. `single_file` puts the whole page into page.html as well. `attentions` lets an encoder's graphs also give out
    where each layer looks. `batches` are real inputs that matrices are rounded for, else built-in texts. `code` is that
    of layers of its maker's own, which become nodes (`lmworks.export.traced`). Raises InputError for what cannot be
    exported, CheckFailed for a graph that does not give torch's answers.
    """
    folder, out, dtypes = Path(folder), Path(out), check_dtypes(dtypes)
    if single_file and to != "web":
        raise InputError("only a page can be a single file", found=f"--to {to}", fix="add --to web")
    with merged(folder) as source:
        model = load_model(source, code=code).eval()
        if attentions:
            check_attends(model)
        if to == "web":
            check_page(model, source, dtypes)
        size = sum(p.numel() for p in model.parameters()) * 4
        need = sum(size * PARTS.get(dtype, 0.6) for dtype in dtypes) + size
        check_output(out, overwrite=overwrite, need_bytes=int(need))
        if any(out.resolve() in (place.resolve(), *place.resolve().parents) for place in (folder, source)):
            raise InputError("the output would replace the checkpoint itself", where=str(out), fix="choose another -o")
        task = find_task(model, source)
        if data is not None and task is None:
            raise InputError("no task answers with this head, so nothing can be recorded of --data", found=model.kind)
        with new_folder(out) as staged:
            write_folder(model, source, staged)
            (staged / WEIGHTS).unlink()  # the graphs hold them
            write_json(staged / "config.json", publish(read_json(staged / "config.json")))
            limit_texts(staged, model.config.turn)
            chosen = find_precisions(model, source, dtypes, batches=batches)
            most = None if to == "web" else LARGE
            export_onnx(
                model, staged, dtypes=dtypes, external=external, most=most, precisions=chosen, attentions=attentions
            )
            announce(staged)
            graphs, limit = check_graphs(model, source, staged, dtypes)
            for dtype, precision in chosen.items():
                graphs[dtype] |= {"kept": list(precision.kept), "divergence": precision.divergence}
            selftest, unproven = None, "no task answers with this head"
            try:
                selftest = None if task is None else record(model, staged, task, data=data)
            except InputError as error:  # such as a tokenizer without the task's mask: the graphs themselves are fine
                if to == "web" or data is not None:
                    raise
                unproven = error.what
            if selftest is not None and to == "web":
                add_page(model, staged, selftest, title=folder.resolve().name, single_file=single_file)
            elif selftest is not None:
                write_json(staged / SELFTEST, selftest)
            watched = carry(folder, staged, dtypes)
            values: dict[str, Any] = {
                "out": str(out), "to": to, "head": model.kind, "task": task, "graphs": graphs, "limit": limit,
                "merged": source != folder, "source_sha": hash_weights(source),
            }  # fmt: skip
            values |= {"attentions": True} if attentions else {}
            values |= {"own_layers": [part._asdict() for part in model.parts]} if model.parts else {}
            made_by = {"made_by": f"lmworks {__version__}", "source": folder.resolve().name}
            receipt = write_receipt(staged, {**made_by, **recall(folder), "export": values})
    values["files"] = sorted([*receipt["files"], RECEIPT])
    rows = tuple(
        (dtype, row["file"], round(row["bytes"] / 1e6, 2), row["max_abs_diff"], row["agreement"])
        for dtype, row in graphs.items()
    )
    columns = ("dtype", "file", "MB", "largest difference", "agreement")
    notes: tuple[str, ...] = () if selftest else (f"There is no selftest.json to verify the folder with: {unproven}.",)
    notes += (watched,) if watched else ()
    title = f"{out}: {model.kind}, {', '.join(dtypes)}"
    return Report(title, values, tables=(Table("Graphs", columns, rows),), notes=notes)


@contextmanager
def merged(folder: Path) -> Iterator[Path]:
    """Yield the folder itself, or that of an adapter merged into its base, for as long as it is needed."""
    if not (folder / ADAPTER_CONFIG).is_file():
        yield folder
        return
    with TemporaryDirectory(prefix="lmworks-") as place:
        merge(folder, Path(place) / "merged")
        yield Path(place) / "merged"


def limit_texts(staged: Path, turn: int | None) -> None:
    """Say in the tokenizer's config that no text may be longer than the graphs' rotary tables."""
    if turn is not None and has_tokenizer(staged):
        tokenizer = Tokenizer.from_pretrained(staged)
        tokenizer.save(staged, max_length=min(turn, tokenizer.model_max_length or turn))


def announce(staged: Path) -> None:
    """Say in config.json which graphs have files of weights beside them, and how many: transformers.js asks there."""
    chunks = {
        file: len(list((staged / "onnx").glob(f"{file}_data*")))
        for file in FILES.values()
        if (staged / "onnx" / f"{file}_data").is_file()
    }
    if chunks:
        path = staged / "config.json"
        config = read_json(path)
        own = {**config.get("transformers.js_config", {}), "use_external_data_format": chunks}
        write_json(path, {**config, "transformers.js_config": own})


def check_graphs(
    model: Model, source: Path, staged: Path, dtypes: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], float]:
    """Ask every graph what torch is asked; return what each dtype gave, and fp32's limit. Raises CheckFailed."""
    c = replace(model.config, max_position_embeddings=model.config.turn or model.config.max_position_embeddings)
    rows = [row for group in make_probes(source, c).values() for row in group]
    known = [next(answer(model, [row], left=False))["numbers"] for row in rows]
    largest = max(float(np.abs(numbers).max(initial=0)) for numbers in known)
    limit = min(FP32_MOST, max(FP32_CLOSE, FP32_PART * largest))
    found = {}
    for dtype in dtypes:
        runtime = OnnxRuntime(staged, dtype=dtype)
        given = [next(iter(runtime.run(batch_of(row)).values()))[0] for row in rows]
        differences = [differ(a, b) for a, b in zip(given, known, strict=True)]
        worst = None if None in differences else max(difference for difference in differences if difference is not None)
        if worst is None or (dtype == "fp32" and worst > limit):
            raise CheckFailed(
                f"the {dtype} graph does not give the model's answers", where=str(staged),
                found="numbers that are not finite" if worst is None else f"a difference of {worst:.2e}",
                expected=f"at most {limit:.1e}" if dtype == "fp32" else "finite numbers",
                fix="choose another dtype: fp16 holds numbers up to 65504 only" if "16" in dtype else "",
            )  # fmt: skip
        files = [staged / "onnx" / FILES[dtype], *(staged / "onnx").glob(f"{FILES[dtype]}_data*")]
        found[dtype] = {
            "file": f"onnx/{FILES[dtype]}", "bytes": sum(path.stat().st_size for path in files),
            "max_abs_diff": worst, "agreement": agree(given, known, model.kind),
        }  # fmt: skip
    return found, limit


def batch_of(row: Arrays) -> Arrays:
    """Return a row as a batch of one, without padding."""
    return {name: row[name][None] for name in ("input_ids", "token_type_ids", "pixel_values") if name in row}


def agree(given: Sequence[Any], known: Sequence[Any], kind: str) -> float | None:
    """Return the part of equal decisions; of states their mean cosine; None where nothing is decided."""
    if kind == "Model":
        one, two = np.concatenate(list(given)), np.concatenate(list(known))
        return float(((one * two).sum(-1) / (np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1))).mean())
    if known[0].shape[-1] < 2:
        return None
    axis = 0 if kind == "QuestionAnswering" else -1  # where an answer starts and ends is chosen among the tokens
    same = [np.atleast_1d(a.argmax(axis) == b.argmax(axis)) for a, b in zip(given, known, strict=True)]
    return float(np.concatenate(same).mean())
