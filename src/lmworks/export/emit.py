"""One emitter per core class: how each module of a decoder becomes nodes of an ONNX graph.

Shapes: B batch, T new tokens, S keys (past and new), D hidden, H heads, K key/value heads, E head size, V vocabulary.

The walk mirrors `forward`. What differs is fusion: query, key and value are one product; attention with its cache and
its rotation is one node (GroupQueryAttention); an addition to the residual stream waits until the next norm, which does
both in one node. A module without a row in EMITTERS is an error, and so is a weight that no emitter has read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lmworks.base.errors import InputError
from lmworks.export.arithmetic import Arithmetic
from lmworks.export.graph import Graph, Shape
from lmworks.models.attention import Attention
from lmworks.models.blocks import PreNormBlock
from lmworks.models.config import Config
from lmworks.models.heads import Head, Model
from lmworks.models.layers import ACTIVATIONS, MLP, GatedMLP, RMSNorm
from lmworks.models.rope import rope_table
from lmworks.models.transformer import TokenEmbeddings, Transformer

HIDDEN = -1e9  # added to the score of a key that may not be seen
LAST = 2**63 - 1  # the end of a slice that takes everything


@dataclass
class Stream:
    """The residual stream: a value, and what is still to be added to it."""

    value: str
    delta: str = ""
    bias: str = ""


class Walk:
    """One pass over a model: the graph so far, the arithmetic, and the values that all layers share."""

    def __init__(self, model: Model, arithmetic: Arithmetic) -> None:
        self.graph, self.arithmetic = Graph(), arithmetic
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.shared: dict[str, str] = {}  # what every attention reads: lengths, total, bias, cos, sin

    def emit(self, module: nn.Module, path: str, *inputs: Any) -> Any:
        """Emit one module with the emitter of exactly its class."""
        emitter = EMITTERS.get(type(module))
        if emitter is None:
            raise self.unknown(module, path)
        return emitter(self, module, path, *inputs)

    def unknown(self, module: nn.Module, path: str) -> InputError:
        """Return the error for a module that has no emitter."""
        return InputError(
            f"the ONNX exporter does not know the module {type(module).__name__}",
            where=path,
            expected="one of " + ", ".join(["Linear", *sorted(kind.__name__ for kind in EMITTERS)]),
            fix="merge or remove the changed layer before exporting",
        )

    def read(self, parameter: torch.Tensor) -> NDArray[np.float32]:
        """Return a parameter's numbers and note that it was used."""
        self.parameters.pop(id(parameter), None)
        return parameter.detach().to("cpu", torch.float32).numpy()

    def store(self, name: str, parameter: torch.Tensor | None) -> str:
        """Store a parameter as it is; None is an input left out."""
        return "" if parameter is None else self.graph.weight(name, self.read(parameter))

    def linear(self, module: nn.Linear, path: str, x: str, *, out: str = "") -> str:
        """Multiply by a Linear's weight; its bias is the caller's."""
        return self.arithmetic.linear(self.graph, x, self.matrix(module, path).T, name=path, out=out)

    def matrix(self, module: nn.Module, path: str) -> NDArray[np.float32]:
        """Return the weight of a plain Linear (O, I) or Embedding (V, D); one that is wrapped is an error."""
        if not (type(module) is nn.Linear or type(module) is nn.Embedding):
            raise self.unknown(module, path)
        return self.read(module.weight)

    def done(self) -> bytes:
        """Return the model's bytes; a parameter that nothing has read is an error."""
        if self.parameters:
            raise InputError(
                "the ONNX exporter does not know these weights", found=", ".join(sorted(self.parameters.values()))
            )
        return self.graph.to_bytes()


