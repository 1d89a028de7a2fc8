"""Families × heads: our graphs against our torch modules, in fp32 and int8, padded on either side; one table.

That our modules are transformers' is the parity matrix's business; here some cells are held to transformers directly.
Heads are of 32 numbers, because the operators of decoders take no smaller ones that are rotated in part.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "parity"))
import zoo

from lmworks.export.emit import make_graph
from lmworks.models.checkpoint import load_model
from lmworks.models.families import find_family, find_head
from lmworks.models.heads import Model

CLOSE, INT8_MOST = 1e-4, 0.35  # largest difference; root mean square in standard deviations of random weights
LENGTHS, WIDTH = (70, 41, 9), 70  # beyond every window, within it, and a short one
FOUND: dict[tuple[str, str], tuple[float, float]] = {}


@pytest.fixture(scope="module", autouse=True)
def sizes() -> Iterator[None]:
    """Give the zoo's configs wider heads while this file runs."""
    with pytest.MonkeyPatch.context() as patch:
        for table in (zoo.TEXT, zoo.DECODER, zoo.MODERN, zoo.DEBERTA):
            patch.setitem(table, "hidden_size", 128)
        yield


def make_model(case: str, head: str) -> Model:
    """Return our model of one cell, random and moved away from identity."""
    extra: dict[str, Any] = {"num_labels": 5} if head in {"SequenceClassification", "TokenClassification"} else {}
    if head == "CausalLM" and case in zoo.READS_BOTH_WAYS:
        extra["is_decoder"] = True
    hf = json.loads(zoo.CONFIGS[case](**extra).to_json_string(use_diff=False))
    config = find_family(hf["model_type"]).config(hf)
    model = Model(config, head, find_head(config, head), seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (1.0 if "positions" in name else 0.08))
    return model


