"""Layers of a user's own in graphs: each place, in ONNX Runtime, gives what torch gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
import zoo

from lmworks.base.errors import InputError
from lmworks.export.emit import make_graph
from lmworks.export.onnx import export_onnx, make_onnx
from lmworks.models.attention import Attention
from lmworks.models.checkpoint import load_model
from lmworks.models.config import Config
from lmworks.models.custom import change
from lmworks.models.heads import Model
from lmworks.runtime.onnx_runtime import OnnxRuntime
from lmworks.runtime.torch_runtime import TorchRuntime


class Scaled(nn.Module):
    """Two products, a mean over the features, and a number that depends on the length."""

    def __init__(self, base: Any, config: Config) -> None:
        super().__init__()
        size = config.hidden_size
        self.up, self.down = nn.Linear(size, 16), nn.Linear(16, size)
        self.register_buffer("steps", torch.linspace(0, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x))) + self.steps
        return x + y * x.abs().mean(-1, keepdim=True) * (x.shape[1] / 11)


class Local(Scaled):
    """What a decoder may hold: each token by itself."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x))) + self.steps
        return x + y * x.abs().mean(-1, keepdim=True)


class Swish(nn.Module):
    """An activation with a number of its own."""

    def __init__(self, base: Any, config: Config) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(1.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class Sharp(Attention):
    """Attention at another temperature, with the weights of what it replaces."""

    def __init__(self, base: Attention, config: Config) -> None:
        super().__init__(config, base.layer)
        self.load_state_dict(base.state_dict())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, look: Any) -> Tensor:
        return super().attend(2 * q, k, v, look)


class Doubled(nn.Module):
    """A layer without numbers of its own, which nothing would miss."""

    def __init__(self, base: Any, config: Config) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Peeking(nn.Module):
    """What a graph cannot hold: what is computed depends on a number."""

    def __init__(self, base: Any, config: Config) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x


IDS = np.random.default_rng(0).integers(4, zoo.VOCAB, (3, 11))
MASK = (np.arange(11) < np.array([[11], [4], [7]])).astype(np.int64)
ENCODER = [
    ("embeddings", Scaled, "after"), ("layers.0", Scaled, "after"), ("layers.1.mlp", Scaled, "after"),
    ("layers.0.attention", Scaled, "after"), ("layers.1.mlp_norm", Scaled, "after"),
    ("layers.0.mlp", Scaled, "replace"), ("layers.1.mlp_norm", Scaled, "replace"),
    ("layers.1.mlp.act", Swish, "replace"), ("layers.0.mlp.act", "relu", "replace"),
    ("layers.2.attention", Sharp, "replace"),
]  # fmt: skip
DECODER = [
    ("layers.0", Local, "after"), ("layers.1.attention", Swish, "after"), ("layers.1.mlp", Swish, "replace"),
    ("layers.0.mlp.act", Swish, "replace"), ("final_norm", Swish, "replace"),
    ("layers.0.attention_norm", Swish, "after"),
]  # fmt: skip


def make(case: str, head: str, folder: Path, at: str, code: Any, how: Any) -> Model:
    """Save a published model with random weights; return it with a layer of its own."""
    if case == "llama":  # ONNX Runtime's attention takes heads of 16
        sizes = {**zoo.DECODER, "num_attention_heads": 2}
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    else:
        zoo.make_reference(case, head).save_pretrained(folder)
    torch.manual_seed(0)
    model = load_model(folder, head).eval()
    change(model, at, code, how=how)
    return model.eval()


@pytest.mark.parametrize(("at", "code", "how"), ENCODER)
def test_an_encoder_with_it_equals_torch(at: str, code: Any, how: Any, tmp_path: Path) -> None:
    model = make("bert", "SequenceClassification", tmp_path, at, code, how)
    batch = {"input_ids": IDS, "attention_mask": MASK}
    plain = TorchRuntime(tmp_path).run(batch)["logits"]
    known = TorchRuntime(model).run(batch)["logits"]
    assert np.abs(known - plain).max() > 1e-3
    limits = {"fp32": 1e-5, **({"fp16": 5e-3, "int8": 0.2} if at == "layers.0" else {})}
    export_onnx(model, tmp_path, dtypes=list(limits))
    for dtype, most in limits.items():
        given = OnnxRuntime(tmp_path, dtype=dtype).run(batch)["logits"]
        np.testing.assert_allclose(given, known, atol=most * max(1, np.abs(known).max()), rtol=0)


