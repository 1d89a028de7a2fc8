"""Write a model as ONNX files, in the folder layout that transformers.js reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.files import write_bytes
from lmworks.compress.rounding import Precision
from lmworks.export.arithmetic import ARITHMETIC
from lmworks.export.emit import make_graph
from lmworks.export.traced import Own
from lmworks.models.checkpoint import load_model
from lmworks.models.heads import Model
from lmworks.runtime.onnx_runtime import FILES

ALIASES = {"q8": "int8"}  # transformers.js's name of model_quantized.onnx


def export_onnx(
    model: Model | str | Path, out_folder: str | Path, *, dtypes: Sequence[str] = ("fp32", "int8"),
    external: bool | None = None, most: int | None = None, precisions: Mapping[str, Precision] | None = None,
    attentions: bool = False,
) -> dict[str, Path]:  # fmt: skip
    """Write `out_folder/onnx/model*.onnx`, one file a dtype, each whole or not at all; return their paths.

    `model` is a loaded model or its folder. The same weights give the same bytes. `external` puts the weights beside
    the graph, in model*.onnx_data; None: where they are more than `most` bytes, by default as many as one file can
    hold. `precisions` are what calibration found for some dtypes. `attentions` adds outputs that say where each
    layer of an encoder looks. Raises InputError for a dtype or a module that the exporter does not know.
    """
    dtypes = check_dtypes(dtypes)
    found = model if isinstance(model, Model) else load_model(model)
    folder = Path(out_folder) / "onnx"
    made, own = {}, Own(found) if found.parts else None
    for dtype in dtypes:
        precision = (precisions or {}).get(dtype)
        graph = make_graph(found, dtype=dtype, precision=precision, attentions=attentions, own=own)
        files = graph.to_files(FILES[dtype], external=external, most=most)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in reversed(files.items()):  # the graph last: what it names is there
            write_bytes(folder / name, data)
        made[dtype] = folder / FILES[dtype]
    return made


def make_onnx(model: Model, *, dtype: str = "fp32", precision: Precision | None = None) -> bytes:
    """Return the serialized ONNX graph of a model."""
    return make_graph(model, dtype=dtype, precision=precision).to_bytes()


def check_dtypes(dtypes: Sequence[str]) -> list[str]:
    """Return the dtypes by our names, each once; raise InputError for one that does not exist."""
    found = list(dict.fromkeys(ALIASES.get(dtype, dtype) for dtype in dtypes))
    unknown = [dtype for dtype in found if dtype not in ARITHMETIC]
    if unknown or not found:
        raise InputError(
            "the exporter does not know this dtype", found=", ".join(unknown) or "none",
            expected=", ".join(ARITHMETIC), fix=did_you_mean(unknown[0], ARITHMETIC).strip() if unknown else "",
        )  # fmt: skip
    return found
