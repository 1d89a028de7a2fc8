"""A tiny trained model in its complete folder: graphs, page, self-test and receipt. Made once a test run."""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from lmworks.export.onnx import export_onnx
from lmworks.export.receipt import write_receipt
from lmworks.export.selftest import record_selftest
from lmworks.export.verify import verify
from lmworks.export.web import write_page
from lmworks.models.checkpoint import save_model
from lmworks.models.config import Config
from lmworks.models.heads import CausalLM
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.tokens.train import train_tokenizer

PROMPTS = (
    "The small bird ",
    "A naïve cat",
    "Every café",
    "☕ The",
    "  The",
    "The old fox sees",
    "Ransoti and Senatorion and",
    "Who",
)
CONTEXT = 96


def sentences(count: int) -> list[str]:
    """Return made-up sentences with characters of one to four bytes."""
    draw = random.Random(0)
    who = ["The small bird", "The old fox", "A naïve cat", "Every café ☕", "Who", "The 🦊"]
    does = ["sees", "doesn't like", "finds", "sings to", "paints"]
    what = ["the river", "a café", "nobody", "the sea — today", "two hats 🎩"]
    names = ["".join(draw.choice("aeinorst") for _ in range(draw.randint(4, 9))).title() for _ in range(200)]
    lines = [f"{draw.choice(who)} {draw.choice(does)} {draw.choice(what)}." for _ in range(count)]
    return lines + [" and ".join(draw.sample(names, 2)) + "." for _ in range(count)]


@cache
def made_folder() -> Path:
    """Train for a moment and write everything; the folder is shared, so tests that change it take a `copy_folder`."""
    place = Path(tempfile.mkdtemp(prefix="lmworks-tests-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    folder = place / "birds & foxes"
    folder.mkdir()
    text = "\n".join(sentences(400))
    tokenizer = train_tokenizer([text], kind="bpe", vocab_size=384)
    config = Config(
        model_type="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=CONTEXT,
        hidden_act="silu",
        norm="rms",
        gated=True,
        attention_bias=False,
        mlp_bias=False,
        positions="rope",
        bos_token_id=tokenizer.eos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    model = train(CausalLM(config, seed=0), torch.tensor(tokenizer.encode(text)))
    tokenizer.save(folder)
    save_model(model, folder)
    export_onnx(model, folder)
    selftest = record_selftest(TorchRuntime(model), tokenizer, PROMPTS, tokens=32)
    write_page(folder, title="Birds & foxes", facts=facts(), selftest=selftest)
    (folder / "training").mkdir()
    (folder / "training" / "metrics.jsonl").write_text("{}\n")
    write_receipt(folder, {"seed": 0})
    assert verify(folder, runtimes=("onnx",))["passed"]
    return folder


def train(model: CausalLM, ids: torch.Tensor) -> CausalLM:
    """Fit `ids` (T,) for a few seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        starts = torch.randint(0, len(ids) - 49, (8,), generator=generator)
        rows = torch.stack([ids[start : start + 49] for start in starts])  # (B, T+1)
        logits = model(rows[:, :-1])  # (B, T, V)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def facts() -> dict[str, object]:
    """Return what a run says for itself."""
    return {
        "out": "/home/somebody/secret/place",
        "corpus": "birds",
        "parameters": 81_920,
        "train_bytes": 20_000,
        "perplexity": 3.25,
        "bits_per_byte": 0.5,
        "ngram_bits_per_byte": 0.75,
        "mixture_bits_per_byte": None,
        "next_token_accuracy": 0.625,
        "steps": 80,
        "train_seconds": 2.0,
        "dtype": "fp32",
        "settings": {"tokenizer": "bpe"},
    }


def copy_folder(target: Path) -> Path:
    """Return a copy to change."""
    shutil.copytree(made_folder(), target)
    return target