def emit_causal_lm(walk: Walk, model: Model) -> None:
    """Declare the inputs and outputs that transformers.js reads, then emit the network and its head."""
    config, graph = model.config, walk.graph
    check_exportable(model)
    logits = graph.output("logits", np.float32, ["batch_size", "num_logits", config.vocab_size])
    ids = graph.input("input_ids", np.int64, ["batch_size", "sequence_length"])
    mask = graph.input("attention_mask", np.int64, ["batch_size", "total_sequence_length"])
    if config.positions == "learned":
        graph.input("position_ids", np.int64, ["batch_size", "sequence_length"])
    keep = graph.input("num_logits_to_keep", np.int64, [])
    share_mask(walk, ids, mask)
    x = walk.emit(model.transformer, "transformer", ids)  # (B, T, D)
    start = graph.add("Neg", [keep], name="first_logit")
    start = graph.add("Reshape", [start, graph.constant([1])], name="first_logit.list")
    x = graph.add("Slice", [x, start, graph.constant([LAST]), graph.constant([1])], name="last_tokens")
    walk.emit(model.head, "head", x, model.transformer.embeddings.tokens.weight, logits)  # type: ignore[union-attr]


def check_exportable(model: Model) -> None:
    """Raise InputError for what the graph would leave out in silence: what is not a module or a weight."""
    c = model.config
    for what, absent in {
        "a head other than a language model's": model.kind == "CausalLM" and c.causal,
        "a sliding window": not c.local_layers,
        "heads that are rotated in part": c.rotary_dim in (None, c.head_dim),
        "positions that do not start at 0": not c.position_offset,
    }.items():
        if not absent:
            raise InputError(f"the ONNX exporter does not know {what} yet", found=f"{c.model_type} {model.kind}")


def share_mask(walk: Walk, ids: str, mask: str) -> None:
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
    walk.shared["lengths"] = add("Cast", [last], name="mask.lengths.int32", to=graph.onnx.TensorProto.INT32)
    walk.shared["total"] = add("Cast", [total], name="mask.total.int32", to=graph.onnx.TensorProto.INT32)
    seen = add("Cast", [mask], name="mask.seen", to=graph.onnx.TensorProto.FLOAT)
    hidden = add("Sub", [graph.constant(1, np.float32), seen], name="mask.hidden")
    bias = add("Mul", [hidden, graph.constant(HIDDEN, np.float32)], name="mask.bias")  # (B, S)
    bias = add("Unsqueeze", [bias, graph.constant([1, 2])], name="mask.bias.4d")  # (B, 1, 1, S)
    shape = add("Concat", [rows, graph.constant([1]), new, keys], name="mask.bias.shape", axis=0)
    walk.shared["bias"] = add("Expand", [bias, shape], name="mask.bias.expanded")  # (B, 1, T, S)


def emit_transformer(walk: Walk, transformer: Transformer, path: str, ids: str) -> str:
    """Return the normalized hidden states (B, T, D)."""
    if transformer.config.positions == "rope":
        share_rope(walk, transformer.config)
    stream = walk.emit(transformer.embeddings, "embeddings", ids)
    for i, layer in enumerate(transformer.layers):
        walk.emit(layer, f"layers.{i}", stream)
    normalized: str = walk.emit(transformer.final_norm, "final_norm", stream)
    return normalized


def emit_token_embeddings(walk: Walk, embeddings: TokenEmbeddings, path: str, ids: str) -> Stream:
    """Look up tokens, and positions where they are learned; the first norm adds the two."""
    stream = Stream(walk.arithmetic.embed(walk.graph, ids, walk.matrix(embeddings.tokens, path), name=f"{path}.tokens"))
    if embeddings.positions is not None:
        table = walk.graph.weight(f"{path}.positions.weight", walk.matrix(embeddings.positions, path))
        stream.delta = walk.graph.add("Gather", [table, "position_ids"], name=f"{path}.positions")
    return stream


def emit_pre_norm_block(walk: Walk, block: PreNormBlock, path: str, stream: Stream) -> None:
    """x + attention(norm(x)), then x + mlp(norm(x)), both added by the norm that comes next."""
    x = walk.emit(block.attention_norm, f"{path}.attention_norm", stream)
    stream.delta, stream.bias = walk.emit(block.attention, f"{path}.attention", x)
    x = walk.emit(block.mlp_norm, f"{path}.mlp_norm", stream)
    stream.delta, stream.bias = walk.emit(block.mlp, f"{path}.mlp", x)