def open_graph(data: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Feed a graph as transformers.js does; return logits, starts and ends side by side, or hidden states."""
    feed = {"num_logits_to_keep": np.array(0), **inputs}
    if "attention_mask" in inputs:
        feed["position_ids"] = np.maximum(inputs["attention_mask"].cumsum(1) - 1, 0)
    for item in session.get_inputs():
        if item.name.startswith("past"):
            dtype = np.float16 if "float16" in item.type else np.float32
            feed[item.name] = np.zeros((len(inputs["input_ids"]), item.shape[1], 0, item.shape[3]), dtype)
    names = [item.name for item in session.get_outputs() if not item.name.startswith(("present", "features"))]
    found = session.run(names, {item.name: feed[item.name] for item in session.get_inputs()})
    assert all(array.dtype == np.float32 for array in found)
    return np.stack(found, -1) if len(found) == 2 else found[0]


def batches(model: Model) -> Iterator[dict[str, np.ndarray]]:
    """Yield a row alone, three rows without padding, and three padded on the right and on the left."""
    random = np.random.default_rng(0)
    if model.config.vision is not None:
        for rows in (1, 3):
            yield {"pixel_values": random.standard_normal((rows, 3, 32, 32)).astype(np.float32)}
        return
    for rows, side in ((1, ""), (3, ""), (3, "right"), (3, "left")):
        mask = np.ones((rows, WIDTH), np.int64)
        for row, length in enumerate(LENGTHS[:rows] if side else ()):
            mask[row, length:] = side != "right"
            if side == "left":
                mask[row] = np.arange(WIDTH) >= WIDTH - length
        batch = {"input_ids": random.integers(4, zoo.VOCAB, (rows, WIDTH)), "attention_mask": mask}
        if model.config.type_vocab_size > 1:
            batch["token_type_ids"] = random.integers(0, 2, (rows, WIDTH)) * (model.kind != "CausalLM")
        yield batch


def expected(model: Model, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return what torch gives."""
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    with torch.no_grad():
        if "pixel_values" in tensors:
            return model(tensors["pixel_values"]).numpy()
        return model(
            tensors["input_ids"], tensors["attention_mask"], token_type_ids=tensors.get("token_type_ids")
        ).numpy()


def real(array: np.ndarray, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Leave out what stands at padding."""
    mask = batch.get("attention_mask")
    return array[mask == 1] if mask is not None and array.ndim == 3 else array


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print the matrix when the cells are done."""
    yield
    heads = list(dict.fromkeys(head for _, head in zoo.CELLS))
    short = {head: "".join(letter for letter in head if letter.isupper()) or head for head in heads}
    lines = ["", "graph against torch: largest difference in fp32, root mean square of int8 in standard deviations"]
    lines.append(f"{'':17s}" + "".join(f"{short[head]:>13s}" for head in heads))
    for case in zoo.CONFIGS:
        cells = (FOUND.get((case, head)) for head in heads)
        lines.append(f"{case:17s}" + "".join(f"{'' if x is None else f'{x[0]:.0e} {x[1]:.3f}':>13s}" for x in cells))
    lines.append(f"{len(FOUND)} cells, worst {max((x for x, _ in FOUND.values()), default=0):.1e}")
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        terminal.write("\n".join(lines) + "\n")


@pytest.mark.parametrize("cell", zoo.CELLS, ids=lambda cell: f"{cell[0]}-{cell[1]}")
def test_a_graph_gives_torchs_answers(cell: tuple[str, str]) -> None:
    """C10: every family with every head; the same numbers and the same decisions."""
    model = make_model(*cell)
    graphs = {dtype: open_graph(make_graph(model, dtype=dtype).to_bytes()) for dtype in ("fp32", "int8")}
    worst, errors, every = 0.0, [], []
    for batch in batches(model):
        known = real(expected(model, batch), batch)
        given = real(run(graphs["fp32"], batch), batch)
        worst = max(worst, float(np.abs(given - known).max()))
        assert (given.argmax(-1) == known.argmax(-1)).mean() == 1 or worst > 1e-6  # a tie is no decision
        lossy = real(run(graphs["int8"], batch), batch)
        errors.append((lossy - known).ravel())
        every.append(known.ravel())
    FOUND[cell] = worst, float(np.sqrt(np.square(np.concatenate(errors)).mean()) / np.concatenate(every).std())
    assert worst < CLOSE
    assert 1e-4 < FOUND[cell][1] < INT8_MOST


@pytest.mark.parametrize("cell", [("bert", "TokenClassification"), ("mistral", "SequenceClassification"),
                                  ("modernbert", "MaskedLM"), ("phi", "CausalLM"), ("roberta", "QuestionAnswering")],
                         ids=lambda cell: f"{cell[0]}-{cell[1]}")  # fmt: skip
def test_a_graph_gives_transformers_answers(cell: tuple[str, str], tmp_path: Path) -> None:
    """C1: each row alone, as transformers reads it; the graph reads it beside others, padded on the left."""
    reference = zoo.make_reference(*cell)
    reference.config.num_labels = getattr(reference.config, "num_labels", 2)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path, cell[1])
    *_, batch = batches(model)
    batch.pop("token_type_ids", None)
    given = run(open_graph(make_graph(model).to_bytes()), {"token_type_ids": 0 * batch["input_ids"], **batch})
    for row, length in enumerate(LENGTHS):
        ids = torch.from_numpy(batch["input_ids"][row : row + 1, WIDTH - length :])
        with torch.no_grad():
            known = zoo.numbers(reference(input_ids=ids))[0].numpy()
        own = given[row, WIDTH - length :] if given.ndim == 3 else given[row]
        np.testing.assert_allclose(own, known, atol=CLOSE)


@pytest.mark.parametrize(("case", "head", "inputs", "outputs"), [
    ("bert", "SequenceClassification", "input_ids attention_mask token_type_ids", "logits features"),
    ("bert", "Model", "input_ids attention_mask token_type_ids", "last_hidden_state"),
    ("roberta", "TokenClassification", "input_ids attention_mask", "logits"),
    ("distilbert", "QuestionAnswering", "input_ids attention_mask", "start_logits end_logits"),
    ("modernbert", "MaskedLM", "input_ids attention_mask", "logits"),
    ("llama", "SequenceClassification", "input_ids attention_mask", "logits features"),
    ("vit", "ImageClassification", "pixel_values", "logits"),
])  # fmt: skip
def test_names_are_those_of_transformers_js(case: str, head: str, inputs: str, outputs: str) -> None:
    session = open_graph(make_graph(make_model(case, head)).to_bytes())
    assert {item.name for item in session.get_inputs()} == set(inputs.split())
    assert [item.name for item in session.get_outputs()] == outputs.split()
    assert all(item.shape[0] == "batch_size" for item in (*session.get_inputs(), *session.get_outputs()))


@pytest.mark.parametrize(("dtype", "attention", "norm", "gelu"), [
    ("fp32", "MultiHeadAttention", "LayerNormalization", "BiasGelu"),
    ("fp16", "MultiHeadAttention", "SkipLayerNormalization", "BiasGelu"),
    ("int8", "Softmax", "LayerNormalization", "Gelu"),
    ("q4", "MultiHeadAttention", "LayerNormalization", "BiasGelu"),
])  # fmt: skip
def test_the_graphs_of_encoders_have_the_nodes_that_are_fastest(
    dtype: str, attention: str, norm: str, gelu: str
) -> None:
    model = make_model("bert", "SequenceClassification")
    nodes = [node.op_type for node in make_graph(model, dtype=dtype).nodes]
    assert nodes.count(attention) == nodes.count(gelu) == 4
    assert nodes.count(norm) == 9, "the embeddings' norm and two a layer"
    others = {"MultiHeadAttention", "Softmax", "LayerNormalization", "SkipLayerNormalization", "BiasGelu", "Gelu"}
    assert not (others - {attention, norm, gelu}) & set(nodes)


def test_a_window_that_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above sees a missing window: with the window's bias at zero the answers move."""
    model = make_model("modernbert", "MaskedLM")
    batch = next(batches(model))
    known = expected(model, batch)
    monkeypatch.setattr("lmworks.export.emit_encoder.HIDDEN", 0.0)
    moved = run(open_graph(make_graph(model).to_bytes()), batch)
    assert np.abs(moved - known).max() > 0.1
