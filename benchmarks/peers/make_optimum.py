"""Write optimum's graph of a causal language model, and its 8-bit form as transformers.js's conversion script makes it.

build/peers/optimum/bin/python benchmarks/peers/make_optimum.py MODEL OUT
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic
from optimum.exporters.onnx import main_export


def main() -> None:
    """Export, quantize, and put both where transformers.js looks for them."""
    model, out = Path(sys.argv[1]), Path(sys.argv[2]) / "onnx"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        main_export(str(model), folder, task="text-generation-with-past", do_validation=False)
        small = Path(folder) / "small.onnx"
        quantize_dynamic(
            Path(folder) / "model.onnx", small, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8,
            extra_options={"EnableSubgraph": True, "MatMulConstBOnly": True},
        )  # fmt: skip
        shutil.move(small, out / "model_quantized.onnx")
        shutil.move(Path(folder) / "model.onnx", out / "model.onnx")


if __name__ == "__main__":
    main()
