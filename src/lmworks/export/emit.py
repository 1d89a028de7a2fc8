"""One emitter per core class: how each module of a model becomes nodes of an ONNX graph.

Shapes: B batch, T tokens, D hidden_size.

The walk mirrors `forward`. What differs is fusion: attention is one node (emit_decoder, emit_encoder), an addition to
the residual stream waits until the next norm, which does both in one node; where parts were measured faster, both are
parts. A module without a row in EMITTERS is an error, and so is a weight that no emitter has read.
"""

from __future__ import annotations

from torch import nn

from lmworks.base.errors import InputError
from lmworks.compress.rounding import Precision
from lmworks.export.arithmetic import ARITHMETIC
from lmworks.export.emit_decoder import LAST, declare_generation, emit_causal_attention
from lmworks.export.emit_disentangled import emit_disentangled_attention, emit_neighbour_block, emit_neighbours
from lmworks.export.emit_encoder import check_attends, declare_whole, emit_encoder_attention, emit_patch_embeddings
from lmworks.export.emit_head import declare_outputs, emit_head, finish
from lmworks.export.emit_recurrent import declare_states, emit_feed_forward, emit_recurrent
from lmworks.export.graph import Graph
from lmworks.export.traced import Own
from lmworks.export.walk import Emitters, Stream, Walk
from lmworks.models.attention import Attention
from lmworks.models.blocks import NeighbourBlock, ParallelBlock, PostNormBlock, PreNormBlock
from lmworks.models.disentangled import DisentangledAttention, Neighbours
from lmworks.models.feedforward import FeedForward
from lmworks.models.heads import Head, Model
from lmworks.models.layers import MLP, GatedMLP, RMSNorm
from lmworks.models.recurrent import Recurrent, Sequential
from lmworks.models.transformer import PatchEmbeddings, TokenEmbeddings, Transformer


def make_graph(
    model: Model, *, dtype: str = "fp32", precision: Precision | None = None, attentions: bool = False,
    own: Own | None = None,
) -> Graph:  # fmt: skip
    """Return the graph of a model with its head, with the inputs and outputs that transformers.js reads.

    A model that writes text goes on from a cache: past_key_values and present. All others read whole sequences.
    `precision` is what calibration found for this dtype. `attentions` adds attentions.0 (B, H, T, T) and so on, one
    for each layer of an encoder. `own` are the model's layers of a user's own, read before. Raises InputError for what
    the exporter does not know.
    """
    arithmetic, half = ARITHMETIC[dtype]
    chosen = arithmetic()
    chosen.precision = precision or chosen.precision
    walk = Walk(model, chosen, EMITTERS, own or (Own(model) if model.parts else None))
    if attentions:
        check_attends(model)
    walk.attends = attentions
    walk.sums_in_norms = half
    outputs = declare_outputs(walk)
    if isinstance(model.transformer, Sequential):
        if half or not walk.writes:
            raise InputError(
                f"a graph of {model.config.model_type} cannot be had so", found=dtype if half else model.kind,
                expected="fp32, int8 or q4 of the language model: ONNX Runtime's cells compute in float32",
            )  # fmt: skip
        source = declare_states(walk)
    else:
        source = declare_generation(walk) if walk.writes else declare_whole(walk)
    x = walk.emit(model.transformer, "transformer", source)  # (B, T, D)
    if walk.writes:
        graph = walk.graph
        start = graph.add("Neg", ["num_logits_to_keep"], name="first_logit")
        start = graph.add("Reshape", [start, graph.constant([1])], name="first_logit.list")
        x = graph.add("Slice", [x, start, graph.constant([LAST]), graph.constant([1])], name="last_tokens")
    finish(walk, x, outputs)
    graph = walk.done()
    if half:
        graph.halve()
    return graph


def emit_transformer(walk: Walk, transformer: Transformer, path: str, source: str) -> str:
    """Return the hidden states (B, T, D), normalized where there is a final norm."""
    stream = walk.emit(transformer.embeddings, "embeddings", source)
    runs = [0] * len(transformer.layers)
    for i in transformer.order:
        again = f".again{runs[i]}" if runs[i] else ""
        walk.emit(transformer.layers[i], f"layers.{i}{again}", stream)
        runs[i] += 1
    normalized: str = walk.emit(transformer.final_norm, "final_norm", stream)
    return normalized


