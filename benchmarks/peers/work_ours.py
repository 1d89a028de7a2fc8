"""lmworks: `how` is runtime (torch or onnx) and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from race import serve

from lmworks.runtime.batching import run_features
from lmworks.tasks.base import Feature


class Ours:
    """A runtime, used as `generate` and the predictors use it."""

    def __init__(self, setting: dict[str, Any]) -> None:
        folder, dtype, threads = Path(setting["model"]), setting["dtype"], setting["threads"]
        if setting["runtime"] == "torch":
            import torch

            from lmworks.runtime.torch_runtime import TorchRuntime

            torch.set_num_threads(threads)
            self.runtime: Any = TorchRuntime(folder, dtype=dtype)
        else:
            from lmworks.runtime.onnx_runtime import FILES, OnnxRuntime

            if not (folder / "onnx" / FILES[dtype]).is_file():
                from lmworks.export.onnx import export_onnx

                export_onnx(folder, folder, dtypes=[dtype])
            self.runtime = OnnxRuntime(folder, dtype=dtype, threads=threads)

    def generate(self, ids: Sequence[int], tokens: int) -> Sequence[int]:
        """Prefill, then step."""
        written = [int(np.argmax(self.runtime.prefill([0], [ids])[0]))]
        while len(written) < tokens:
            written.append(int(np.argmax(self.runtime.step([0], written[-1:])[0])))
        return written

    def logits(self, ids: Sequence[int]) -> Any:
        """Return the prompt's last logits."""
        return self.runtime.prefill([0], [ids])[0]

    def encode(self, rows: Sequence[Sequence[int]]) -> Any:
        """Run rows as the predictors run features."""
        features = [Feature({"input_ids": list(row)}, example=i) for i, row in enumerate(rows)]
        return np.array(run_features(self.runtime, features, output="logits"))


if __name__ == "__main__":
    serve(Ours)
