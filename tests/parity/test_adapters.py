"""Adapters of every family with every head: made here, the same numbers in the real peft, and back.

MultipleChoice is left out: its inputs are of another shape, its layers those of the other heads.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import CELLS, VOCAB, make_reference, numbers

from lmworks.models.checkpoint import load_model
from lmworks.training.adapter_files import open_adapter, save_adapter
from lmworks.training.lora import add_lora
from lmworks.training.targets import RENAMED

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers


@pytest.mark.parametrize(("case", "head"), [cell for cell in CELLS if cell[1] != "MultipleChoice"])
def test_peft_gives_the_same_numbers(case: str, head: str, tmp_path: Path) -> None:
    """B18: DoRA on every matrix, magnitudes, fused parts, and the head, all moved away from where they start."""
    reference = make_reference(case, head)
    reference.save_pretrained(tmp_path / "base")
    model = add_lora(load_model(tmp_path / "base", head), rank=3, targets="all-linear", dora=True)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(4, VOCAB, (2, 20), generator=generator)
    if model.config.vision:
        inputs = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        plain = model(inputs)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        expected = model(inputs)
        assert (expected - plain).abs().max() > 0.05
        save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
        assert torch.equal(open_adapter(tmp_path / "adapter").model(inputs), expected)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|[Uu]nexpected|not find|mismatch).*")
            theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
        found = numbers(theirs(**{"pixel_values" if model.config.vision else "input_ids": inputs}))
        assert found.shape == expected.shape and (found - expected).abs().max() <= 2e-5


def test_an_adapter_with_the_older_names_of_a_vision_transformer(tmp_path: Path) -> None:
    """As peft wrote them with transformers 4."""
    make_reference("vit", "ImageClassification").save_pretrained(tmp_path / "base")
    model = add_lora(load_model(tmp_path / "base"), targets="all-linear", seed=2)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
        save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
        path, older = tmp_path / "adapter/adapter_model.safetensors", {}
        for key, tensor in load_file(path).items():
            for old, new in reversed(RENAMED["vit"][1:]):
                key = key.replace(f".{new}.", f".{old}.")
            older[key.replace("vit.layers.", "vit.encoder.layer.")] = tensor
        assert "base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight" in older
        save_file(older, path)
        assert torch.equal(open_adapter(tmp_path / "adapter").model(pixels), model(pixels))
