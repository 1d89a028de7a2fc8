"""Bottleneck adapters against the formula in plain torch, hooked into transformers' models; files, merge, kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as t
from adapters import CONFIGS, ENDS, LABELS, SIZES, VOCAB, largest, make_base, move, random_ids
from safetensors.torch import load_file, save_file

from lmworks.base.errors import FormatError, InputError
from lmworks.export.merge import merge
from lmworks.export.onnx import export_onnx
from lmworks.models.checkpoint import load_model
from lmworks.models.heads import Model
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.training.adapter_files import open_adapter, save_adapter
from lmworks.training.bottleneck import add_bottleneck
from lmworks.training.int8 import quantize_base
from lmworks.training.lora import activate, add_lora, merge_lora, trainable_parameters, unload
from lmworks.verbs.inspection import inspect_folder

CLOSE = 1e-5
IDS = random_ids(3, 20)
SIZE = 5
MORE: dict[str, Any] = {
    "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**SIZES, partial_rotary_factor=0.5, **ENDS)),
    "distilbert": lambda: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64,
                           **LABELS)
    ),
    "vit": lambda: t.ViTForImageClassification(
        t.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16,
                    patch_size=8, **LABELS)
    ),
}  # fmt: skip
OUTPUTS = {  # transformers' names of the layers that a bottleneck comes after
    "bert": ("attention.output.dense", "output.dense"), "roberta": ("attention.output.dense", "output.dense"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"), "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "modernbert": ("attn.Wo", "mlp.Wo"), "phi": ("self_attn.dense", "mlp.fc2"),
    "distilbert": ("attention.out_lin", "ffn.lin2"), "vit": ("attention.o_proj", "mlp.fc2"),
}  # fmt: skip


def make(case: str, folder: Path) -> Any:
    """Save a random published model and return it."""
    if case in CONFIGS:
        return make_base(case, folder)
    torch.manual_seed(0)
    base = MORE[case]().eval()
    move(base, 0.1)
    base.save_pretrained(folder)
    return base


def adapt(folder: Path, **settings: Any) -> Model:
    """Return one of our models with a bottleneck that was moved away from its start."""
    model = add_bottleneck(load_model(folder), size=SIZE, **settings)
    move(model, 0.2)
    return model.eval()


def hook(base: Any, case: str, tensors: dict[str, torch.Tensor]) -> int:
    """Put the formula, from the tensors of a folder, behind the layers of a transformers model; return how many."""
    count = 0
    for name, module in base.named_modules():
        if not any(f".{name}".endswith(f".{end}") for end in OUTPUTS[case]):
            continue
        start = f"base_model.model.{name}.bottleneck_"
        d, d_bias, u, u_bias = (tensors[start + end] for end in ("down.weight", "down.bias", "up.weight", "up.bias"))

        def add(
            module: Any, inputs: Any, h: torch.Tensor,
            d: Any = d, d_bias: Any = d_bias, u: Any = u, u_bias: Any = u_bias,
        ) -> torch.Tensor:  # fmt: skip
            z = h @ d.T + d_bias
            return h + (0.5 * z * (1 + torch.erf(z / 2**0.5))) @ u.T + u_bias  # type: ignore[no-any-return]

        module.register_forward_hook(add)
        count += 1
    return count


@pytest.mark.parametrize("case", OUTPUTS)
def test_logits_are_those_of_the_formula(case: str, tmp_path: Path) -> None:
    """Post-norm, pre-norm, gated and parallel blocks, text and images: from the folder's tensors alone."""
    base = make(case, tmp_path / "base")
    fresh = add_bottleneck(load_model(tmp_path / "base"), size=SIZE)
    inputs = IDS if case != "vit" else torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    key = "pixel_values" if case == "vit" else "input_ids"
    with torch.no_grad():
        plain = base(**{key: inputs}).logits
        assert largest(fresh.eval()(inputs), plain) <= CLOSE  # a fresh adapter changes nothing
        model = adapt(tmp_path / "base")
        found = model(inputs)
        assert save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")["layers"] == 4
        tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
        assert hook(base, case, tensors) == 4
        head = {k.removeprefix("base_model.model."): v for k, v in tensors.items() if "bottleneck" not in k}
        assert not base.load_state_dict(head, strict=False).unexpected_keys  # it is trained too
        expected = base(**{key: inputs}).logits
        assert largest(found, expected) <= CLOSE < 0.01 < largest(plain, expected)
        assert torch.equal(open_adapter(tmp_path / "adapter").model(inputs), found)


