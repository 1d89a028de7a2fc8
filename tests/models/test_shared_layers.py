"""ALBERT's layers: one set of weights that runs several times, in files, gradients, optimizers, graphs and adapters."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[1] / "parity"))
import zoo

from lmworks.base.errors import InputError
from lmworks.compress.quantize import quantize
from lmworks.export.emit import make_graph
from lmworks.models.checkpoint import load_model, save_model
from lmworks.models.compact import Grid
from lmworks.training.distillation import cut_layers
from lmworks.training.lora import add_lora, trainable_parameters
from lmworks.training.prefix import add_prefix

IDS = torch.randint(4, zoo.VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four layers of one set of weights, with a head for five labels."""
    zoo.make_reference("albert", "SequenceClassification").save_pretrained(tmp_path / "albert")
    return tmp_path / "albert"


def test_a_weight_is_there_once(folder: Path, tmp_path: Path) -> None:
    """In the network, in its state, and in the file, whatever the depth."""
    model = load_model(folder)
    assert len(model.transformer.layers) == 1 and model.transformer.order == [0, 0, 0, 0]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) and list(model.state_dict()) == names
    save_model(model, tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    two = zoo.make_reference("albert groups", "Model")
    two.save_pretrained(tmp_path / "two")
    assert load_model(tmp_path / "two").transformer.order == [0, 0, 1, 1]


def test_gradients_and_a_step_are_those_of_transformers(folder: Path) -> None:
    """All runs of a layer add to one gradient, and an optimizer moves each weight once."""
    ours, theirs = load_model(folder), zoo.make_reference("albert", "SequenceClassification")
    labels = torch.tensor([0, 3, 1])
    for model, logits in ((ours, ours(IDS)), (theirs, theirs(IDS).logits)):
        torch.nn.functional.cross_entropy(logits, labels).backward()
        torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    with torch.no_grad():
        assert (ours(IDS) - theirs(IDS).logits).abs().max() < 1e-5
    shared = ours.transformer.layers[0].mlp.up_proj.weight.grad
    expected = theirs.albert.encoder.albert_layer_groups[0].albert_layers[0].ffn.weight.grad
    assert (shared - expected).abs().max() < 1e-6 * expected.abs().max() + 1e-7


@pytest.mark.parametrize("dtype", ["fp32", "int8", "q4"])
def test_a_graph_holds_a_weight_once(dtype: str, folder: Path) -> None:
    """Four runs read the same initializers: the graph of twelve layers is as large, but for its nodes."""
    sizes = []
    for layers in (4, 12):
        model = load_model(folder)
        model.transformer.order = [0] * layers
        graph = onnx.load_from_string(make_graph(model, dtype=dtype).to_bytes())
        names = [weight.name for weight in graph.graph.initializer]
        assert len(names) == len(set(names)) and not any("again" in name for name in names)
        assert sum(node.op_type.startswith("MatMul") for node in graph.graph.node) >= 6 * layers
        sizes.append(sum(len(weight.raw_data) for weight in graph.graph.initializer))
    assert sizes[0] == sizes[1]


def test_whole_numbers(folder: Path, tmp_path: Path) -> None:
    """A quantized layer is one layer too, and comes back from its folder."""
    model = load_model(folder)
    quantize(model, Grid())
    with torch.inference_mode():
        expected = model(IDS)
    save_model(model, tmp_path / "int8")
    again = load_model(tmp_path / "int8")
    with torch.inference_mode():
        assert torch.equal(again(IDS), expected)
        assert (expected - load_model(folder)(IDS)).abs().max() < 0.1
    packed = [key for key in load_file(tmp_path / "int8/model.safetensors") if key.endswith("up_proj.q")]
    assert len(packed) == 1


def test_an_adapter_serves_every_run(folder: Path) -> None:
    """As in peft, whose adapter of a shared layer is shared (tests/parity/test_adapters.py holds it to that)."""
    model = add_lora(load_model(folder), rank=2, targets="all-linear")
    adapters = [name for name, _ in model.named_parameters() if "layers." in name and ".A" in name]
    assert len(adapters) == 6  # q, k, v, o, up, down
    matrices = [(32, 32)] * 4 + [(32, 48), (48, 32)] + [(16, 32)]  # the last brings embeddings to their size
    head = (32 * 32 + 32) + (32 * 5 + 5)
    assert trainable_parameters(model).trainable == sum(2 * (a + b) for a, b in matrices) + head


def test_what_wants_layers_of_its_own_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="share their weights"):
        add_prefix(load_model(folder), length=4)
    with pytest.raises(InputError, match="none of them can be left out"):
        cut_layers(load_model(folder), [0, 2])
