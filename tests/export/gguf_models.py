"""Small models that llama.cpp is asked about, and the process that asks it."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf
import torch
import transformers as t

from lmworks.tokens.tokenizer import Tokenizer
from lmworks.tokens.train import train_tokenizer

LLAMA_CPP = Path(__file__).with_name("llama_cpp")
ROOT = Path(__file__).parents[2]
VOCAB, LEARNT = 500, 48  # rows, a few of them without a token; how much of a text a model learns by heart
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 160, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
STRETCHED = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 160, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 1}  # fmt: skip
MODELS: dict[str, t.PretrainedConfig] = {
    "llama": t.LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama-3": t.LlamaConfig(**SIZES, num_key_value_heads=1, head_dim=32, attention_bias=True, mlp_bias=True,
                             tie_word_embeddings=True, rope_parameters=STRETCHED),
    "mistral": t.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=128),
    "qwen2": t.Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": t.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32),
    "fused": t.Phi3Config(**SIZES, num_key_value_heads=2),  # by name, llama.cpp expects a "phi3" to have its tokens
    "phi": t.PhiConfig(**SIZES, partial_rotary_factor=0.5, rope_theta=3000.0),
    "gpt2": t.GPT2Config(**GPT2),
}  # fmt: skip
PROSE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8") + "Zażółć gęślą jaźń; 東京は晴れ, don't, 12345.\n\n  \t"
HARD = (
    "Hello world  two   three\n\n\n four\t5 1234567 3.14", "don't CAN'T we'LL 'tis", "🙂👩‍👩‍👧 東京は晴れ ½² ﷽",
    "\u200b\u00a0nbsp\u3000wide end ", "x=1;\r\n\r\n  y += 2;\t\t// ¿qué?", "A" * 70, "  lead", "\n", "ǅ ﬁ e\u0301 é",
    "¹²③ 12 ١٢٣ 1a2b", "__init__(self, *args):::---", "Ünïcödé ÀÉÎÕÜ ßẞ ДЖЁ αβγ עברית हिन्दी ไทย",
)  # fmt: skip


def make_model(name: str, folder: Path, tokenizer: Tokenizer) -> t.PreTrainedModel:
    """Save a model that has learnt a text by heart, so that no rounding of 16 bits changes what it says."""
    torch.manual_seed(5)
    model = t.AutoModelForCausalLM.from_config(MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.tensor(tokenizer.encode(PROSE)[: 4 * LEARNT]).view(4, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(50):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return model.eval()


def make_tokenizer(**template: str) -> Tokenizer:
    """Train a tokenizer of our own on prose."""
    tokenizer = train_tokenizer([PROSE], vocab_size=VOCAB - 8)
    tokenizer.config.update(template)
    return tokenizer


def make_cut(*steps: Any, ignore_merges: bool = False, begins: bool = False) -> hf.Tokenizer:
    """Train byte-level BPE behind other cuts into words."""
    backend = hf.Tokenizer(hf.models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = hf.pre_tokenizers.Sequence(list(steps))
    backend.decoder = hf.decoders.ByteLevel()
    letters = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    trainer = hf.trainers.BpeTrainer(vocab_size=700, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=letters,
                                     show_progress=False)  # fmt: skip
    backend.train_from_iterator([PROSE, *HARD * 3], trainer)
    backend.add_tokens([hf.AddedToken("<|im_end|>", special=True), hf.AddedToken("    ", normalized=False)])
    if begins:
        process = hf.processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
        backend.post_processor = hf.processors.Sequence([hf.processors.ByteLevel(trim_offsets=False), process])
    return backend


def make_pieces(folder: Path, *, legacy: bool) -> Tokenizer:
    """Train SentencePiece's BPE as Llama 2 and Mistral did, and read it as they are read."""
    folder.mkdir()
    text = folder / "text.txt"
    text.write_text("\n".join([PROSE, *HARD * 3]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=700, model_type="bpe", byte_fallback=True,
        character_coverage=0.99, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, user_defined_symbols=["[INST]"], minloglevel=3,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy, "add_bos_token": True}))
    return Tokenizer.from_pretrained(folder)


def save_plain(folder: Path, tokenizer: Tokenizer) -> Path:
    """Save a tiny random Llama, with more rows than tokens, beside a tokenizer."""
    sizes = {**SIZES, "vocab_size": tokenizer.vocab_size + 3, "hidden_size": 32, "intermediate_size": 32,
             "num_hidden_layers": 1, "eos_token_id": tokenizer.eos_id}  # fmt: skip
    torch.manual_seed(0)
    t.LlamaForCausalLM(t.LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def ask(work: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Ask llama.cpp about several files in one process; a row's logits come back as (T, V)."""
    node = shutil.which("node")
    if node is None or not (LLAMA_CPP / "node_modules").is_dir():
        pytest.skip("llama.cpp is not installed: make install")
    questions, out = folder / "questions.json", folder / "answers.json"
    questions.write_text(json.dumps(work), encoding="utf-8")
    command = [node, str(LLAMA_CPP / "run.mjs"), str(questions), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(out.read_text())
    for row in found:
        row["logits"] = [
            np.stack([np.frombuffer(base64.b64decode(one), np.float32) for one in each]) for each in row["logits"]
        ]
    return found
