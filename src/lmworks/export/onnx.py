"""Write a causal language model as ONNX files, in the folder layout that transformers.js reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmworks.base.errors import InputError
from lmworks.base.files import write_bytes
from lmworks.export.arithmetic import ARITHMETIC
from lmworks.export.emit import Walk, emit_causal_lm
from lmworks.models.checkpoint import load_model
from lmworks.models.heads import Model

# transformers.js finds a dtype by its file's suffix; our int8 is its q8, its default in a browser without a GPU
FILES = {"fp32": "model.onnx", "int8": "model_quantized.onnx"}


def export_onnx(
    model: Model | str | Path, out_folder: str | Path, *, dtypes: Sequence[str] = ("fp32", "int8")
) -> dict[str, Path]:
    """Write `out_folder/onnx/model*.onnx`, one file a dtype, each whole or not at all; return their paths.

    `model` is a loaded model or its folder. The same weights give the same bytes. Raises InputError for a dtype or a
    module that the exporter does not know, and for a model of more than 2 GB.
    """
    unknown = [dtype for dtype in dtypes if dtype not in ARITHMETIC]
    if unknown:
        raise InputError(
            "the exporter does not know this dtype", found=", ".join(unknown), expected=", ".join(ARITHMETIC)
        )
    found = model if isinstance(model, Model) else load_model(model)
    folder = Path(out_folder) / "onnx"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {dtype: folder / FILES[dtype] for dtype in dtypes}
    for dtype, path in paths.items():
        write_bytes(path, make_onnx(found, dtype=dtype))
    return paths


def make_onnx(model: Model, *, dtype: str = "fp32") -> bytes:
    """Return the serialized ONNX graph of a language model."""
    walk = Walk(model, ARITHMETIC[dtype]())
    emit_causal_lm(walk, model)
    return walk.done()
