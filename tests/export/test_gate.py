"""What judges a lossy graph: the root mean square, which real rounding passes and a broken graph does not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from minilm_heads import MINILM
from onnx import numpy_helper
from tiny_page import copy_folder

from lmworks.export.onnx import export_onnx
from lmworks.export.receipt import write_receipt
from lmworks.export.selftest import PARTS, distance, find_problems, measure_gaps, tolerances
from lmworks.export.selftest_tasks import record_task
from lmworks.export.verify import verify
from lmworks.runtime.torch_runtime import TorchRuntime

Arrays = dict[str, np.ndarray]
LAYER = re.compile(r"(layers\.\d+)\..*\.weight")


def wrong_scale(arrays: Arrays, layers: list[str]) -> Arrays:
    """The scales of one layer are those of 8 bits, its weights have 7."""
    names = [name for name in arrays if name.startswith(f"{layers[-1]}.") and name.endswith(".scale")]
    return {name: arrays[name] * np.float32(127 / 63) for name in names}


def missing_scale(arrays: Arrays, layers: list[str]) -> Arrays:
    """One matrix has the scale of another."""
    name = f"{layers[0]}.mlp.up_proj.scale"
    return {name: np.full_like(arrays[name], 4 * arrays[name].mean())}


def swapped_layers(arrays: Arrays, layers: list[str]) -> Arrays:
    """Two layers have each other's MLP, but not its scales."""
    first, last = (f"{layer}.mlp.up_proj.weight" for layer in (layers[0], layers[-1]))
    return {first: arrays[last], last: arrays[first]}


def turned_weight(arrays: Arrays, layers: list[str]) -> Arrays:
    """The rows of one matrix come in the wrong order."""
    name = f"{layers[0]}.mlp.down_proj.weight"
    return {name: arrays[name][::-1].copy()}


BROKEN = (wrong_scale, missing_scale, swapped_layers, turned_weight)


def judge(folder: Path) -> dict[str, Any]:
    """Return the cell of the int8 graph."""
    write_receipt(folder, {})
    return verify(folder, runtimes=("onnx",), dtypes=("int8",))["runtimes"]["onnx"]["int8"]


def check_broken_graphs(folder: Path) -> None:
    """See that the honest graph passes with room and each broken one fails by its logits."""
    cell = judge(folder)
    assert cell["passed"] and cell["rms_diff"] < 0.8 * cell["tolerance"], cell
    path = folder / "onnx" / "model_quantized.onnx"
    honest = path.read_bytes()
    for change in BROKEN:
        graph = onnx.load_from_string(honest)
        held = {item.name: item for item in graph.graph.initializer}
        arrays = {name: numpy_helper.to_array(item) for name, item in held.items()}
        layers = sorted({found[1] for name in arrays if (found := LAYER.match(name))})
        for name, values in change(arrays, layers).items():
            held[name].CopyFrom(numpy_helper.from_array(values, name))
        path.write_bytes(graph.SerializeToString())
        cell = judge(folder)
        assert not cell["passed"] and "root mean square" in cell["problem"], (change.__name__, cell)


def test_a_broken_decoder_fails(tmp_path: Path) -> None:
    check_broken_graphs(copy_folder(tmp_path / "model"))


def test_a_broken_classifier_of_150_labels_fails(tmp_path: Path) -> None:
    """A real network; only its last projection is random."""
    folder = Path(shutil.copytree(MINILM, tmp_path / "model"))
    torch.manual_seed(0)
    body = transformers.AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=150)
    body.save_pretrained(folder)
    export_onnx(folder, folder, dtypes=("int8",))
    record = record_task(TorchRuntime(folder), folder, "text-classification")
    (folder / "selftest.json").write_text(json.dumps(record))
    check_broken_graphs(folder)


@pytest.mark.parametrize("count", [2, 150, 30_000])
def test_the_verdict_does_not_hang_on_how_many_logits_there_are(count: int) -> None:
    """Rounding of one size: the largest of 30,000 differences is twice that of two, their mean square is the same."""
    draw = np.random.default_rng(0)
    rows = [draw.standard_normal(count).astype(np.float32) for _ in range(200)]
    spread = float(np.concatenate(rows).std())
    for part, passed in ((0.1, True), (0.3, False)):
        moved = [row + part * spread * draw.standard_normal(count).astype(np.float32) for row in rows]
        gaps = measure_gaps(zip(moved, rows, strict=True))
        limit = tolerances(4.0, spread)["int8"]
        assert gaps["rms_diff"] == pytest.approx(part * spread, rel=0.15)
        assert (find_problems(True, gaps, limit, dtype="int8") == []) is passed
        assert gaps["max_abs_diff"] == max(distance(a, b) for a, b in zip(moved, rows, strict=True))
    assert gaps["max_abs_diff"] > PARTS["int8"] * spread


def test_fp32_is_judged_by_its_largest_difference() -> None:
    """One logit of ten thousand, which a mean would hide."""
    row = np.zeros(10_000, np.float32)
    moved = row.copy()
    moved[77] = 2e-4
    gaps = measure_gaps([(moved, row)])
    assert gaps["rms_diff"] < 1e-5 and find_problems(True, gaps, 1e-4, dtype="fp32")


@pytest.mark.parametrize("given", [[0, np.nan], [0, np.inf], [0]])
def test_what_cannot_be_compared_is_infinitely_far(given: list[float]) -> None:
    gaps = measure_gaps([(np.array(given, np.float32), np.zeros(2, np.float32))])
    assert gaps == {"max_abs_diff": float("inf"), "rms_diff": float("inf")}


def test_one_number_is_not_judged_by_how_little_it_changes(tmp_path: Path) -> None:
    """A model of prices about 50 says nearly the same for every text: no dtype may have less room than float16 has."""
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                     num_labels=1)  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(1e-3)
        model.classifier.bias.fill_(50)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(tmp_path)
    allowed = record_task(TorchRuntime(tmp_path, head="SequenceClassification"), tmp_path, "text-classification")
    tolerance = allowed["tolerance"]
    assert tolerance["fp16"] > 50 / 2**12 and tolerance["int8"] < 0.5  # half a step of float16 at 50; one in a hundred
    assert min(tolerances(9.0, 1e-9).values()) == tolerances(9.0, 1e-9)["fp32"]
