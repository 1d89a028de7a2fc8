"""What a fine-tuned model must beat: the commonest answer, and a linear classifier on the body as it was published.

The frozen-feature baseline is logistic regression (with an L2 penalty, fitted by L-BFGS) on the mean hidden state of a
text, or the hidden state of a word's first token. For answers in a text, the baseline is a random span as long as the
right one, and never an answer where some questions have none.

Shapes: n rows, D hidden_size, L labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lmworks.evaluation.metrics import score
from lmworks.models.heads import Model, pool
from lmworks.runtime.batching import make_batches
from lmworks.runtime.torch_runtime import inference
from lmworks.text.labelled import Labelled
from lmworks.training.data import IGNORED, draw
from lmworks.training.examples import Examples, Row, collate_rows
from lmworks.training.lora_layers import without_adapters
from lmworks.training.machine import to_device

MOST_ROWS = 2000  # of the training data for the frozen features: a pass over them takes a while
PENALTY = 1e-3  # of the squared weights, on features of variance 1
ITERATIONS = 200
SAMPLE, SPANS = 2**32 + 8, 2**32 + 9  # random streams


def majority(train: Labelled, held_out: Labelled) -> dict[str, float]:
    """Return the metrics of always giving the commonest answer of the training data; random spans for questions."""
    if train.task == "question-answering":
        said: list[Any] = random_spans(held_out)
    elif train.task == "token-classification":
        commonest = Counter(tag for tags in train.references for tag in tags).most_common(1)[0][0]
        said = [(commonest,) * len(tags) for tags in held_out.references]
    elif isinstance(train.references[0], float):
        said = [float(np.mean(train.references))] * len(held_out.references)
    else:
        said = [Counter(train.references).most_common(1)[0][0]] * len(held_out.references)
    return score(train.task, said, held_out.references, labels=train.labels)


def no_answer(held_out: Labelled) -> dict[str, float]:
    """Return the metrics of saying of every question that it has no answer."""
    return score(held_out.task, [""] * len(held_out.references), held_out.references)


def random_spans(data: Labelled) -> list[str]:
    """Return for each question a span of words of its context, as many as the first answer has, from anywhere.

    Where there is no answer, as many as another question's has: the baseline must not know.
    """
    numbers = draw(0, 0, len(data.examples), stream=SPANS)
    lengths = [len(answers[0][0].split()) for answers in data.references if answers] or [1]
    said = []
    for (_, context), answers, number in zip(data.examples, data.references, numbers, strict=True):
        words = context.split()
        length = len(answers[0][0].split()) if answers else lengths[int(number >> np.uint64(32)) % len(lengths)]
        start = int(number % np.uint64(max(1, len(words) - length + 1)))
        said.append(" ".join(words[start : start + length]))
    return said


def frozen_features(
    model: Model, data: Examples, held_out: Labelled, labels: Sequence[str], *, seed: int = 0
) -> dict[str, float] | None:
    """Return the metrics of logistic regression on the model without adapters; None without single classes."""
    task = held_out.task
    if task not in ("text-classification", "token-classification") or not isinstance(
        data.rows[0].targets["labels"], int | list
    ):
        return None
    chosen = np.sort(np.argsort(draw(seed, 0, len(data.rows), stream=SAMPLE), kind="stable")[:MOST_ROWS])
    x, y, _ = features(model, [data.rows[i] for i in chosen], pad_id=data.pad_id)
    mean, spread = x.mean(0), x.std(0, correction=min(1, len(x) - 1)).clamp(min=1e-6)  # one row spreads by 0
    weight, bias = fit((x - mean) / spread, y, len(labels))
    x, _, owner = features(model, data.held_out, pad_id=data.pad_id)
    scores = ((x - mean) / spread) @ weight.t() + bias  # (n, L)
    if task == "text-classification":
        total = torch.zeros(len(held_out.examples), len(labels)).index_add_(0, torch.tensor(owner), scores)
        said: list[Any] = [labels[i] for i in total.argmax(1).tolist()]
    else:
        tags = [["O"] * len(reference) for reference in held_out.references]
        words = [word for row in data.held_out for word in row.feature.notes["words"]]
        for example, word, best in zip(owner, words, scores.argmax(1).tolist(), strict=True):
            tags[example][word] = labels[best]
        said = [tuple(row) for row in tags]
    return score(task, said, held_out.references, labels=labels)


def features(model: Model, rows: Sequence[Row], *, pad_id: int) -> tuple[Tensor, Tensor, list[int]]:
    """Return the features (n, D) of rows or of their scored tokens, the labels (n,), and the example of each."""
    found: list[Any] = [None] * len(rows)
    device = next(model.parameters()).device
    with inference(model), without_adapters(model):
        for places in make_batches([len(row.feature) for row in rows], batch_tokens=2048, max_rows=64):
            batch = to_device(collate_rows([rows[i] for i in places], pad_id=pad_id), device)
            mask = batch.get("attention_mask")
            states = model.hidden_states(batch["input_ids"], mask, token_type_ids=batch.get("token_type_ids"))
            labels = batch["labels"].cpu()
            pooled = (pool(states, "mean", mask) if labels.ndim == 1 else states).cpu()
            for place, state, label in zip(places, pooled, labels, strict=True):
                kept = label != IGNORED
                found[place] = (state[kept], label[kept]) if labels.ndim > 1 else (state[None], label[None])
    owner = [row.feature.example for row, (_, label) in zip(rows, found, strict=True) for _ in label]
    return torch.cat([x for x, _ in found]).clone(), torch.cat([y for _, y in found]).clone(), owner


def fit(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Fit logistic regression to x (n, D) and y (n,); return the weights (L, D) and the bias (L,)."""
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight.t() + bias, y) + PENALTY * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