def emit_layer_norm(walk: Walk, norm: nn.LayerNorm, path: str, stream: Stream) -> str:
    """Add what the stream still owes and normalize, in one node; without a debt, only normalize."""
    weights = [walk.store(f"{path}.weight", norm.weight), walk.store(f"{path}.bias", norm.bias)]
    if not stream.delta:
        return walk.graph.add("LayerNormalization", [stream.value, *weights], name=path, epsilon=norm.eps)
    return skip_norm(walk, "SkipLayerNormalization", path, stream, weights, norm.eps)


def emit_rms_norm(walk: Walk, norm: RMSNorm, path: str, stream: Stream) -> str:
    """Do the same for x / sqrt(mean(x^2) + eps); ONNX Runtime fuses the written-out form."""
    weight = walk.store(f"{path}.weight", norm.weight)
    if stream.delta:
        return skip_norm(walk, "SkipSimplifiedLayerNormalization", path, stream, [weight], norm.eps)
    graph, add = walk.graph, walk.graph.add
    mean = add("Pow", [stream.value, graph.constant(2, np.float32)], name=f"{path}.square")
    mean = add("ReduceMean", [mean, graph.constant([-1])], name=f"{path}.mean")
    root = add("Add", [mean, graph.constant(norm.eps, np.float32)], name=f"{path}.eps")
    root = add("Sqrt", [root], name=f"{path}.root")
    unit = add("Div", [stream.value, root], name=f"{path}.unit")
    return add("Mul", [unit, weight], name=path)


def skip_norm(walk: Walk, kind: str, path: str, stream: Stream, weights: list[str], eps: float) -> str:
    """Emit norm(value + delta + bias); the sum is the stream's new value."""
    inputs = [stream.value, stream.delta, *weights]
    inputs += [stream.bias] if stream.bias else []
    stream.value, stream.delta, stream.bias = f"{path}.sum", "", ""
    outputs = [f"{path}.out", "", "", stream.value]
    return walk.graph.add(f"com.microsoft.{kind}", inputs, name=path, outputs=outputs, epsilon=eps)


def share_rope(walk: Walk, config: Config) -> None:
    """Store the cosine and sine tables (P, E/2) that attention rotates with, from the model's own formula."""
    for name, table in zip(("cos", "sin"), rope_table(config, config.max_position_embeddings), strict=True):
        walk.shared[name] = walk.graph.weight(f"rope.{name}", table.numpy())


def emit_attention(walk: Walk, attention: Attention, path: str, x: str) -> tuple[str, str]:
    """Return attention's output (B, T, D) without its bias, and the bias."""
    graph, heads, size = walk.graph, attention.kv_heads, attention.head_dim
    multiple = 16 if "cos" in walk.shared else 8
    if size % multiple:
        raise InputError(
            "the attention operator of ONNX Runtime cannot take this head size",
            where=path,
            found=f"head_dim {size}",
            expected=f"a multiple of {multiple}",
            fix="train with another number of heads",
        )
    names = [f"{attention.layer}.{kind}" for kind in ("key", "value")]
    shape: Shape = ["batch_size", heads, "past_sequence_length", size]
    past = [graph.input(f"past_key_values.{name}", np.float32, shape) for name in names]
    shape = ["batch_size", heads, "total_sequence_length", size]
    present = [graph.output(f"present.{name}", np.float32, shape) for name in names]
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight = np.concatenate([walk.matrix(part, path) for part in parts]).T  # (D, (H + 2K) E)
    qkv = walk.arithmetic.linear(graph, x, weight, name=f"{path}.qkv_proj")
    if attention.q_proj.bias is not None:
        bias = graph.weight(f"{path}.qkv_proj.bias", np.concatenate([walk.read(part.bias) for part in parts]))
        qkv = graph.add("Add", [qkv, bias], name=f"{path}.qkv_proj.add")
    shared = walk.shared
    rope = [shared.get("cos", ""), shared.get("sin", "")]
    y = graph.add(
        "com.microsoft.GroupQueryAttention",
        [qkv, "", "", *past, shared["lengths"], shared["total"], *rope, "", shared["bias"]],
        name=path,
        outputs=[f"{path}.out", *present],
        num_heads=attention.heads,
        kv_num_heads=attention.kv_heads,
        scale=size**-0.5,
        do_rotary=int("cos" in shared),
    )
    return walk.linear(attention.o_proj, f"{path}.o_proj", y), walk.store(f"{path}.o_proj.bias", attention.o_proj.bias)


