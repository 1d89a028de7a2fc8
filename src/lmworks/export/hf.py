"""Write a checkpoint afresh, in today's Hugging Face layout: one safetensors file, today's names, both configs.

Whatever `load_model` reads goes in: old names of norms, shards, files with and without prefixes, the config of
transformers 4. What comes out was read again and compared before it took its place.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lmworks import __version__
from lmworks.base.errors import CheckFailed, FormatError, InputError, did_you_mean
from lmworks.base.files import check_output, confine, new_folder, read_json, sha256, write_json
from lmworks.base.report import Report, Table
from lmworks.export.parity import answer, differ, hash_weights
from lmworks.export.probe import VOCABULARIES, make_probes
from lmworks.export.receipt import write_receipt
from lmworks.models.checkpoint import load_model, read_config, save_model
from lmworks.models.heads import Model
from lmworks.models.weights import WEIGHTS, find_files, read_tensors
from lmworks.tokens.tokenizer import Tokenizer

FORMATS = ("hf",)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GENERATION = "generation_config.json"
COPIED = (  # as they are, where they are
    "preprocessor_config.json", "processor_config.json", "modules.json", "config_sentence_transformers.json",
    "sentence_*_config.json", "tokenizer.model", "spiece.model", "sentencepiece*.model", "README*", "LICENSE*",
    "NOTICE*",
)  # fmt: skip


def export(
    folder: str | Path, out: str | Path, *, to: str = "hf", dtype: str | None = None, overwrite: bool = False
) -> Report:
    """Write the checkpoint in `folder` to the new folder `out`, which is whole or absent.

    `dtype` is "fp32", "fp16", "bf16", or None for the file's own. `values["bit_equal"]` says that every weight is what
    it was; after a change of dtype `max_abs_diff` says how far the answers moved. Raises InputError for an output that
    cannot be written, a format or dtype that does not exist, and weights that do not fit the dtype.
    """
    folder, out = Path(folder), Path(out)
    check_choice(to, FORMATS, "lmworks export does not write this format")
    if dtype is not None:
        check_choice(dtype, DTYPES, "lmworks export does not write this dtype")
    if folder.resolve() == out.resolve() or out.resolve() in folder.resolve().parents:
        raise InputError("the output would replace the checkpoint itself", where=str(out), fix="choose another -o")
    model = load_model(folder, dtype=None if dtype is None else DTYPES[dtype])
    check_range(model, dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()} if overwrite else model.state_dict()
    check_output(out, overwrite=overwrite, need_bytes=sum(t.nbytes for t in state.values()) * 11 // 10)
    sha = hash_weights(folder)
    with new_folder(out) as staged:
        write_files(model, folder, staged)
        values = check_written(model, folder, staged, dtype)
        facts = {"made_by": f"lmworks {__version__}", "source": folder.resolve().name, "source_sha": sha}
        write_receipt(staged, {**facts, "export": {name: values[name] for name in ("head", "dtype", "left_out")}})
    values = {"out": str(out), "to": to, **values, "source_sha": sha, "files": sorted(list_written(out))}
    rows = tuple((name.replace("_", " "), values[name]) for name in ("head", "dtype", "tensors", "bytes", "sha256"))
    notes = [f"left out, since {values['head']} does not use them: {', '.join(values['left_out'])}"]
    verdict = "every weight is what it was" if values["bit_equal"] else f"answers moved by {values['max_abs_diff']:.1e}"
    title = f"{out}: {verdict}"
    return Report(title, values, tables=(Table("Written", ("what", "value"), rows),),
                  notes=tuple(notes if values["left_out"] else ()))  # fmt: skip
