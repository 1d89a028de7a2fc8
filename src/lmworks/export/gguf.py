"""Export a decoder for llama.cpp and Ollama: a GGUF file a dtype, a Modelfile, a README.

Every file is read again: its tensors, multiplied out and put back into our network, answer the texts that the model
answers. In f32 they are the model's to the bit.

    f32, f16   every matrix so; vectors and learned positions stay f32
    q8_0       blocks of 32 numbers of a row share a scale of 16 bits; 8 bits a number
    q4_0       the same with 4 bits; the embedding and the projection stay q8_0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmworks import __version__
from lmworks.base.errors import CheckFailed, InputError, did_you_mean
from lmworks.base.files import check_output, new_folder, write_text
from lmworks.base.optional import require
from lmworks.base.report import Report, Table
from lmworks.export.gguf_folder import write_modelfile, write_readme
from lmworks.export.gguf_model import (
    FACTORS,
    Architecture,
    context_length,
    describe_sizes,
    find_architecture,
    make_tensors,
    read_state,
)
from lmworks.export.gguf_tokenizer import describe_tokenizer
from lmworks.export.onnx_folder import agree, merged
from lmworks.export.parity import answer, differ, hash_weights
from lmworks.export.probe import make_probes
from lmworks.export.receipt import RECEIPT, recall, write_receipt
from lmworks.models.checkpoint import load_model, make_empty
from lmworks.models.folder import has_tokenizer
from lmworks.models.heads import Model
from lmworks.runtime.predictor import read_eos_ids
from lmworks.tokens.tokenizer import Tokenizer

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "q4_0": 2}  # general.file_type
BITS = {"f32": 32, "f16": 16, "q8_0": 8.5, "q4_0": 4.5}
BLOCK = 32  # numbers of a row that share a scale
FINE = ("token_embd.", "output.")  # what q4_0 holds in q8_0
WHOLE = ("position_embd.", FACTORS)  # always f32, as are vectors
DEFAULT = ("f16", "q8_0")
FORMAT = {"general.quantization_version": 2, "general.type": "model"}


def export_gguf(
    folder: str | Path, out: str | Path, *, dtypes: Sequence[str] = DEFAULT, overwrite: bool = False
) -> Report:
    """Write a GGUF file a dtype of the checkpoint in `folder` to the new folder `out`, which is whole or absent.

    An adapter is merged into its base first. Raises InputError for a model or a tokenizer that llama.cpp does not have,
    CheckFailed for a file that does not hold the model.
    """
    folder, out, dtypes = Path(folder), Path(out), check_dtypes(dtypes)
    require("gguf", extra="gguf")
    with merged(folder) as source:
        model = load_model(source).eval()
        arch = find_architecture(model, str(folder))
        if not has_tokenizer(source):
            raise InputError("a GGUF file needs a tokenizer", where=str(folder), fix="put a tokenizer.json beside it")
        tokenizer = Tokenizer.from_pretrained(source)
        ends = read_eos_ids(source, tokenizer)
        keys, notes = describe_tokenizer(tokenizer, model.config.vocab_size, ends, where=str(folder))
        numbers = sum(p.numel() for p in model.parameters())
        check_output(out, overwrite=overwrite, need_bytes=int(numbers * sum(BITS[dtype] for dtype in dtypes) / 7))
        if any(out.resolve() in (place.resolve(), *place.resolve().parents) for place in (folder, source)):
            raise InputError("the output would replace the checkpoint itself", where=str(out), fix="choose another -o")
        context = context_length(model.config)
        if context < model.config.max_tokens:
            notes.append(f"llama.cpp has no sliding window here: past {context} tokens it sees more than the model.")
        with new_folder(out) as staged:
            files = write_files(model, arch, source, staged, dtypes, {"general.name": folder.resolve().name, **keys})
            write_beside(staged, files, tokenizer, keys, ends, context, notes, name=folder.resolve().name)
            values: dict[str, Any] = {
                "out": str(out), "to": "gguf", "architecture": arch.name, "dtypes": files, "context": context,
                "tokenizer": [keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]],
                "merged": source != folder, "source_sha": hash_weights(source), "notes": notes,
            }  # fmt: skip
            made_by = {"made_by": f"lmworks {__version__}", "source": folder.resolve().name}
            receipt = write_receipt(staged, {**made_by, **recall(folder), "export": values})
    values["files"] = sorted([*receipt["files"], RECEIPT])
    table = tuple(
        (dtype, row["file"], round(row["bytes"] / 1e6, 2), row["max_abs_diff"], row["agreement"])
        for dtype, row in files.items()
    )
    columns = ("dtype", "file", "MB", "largest difference", "agreement")
    title = f"{out}: {arch.name} for llama.cpp, {', '.join(dtypes)}"
    return Report(title, values, tables=(Table("Files", columns, table),), notes=tuple(notes))


def write_files(
    model: Model, arch: Architecture, source: Path, staged: Path, dtypes: Sequence[str], keys: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Write and check the file of every dtype; return what is known of each."""
    rows = [row for group in make_probes(source, model.config).values() for row in group]
    known = [next(answer(model, [row], left=False))["numbers"] for row in rows]
    keys = {**FORMAT, **describe_sizes(model.config, arch), **keys}
    files = {}
    for dtype in dtypes:
        path = staged / f"model-{dtype}.gguf"
        write_gguf(path, model, arch, keys, dtype)
        files[dtype] = check_gguf(path, model, arch, dtype, rows, known)
    return files


