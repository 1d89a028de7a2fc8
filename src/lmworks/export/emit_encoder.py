"""Whole sequences as nodes: their inputs, positions over real tokens, and attention that looks both ways.

Shapes: B batch, T tokens (or patches and the class token), D hidden_size, H heads, E head_dim.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from lmworks.base.errors import InputError
from lmworks.export.emit_decoder import HIDDEN, share_causal_mask, share_rope
from lmworks.export.graph import Shape
from lmworks.export.walk import Stream, Walk
from lmworks.models.attention import Attention
from lmworks.models.heads import Model
from lmworks.models.recurrent import Sequential
from lmworks.models.transformer import PatchEmbeddings

ATTENTIONS = "attentions."  # of the outputs, one for each run of a layer; transformers calls the tuple so


def declare_whole(walk: Walk) -> str:
    """Declare the inputs of a model that reads whole sequences; return the ids (B, T), or the images."""
    graph, c = walk.graph, walk.config
    if c.vision is not None:
        shape: Shape = ["batch_size", c.vision.num_channels, c.vision.image_size, c.vision.image_size]
        return graph.input("pixel_values", np.float32, shape)
    ids = graph.input("input_ids", np.int64, ["batch_size", "sequence_length"])
    mask = graph.input("attention_mask", np.int64, ["batch_size", "sequence_length"])
    walk.shared["mask"] = mask
    if c.type_vocab_size > 1:
        walk.shared["types"] = graph.input("token_type_ids", np.int64, ["batch_size", "sequence_length"])
    if c.causal:
        share_causal_mask(walk, ids, mask)
    else:
        walk.shared["bias"] = hide_padding(walk, ids, mask)
    share_positions(walk, mask)
    return ids


def check_attends(model: Model) -> None:
    """Raise InputError for a model whose graph cannot give out where its layers look."""
    if model.config.causal or isinstance(model.transformer, Sequential):
        raise InputError(
            "the graph of this model cannot give its attention", found=model.config.model_type,
            expected="an encoder: BERT, RoBERTa, XLM-RoBERTa, DistilBERT, ALBERT, ModernBERT, DeBERTa or ViT",
            fix="export without --attentions",
        )  # fmt: skip


def share_positions(walk: Walk, mask: str) -> None:
    """Count real tokens from 0: padding on the left moves nothing. What reads no positions drops them."""
    graph = walk.graph
    count = graph.add("CumSum", [mask, graph.constant(1)], name="positions.count")  # (B, T), from 1
    from_zero = graph.add("Sub", [count, graph.constant(1)], name="positions.from_zero")
    walk.shared["positions"] = graph.add("Max", [from_zero, graph.constant(0)], name="positions")


def hide_padding(walk: Walk, ids: str, mask: str) -> str:
    """Return the bias (B, 1, T, T) that hides padding; WebGPU knows no mask of keys, processors take either."""
    graph, add = walk.graph, walk.graph.add
    seen = graph.cast(mask, np.float32, name="mask.seen")
    hidden = add("Sub", [graph.number(1), seen], name="mask.hidden")
    bias = add("Mul", [hidden, graph.number(HIDDEN)], name="mask.bias")  # (B, T)
    bias = add("Unsqueeze", [bias, graph.constant([1, 2])], name="mask.bias.4d")  # (B, 1, 1, T)
    length = add("Shape", [ids], name="mask.length", start=1, end=2)
    shape = add("Concat", [graph.constant([1, 1]), length, graph.constant([1])], name="mask.bias.shape", axis=0)
    return add("Expand", [bias, shape], name="mask.bias.expanded")


def share_window(walk: Walk) -> str:
    """Return the bias (B, 1, T, T) that also hides what lies beyond a local layer's window."""
    if "window" not in walk.shared:
        graph, add = walk.graph, walk.graph.add
        length = add("Shape", [walk.shared["mask"]], name="window.length", start=1, end=2)
        length = add("Reshape", [length, graph.constant([])], name="window.end")
        row = add("Range", [graph.constant(0), length, graph.constant(1)], name="window.index")  # (T,)
        column = add("Unsqueeze", [row, graph.constant([1])], name="window.column")  # (T, 1)
        away = add("Sub", [column, row], name="window.away")
        away = add("Abs", [away], name="window.distance")  # (T, T)
        far = add("Greater", [away, graph.constant(walk.config.window or 0)], name="window.far")
        far = graph.cast(far, np.float32, name="window.hidden")
        bias = add("Mul", [far, graph.number(HIDDEN)], name="window.bias")
        walk.shared["window"] = add("Add", [walk.shared["bias"], bias], name="window.bias.all")
    return walk.shared["window"]


def emit_encoder_attention(walk: Walk, attention: Attention, path: str, x: str, local: bool) -> str:
    """Return the mixed values (B, T, H * E), from one node or, in 8 bits, from its parts.

    Three products read one activation (measured: no slower than one that must be split), and their biases are added
    inside the node, but for heads that are rotated in between.
    """
    graph = walk.graph
    if attention.heads != attention.kv_heads:
        raise InputError("the ONNX exporter has no grouped heads for a model that reads both ways", where=path)
    cos, sin = share_rope(walk, local=local)
    values, parts = [], {name: getattr(attention, f"{name}_proj") for name in "qkv"}
    for name, part in parts.items():
        emit = walk.affine if cos or not walk.arithmetic.fused else walk.linear
        y = emit(part, f"{path}.{name}_proj", x)
        values.append(rotate(walk, f"{path}.{name}_rope", y, attention, cos, sin) if cos and name != "v" else y)
    windowed = local and walk.config.window is not None
    hidden = share_window(walk) if windowed else walk.shared.get("bias", "")
    q, k, v = values
    if not walk.arithmetic.fused:
        weights = look(walk, attention, path, q, k, hidden)
        return mix(walk, path, weights, split_heads(walk, v, f"{path}.v", attention.heads))
    bias = ""
    if not cos and attention.q_proj.bias is not None:
        joined = np.concatenate([walk.read(part.bias) for part in parts.values()])
        bias = graph.weight(f"{path}.qkv_proj.bias", joined)
    if walk.attends:  # beside the node, which keeps its own; the keys' bias moves no weight
        look(walk, attention, path, walk.plus(q, f"{path}.q", attention.q_proj.bias if bias else None), k, hidden)
    inputs = [q, k, v, bias, "", hidden]
    while not inputs[-1]:
        inputs.pop()
    return graph.add(
        "com.microsoft.MultiHeadAttention", inputs, name=path, num_heads=attention.heads,
        scale=attention.head_dim**-0.5,
    )  # fmt: skip


