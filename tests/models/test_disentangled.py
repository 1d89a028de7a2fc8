"""DeBERTa: buckets of every published size, the two heads for hidden words, and what cannot be had."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

sys.path.append(str(Path(__file__).parents[1] / "parity"))
import zoo

from lmworks.base.errors import InputError
from lmworks.models.checkpoint import load_model, save_model
from lmworks.models.config import Relative
from lmworks.models.disentangled import make_buckets
from lmworks.models.families import find_family
from lmworks.training.prefix import add_prefix

IDS = torch.randint(4, zoo.VOCAB, (2, 60), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("positions", "buckets"), [(512, 256), (512, 0), (128, 32), (160, 16), (24, 0), (1024, 512)])
def test_buckets_are_those_of_transformers(positions: int, buckets: int) -> None:
    """512 and 256 are those of every published model; distances beyond the farthest are all alike."""
    r = Relative(positions=positions, buckets=buckets)
    T = 2 * positions + 50
    row = torch.zeros(1, T, 1)
    found = build_relative_position(row, row, bucket_size=buckets or -1, max_position=positions)[0]
    expected = (found + r.span).clamp(0, 2 * r.span - 1)  # as attention reads them
    table, place = make_buckets(r), torch.arange(T)
    away = (place[:, None] - place).clamp(-positions, positions) + positions
    assert torch.equal(table[away], expected)
    assert len(set(table.tolist())) > r.span


def published(folder: Path) -> Path:
    """Write a folder as Microsoft does: no `legacy`, no class, its own names for the head, and more beside it."""
    reference = zoo.make_reference("deberta-v2 new", "MaskedLM")
    reference.save_pretrained(folder)
    hf = json.loads((folder / "config.json").read_text())
    for key in ("legacy", "architectures"):
        del hf[key]
    (folder / "config.json").write_text(json.dumps(hf))
    tensors = load_file(folder / "model.safetensors")
    more = {
        "mask_predictions.dense.weight": (32, 32),
        "mask_predictions.LayerNorm.bias": (32,),
        "mask_predictions.classifier.weight": (1, 32),
        "deberta.embeddings.position_embeddings.weight": (160, 32),
    }
    save_file({**tensors, **{key: torch.zeros(shape) for key, shape in more.items()}}, folder / "model.safetensors")
    return folder


def test_the_head_of_published_files_is_found(tmp_path: Path) -> None:
    """transformers draws a new one there, unless config.json says "legacy": false; what we write says so."""
    folder = published(tmp_path / "in")
    model = load_model(folder, "MaskedLM")
    expected = zoo.make_reference("deberta-v2 new", "MaskedLM")
    with torch.no_grad():
        assert (model(IDS) - expected(IDS).logits).abs().max() < 1e-5
        save_model(model, tmp_path / "out")
        again, info = type(expected).from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values()) and torch.equal(again.eval()(IDS).logits, expected(IDS).logits)
        assert torch.equal(load_model(tmp_path / "out", "MaskedLM")(IDS), model(IDS))


def test_a_body_has_neither_head(tmp_path: Path) -> None:
    """Nothing is drawn in silence."""
    zoo.make_reference("deberta-v2", "Model").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no head for MaskedLM"):
        load_model(tmp_path, "MaskedLM")
    fresh = load_model(tmp_path, "MaskedLM", new_head=True)
    assert set(fresh.spec.keys) >= {"cls.predictions.transform.dense"}


def test_half_precision(tmp_path: Path) -> None:
    """Sizes of masks and scales fit bfloat16 and float16."""
    zoo.make_reference("deberta-v2", "SequenceClassification").save_pretrained(tmp_path)
    mask = torch.ones_like(IDS)
    mask[1, 40:] = 0
    with torch.no_grad():
        expected = load_model(tmp_path)(IDS, mask)
        for dtype in (torch.bfloat16, torch.float16):
            found = load_model(tmp_path, dtype=dtype)(IDS, mask)
            assert found.dtype == dtype and (found.float() - expected).abs().max() < 0.1


def test_dropout_is_that_of_training_only(tmp_path: Path) -> None:
    zoo.make_reference("deberta-v2 conv", "SequenceClassification").save_pretrained(tmp_path)
    model = load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(IDS), model(IDS))
        model.train()
        assert not torch.equal(model(IDS), model(IDS))


Case = tuple[dict[str, Any], str]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"relative_attention": False}, "relative_attention"),
        ({"position_buckets": 15}, "position_buckets"),
        ({"position_buckets": 400}, "position_buckets"),
        ({"pos_att_type": "p2p"}, "pos_att_type"),
        ({"embedding_size": 16}, "embedding_size"),
        ({"attention_head_size": 16}, "attention_head_size"),
        ({"conv_kernel_size": 4}, "conv_kernel_size"),
        ({"conv_kernel_size": 3, "conv_act": "swish"}, "conv_act"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], match: str) -> None:
    hf = json.loads(zoo.CONFIGS["deberta-v2"]().to_json_string(use_diff=False))
    with pytest.raises(InputError, match=match):
        find_family("deberta-v2").config({**hf, **change})


def test_a_prefix_is_refused(tmp_path: Path) -> None:
    zoo.make_reference("deberta-v2", "SequenceClassification").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="how far a prefix is"):
        add_prefix(load_model(tmp_path), length=4)