def test_only_the_bottlenecks_and_the_head_are_trained(tmp_path: Path) -> None:
    make("bert", tmp_path)
    model = add_bottleneck(load_model(tmp_path), size=SIZE)
    one = 2 * 32 * SIZE + SIZE + 32
    assert trainable_parameters(model).trainable == 2 * 2 * one + 32 * 3 + 3 + 32 * 32 + 32  # the head has a pooler
    model(IDS).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    draws = [add_bottleneck(load_model(tmp_path), size=SIZE, seed=seed).state_dict() for seed in (1, 1, 2)]
    key = next(key for key in draws[0] if key.endswith("down.weight"))
    assert torch.equal(draws[0][key], draws[1][key]) and not torch.equal(draws[0][key], draws[2][key])


def test_on_an_int8_base_and_in_bfloat16(tmp_path: Path) -> None:
    """The bottleneck stays exact on a base that is stored coarsely; bf16 packs the other matrices."""
    make("llama", tmp_path)
    model = adapt(tmp_path)
    exact = TorchRuntime(model).run({"input_ids": IDS.numpy()})["logits"]
    rough = TorchRuntime(model, dtype="bf16").run({"input_ids": IDS.numpy()})["logits"]
    assert 0 < np.abs(exact - rough).max() < 0.1 * np.abs(exact).max()
    small = load_model(tmp_path)
    quantize_base(small)
    add_bottleneck(small, size=SIZE)
    move(small, 0.2)
    with torch.no_grad():
        coarse = small.eval()(IDS)
        assert 0 < largest(coarse, torch.from_numpy(exact)) < 0.1 * np.abs(exact).max()
        activate(small, None)
        assert largest(small(IDS), coarse) > 0.01


def test_peft_and_merge_refuse_it_clearly(tmp_path: Path) -> None:
    base = make("gpt2", tmp_path / "base")
    model = adapt(tmp_path / "base")
    facts = save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    assert facts["notes"] == ["peft has no such adapter: lmworks alone reads bottlenecks"]
    with pytest.raises(KeyError, match="LMWORKS_BOTTLENECK"):
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"cannot be merged(.|\n)*not linear(.|\n)*lmworks evaluate, classify"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    before = model(IDS)
    with pytest.raises(InputError, match="it is not linear"):
        merge_lora(model)
    assert torch.equal(model(IDS), before)  # what could not be merged is as it was
    with pytest.raises(InputError):
        export_onnx(model, tmp_path / "graph.onnx")
    assert inspect_folder(tmp_path / "adapter").values["adapter"]["peft_type"] == "LMWORKS_BOTTLENECK"


def test_a_lora_and_a_bottleneck_share_a_layer(tmp_path: Path) -> None:
    make("llama", tmp_path)
    model = load_model(tmp_path)
    with torch.no_grad():
        plain = model(IDS)
        add_lora(model, targets="all-linear", name="low")
        move(model, 0.1)
        low = model(IDS)
        add_bottleneck(model, size=SIZE, name="narrow")
        move(model, 0.2)
        narrow = model(IDS)
        activate(model, "low")
        assert torch.equal(model(IDS), low)
        activate(model, None)
        assert torch.equal(model(IDS), plain)
        activate(model, "narrow")
        assert torch.equal(model(IDS), narrow)
        assert torch.equal(unload(model)(IDS), plain)


def change(folder: Path, **values: Any) -> None:
    """Change the config of an adapter."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    make("gpt2", tmp_path / "base")
    make("llama", tmp_path / "other")
    folder = tmp_path / "adapter"
    save_adapter(adapt(tmp_path / "base"), folder, base=tmp_path / "base")
    with pytest.raises(InputError, match="no adapter can have this bottleneck"):
        add_bottleneck(load_model(tmp_path / "base"), size=0)
    with pytest.raises(InputError, match="no such activation"):
        add_bottleneck(load_model(tmp_path / "base"), act="gelo")
    with pytest.raises(FormatError, match=r"no such layer: transformer.h.\{0,1\}.attn.c_proj"):
        open_adapter(folder, base=tmp_path / "other")
    change(folder, bottleneck_act="none")
    with pytest.raises(InputError, match="no such activation"):
        open_adapter(folder)
    change(folder, bottleneck_act="gelu")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.transformer.h.1.mlp.c_proj.bottleneck_"
    del tensors["base_model.model.transformer.h.0.mlp.c_proj.bottleneck_up.bias"]
    save_file({**tensors, f"{key}up.weight": torch.ones(3, 3)}, file)
    with pytest.raises(FormatError, match=r"up.bias is None(.|\n)*up.weight is \(3, 3\), not \(32, 5\)"):
        open_adapter(folder)
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith(key)}, file)
    with pytest.raises(FormatError, match=r"missing: the bottleneck after transformer.h.1.mlp.c_proj"):
        open_adapter(folder)
