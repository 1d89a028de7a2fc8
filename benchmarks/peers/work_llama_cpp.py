"""llama.cpp through llama-cpp-python, built from source: `how` is `type`, a tensor type of GGUF (F32, BF16, Q8_0 …)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from race import serve

CONTEXT = 256


class Peer:
    """Its evaluation, token by token, with flash attention; the next token is the largest logit."""

    def __init__(self, setting: dict[str, Any]) -> None:
        kind = llama_cpp.GGML_TYPE_F32 if setting["type"] == "F32" else llama_cpp.GGML_TYPE_F16
        self.model = llama_cpp.Llama(
            str(make_file(Path(setting["model"]), setting["type"])), n_ctx=CONTEXT, n_threads=setting["threads"],
            n_threads_batch=setting["threads"], flash_attn=True, type_k=kind, type_v=kind, verbose=False,
        )  # fmt: skip

    def generate(self, ids: Sequence[int], tokens: int) -> list[int]:
        """Write greedily, past the end of a document."""
        written = [int(self.logits(ids).argmax())]
        while len(written) < tokens:
            self.model.eval(written[-1:])
            written.append(int(self.last().argmax()))
        return written

    def logits(self, ids: Sequence[int]) -> Any:
        """Return the prompt's last logits."""
        self.model.reset()
        self.model.eval(list(ids))
        return self.last()

    def last(self) -> Any:
        """Return the logits (V,) of the token that was evaluated last."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.model.ctx), (self.model.n_vocab(),)).copy()


def make_file(folder: Path, kind: str) -> Path:
    """Return the model as a GGUF file."""
    path = folder / "llama.cpp" / f"{kind}.gguf"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        staged = path.with_suffix(".partial")
        script = Path(__file__).with_name("gguf_file.py")
        subprocess.run([sys.executable, str(script), str(folder), str(staged), kind], check=True, stdout=sys.stderr)
        staged.rename(path)
    return path


if __name__ == "__main__":
    serve(Peer)
