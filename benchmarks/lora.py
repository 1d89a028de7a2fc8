"""A LoRA step on a Llama of 59 million parameters: our loop against peft around transformers' model, time and memory.

Rank 8 on queries and values, the same folder, batch and optimizer for all. The row with a target is against peft at the
same precision. Each setting runs in a process of its own; one step of each in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from turns import serve, take_turns

VOCAB, LAYERS, WIDTH, HEADS, CONTEXT, BATCH, RANK = 16_384, 12, 512, 8, 128, 8, 8
ROUNDS = 12
OURS, PEERS = ("bf16", "bf16 int8 base", "fp32"), ("peft bf16", "peft fp32")


def make_folder(folder: Path) -> None:
    """Write the base model."""
    from lmworks.models.checkpoint import save_model
    from lmworks.models.families import llama
    from lmworks.models.heads import CausalLM

    config = llama.new(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    save_model(CausalLM(config, seed=0), folder)


def our_step(setting: str, base: Path, folder: Path) -> Callable[[], object]:
    """Return one step of our loop as users get it."""
    import numpy as np

    from lmworks.models.checkpoint import load_model
    from lmworks.training.data import TokenWindows
    from lmworks.training.int8 import quantize_base
    from lmworks.training.log import Log
    from lmworks.training.lora import add_lora
    from lmworks.training.objectives import CausalLoss
    from lmworks.training.train_config import TrainConfig
    from lmworks.training.trainer import Trainer

    model = load_model(base, "CausalLM")
    if "int8" in setting:
        quantize_base(model)
    add_lora(model, rank=RANK)
    stream = np.random.default_rng(0).integers(0, VOCAB, 100_000).astype(np.uint16)
    config = TrainConfig(steps=10_000, lr=5e-4, dtype="bf16" if "bf16" in setting else "fp32", compile="never")
    data = TokenWindows(stream, context=CONTEXT, batch_size=BATCH)
    trainer = Trainer(model, objective=CausalLoss(), data=data, config=config, folder=folder, stream=None)
    trainer.start_or_resume()
    trainer.log = Log(folder, start=0, step=0, steps=10_000, stream=None)
    return trainer.train_step


def peer_step(setting: str, base: Path) -> Callable[[], object]:
    """Return one step of a plain loop around peft."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lmworks.base.threads import cpu_count

    torch.set_num_threads(cpu_count())
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=16)
    ).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        ids = torch.randint(VOCAB, (BATCH, CONTEXT + 1), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in setting):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def work(setting: str, base: Path) -> None:
    """Serve one setting."""
    with tempfile.TemporaryDirectory() as folder:
        serve(peer_step(setting, base) if setting in PEERS else our_step(setting, base, Path(folder)))


def main() -> None:
    """Let all settings step in turn; print medians of the paired ratios, and the peak memory of each process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", choices=(*OURS, *PEERS))
    parser.add_argument("--base", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.base)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        turns = take_turns(__file__, (*OURS, *PEERS), rounds=options.rounds, options=["--base", folder])
    rows = []
    for name in OURS:
        peer = "peft fp32" if name == "fp32" else "peft bf16"
        pairs = zip(turns[name].seconds, turns[peer].seconds, strict=True)
        what = f"LoRA step, Llama 59M, {BATCH} × {CONTEXT} tokens, {name} (peer: {peer})"
        speed, peers = (BATCH * CONTEXT / statistics.median(turns[one].seconds) for one in (name, peer))
        rows.append({"what": what, "ours": speed, "peer": peers, "unit": "tokens/s",
                     "ratio": statistics.median(b / a for a, b in pairs),
                     "target": None if "int8" in name else 1.15})  # fmt: skip
        held, theirs = (turns[one].peak_bytes / 1e6 for one in (name, peer))
        rows.append({"what": f"{what}, peak memory", "ours": held, "peer": theirs, "unit": "MB",
                     "ratio": theirs / held, "target": None if "int8" in name else 1.0})  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
