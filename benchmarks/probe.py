"""How far back each network remembers, and how far back its gradient reaches.

    python benchmarks/probe.py OUT [--steps 200 500 1500] [--tiny]

Recall: one of eight symbols, then k tokens of noise, then a question mark: which symbol was it? Trained on k from 1 to
64 for so many steps, each time from the beginning; asked for each k; chance is 1/8. Writes OUT/recall.md and
OUT/results.json, and OUT/report.html with the curves.

Gradients: the norm of d loss(T) / d h(t) by T − t, where the loss is that of the last token and h(t) is what the first
layer says at t. In an RNN it is a product of T − t matrices: it vanishes, and explodes where the recurrent matrix is
made larger; gates and attention pass it on.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmworks.base.chart import Chart
from lmworks.base.files import write_json, write_text
from lmworks.base.report import Report, Table
from lmworks.base.types import Batch
from lmworks.models.heads import CausalLM
from lmworks.training.data import IGNORED
from lmworks.training.objectives import CausalLoss
from lmworks.training.train_config import TrainConfig
from lmworks.training.trainer import Trainer
from lmworks.verbs.run import make_network
from lmworks.verbs.settings import Settings

SYMBOLS, NOISE, LONGEST = 8, 24, 64
ASK, VOCAB = SYMBOLS + NOISE, SYMBOLS + NOISE + 1
DISTANCES = (1, 4, 8, 16, 32, 64)
NETWORKS: dict[str, dict[str, Any]] = {  # of about 50,000 parameters each
    "feedforward": {"arch": "feedforward", "hidden_size": 96, "embedding_size": 48, "layers": 1, "window": 9},
    "rnn": {"arch": "rnn", "hidden_size": 160, "embedding_size": 80, "layers": 1},
    "lstm": {"arch": "lstm", "hidden_size": 84, "embedding_size": 42, "layers": 1},
    "gru": {"arch": "gru", "hidden_size": 96, "embedding_size": 48, "layers": 1},
    "transformer": {"arch": "transformer", "hidden_size": 42, "layers": 2, "heads": 3},
}


class Recall:
    """Rows of symbol, noise, question; only the answer is scored."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def make(self, rng: np.random.Generator, distance: int, rows: int) -> Batch:
        """Return rows with so many tokens of noise: input_ids and labels (B, k + 2)."""
        symbol = rng.integers(0, SYMBOLS, (rows, 1))
        noise = rng.integers(SYMBOLS, SYMBOLS + NOISE, (rows, distance))
        ids = np.concatenate([symbol, noise, np.full((rows, 1), ASK)], 1)
        labels = np.full(ids.shape, IGNORED)
        labels[:, -1:] = symbol
        return {"input_ids": ids, "labels": labels}

    def batch(self, step: int) -> Batch:
        """Return a batch of one distance."""
        rng = np.random.Generator(np.random.Philox(key=[7, step]))
        return self.make(rng, int(rng.integers(1, LONGEST + 1)), self.rows)

    def validation(self, tokens: int | None = None) -> Iterator[Batch]:
        """Nothing chooses a step: the last is taken."""
        return iter(())

    def fingerprint(self) -> str:
        """Return what decides the batches."""
        return f"recall {self.rows}"


def network(name: str) -> CausalLM:
    """Return a fresh one."""
    return CausalLM(make_network(Settings(context=2 * LONGEST, **NETWORKS[name]), vocab_size=VOCAB), seed=0)


def accuracy(model: CausalLM, distance: int, rows: int) -> float:
    """Return the share of symbols recalled over so many tokens."""
    batch = Recall(rows).make(np.random.default_rng(distance), distance, rows)
    with torch.inference_mode():
        said = model.eval()(torch.from_numpy(batch["input_ids"]), last=-1)[:, :SYMBOLS].argmax(-1).numpy()
    return float((said == batch["labels"][:, -1]).mean())


