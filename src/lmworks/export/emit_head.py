"""Heads as nodes: what a task reads from the hidden states, under the names that transformers.js looks for.

Shapes: B batch, T tokens, D hidden_size, O outputs of the head, V vocab_size.
"""

from __future__ import annotations

import numpy as np

from lmworks.export.graph import Shape
from lmworks.export.walk import Stream, Walk
from lmworks.models.heads import Head

ROWS, TOKENS, KEPT = "batch_size", "sequence_length", "num_logits"
FEATURES = "features"  # what a classifier's last matrix reads: it tells known inputs from strange ones


def declare_outputs(walk: Walk) -> list[str]:
    """Declare what the graph gives: last_hidden_state, start_logits and end_logits, or logits, perhaps features."""
    graph, model, c = walk.graph, walk.model, walk.config
    tokens: int | str = KEPT if walk.writes else TOKENS if c.vision is None else c.max_position_embeddings
    if model.kind == "Model":
        return [graph.output("last_hidden_state", np.float32, [ROWS, tokens, c.hidden_size])]
    if model.spec.outputs == "span":
        return [graph.output(f"{end}_logits", np.float32, [ROWS, tokens]) for end in ("start", "end")]
    size = model.spec.size(c)
    shape: Shape = [ROWS, tokens, size] if model.head.pool == "none" else [ROWS, size]
    found = [graph.output("logits", np.float32, shape)]
    if model.kind == "SequenceClassification" and model.spec.outputs == "labels":
        found.append(graph.output(FEATURES, np.float32, [ROWS, c.hidden_size]))
    return found


def finish(walk: Walk, x: str, outputs: list[str]) -> None:
    """Make the outputs out of the hidden states (B, T, D)."""
    graph, model = walk.graph, walk.model
    if model.kind == "Model":
        walk.skip(model.head)  # a pooler that no task reads
        graph.add("Identity", [x], name="states", outputs=outputs)
        return
    span = len(outputs) == 2 and FEATURES not in outputs
    walk.emit(model.head, "head", x, "span" if span else outputs[0], FEATURES in outputs)
    for i, out in enumerate(outputs if span else ()):
        graph.add("Gather", ["span", graph.constant(i)], name=f"head.{out}", outputs=[out], axis=-1)


def emit_head(walk: Walk, head: Head, path: str, x: str, out: str, features: bool = False) -> None:
    """Make the head's numbers, and give out what they are made of; a projection tied to the embedding is not stored.

    A head that chooses among a few labels keeps its weights as they are in every dtype.
    """
    graph, exact = walk.graph, walk.model.spec.outputs != "vocab"
    x = pool(walk, head.pool, x)  # (B, T, D) or (B, D)
    if head.dense is not None:
        y = walk.linear(head.dense, f"{path}.dense", x, exact=exact)
        x = walk.activate(head.act, f"{path}.dense", y, walk.store(f"{path}.dense.bias", head.dense.bias))
    if head.norm is not None:
        x = walk.emit(head.norm, f"{path}.norm", Stream(x))
    assert head.project is not None
    if features:
        graph.add("Identity", [x], name=f"{path}.features", outputs=[FEATURES])
    bias = head.project.bias
    product = out if bias is None else f"{path}.product"
    if walk.tied:
        walk.arithmetic.tied(graph, x, name=path, out=product)
    else:
        walk.linear(head.project, path, x, out=product, exact=exact)
    if bias is not None:
        graph.add("Add", [product, walk.store(f"{path}.bias", bias)], name=f"{path}.add", outputs=[out])


def pool(walk: Walk, kind: str, x: str) -> str:
    """Choose a state of each row (B, T, D), or their mean, padding apart: (B, D); "none" keeps all (B, T, D)."""
    graph, add = walk.graph, walk.graph.add
    if kind == "none":
        return x
    if walk.config.vision is not None and kind == "first":
        return add("Gather", [x, graph.constant(0)], name="pool", axis=1)
    mask = walk.shared["mask"]
    if kind == "mean":
        real = graph.cast(mask, np.float32, name="pool.real")  # (B, T)
        row = add("Unsqueeze", [real, graph.constant([1])], name="pool.row")  # (B, 1, T)
        total = add("MatMul", [row, x], name="pool.total")  # (B, 1, D)
        total = add("Squeeze", [total, graph.constant([1])], name="pool.sum")
        count = add("ReduceSum", [real, graph.constant([1])], name="pool.count")  # (B, 1)
        return add("Div", [total, count], name="pool")
    if kind == "first":
        seen = graph.cast(mask, np.int32, name="pool.seen")
        place = add("ArgMax", [seen], name="pool.place", axis=1, keepdims=1)  # (B, 1), the first of the ones
    else:
        place = add("Unsqueeze", [walk.shared["last"], graph.constant([1])], name="pool.place")
    return add("GatherND", [x, place], name="pool", batch_dims=1)
