"""A training step of a GPT of 13.9 million parameters: our loop against a plain loop in the style of nanoGPT.

The peer is written here from nanoGPT's recipe (fused q/k/v, flash attention, tied head, fused AdamW, clipping) and runs
in fp32, in bf16 autocast, and in bf16 compiled; the row with a target is against its fastest setting. Each runs in a
process of its own, so that neither profits from the other's allocator; one step of each in turn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from turns import serve, take_turns

VOCAB, LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 8192, 6, 384, 6, 256, 16
ROUNDS, STREAM = 15, 500_000
PEERS = ("fp32", "bf16", "bf16 compiled")


def our_step(folder: Path) -> Callable[[], None]:
    """Return one step of our loop as users get it: batch, loss, clipping, update, log line."""
    import numpy as np

    from lmworks.models.families import gpt2
    from lmworks.models.heads import CausalLM
    from lmworks.training.data import TokenWindows
    from lmworks.training.log import Log
    from lmworks.training.objectives import CausalLoss
    from lmworks.training.train_config import TrainConfig
    from lmworks.training.trainer import Trainer

    config = gpt2.new(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    stream = np.random.default_rng(0).integers(0, VOCAB, STREAM).astype(np.uint16)
    trainer = Trainer(
        CausalLM(config, seed=0),
        objective=CausalLoss(),
        data=TokenWindows(stream, context=CONTEXT, batch_size=BATCH),
        config=TrainConfig(steps=10_000, lr=1e-3, warmup=100),
        folder=folder,
    )
    trainer.start_or_resume()
    trainer.log = Log(folder, start=0, step=0, steps=10_000, stream=None)
    return trainer.train_step


def peer_step(setting: str) -> Callable[[], None]:
    """Return one step of the plain loop."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from lmworks.base.threads import cpu_count

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            B, T, _ = x.shape
            parts = self.qkv(self.ln_1(x)).split(WIDTH, dim=2)
            q, k, v = (part.view(B, T, HEADS, WIDTH // HEADS).transpose(1, 2) for part in parts)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, WIDTH))
            return x + self.down(F.gelu(self.up(self.ln_2(x))))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
            self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
            self.norm, self.head = nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, VOCAB, bias=False)
            self.tokens.weight = self.head.weight
            for p in self.parameters():
                if p.ndim > 1:
                    nn.init.normal_(p, std=0.02)

        def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
            logits = self.head(self.norm(self.blocks(x)))
            return F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1))

    torch.set_num_threads(cpu_count())
    torch.manual_seed(0)
    network = GPT()
    matrices = [p for p in network.parameters() if p.ndim >= 2]
    vectors = [p for p in network.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    model = torch.compile(network) if "compiled" in setting else network
    stream = np.random.default_rng(0).integers(0, VOCAB, STREAM).astype(np.uint16)

    def step() -> None:
        starts = torch.randint(len(stream) - CONTEXT, (BATCH,)).tolist()
        ids = torch.stack([torch.from_numpy(stream[i : i + CONTEXT].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(stream[i + 1 : i + 1 + CONTEXT].astype(np.int64)) for i in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in setting):
            loss = model(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def work(what: str) -> None:
    """Serve one setting."""
    with tempfile.TemporaryDirectory() as folder:
        serve(our_step(Path(folder)) if what == "ours" else peer_step(what))


def main() -> None:
    """Start a process for each setting, let them step in turn, print the medians of the paired ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", choices=("ours", *PEERS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--eager", action="store_true", help="leave the compiled peer out: it takes a minute to start")
    options = parser.parse_args()
    what = options.work
    if what:
        work(what)
        return
    compiler = not options.eager and (shutil.which("g++") or shutil.which("clang++"))
    settings = ["ours", *(p for p in PEERS if compiler or "compiled" not in p)]
    turns = take_turns(__file__, settings, rounds=options.rounds)
    seconds = {name: taken.seconds for name, taken in turns.items()}
    speed = {name: BATCH * CONTEXT / statistics.median(times) for name, times in seconds.items()}
    best = max(settings[1:], key=lambda name: speed[name])
    rows = []
    for name in settings[1:]:
        ratio = statistics.median(theirs / ours for ours, theirs in zip(seconds["ours"], seconds[name], strict=True))
        rows.append({
            "what": f"training step, GPT 13.9M, {BATCH} × {CONTEXT} tokens (peer: plain loop, {name})",
            "ours": speed["ours"], "peer": speed[name], "unit": "tokens/s",
            "ratio": ratio, "target": 1.1 if name == best else None,
        })  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