def gradient_norms(model: CausalLM, T: int = LONGEST, rows: int = 16) -> list[float]:
    """Return the mean norm of d loss(T) / d h(t), for T − t = 0, 1, …"""
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (rows, T + 1)))
    if model.config.block == "pre":
        kept = model.transformer.layers[0].register_forward_hook(lambda _m, _i, y: keep(y))
        norms = backward(model, ids)
        kept.remove()
        return norms
    if model.config.block == "feedforward":
        kept = model.transformer.embeddings.register_forward_hook(lambda _m, _i, y: keep(y))
        norms = backward(model, ids)
        kept.remove()
        return norms
    cell: Any = model.transformer.layers[0].cell
    parameters = [p.detach() for p in (cell.weight_ih_l0, cell.weight_hh_l0, cell.bias_ih_l0, cell.bias_hh_l0)]
    one = {"rnn": torch.nn.RNNCell, "lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell}[model.config.block]
    step = one(cell.input_size, cell.hidden_size)
    step.load_state_dict(dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), parameters, strict=True)))
    x, state, states = model.transformer.embeddings(ids[:, :-1]), None, []
    for t in range(T):  # a step at a time: the fused kernel does not show what lies between
        state = step(x[:, t], state)
        h = state[0] if isinstance(state, tuple) else state
        h.retain_grad()
        states.append(h)
    torch.nn.functional.cross_entropy(model.head(states[-1]), ids[:, -1]).backward()
    return [0.0 if h.grad is None else float(h.grad.norm(dim=-1).mean()) for h in reversed(states)]


KEPT: list[Tensor] = []


def keep(y: Tensor) -> None:
    """Hold what a layer says, so that its gradient can be read."""
    y.retain_grad()
    KEPT.append(y)


def backward(model: CausalLM, ids: Tensor) -> list[float]:
    """Return the norms of the gradient at what was held, from the last token back."""
    KEPT.clear()
    torch.nn.functional.cross_entropy(model(ids[:, :-1], last=-1), ids[:, -1]).backward()
    assert KEPT[0].grad is not None
    return KEPT[0].grad.norm(dim=-1).mean(0).flip(0).tolist()


def learn(name: str, steps: int, args: argparse.Namespace) -> dict[int, float]:
    """Train a fresh network for so many steps; return the share of symbols that it recalls by their distance."""
    model = network(name)
    config = TrainConfig(steps=steps, lr=3e-3, min_lr=3e-4, warmup=min(50, steps), eval_every=steps, dtype="fp32",
                         compile="never", weight_decay=0.0, max_grad_norm=1.0, seed=0)  # fmt: skip
    Trainer(model, objective=CausalLoss(), data=Recall(args.batch), config=config,
            folder=args.out / f"{name}-{steps}").fit()  # fmt: skip
    return {k: accuracy(model, k, 8 if args.tiny else 500) for k in DISTANCES}


def main() -> None:
    """Train and ask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 500, 1500])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.batch = [2, 3], 2
    results: dict[str, Any] = {"steps": args.steps, "batch": args.batch, "recall": {}, "gradients": {}}
    for name in NETWORKS:
        model = network(name)
        results["gradients"][f"{name}, fresh"] = gradient_norms(model)
        if name == "rnn":
            wild = network(name)
            with torch.no_grad():
                wild.transformer.layers[0].cell.weight_hh_l0.mul_(4.0)
            wild.transformer.embeddings.tokens.weight.data.mul_(0.01)  # where tanh is nearly straight
            results["gradients"]["rnn, recurrent matrix × 4"] = gradient_norms(wild)
        results["recall"][name] = {"parameters": sum(p.numel() for p in model.parameters()), "accuracy": {}}
        for steps in args.steps:
            results["recall"][name]["accuracy"][steps] = learn(name, steps, args)
            write_json(args.out / "results.json", results)
    columns = ("network", "parameters", "steps", *(f"k = {k}" for k in DISTANCES))
    table = tuple((name, r["parameters"], steps, *(round(found[k], 3) for k in DISTANCES))
                  for name, r in results["recall"].items() for steps, found in r["accuracy"].items())  # fmt: skip
    norms = {name: [max(n, 1e-30) for n in values] for name, values in results["gradients"].items()}
    lines = tuple(
        (name, tuple((float(t), float(np.log10(n))) for t, n in enumerate(values))) for name, values in norms.items()
    )
    chart = Chart("log10 of |d loss(T) / d h(t)| by T − t", "T − t", "log10 of the norm", lines)
    reach = tuple((name, values[0], values[8], values[32], values[-1]) for name, values in norms.items())
    tables = (Table(f"Recall (chance {1 / SYMBOLS})", columns, table),
              Table("Gradient by distance", ("network", "0", "8", "32", str(LONGEST - 1)), reach))  # fmt: skip
    report = Report("How far back", results, tables=tables, charts=(chart,))
    write_text(args.out / "report.html", report.to_html())
    head = "| " + " | ".join(columns) + " |\n|" + "--|" * len(columns) + "\n"
    write_text(args.out / "recall.md", head + "".join("| " + " | ".join(map(str, row)) + " |\n" for row in table))
    report.print(sys.stdout)


if __name__ == "__main__":
    main()
