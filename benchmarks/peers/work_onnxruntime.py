"""ONNX Runtime as users run it, through optimum-onnx: `how` is dtype (fp32, int8) and `batch` (rows sorted)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from batches import in_batches
from optimum.onnxruntime import ORTModelForSequenceClassification, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig
from race import serve

NAMES = {"fp32": "model.onnx", "int8": "model_quantized.onnx"}


class Peer:
    """Its sequence classifier with padded batches."""

    def __init__(self, setting: dict[str, Any]) -> None:
        self.setting = setting
        folder, made = Path(setting["model"]), Path(setting["model"]) / "optimum"
        if not (made / NAMES["fp32"]).is_file():
            ORTModelForSequenceClassification.from_pretrained(folder, export=True).save_pretrained(made)
        if not (made / NAMES[setting["dtype"]]).is_file():
            way = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
            ORTQuantizer.from_pretrained(made, file_name=NAMES["fp32"]).quantize(save_dir=made, quantization_config=way)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = setting["threads"]
        self.model = ORTModelForSequenceClassification.from_pretrained(
            made, file_name=NAMES[setting["dtype"]], session_options=options
        )

    def encode(self, rows: Sequence[Sequence[int]]) -> Any:
        """Run padded batches."""
        return in_batches(rows, self.run, most=self.setting.get("batch"))

    def run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Run one padded batch: (B, T) twice -> (B, O)."""
        return self.model(input_ids=ids, attention_mask=mask, token_type_ids=np.zeros_like(ids)).logits


if __name__ == "__main__":
    serve(Peer)