def write_beside(
    staged: Path, files: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer, keys: Mapping[str, Any],
    ends: Sequence[int], context: int, notes: Sequence[str], *, name: str,
) -> None:  # fmt: skip
    """Write the Modelfile, for the first dtype, and the README."""
    begins = tokenizer.token(keys["tokenizer.ggml.bos_token_id"]) if keys["tokenizer.ggml.add_bos_token"] else None
    first = next(iter(files.values()))["file"]
    write_text(staged / "Modelfile", write_modelfile(first, tokenizer, ends, context, begins=begins or ""))
    write_text(staged / "README.md", write_readme(files, notes, title=name, context=context, version=__version__))


def check_dtypes(dtypes: Sequence[str]) -> list[str]:
    """Return the dtypes, each once; raise InputError for one that is not there."""
    unknown = [dtype for dtype in dtypes if dtype not in FILE_TYPES]
    if unknown or not dtypes:
        fix = did_you_mean(unknown[0], FILE_TYPES).strip() if unknown else ""
        raise InputError("there is no such GGUF dtype", found=", ".join(unknown), expected=", ".join(FILE_TYPES),
                         fix=fix)  # fmt: skip
    return list(dict.fromkeys(dtypes))


def choose_type(name: str, tensor: Tensor, dtype: str) -> str:
    """Return what a tensor is held in: its rows may not fill blocks, and small or delicate ones stay whole."""
    if tensor.ndim < 2 or name.startswith(WHOLE):
        return "f32"
    if dtype.startswith("q") and tensor.shape[-1] % BLOCK:
        return "f16"
    return "q8_0" if dtype == "q4_0" and name.startswith(FINE) else dtype


def write_gguf(path: Path, model: Model, arch: Architecture, keys: Mapping[str, Any], dtype: str) -> None:
    """Write one file: the keys, the list of tensors, then the tensors one by one."""
    gguf = require("gguf", extra="gguf")
    writer = gguf.GGUFWriter(path, arch.name)
    for key, value in {**keys, "general.file_type": FILE_TYPES[dtype]}.items():
        add_key(writer, key, value)
    kinds = {}
    for name, tensor in make_tensors(model, arch):
        kinds[name] = choose_type(name, tensor, dtype)
        kind = gguf.GGMLQuantizationType[kinds[name].upper()]
        shape = tuple(tensor.shape)
        if kinds[name].startswith("q"):
            shape = gguf.quant_shape_to_byte_shape(shape, kind)
        size = int(np.prod(shape)) * {"f32": 4, "f16": 2}.get(kinds[name], 1)
        plain = {"f32": np.float32, "f16": np.float16}.get(kinds[name], np.uint8)
        writer.add_tensor_info(name, shape, np.dtype(plain), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in make_tensors(model, arch):
            kind = gguf.GGMLQuantizationType[kinds[name].upper()]
            if kinds[name] != "f32" and float(tensor.abs().max()) > torch.finfo(torch.float16).max:
                raise InputError("some weights do not fit 16 bits", found=name, fix="export with --dtype f32")
            writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(tensor.numpy()), kind))
    finally:
        writer.close()


def add_key(writer: Any, key: str, value: Any) -> None:
    """Add a key with the type that llama.cpp reads: numbers of 32 bits."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def check_gguf(
    path: Path, model: Model, arch: Architecture, dtype: str, rows: Sequence[Any], known: Sequence[Any]
) -> dict[str, Any]:
    """Read a file again, multiply it out, and ask it what the model was asked. Raises CheckFailed."""
    gguf = require("gguf", extra="gguf")
    tensors, kinds = {}, dict[str, int]()
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        tensors[tensor.name] = torch.from_numpy(np.array(numbers, np.float32))
        kind = tensor.tensor_type.name.lower()
        kinds[kind] = kinds.get(kind, 0) + 1
    again = make_empty(model.config, model.kind)
    state = read_state(tensors, model, arch)
    if model.is_tied:
        state["head.project.weight"] = state["transformer.embeddings.tokens.weight"]
    again.load_state_dict(state, assign=True)
    given = [next(answer(again.eval(), [row], left=False))["numbers"] for row in rows]
    differences = [differ(a, b) for a, b in zip(given, known, strict=True)]
    worst = None if None in differences else max(value for value in differences if value is not None)
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])]
    if worst is None or (dtype == "f32" and moved):
        raise CheckFailed(
            f"the {dtype} file does not hold the model", where=path.name,
            found="numbers that are not finite" if worst is None else ", ".join(moved)[:300],
            expected="the same numbers" if dtype == "f32" else "finite numbers",
        )  # fmt: skip
    return {
        "file": path.name, "bytes": path.stat().st_size, "tensors": kinds, "max_abs_diff": worst,
        "agreement": agree(given, known, model.kind),
    }  # fmt: skip
