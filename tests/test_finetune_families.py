"""Fine-tuning XLM-RoBERTa, ALBERT, DeBERTa, Qwen3 and Phi-3 by the ordinary path; transformers reads what is left."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent / "training"))
from tuning_models import make_languages, write_vocabulary

from lmworks.export.onnx_folder import export_graphs
from lmworks.runtime.predictor import load
from lmworks.tokens.train import train_tokenizer
from lmworks.verbs.finetuning import finetune

t = transformers
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "max_position_embeddings": 170, "pad_token_id": 0}  # fmt: skip
DEBERTA = {"relative_attention": True, "position_buckets": 16, "pos_att_type": "p2c|c2p", "share_att_key": True,
           "norm_rel_ebd": "layer_norm", "position_biased_input": False, "conv_kernel_size": 3}  # fmt: skip
BODIES: dict[str, Callable[[int], Any]] = {
    "xlm-roberta": lambda size: t.XLMRobertaModel(t.XLMRobertaConfig(vocab_size=size, **SIZES)),
    "albert": lambda size: t.AlbertModel(t.AlbertConfig(vocab_size=size, embedding_size=16, **SIZES)),
    "deberta-v2": lambda size: t.DebertaV2Model(t.DebertaV2Config(vocab_size=size, **DEBERTA, **SIZES)),
    "qwen3": lambda size: t.Qwen3Model(t.Qwen3Config(vocab_size=size, head_dim=16, num_key_value_heads=1, **SIZES)),
    "phi3": lambda size: t.Phi3Model(t.Phi3Config(vocab_size=size, num_key_value_heads=1, **SIZES)),
}


@pytest.fixture(scope="module")
def languages(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("languages")
    make_languages(root, data_folder, 160)
    return root


@pytest.mark.parametrize("family", BODIES)
def test_it_learns_and_transformers_reads_the_folder(family: str, languages: Path, tmp_path: Path) -> None:
    """Two languages are told apart; the same answers in transformers and from the exported graph."""
    rows = [json.loads(line) for line in (languages / "validation.jsonl").read_text().splitlines()]
    texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    body, out = tmp_path / "body", tmp_path / "out"
    if family in ("qwen3", "phi3"):
        tokenizer = train_tokenizer(texts, kind="bpe", vocab_size=500)
        tokenizer.save(body, max_length=160)
        size = tokenizer.vocab_size
    else:
        size = write_vocabulary(body, texts)
    torch.manual_seed(0)
    BODIES[family](size).save_pretrained(body)
    values = finetune(
        body, languages / "train.jsonl", out, validation=languages / "validation.jsonl", task="text-classification",
        epochs=4, lr=3e-3, batch_size=8, dtype="fp32",
    ).values  # fmt: skip
    assert values["new_head"] and values["accuracy"] >= 0.85 > values["baselines"]["majority"]["accuracy"]
    pipe = transformers.pipeline("text-classification", model=str(out), device="cpu")
    said = [answer["label"] for answer in pipe(texts)]
    assert sum(a == b for a, b in zip(said, labels, strict=True)) / len(labels) == values["accuracy"]
    export_graphs(out, tmp_path / "onnx", dtypes=["fp32"])
    predictor = load(tmp_path / "onnx", runtime="onnx")
    assert [one[0].label for one in predictor(texts)] == said


def test_a_masked_albert_keeps_one_layer(languages: Path, tmp_path: Path) -> None:
    """Text goes on training a masked model: the small embeddings stay tied, the layer stays one."""
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(json.loads(line)["text"] for line in (languages / "train.jsonl").read_text().splitlines())
    )
    body = tmp_path / "body"
    size = write_vocabulary(body, text.read_text().splitlines())
    config = t.AlbertConfig(vocab_size=size, embedding_size=16, **{**SIZES, "num_hidden_layers": 3})
    t.AlbertForMaskedLM(config).save_pretrained(body)
    values = finetune(
        body, text, tmp_path / "out", task="fill-mask", epochs=6, lr=1e-2, batch_size=4, dtype="fp32"
    ).values
    assert not values["new_head"] and values["perplexity"] < size / 2
    before, after = (load_file(place / "model.safetensors") for place in (body, tmp_path / "out"))
    assert before.keys() == after.keys() and not any("groups.1." in key for key in after)
    model, info = t.AlbertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and model.config.num_hidden_layers == 3