def test_a_layer_that_runs_several_times_holds_its_weights_once(tmp_path: Path) -> None:
    model = make("albert", "SequenceClassification", tmp_path, "layers.0", Scaled, "after")
    assert len(model.transformer.order) > len(model.transformer.layers)
    export_onnx(model, tmp_path, dtypes=["fp32"])
    given = OnnxRuntime(tmp_path, dtype="fp32").run({"input_ids": IDS, "attention_mask": MASK})["logits"]
    known = TorchRuntime(model).run({"input_ids": IDS, "attention_mask": MASK})["logits"]
    np.testing.assert_allclose(given, known, atol=1e-5)
    graph = onnx.load(tmp_path / "onnx/model.onnx").graph
    assert sum(weight.name.endswith("own.steps") for weight in graph.initializer) == 1


@pytest.mark.parametrize(("at", "code", "how"), DECODER)
def test_a_decoder_with_it_keeps_its_cache(at: str, code: Any, how: Any, tmp_path: Path) -> None:
    model = make("llama", "CausalLM", tmp_path, at, code, how)
    export_onnx(model, tmp_path, dtypes=["fp32"])
    graph, known = OnnxRuntime(tmp_path, dtype="fp32"), TorchRuntime(model)
    prompt = IDS[0, :7].tolist()
    np.testing.assert_allclose(graph.prefill([0], [prompt]), known.prefill([0], [prompt]), atol=1e-5)
    for token in (3, 21, 8):
        np.testing.assert_allclose(graph.step([0], [token]), known.step([0], [token]), atol=1e-5)


@pytest.mark.parametrize(
    ("at", "code", "how"), [("layers.0", Scaled, "after"), ("layers.*.attention", Sharp, "replace")]
)
def test_a_model_of_pictures_with_it(at: str, code: Any, how: Any, tmp_path: Path) -> None:
    model = make("vit", "ImageClassification", tmp_path, at, code, how)
    vision = model.config.vision
    assert vision is not None
    shape = (3, vision.num_channels, vision.image_size, vision.image_size)
    batch = {"pixel_values": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    export_onnx(model, tmp_path, dtypes=["fp32"])
    given = OnnxRuntime(tmp_path, dtype="fp32").run(batch)["logits"]
    np.testing.assert_allclose(given, TorchRuntime(model).run(batch)["logits"], atol=1e-5)


@pytest.mark.parametrize(
    ("case", "at", "code", "how", "where"),
    [
        ("bert", "layers.0", Peeking, "after", "layers.0.after"),
        ("bert", "layers.0.mlp.up_proj", Swish, "after", "layers.0.mlp.up_proj"),
        ("bert", "layers.0.mlp.up_proj", Swish, "replace", "test_traced:Swish"),
        ("llama", "layers.1.attention", Sharp, "replace", "layers.1.attention"),
        ("llama", "layers.1.attention.q_norm", Doubled, "after", "layers.1.attention.q_norm.after"),
    ],
)
def test_what_cannot_become_nodes_is_named(case: str, at: str, code: Any, how: Any, where: str, tmp_path: Path) -> None:
    head = "CausalLM" if case == "llama" else "SequenceClassification"
    with pytest.raises(InputError) as error:
        make_onnx(make(case, head, tmp_path, at, code, how))
    assert error.value.where == where


def test_where_it_looks_is_not_given_out_without_it(tmp_path: Path) -> None:
    """The others' would be counted as its own."""
    model = make("bert", "SequenceClassification", tmp_path, "layers.1.attention", Sharp, "replace")
    with pytest.raises(InputError, match=r"layers\.1\.attention"):
        make_graph(model, attentions=True)