def emit_mlp(walk: Walk, mlp: MLP, path: str, x: str) -> tuple[str, str]:
    """Return down(act(up(x))) without its last bias, and the bias."""
    up = walk.linear(mlp.up_proj, f"{path}.up_proj", x)
    bias = walk.store(f"{path}.up_proj.bias", mlp.up_proj.bias)
    return emit_down(walk, mlp, path, activate(walk, mlp.act, path, up, bias))


def emit_gated_mlp(walk: Walk, mlp: GatedMLP, path: str, x: str) -> tuple[str, str]:
    """Return down(act(gate(x)) * up(x)) without its last bias, and the bias."""
    gate = walk.linear(mlp.gate_proj, f"{path}.gate_proj", x)
    up = walk.linear(mlp.up_proj, f"{path}.up_proj", x)
    bias = walk.store(f"{path}.gate_proj.bias", mlp.gate_proj.bias)
    if mlp.up_proj.bias is not None:
        up = walk.graph.add(
            "Add", [up, walk.store(f"{path}.up_proj.bias", mlp.up_proj.bias)], name=f"{path}.up_proj.add"
        )
    product = walk.graph.add("Mul", [activate(walk, mlp.act, path, gate, bias), up], name=f"{path}.product")
    return emit_down(walk, mlp, path, product)


def emit_down(walk: Walk, mlp: MLP, path: str, x: str) -> tuple[str, str]:
    """Return the last product of an MLP, and its bias."""
    down = walk.linear(mlp.down_proj, f"{path}.down_proj", x)
    return down, walk.store(f"{path}.down_proj.bias", mlp.down_proj.bias)


def activate(walk: Walk, function: Callable[..., Any], path: str, x: str, bias: str) -> str:
    """Return function(x + bias) as one node, or as two where the node takes no bias."""
    if function not in NODES:
        name = getattr(function, "__name__", type(function).__name__)
        raise InputError(f"the ONNX exporter does not know the activation {name}", where=path)
    operator, attributes, adds = NODES[function]
    if bias and not adds:
        x, bias = walk.graph.add("Add", [x, bias], name=f"{path}.bias"), ""
    return walk.graph.add(operator, [x, bias] if bias else [x], name=f"{path}.act", **attributes)


def emit_head(walk: Walk, head: Head, path: str, x: str, embedding: torch.Tensor, out: str) -> None:
    """Make the logits; a projection tied to the embedding is not stored again."""
    assert head.project is not None
    if head.project.weight is embedding:
        walk.arithmetic.tied(walk.graph, x, name=path, out=out)
    else:
        walk.linear(head.project, path, x, out=out)


# activation -> operator, its attributes, whether it takes a bias
NODES: dict[Callable[..., Any], tuple[str, dict[str, Any], bool]] = {
    ACTIVATIONS["gelu"]: ("com.microsoft.Gelu", {}, False),
    ACTIVATIONS["gelu_new"]: ("com.microsoft.FastGelu", {}, True),
    ACTIVATIONS["silu"]: ("com.microsoft.QuickGelu", {"alpha": 1.0}, False),  # x sigmoid(alpha x)
    ACTIVATIONS["relu"]: ("Relu", {}, False),
}

EMITTERS: dict[type[nn.Module], Callable[..., Any]] = {
    Transformer: emit_transformer,
    TokenEmbeddings: emit_token_embeddings,
    PreNormBlock: emit_pre_norm_block,
    nn.LayerNorm: emit_layer_norm,
    RMSNorm: emit_rms_norm,
    Attention: emit_attention,
    MLP: emit_mlp,
    GatedMLP: emit_gated_mlp,
    Head: emit_head,
}
