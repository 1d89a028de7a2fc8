"""Disentangled attention as nodes: keys and queries of distances are constants, which nothing computes again.

Shapes: B batch, T tokens, D hidden_size, H heads, E head_dim, S buckets on either side, P the farthest distance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lmworks.export.emit_encoder import mix, split_heads, weigh
from lmworks.export.walk import Stream, Walk
from lmworks.models.blocks import NeighbourBlock, PostNormBlock
from lmworks.models.compact import LowRankLinear
from lmworks.models.disentangled import DisentangledAttention, Neighbours, RelativeEmbeddings


def emit_disentangled_attention(
    walk: Walk, attention: DisentangledAttention, path: str, x: str, local: bool
) -> tuple[str, str]:
    """Return attention's output (B, T, D) without its bias, and the bias."""
    graph, add, heads = walk.graph, walk.graph.add, attention.heads
    parts = {}  # keys (B, H, E, T), queries and values (B, H, T, E)
    for name in "qkv":
        y = walk.affine(getattr(attention, f"{name}_proj"), f"{path}.{name}_proj", x)
        parts[name] = split_heads(walk, y, f"{path}.{name}", heads, turned=name == "k")
    parts["q"] = add("Mul", [parts["q"], graph.number(attention.scale)], name=f"{path}.q_scaled")
    score = add("MatMul", [parts["q"], parts["k"]], name=f"{path}.score")  # (B, H, T, T)
    pk, pq = distances_of(walk, attention, path)
    index = share_index(walk) if pk is not None or pq is not None else ""
    if pk is not None:
        table = graph.weight(f"{path}.c2p", pk.transpose(0, 2, 1))  # (H, E, 2S)
        near = add("MatMul", [parts["q"], table], name=f"{path}.c2p_all")  # (B, H, T, 2S)
        near = add("GatherElements", [near, index], name=f"{path}.c2p_score", axis=3)
        score = add("Add", [score, near], name=f"{path}.c2p_sum")
    if pq is not None:
        table = graph.weight(f"{path}.p2c", pq * np.float32(attention.scale))  # (H, 2S, E)
        near = add("MatMul", [table, parts["k"]], name=f"{path}.p2c_all")  # (B, H, 2S, T)
        near = add("GatherElements", [near, index], name=f"{path}.p2c_score", axis=2)
        score = add("Add", [score, near], name=f"{path}.p2c_sum")
    weights = weigh(walk, heads, path, score, walk.shared["bias"])
    mixed = mix(walk, path, weights, parts["v"])
    o_proj = attention.o_proj
    return walk.linear(o_proj, f"{path}.o_proj", mixed), walk.store(f"{path}.o_proj.bias", o_proj.bias)


@torch.no_grad()
def distances_of(
    walk: Walk, attention: DisentangledAttention, path: str
) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Return the keys and the queries of every distance, (H, 2S, E) each; None for a term that is not used."""
    body = walk.model.transformer
    relative = body.relative
    assert relative is not None
    for name in ("pos_k_proj", "pos_q_proj"):
        layer = getattr(attention, name)
        if layer is not None:
            if not isinstance(layer, LowRankLinear):
                walk.matrix(layer, f"{path}.{name}")  # an error where it is wrapped
            walk.skip(layer)
    walk.matrix(relative.vectors, "relative.vectors")
    walk.skip(relative)
    vectors = relative.norm(relative.vectors.weight)  # (2S, D)
    pk, pq = (None if part is None else part.float().cpu().numpy() for part in attention.positions(vectors))
    return pk, pq


def share_index(walk: Walk) -> str:
    """Return which distance lies between any two tokens, for each head of each row (B, H, T, T) int32."""
    if "distances" not in walk.shared:
        graph, add, relative = walk.graph, walk.graph.add, walk.model.transformer.relative
        assert isinstance(relative, RelativeEmbeddings)
        table = graph.weight("distances.buckets", np.array(relative.buckets, np.int32))  # (2P + 1,)
        rows = add("Shape", [walk.shared["mask"]], name="distances.rows", start=0, end=1)
        length = add("Shape", [walk.shared["mask"]], name="distances.length", start=1, end=2)
        end = add("Reshape", [length, graph.constant([])], name="distances.end")
        place = add("Range", [graph.constant(0), end, graph.constant(1)], name="distances.place")  # (T,)
        column = add("Unsqueeze", [place, graph.constant([1])], name="distances.column")  # (T, 1)
        away = add("Sub", [column, place], name="distances.away")  # (T, T)
        most = relative.positions
        away = add("Clip", [away, graph.constant(-most), graph.constant(most)], name="distances.near")
        away = add("Add", [away, graph.constant(most)], name="distances.from_zero")
        index = add("Gather", [table, away], name="distances.index")  # (T, T)
        heads = graph.constant([walk.config.num_attention_heads])
        shape = add("Concat", [rows, heads, length, length], name="distances.shape", axis=0)
        walk.shared["distances"] = add("Expand", [index, shape], name="distances")
    return walk.shared["distances"]


def emit_neighbours(walk: Walk, neighbours: Neighbours, path: str, x: str) -> str:
    """Return act(conv(x)) (B, T, D), where padding counts as 0."""
    graph, add, conv = walk.graph, walk.graph.add, neighbours.conv
    if type(conv) is not nn.Conv1d:
        raise walk.unknown(conv, f"{path}.conv")
    seen = graph.cast(walk.shared["mask"], np.float32, name=f"{path}.seen")
    seen = add("Unsqueeze", [seen, graph.constant([2])], name=f"{path}.real")  # (B, T, 1)
    y = add("Mul", [x, seen], name=f"{path}.whole")
    y = add("Transpose", [y], name=f"{path}.features", perm=[0, 2, 1])  # (B, D, T)
    inputs = [y, walk.store(f"{path}.conv.weight", conv.weight), walk.store(f"{path}.conv.bias", conv.bias)]
    sizes: dict[str, Any] = {
        "kernel_shape": list(conv.kernel_size),
        "pads": [conv.kernel_size[0] // 2] * 2,
        "group": conv.groups,
    }
    y = add("Conv", inputs, name=f"{path}.conv", **sizes)
    y = add("Transpose", [y], name=f"{path}.tokens", perm=[0, 2, 1])
    return walk.activate(neighbours.act, path, y, "")


def emit_neighbour_block(walk: Walk, block: NeighbourBlock, path: str, stream: Stream) -> None:
    """Do what a block with norms behind it does, then add what is beside each token and normalise."""
    x = stream.value
    walk.emitters[PostNormBlock](walk, block, path, stream)
    stream.delta = walk.emit(block.neighbours, f"{path}.neighbours", x)
    stream.value = walk.emit(block.neighbours_norm, f"{path}.neighbours_norm", stream)