def emit_token_embeddings(walk: Walk, embeddings: TokenEmbeddings, path: str, ids: str) -> Stream:
    """Look up tokens, positions and segments; a norm here, or the first of the layers, adds them."""
    graph, tokens = walk.graph, walk.matrix(embeddings.tokens, path)
    stream = Stream(walk.arithmetic.embed(graph, ids, tokens, name=f"{path}.tokens", tied=walk.tied))
    only = None  # the one segment of every token
    if embeddings.types is not None:
        types = walk.matrix(embeddings.types, path)  # (segments, D)
        if "types" in walk.shared:
            table = graph.weight(f"{path}.types.weight", types)
            stream.delta = graph.add("Gather", [table, walk.shared["types"]], name=f"{path}.types")
        else:
            only = types[0]
    if embeddings.positions is not None:
        places = walk.matrix(embeddings.positions, path)[embeddings.offset :]
        table = graph.weight(f"{path}.positions.weight", places if only is None else places + only)
        found = graph.add("Gather", [table, walk.shared["positions"]], name=f"{path}.positions")
        if stream.delta:
            found = graph.add("Add", [found, stream.delta], name=f"{path}.positions.types")
        stream.delta = found
    elif only is not None:
        stream.bias = graph.weight(f"{path}.types.weight", only)
    if embeddings.norm is not None:
        stream = Stream(walk.emit(embeddings.norm, f"{path}.norm", stream))
    if embeddings.project is not None:
        value = walk.settle(stream, f"{path}.project")
        stream = Stream(walk.affine(embeddings.project, f"{path}.project", value))
    return stream


def emit_pre_norm_block(walk: Walk, block: PreNormBlock, path: str, stream: Stream) -> None:
    """x + attention(norm(x)), then x + mlp(norm(x)), both added by the norm that comes next."""
    x = walk.emit(block.attention_norm, f"{path}.attention_norm", stream)
    stream.delta, stream.bias = walk.emit(block.attention, f"{path}.attention", x, block.local)
    x = walk.emit(block.mlp_norm, f"{path}.mlp_norm", stream)
    stream.delta, stream.bias = walk.emit(block.mlp, f"{path}.mlp", x)


def emit_post_norm_block(walk: Walk, block: PostNormBlock, path: str, stream: Stream) -> None:
    """norm(x + attention(x)), then norm(x + mlp(x)): a norm's answer is the stream."""
    stream.delta, stream.bias = walk.emit(block.attention, f"{path}.attention", stream.value, block.local)
    stream.value = walk.emit(block.attention_norm, f"{path}.attention_norm", stream)
    stream.delta, stream.bias = walk.emit(block.mlp, f"{path}.mlp", stream.value)
    stream.value = walk.emit(block.mlp_norm, f"{path}.mlp_norm", stream)


def emit_parallel_block(walk: Walk, block: ParallelBlock, path: str, stream: Stream) -> None:
    """x + attention(norm(x)) + mlp(norm(x)); the two biases are one."""
    x = walk.emit(block.attention_norm, f"{path}.attention_norm", stream)
    a, a_bias = walk.emit(block.attention, f"{path}.attention", x, block.local)
    b, b_bias = walk.emit(block.mlp, f"{path}.mlp", x)
    stream.delta = walk.graph.add("Add", [a, b], name=f"{path}.sum")
    stream.bias = a_bias or b_bias
    if a_bias and b_bias:
        weights = walk.graph.weights
        stream.bias = walk.graph.weight(f"{path}.bias", weights.pop(a_bias) + weights.pop(b_bias))


def emit_no_norm(walk: Walk, norm: nn.Identity, path: str, stream: Stream) -> str:
    """Add what the stream still owes."""
    return walk.settle(stream, path)


def emit_layer_norm(walk: Walk, norm: nn.LayerNorm, path: str, stream: Stream) -> str:
    """Add what the stream still owes, and normalize: in one node where a GPU reads the graph.

    On processors that node takes three to four times as long as its parts, SkipSimplifiedLayerNormalization does not.
    """
    weights = [walk.store(f"{path}.weight", norm.weight)]
    weights += [walk.store(f"{path}.bias", norm.bias)] if norm.bias is not None else []
    if not (stream.delta and walk.sums_in_norms):
        walk.settle(stream, path)
        return walk.graph.add("LayerNormalization", [stream.value, *weights], name=path, epsilon=norm.eps)
    return skip_norm(walk, "SkipLayerNormalization", path, stream, [*weights, ""][:2], norm.eps)