def look(walk: Walk, attention: Attention, path: str, q: str, k: str, hidden: str) -> str:
    """Return softmax(q k^T / sqrt(E) + hidden) (B, H, T, T) of queries and keys (B, T, H * E)."""
    add = walk.graph.add
    q = add("Mul", [q, walk.graph.number(attention.head_dim**-0.5)], name=f"{path}.q_scaled")
    q = split_heads(walk, q, f"{path}.q", attention.heads)  # (B, H, T, E)
    k = split_heads(walk, k, f"{path}.k", attention.heads, turned=True)  # (B, H, E, T)
    return weigh(walk, attention.heads, path, add("MatMul", [q, k], name=f"{path}.score"), hidden)


def weigh(walk: Walk, heads: int, path: str, score: str, hidden: str) -> str:
    """Return softmax(score + hidden) (B, H, T, T), and give it out where that is asked for."""
    add = walk.graph.add
    score = add("Add", [score, hidden], name=f"{path}.masked") if hidden else score
    weights = add("Softmax", [score], name=f"{path}.weights", axis=-1)
    if walk.attends:
        add("Identity", [weights], name=f"{path}.look", outputs=[declare_weights(walk, heads)])
    return weights


def mix(walk: Walk, path: str, weights: str, v: str) -> str:
    """Return what the heads see side by side: weights (B, H, T, T), values (B, H, T, E) -> (B, T, H * E)."""
    add = walk.graph.add
    mixed = add("MatMul", [weights, v], name=f"{path}.mixed")  # (B, H, T, E)
    mixed = add("Transpose", [mixed], name=f"{path}.tokens", perm=[0, 2, 1, 3])
    return add("Reshape", [mixed, walk.graph.constant([0, 0, -1])], name=path)


def split_heads(walk: Walk, x: str, path: str, heads: int, *, turned: bool = False) -> str:
    """Return (B, T, H * E) as (B, H, T, E), `turned` as (B, H, E, T)."""
    x = walk.graph.add("Reshape", [x, walk.graph.constant([0, 0, heads, -1])], name=f"{path}_heads")
    return walk.graph.add("Transpose", [x], name=path, perm=[0, 2, 3, 1] if turned else [0, 2, 1, 3])


def declare_weights(walk: Walk, heads: int) -> str:
    """Declare where the layer that runs next looks, (B, H, T, T)."""
    c, graph = walk.config, walk.graph
    tokens: int | str = "sequence_length" if c.vision is None else c.max_position_embeddings
    number = sum(item.name.startswith(ATTENTIONS) for item in graph.outputs)
    return graph.output(f"{ATTENTIONS}{number}", np.float32, ["batch_size", heads, tokens, tokens])


def rotate(walk: Walk, path: str, x: str, attention: Attention, cos: str, sin: str) -> str:
    """Turn the pairs of each head (B, T, H * E) by their token's place."""
    rotated = walk.config.rotary.dim or attention.head_dim
    whole = rotated == attention.head_dim
    return walk.graph.add(
        "com.microsoft.RotaryEmbedding", [x, walk.shared["positions"], cos, sin], name=path,
        num_heads=attention.heads, rotary_embedding_dim=0 if whole else rotated,
    )  # fmt: skip


def emit_patch_embeddings(walk: Walk, embeddings: PatchEmbeddings, path: str, pixels: str) -> Stream:
    """Project each patch, put the class token before them, add their places."""
    graph, patches = walk.graph, embeddings.patches
    if type(patches) is not nn.Conv2d:
        raise walk.unknown(patches, f"{path}.patches")
    inputs = [pixels, walk.store(f"{path}.patches.weight", patches.weight)]
    inputs += [walk.store(f"{path}.patches.bias", patches.bias)] if patches.bias is not None else []
    size = list(patches.kernel_size)
    x = graph.add("Conv", inputs, name=f"{path}.patches", kernel_shape=size, strides=size)  # (B, D, rows, columns)
    shape = graph.constant([0, walk.config.hidden_size, -1])
    x = graph.add("Reshape", [x, shape], name=f"{path}.patches.flat")  # (B, D, T - 1)
    x = graph.add("Transpose", [x], name=f"{path}.patches.tokens", perm=[0, 2, 1])  # (B, T - 1, D)
    x = graph.add("Pad", [x, graph.constant([0, 1, 0, 0, 0, 0])], name=f"{path}.room")  # (B, T, D): the first is empty
    places = walk.read(embeddings.positions).copy()  # (1, T, D)
    places[:, :1] += walk.read(embeddings.cls_token)
    table = graph.weight(f"{path}.positions", places)
    return Stream(graph.add("Add", [x, table], name=f"{path}.placed"))
