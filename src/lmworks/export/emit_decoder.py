"""Causal attention as nodes: one GroupQueryAttention a layer, with its cache, its rotation and its window.

Shapes: B batch, T new tokens, S keys (past and new), D hidden_size, H heads, K key/value heads, E head_dim,
R rotary_dim, P positions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lmworks.base.errors import InputError
from lmworks.export.graph import Shape
from lmworks.export.walk import Stream, Walk
from lmworks.models.attention import Attention
from lmworks.models.compact import LowRankLinear
from lmworks.models.config import LongRope

HIDDEN = -1e9  # added to the score of a key that may not be seen
LAST = 2**63 - 1  # the end of a slice that takes everything


def declare_generation(walk: Walk) -> str:
    """Declare the inputs that transformers.js feeds while it writes text; return the ids (B, T)."""
    graph = walk.graph
    ids = graph.input("input_ids", np.int64, ["batch_size", "sequence_length"])
    mask = graph.input("attention_mask", np.int64, ["batch_size", "total_sequence_length"])
    if walk.config.positions == "learned":
        walk.shared["positions"] = graph.input("position_ids", np.int64, ["batch_size", "sequence_length"])
    graph.input("num_logits_to_keep", np.int64, [])
    share_causal_mask(walk, ids, mask)
    return ids


def share_causal_mask(walk: Walk, ids: str, mask: str) -> None:
    """Turn the attention mask (B, S) into what every GroupQueryAttention reads.

    lengths (B,): the index of a row's last key, its place in the cache. Rows padded on the left all end at S - 1; rows
    of different length in a fixed cache end where their mask does. Keys hidden by the mask get a bias (B, 1, T, S),
    which is what makes left padding right: the node alone would only count the keys.
    """
    graph, add = walk.graph, walk.graph.add
    rows = add("Shape", [mask], name="mask.rows", start=0, end=1)
    keys = add("Shape", [mask], name="mask.keys", start=1, end=2)
    new = add("Shape", [ids], name="mask.new", start=1, end=2)
    total = add("Reshape", [keys, graph.constant([])], name="mask.total")
    index = add("Range", [graph.constant(0), total, graph.constant(1)], name="mask.index")  # (S,)
    last = add("Mul", [mask, index], name="mask.real")  # (B, S)
    last = add("ReduceMax", [last, graph.constant([1])], name="mask.lengths", keepdims=0)  # (B,)
    walk.shared["last"] = last
    walk.shared["lengths"] = graph.cast(last, np.int32, name="mask.lengths.int32")
    walk.shared["total"] = graph.cast(total, np.int32, name="mask.total.int32")
    seen = graph.cast(mask, np.float32, name="mask.seen")
    hidden = add("Sub", [graph.number(1), seen], name="mask.hidden")
    bias = add("Mul", [hidden, graph.number(HIDDEN)], name="mask.bias")  # (B, S)
    bias = add("Unsqueeze", [bias, graph.constant([1, 2])], name="mask.bias.4d")  # (B, 1, 1, S)
    shape = add("Concat", [rows, graph.constant([1]), new, keys], name="mask.bias.shape", axis=0)
    walk.shared["bias"] = add("Expand", [bias, shape], name="mask.bias.expanded")  # (B, 1, T, S)


def share_rope(walk: Walk, *, local: bool) -> tuple[str, str]:
    """Return the cosines and sines (P, R/2) that a layer rotates with; empty where nothing is rotated."""
    body, c = walk.model.transformer, walk.config
    if not body.frequencies:
        return "", ""
    local = local and body.local_frequencies != body.frequencies
    names = ("rope.local.cos", "rope.local.sin") if local else ("rope.cos", "rope.sin")
    if names[0] not in walk.graph.weights:
        frequencies = torch.tensor(body.local_frequencies if local else body.frequencies)  # (R/2,)
        positions = c.turn or c.max_position_embeddings  # a graph has one table: that of texts which are not long
        angles = torch.arange(positions).float()[:, None] * frequencies  # (P, R/2)
        factor = c.rotary.scaling.factor if isinstance(c.rotary.scaling, LongRope) else 1.0
        walk.graph.weight(names[0], (angles.cos() * factor).numpy())
        walk.graph.weight(names[1], (angles.sin() * factor).numpy())
    return names


def emit_causal_attention(walk: Walk, attention: Attention, path: str, x: str, local: bool) -> str:
    """Return the mixed values (B, T, H * E), from one product for queries, keys and values."""
    graph, heads, size, c = walk.graph, attention.kv_heads, attention.head_dim, walk.config
    cos, sin = share_rope(walk, local=local)
    check_head_size(path, size, c.rotary.dim or size if cos else None)
    past, present = ["", ""], [f"{path}.present.key", f"{path}.present.value"]
    if walk.writes:
        names = [f"{attention.layer}.{kind}" for kind in ("key", "value")]
        shape: Shape = ["batch_size", heads, "past_sequence_length", size]
        past = [graph.input(f"past_key_values.{name}", np.float32, shape) for name in names]
        shape = ["batch_size", heads, "total_sequence_length", size]
        present = [graph.output(f"present.{name}", np.float32, shape) for name in names]
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    if any(isinstance(part, LowRankLinear) for part in parts):
        each = [walk.linear(part, f"{path}.{name}_proj", x) for name, part in zip("qkv", parts, strict=True)]
        qkv = graph.add("Concat", each, name=f"{path}.qkv_proj", axis=-1)
    else:
        weight = np.concatenate([walk.matrix(part, path) for part in parts]).T  # (D, (H + 2K) E)
        qkv = walk.arithmetic.linear(graph, x, weight, name=f"{path}.qkv_proj")
    if attention.q_proj.bias is not None:
        bias = graph.weight(f"{path}.qkv_proj.bias", np.concatenate([walk.read(part.bias) for part in parts]))
        qkv = graph.add("Add", [qkv, bias], name=f"{path}.qkv_proj.add")
    read = [qkv, "", ""]
    if c.qk_norm:
        sizes = graph.constant([attention.heads * size, heads * size, heads * size])
        read = [f"{path}.{name}" for name in "qkv"]
        graph.add("Split", [qkv, sizes], name=f"{path}.split", outputs=read, axis=-1)
        norms = (("q", attention.q_norm, attention.heads), ("k", attention.k_norm, heads))
        read[:2] = [norm_heads(walk, norm, f"{path}.{name}", count) for name, norm, count in norms]
    window = {"local_window_size": c.window} if local and c.window is not None else {}  # the last `window` keys
    return graph.add(
        "com.microsoft.GroupQueryAttention",
        [*read, *past, walk.shared["lengths"], walk.shared["total"], cos, sin, "", walk.shared["bias"]],
        name=path,
        outputs=[f"{path}.out", *present],
        num_heads=attention.heads,
        kv_num_heads=attention.kv_heads,
        scale=size**-0.5,
        do_rotary=int(bool(cos)),
        **window,
    )


def norm_heads(walk: Walk, norm: nn.Module, x: str, heads: int) -> str:
    """Normalise each of some heads by itself: x (B, T, H * E)."""
    graph = walk.graph
    each = graph.add("Reshape", [x, graph.constant([0, 0, heads, -1])], name=f"{x}.heads")  # (B, T, H, E)
    each = walk.emit(norm, f"{x}_norm", Stream(each))
    return graph.add("Reshape", [each, graph.constant([0, 0, -1])], name=f"{x}.joined")


def check_head_size(path: str, size: int, rotated: int | None) -> None:
    """Raise InputError for heads that the operator refuses: multiples of 8, of which multiples of 16 are rotated."""
    if size % 8 or (rotated is not None and rotated % 16):
        raise InputError(
            "the attention operator of ONNX Runtime cannot take this head size",
            where=path,
            found=f"head_dim {size}" + ("" if rotated is None else f", {rotated} of it rotated"),
            expected="a multiple of 8" + ("" if rotated is None else ", of which a multiple of 16 is rotated"),
            fix='train with another number of heads, or use runtime="torch"',
        )