def emit_rms_norm(walk: Walk, norm: RMSNorm, path: str, stream: Stream) -> str:
    """Do the same for x / sqrt(mean(x^2) + eps), always in one node; ONNX Runtime fuses the written-out form."""
    weight = walk.store(f"{path}.weight", norm.weight)
    if stream.bias and not stream.delta:
        walk.settle(stream, path)
    if stream.delta:
        return skip_norm(walk, "SkipSimplifiedLayerNormalization", path, stream, [weight], norm.eps)
    graph, add = walk.graph, walk.graph.add
    mean = add("Pow", [stream.value, graph.number(2)], name=f"{path}.square")
    mean = add("ReduceMean", [mean, graph.constant([-1])], name=f"{path}.mean")
    root = add("Add", [mean, graph.number(norm.eps)], name=f"{path}.eps")
    root = add("Sqrt", [root], name=f"{path}.root")
    unit = add("Div", [stream.value, root], name=f"{path}.unit")
    return add("Mul", [unit, weight], name=path)


def skip_norm(walk: Walk, kind: str, path: str, stream: Stream, weights: list[str], eps: float) -> str:
    """Emit norm(value + delta + bias); the sum is the stream's new value."""
    inputs = [stream.value, stream.delta, *weights, stream.bias]
    while not inputs[-1]:
        inputs.pop()
    stream.value, stream.delta, stream.bias = f"{path}.sum", "", ""
    outputs = [f"{path}.out", "", "", stream.value]
    return walk.graph.add(f"com.microsoft.{kind}", inputs, name=path, outputs=outputs, epsilon=eps)


def emit_attention(walk: Walk, attention: Attention, path: str, x: str, local: bool) -> tuple[str, str]:
    """Return attention's output (B, T, D) without its bias, and the bias."""
    emit = emit_causal_attention if walk.config.causal else emit_encoder_attention
    y = emit(walk, attention, path, x, local)
    return walk.linear(attention.o_proj, f"{path}.o_proj", y), walk.store(f"{path}.o_proj.bias", attention.o_proj.bias)


def emit_mlp(walk: Walk, mlp: MLP, path: str, x: str) -> tuple[str, str]:
    """Return down(act(up(x))) without its last bias, and the bias."""
    up = walk.linear(mlp.up_proj, f"{path}.up_proj", x)
    bias = walk.store(f"{path}.up_proj.bias", mlp.up_proj.bias)
    return emit_down(walk, mlp, path, walk.activate(mlp.act, path, up, bias))


def emit_gated_mlp(walk: Walk, mlp: GatedMLP, path: str, x: str) -> tuple[str, str]:
    """Return down(act(gate(x)) * up(x)) without its last bias, and the bias."""
    gate = walk.linear(mlp.gate_proj, f"{path}.gate_proj", x)
    up = walk.affine(mlp.up_proj, f"{path}.up_proj", x)
    bias = walk.store(f"{path}.gate_proj.bias", mlp.gate_proj.bias)
    product = walk.graph.add("Mul", [walk.activate(mlp.act, path, gate, bias), up], name=f"{path}.product")
    return emit_down(walk, mlp, path, product)


def emit_down(walk: Walk, mlp: MLP, path: str, x: str) -> tuple[str, str]:
    """Return the last product of an MLP, and its bias."""
    down = walk.linear(mlp.down_proj, f"{path}.down_proj", x)
    return down, walk.store(f"{path}.down_proj.bias", mlp.down_proj.bias)


EMITTERS: Emitters = {
    Transformer: emit_transformer,
    Recurrent: emit_recurrent,
    FeedForward: emit_feed_forward,
    TokenEmbeddings: emit_token_embeddings,
    PatchEmbeddings: emit_patch_embeddings,
    PreNormBlock: emit_pre_norm_block,
    NeighbourBlock: emit_neighbour_block,
    Neighbours: emit_neighbours,
    PostNormBlock: emit_post_norm_block,
    ParallelBlock: emit_parallel_block,
    nn.Identity: emit_no_norm,
    nn.LayerNorm: emit_layer_norm,
    RMSNorm: emit_rms_norm,
    Attention: emit_attention,
    DisentangledAttention: emit_disentangled_attention,
    MLP: emit_mlp,
    GatedMLP: emit_gated_mlp,
    Head: emit_head,
}
