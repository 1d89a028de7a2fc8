"""Graphs in JavaScript: transformers.js gives Python's answers, WebAssembly the same numbers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_emit import batches, expected, make_model, open_graph, real, run, sizes  # noqa: F401
from test_onnx_folder import EXAMPLES, TEXTS, made  # noqa: F401

import lmworks
from lmworks.export.emit import make_graph
from lmworks.export.verify_js import find_modules, find_node
from lmworks.models.heads import Model

TASKS = {
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "MaskedLM": "fill-mask",
    "Model": "feature-extraction",
}
CELLS = [
    ("bert", "SequenceClassification"), ("roberta", "QuestionAnswering"), ("distilbert", "MaskedLM"),
    ("modernbert", "TokenClassification"), ("mistral", "SequenceClassification"), ("mistral", "CausalLM"),
    ("phi", "CausalLM"), ("gpt2", "CausalLM"), ("vit", "ImageClassification"),
]  # fmt: skip
TYPES = {np.dtype(np.int64): "int64", np.dtype(np.float32): "float32"}


def ask(work: dict[str, Any]) -> Any:
    """Run graphs.mjs once."""
    node = find_node()
    work = {"modules": str(find_modules(node)), **work}
    command = [str(node), str(Path(__file__).with_name("graphs.mjs"))]
    done = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "error" not in found, found
    return found


def feeds_of(model: Model, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what the graph is fed; a cache that is still empty."""
    c, feed = model.config, {**batch, "num_logits_to_keep": np.array(0)}
    if "attention_mask" in batch:
        feed["position_ids"] = np.maximum(batch["attention_mask"].cumsum(1) - 1, 0)
    for layer in range(c.num_hidden_layers):
        for kind in ("key", "value"):
            shape = (len(next(iter(batch.values()))), c.num_key_value_heads, 0, c.head_dim)
            feed[f"past_key_values.{layer}.{kind}"] = np.zeros(shape, np.float32)
    return feed


@pytest.mark.node
@pytest.mark.parametrize("library", ["onnxruntime-node", "onnxruntime-web"])
def test_javascript_gives_the_same_numbers(library, tmp_path):
    """C10, C12: fp32, int8, uint8 and q4 of every kind of graph, padded on the left, natively and in WebAssembly."""
    runs, known = [], []
    for case, head in CELLS:
        model = make_model(case, head)
        *_, batch = batches(model)
        for dtype in ("fp32", "int8", "uint8", "q4"):
            data = make_graph(model, dtype=dtype).to_bytes()
            session = open_graph(data)
            path = tmp_path / f"{len(runs)}.onnx"
            path.write_bytes(data)
            names = {item.name for item in session.get_inputs()}
            feeds = {
                name: {"type": TYPES[array.dtype], "dims": array.shape, "data": array.ravel().tolist()}
                for name, array in feeds_of(model, batch).items()
                if name in names
            }
            outputs = [item.name for item in session.get_outputs() if not item.name.startswith(("present", "features"))]
            runs.append({"path": str(path), "feeds": feeds, "outputs": outputs})
            known.append((model, batch, dtype, run(session, batch)))
    found = ask({"library": library, "runs": runs})
    for given, work, (model, batch, dtype, python) in zip(found, runs, known, strict=True):
        arrays = [np.array(given[name], np.float32) for name in work["outputs"]]
        numbers = (np.stack(arrays, -1) if len(arrays) == 2 else arrays[0]).reshape(python.shape)
        numbers, python = real(numbers, batch), real(python, batch)
        error = np.sqrt(np.square(numbers - python).mean()) / python.std()
        assert error < (1e-4 if dtype == "fp32" else 0.1), (model.config.model_type, model.kind, dtype)
        if dtype == "fp32":
            np.testing.assert_allclose(numbers, real(expected(model, batch), batch), atol=1e-4)


@pytest.mark.node
@pytest.mark.parametrize("dtype", ["fp32", "q8"])
def test_pipelines_of_transformers_js_give_pythons_answers(made, dtype):  # noqa: F811
    """C10: the folder is what transformers.js reads, its file names, inputs and outputs."""
    calls: dict[str, list[Any]] = {
        "SequenceClassification": [[text, {"top_k": 5}] for text in TEXTS],
        "TokenClassification": [[text, {"ignore_labels": []}] for text in TEXTS[1:]],
        "QuestionAnswering": [list(EXAMPLES["QuestionAnswering"][0])],
        "MaskedLM": [[text] for text in EXAMPLES["MaskedLM"]],
        "Model": [[text, {"pooling": "mean", "normalize": True}] for text in TEXTS],
    }
    jobs = [{"task": TASKS[head], "folder": str(made[head][1]), "dtype": dtype, "calls": calls[head]} for head in calls]
    found = dict(zip(calls, ask({"pipelines": jobs}), strict=True))
    ours = {head: lmworks.load(made[head][1], dtype={"fp32": "fp32", "q8": "int8"}[dtype], threads=1) for head in calls}
    close = {"abs": 1e-3}
    for text, given in zip(TEXTS, found["SequenceClassification"], strict=True):
        python = ours["SequenceClassification"](text)
        assert [one["label"] for one in given] == [one.label for one in python]
        assert [one["score"] for one in given] == pytest.approx([one.score for one in python], **close)
    for text, given in zip(TEXTS[1:], found["TokenClassification"], strict=True):
        python = [one for one in ours["TokenClassification"](text, aggregation="tokens") if one.attends]
        assert [one["entity"] for one in given] == [one.label for one in python]
        assert [one["score"] for one in given] == pytest.approx([one.score for one in python], **close)
    for question, given in zip(EXAMPLES["QuestionAnswering"][:1], found["QuestionAnswering"], strict=True):
        python = ours["QuestionAnswering"](question)
        assert given["answer"].strip().lower() == python.text.lower()
    for text, given in zip(EXAMPLES["MaskedLM"], found["MaskedLM"], strict=True):
        python = ours["MaskedLM"](text)
        assert [one["token"] for one in given] == [one.token for one in python]
        assert [one["score"] for one in given] == pytest.approx([one.score for one in python], **close)
    for text, given in zip(TEXTS, found["Model"], strict=True):
        row = np.array(given)[0]
        python = np.asarray(ours["Model"](text, pooling="mean", normalize=True)).ravel()
        assert float(row @ python) > 1 - 1e-5
