"""OpenVINO through its own converter: `how` is `hint`, its inference precision, and `batch` (rows sorted by length)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
import transformers
from batches import in_batches
from race import serve

NAMES = ("input_ids", "attention_mask", "token_type_ids")


class Peer:
    """Its compiled model with padded batches."""

    def __init__(self, setting: dict[str, Any]) -> None:
        self.setting = setting
        folder = Path(setting["model"])
        made = folder / "openvino.xml"
        if not made.is_file():
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
            example = {name: torch.ones(2, 8, dtype=torch.int64) for name in NAMES}
            inputs = [(name, openvino.PartialShape([-1, -1]), openvino.Type.i64) for name in NAMES]
            found = openvino.convert_model(model, example_input=example, input=inputs)
            openvino.save_model(found, made, compress_to_fp16=False)
        options = {"INFERENCE_PRECISION_HINT": setting["hint"], "INFERENCE_NUM_THREADS": setting["threads"]}
        self.model = openvino.Core().compile_model(made, "CPU", {**options, "PERFORMANCE_HINT": "LATENCY"})

    def encode(self, rows: Sequence[Sequence[int]]) -> Any:
        """Run padded batches."""
        return in_batches(rows, self.run, most=self.setting.get("batch"))

    def run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Run one padded batch: (B, T) twice -> (B, O)."""
        given = dict(zip(NAMES, (ids, mask, np.zeros_like(ids)), strict=True))
        return self.model(given)[0].copy()


if __name__ == "__main__":
    serve(Peer)
